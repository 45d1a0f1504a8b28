// Shared-memory barriers that count arrivals and bytes. PTX ISA 9.7.13.15.
#pragma once
#include "ptx/types.cuh"

/// PTX ISA 9.7.13.15.9, mbarrier.init.
DEVICE void mbarrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

/// Makes initialised barriers visible to the copy engine. PTX ISA 9.7.13.4, fence.mbarrier_init.
DEVICE void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

/// PTX ISA 9.7.13.15.13, mbarrier.arrive.
DEVICE void mbarrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/// The same of the threads where `arrives`, without a branch.
DEVICE void mbarrier_arrive_if(bool arrives, u32 barrier) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %0, 0; @p mbarrier.arrive.shared::cta.b64 _, [%1]; }" ::"r"(static_cast<u32>(arrives)), "r"(barrier) : "memory");
}

/// Makes the current phase wait for `bytes` more bytes of copies. PTX ISA 9.7.13.15.11, mbarrier.expect_tx.
DEVICE void mbarrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

/// How long the hardware may suspend a waiting thread, in nanoseconds: long, since it is woken when the phase ends. Its own limit is so short that a
/// waiting producer takes a tenth of the issue slots.
constexpr u32 SUSPEND_NS = 1000000;

/// True once the phase of that parity has ended; the hardware suspends the thread for a while first.
/// PTX ISA 9.7.13.15.16, mbarrier.try_wait.
DEVICE bool mbarrier_try_wait(u32 barrier, u32 parity) {
    u32 done;
    asm volatile("{ .reg .pred ended;\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2, %3;\n"
                 "selp.u32 %0, 1, 0, ended; }"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity), "r"(SUSPEND_NS)
                 : "memory");
    return done != 0;
}

/// Whether the phase of that parity has ended. PTX ISA 9.7.13.15.16, mbarrier.test_wait.
DEVICE bool mbarrier_test(u32 barrier, u32 parity) {
    u32 done;
    asm volatile("{ .reg .pred ended;\n"
                 "mbarrier.test_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, ended; }"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return done != 0;
}

DEVICE void mbarrier_wait(u32 barrier, u32 parity) {
    while (!mbarrier_try_wait(barrier, parity)) {
    }
}
