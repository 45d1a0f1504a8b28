// Copies from global to shared memory that a thread starts and does not wait for. PTX ISA 9.7.9.25.3.
#pragma once
#include "ptx/types.cuh"

/// 16 bytes of shared memory: `bytes` (0 to 16) from `from`, which is 16-byte aligned, then zeros. Only those bytes are read.
/// PTX ISA 9.7.9.25.3.1, cp.async.
DEVICE void copy_16_bytes_async(u32 to, const void* from, u32 bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

/// Arrives at `barrier`, which expects every thread, once this thread's copies so far have landed. PTX ISA 9.7.13.15.17, cp.async.mbarrier.arrive.
DEVICE void arrive_when_copied(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
