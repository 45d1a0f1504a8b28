// Barriers among threads, warps and launches.
#pragma once
#include "ptx/types.cuh"

/// Waits for `threads` threads at named barrier `id`, itself included. PTX ISA 9.7.13.1, bar.sync.
template <int threads>
DEVICE void named_barrier_wait(u32 id) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(threads) : "memory");
}

/// Counts as arrived at named barrier `id` without waiting. PTX ISA 9.7.13.1, bar.arrive.
template <int threads>
DEVICE void named_barrier_arrive(u32 id) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "n"(threads) : "memory");
}

/// Makes this thread's ordinary shared-memory writes visible to the tensor core and the copy engine. PTX ISA 9.7.13.4, fence.proxy.
DEVICE void fence_async_proxy() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/// Gives registers back to the pool. PTX ISA 9.7.19.5, setmaxnreg.
template <int registers>
DEVICE void release_registers_down_to() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

/// Takes registers from the pool. PTX ISA 9.7.19.5, setmaxnreg.
template <int registers>
DEVICE void take_registers_up_to() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

/// Waits until the launch before this one has ended and its writes are visible. Nothing without the launch attribute.
/// PTX ISA 9.7.13.13, griddepcontrol.wait.
DEVICE void wait_for_previous_launch() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

/// Lets the next launch start its prologue. PTX ISA 9.7.13.13, griddepcontrol.launch_dependents.
DEVICE void allow_next_launch() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

/// This thread's lane, read where it is asked for: nothing that follows from it is computed ahead of a branch. PTX ISA 10.3, %laneid.
DEVICE int lane_here() {
    int lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    return lane;
}

/// PTX ISA 9.7.13.8, vote.sync.
DEVICE bool any_lane(bool predicate) {
    return __any_sync(~0u, predicate);
}

/// Largest value of the warp. PTX ISA 9.7.13.10, redux.sync.
DEVICE u32 warp_max(u32 value) {
    u32 largest;
    asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(largest) : "r"(value));
    return largest;
}

/// True in one lane of a warp that has all of its lanes here. PTX ISA 9.7.13.14, elect.sync.
DEVICE bool elect_one() {
    u32 elected;
    asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(elected));
    return elected != 0;
}
