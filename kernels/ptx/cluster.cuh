// Blocks of one cluster: their ranks, their barrier, and stores into each other's shared memory.
#pragma once
#include "ptx/types.cuh"

/// PTX ISA 10.17, %cluster_ctarank.
DEVICE u32 cluster_rank() {
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

/// Counts as arrived at the cluster's barrier. Orders nothing by itself: a release would wait for all of the thread's stores to global memory.
/// PTX ISA 9.7.13.3, barrier.cluster.
DEVICE void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

/// Waits until all threads of the cluster have arrived. PTX ISA 9.7.13.3, barrier.cluster.
DEVICE void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/// Where block `rank` of the cluster has what this block has at `address`. PTX ISA 9.7.9.24, mapa.
DEVICE u32 shared_address_of(u32 rank, u32 address) {
    u32 mapped;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
    return mapped;
}

/// Stores into the shared memory of a block of the cluster and reports the four bytes to a barrier there: who waits for it sees them.
/// PTX ISA 9.7.9.13, st.async.
DEVICE void store_to_block(u32 to, float value, u32 barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to), "r"(__float_as_uint(value)), "r"(barrier)
                 : "memory");
}
