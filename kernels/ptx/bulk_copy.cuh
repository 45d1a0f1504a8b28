// The copy engine, for ranges that are contiguous on both sides. PTX ISA 9.7.9.25.
#pragma once
#include "ptx/types.cuh"

/// Copies `bytes` (a multiple of 16, both addresses 16-byte aligned) and reports them to `barrier`.
/// PTX ISA 9.7.9.25.4.1, cp.async.bulk.
DEVICE void bulk_copy_to_shared(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}
