// The caller's tensors, eight elements at a time: f16, bf16 or f32 in memory, f32 in registers.
#pragma once
#include "ptx/math.cuh"
#include "ptx/memory.cuh"

struct F16 {
    static constexpr int bytes = 2;
};
struct Bf16 {
    static constexpr int bytes = 2;
};
struct F32 {
    static constexpr int bytes = 4;
};

/// Elements that one thread loads together: 16 bytes of a 16-bit type.
constexpr int OCTET = 8;

DEVICE float load_element(F16, const void* from) {
    float low, high;
    unpack_f16(*static_cast<const u16*>(from), low, high);
    return low;
}
DEVICE float load_element(Bf16, const void* from) {
    return __uint_as_float(static_cast<u32>(*static_cast<const u16*>(from)) << 16);
}
DEVICE float load_element(F32, const void* from) {
    return *static_cast<const float*>(from);
}

DEVICE void load_full_octet(F16, float (&x)[OCTET], const u8* from) {
    u32 word[4];
    load_16_bytes(word, from);
#pragma unroll
    for (int i = 0; i < 4; ++i) unpack_f16(word[i], x[2 * i], x[2 * i + 1]);
}
DEVICE void load_full_octet(Bf16, float (&x)[OCTET], const u8* from) {
    u32 word[4];
    load_16_bytes(word, from);
#pragma unroll
    for (int i = 0; i < 4; ++i) unpack_bf16(word[i], x[2 * i], x[2 * i + 1]);
}
DEVICE void load_full_octet(F32, float (&x)[OCTET], const u8* from) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        u32 word[4];
        load_16_bytes(word, from + 16 * half);
#pragma unroll
        for (int i = 0; i < 4; ++i) x[4 * half + i] = __uint_as_float(word[i]);
    }
}

/// Channels [8 * octet, 8 * octet + 8) of the row at `row`; zeros from channel `head_dim` on, which are not read.
template <class T>
DEVICE void load_octet(float (&x)[OCTET], const u8* row, int octet, int head_dim) {
    const int channel = octet * OCTET;
    if (channel + OCTET <= head_dim) {
        load_full_octet(T{}, x, row + channel * T::bytes);
        return;
    }
#pragma unroll
    for (int i = 0; i < OCTET; ++i) x[i] = channel + i < head_dim ? load_element(T{}, row + (channel + i) * T::bytes) : 0.f;
}

/// Address of a row of a strided tensor.
template <class T>
DEVICE const u8* row_address(const void* base, const i64 (&stride)[3], i64 batch, i64 head, i64 row) {
    return static_cast<const u8*>(base) + (batch * stride[0] + head * stride[1] + row * stride[2]) * T::bytes;
}
