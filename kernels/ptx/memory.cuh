// Loads and stores that must be one instruction of a known width or state space.
#pragma once
#include "ptx/types.cuh"

/// 32-bit address of a shared-memory object, as every shared-space instruction takes it. PTX ISA 9.7.9.23, cvta.
DEVICE u32 shared_address(const void* object) {
    u32 address;
    asm("{ .reg .u64 wide; cvta.to.shared.u64 wide, %1; cvt.u32.u64 %0, wide; }" : "=r"(address) : "l"(object));
    return address;
}

/// 16 bytes of data that no thread writes while the kernel runs, or zeros. Predicated instead of branched, so that several loads are in flight.
/// PTX ISA 9.7.9.9, ld.global.nc.
DEVICE void load_16_bytes_if(u32 (&word)[4], const void* from, bool wanted) {
    asm volatile("{ .reg .pred wanted; setp.ne.u32 wanted, %5, 0;\n"
                 "mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;\n"
                 "@wanted ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4]; }"
                 : "=&r"(word[0]), "=&r"(word[1]), "=&r"(word[2]), "=&r"(word[3])
                 : "l"(from), "r"(static_cast<u32>(wanted)));
}

/// Data that no thread writes while the kernel runs. PTX ISA 9.7.9.9, ld.global.nc.
DEVICE void load_floats(float (&value)[4], const float* from) {
    asm volatile("ld.global.nc.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(value[0]), "=f"(value[1]), "=f"(value[2]), "=f"(value[3]) : "l"(from));
}
DEVICE void load_floats(float (&value)[2], const float* from) {
    asm volatile("ld.global.nc.v2.f32 {%0, %1}, [%2];" : "=f"(value[0]), "=f"(value[1]) : "l"(from));
}

/// Brings the line of an address to L2. PTX ISA 9.7.9.16, prefetch.
DEVICE void prefetch_to_l2(const void* address) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

/// PTX ISA 9.7.9.12, st.
DEVICE void store_16_bytes(void* to, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

/// PTX ISA 9.7.9.12, st.
DEVICE void store_4_bytes(void* to, u32 a) {
    asm volatile("st.global.u32 [%0], %1;" ::"l"(to), "r"(a) : "memory");
}

/// PTX ISA 9.7.9.12, st.
DEVICE void store_8_bytes(void* to, u32 a, u32 b) {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(a), "r"(b) : "memory");
}

/// PTX ISA 9.7.9.12, st.
DEVICE void store_shared_8_bytes(u32 to, u32 a, u32 b) {
    asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(to), "r"(a), "r"(b) : "memory");
}

/// PTX ISA 9.7.9.12, st.
DEVICE void store_shared_16_bytes(u32 to, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

/// PTX ISA 9.7.9.8, ld.
DEVICE void load_shared_16_bytes(u32 (&word)[4], u32 from) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
                 : "r"(from)
                 : "memory");
}

/// Four 8 x 8 matrices of 16-bit elements, whose rows of 16 bytes lie where lanes 0 to 7, 8 to 15, .. say; each lane gets elements 2 (lane % 4) and
/// the next of row lane / 4. PTX ISA 9.7.14.5.15, ldmatrix.
DEVICE void load_matrices(u32 (&word)[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
                 : "r"(row)
                 : "memory");
}

/// PTX ISA 9.7.9.8, ld.
DEVICE void load_shared_floats(float (&value)[4], u32 from) {
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(value[0]), "=f"(value[1]), "=f"(value[2]), "=f"(value[3])
                 : "r"(from)
                 : "memory");
}

/// PTX ISA 9.7.9.8, ld.
DEVICE float load_shared_float(u32 from) {
    float value;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(from) : "memory");
    return value;
}

/// Largest of the values stored at a shared word so far; a maximum does not depend on the order of arrival. PTX ISA 9.7.13.6, red.
DEVICE void shared_max(u32 at, u32 value) {
    asm volatile("red.shared.max.u32 [%0], %1;" ::"r"(at), "r"(value) : "memory");
}

/// Adds one, or wraps to 0 after `limit`; returns the value before. PTX ISA 9.7.13.5, atom.inc.
DEVICE u32 atomic_increment(u32* counter, u32 limit) {
    u32 before;
    asm volatile("atom.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(limit) : "memory");
    return before;
}
