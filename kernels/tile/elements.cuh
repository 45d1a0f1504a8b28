// The caller's tensors, eight elements at a time: f16, bf16 or f32 in memory, f32 in registers.
// Constant: CUT_OCTET 1 where head_dim is no multiple of 8, so that its last octet is loaded and stored element by element.
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

/// Words of an octet in memory.
template <class T>
constexpr int OCTET_WORDS = OCTET * T::bytes / 4;

/// Eight neighbours of one row as they are in memory.
template <class T>
struct RawOctet {
    u32 word[OCTET_WORDS<T> / 4][4];
};

/// Channels [8 * octet, 8 * octet + 8) of the row at `row`, if `wanted`; zeros from channel `head_dim` on, which are not read.
/// Raw, so that a thread can have many in flight before it needs the first.
template <class T>
DEVICE RawOctet<T> load_octet(const u8* row, int octet, int head_dim, bool wanted) {
    RawOctet<T> raw;
    const int channel = octet * OCTET;
    const u8* const from = row + channel * T::bytes;
#pragma unroll
    for (int part = 0; part < OCTET_WORDS<T> / 4; ++part) load_16_bytes_if(raw.word[part], from + 16 * part, wanted && channel + OCTET <= head_dim);
    // The octet that head_dim cuts, element by element: what follows it may be another tensor, or nothing.
    if constexpr (!CUT_OCTET) return raw;
    if (wanted && channel < head_dim && head_dim < channel + OCTET) {
#pragma unroll
        for (int i = 0; i < OCTET - 1; ++i) {
            if (channel + i >= head_dim) continue;
            u32& word = raw.word[i * T::bytes / 16][i * T::bytes / 4 % 4];
            if constexpr (T::bytes == 4) {
                word = reinterpret_cast<const u32*>(from)[i];
            } else {
                word |= static_cast<u32>(reinterpret_cast<const u16*>(from)[i]) << 16 * (i % 2);
            }
        }
    }
    return raw;
}

DEVICE void widen(float (&x)[OCTET], const RawOctet<F16>& raw) {
#pragma unroll
    for (int i = 0; i < 4; ++i) unpack_f16(raw.word[0][i], x[2 * i], x[2 * i + 1]);
}
DEVICE void widen(float (&x)[OCTET], const RawOctet<Bf16>& raw) {
#pragma unroll
    for (int i = 0; i < 4; ++i) unpack_bf16(raw.word[0][i], x[2 * i], x[2 * i + 1]);
}
DEVICE void widen(float (&x)[OCTET], const RawOctet<F32>& raw) {
#pragma unroll
    for (int i = 0; i < OCTET; ++i) x[i] = __uint_as_float(raw.word[i / 4][i % 4]);
}

/// The larger of two magnitudes, in the element type's own bits, `largest` being one already: magnitudes are ordered as their bits are.
template <class T>
DEVICE u32 larger_magnitudes(T, u32 largest, u32 word) {
    return max_u16x2(largest, word & 0x7fff7fffu);
}
DEVICE u32 larger_magnitudes(F32, u32 largest, u32 word) {
    return max(largest, word & 0x7fffffffu);
}

/// Address of a row of a strided tensor.
template <class T>
DEVICE const u8* row_address(const void* base, const i64 (&stride)[3], i64 batch, i64 head, i64 row) {
    return static_cast<const u8*>(base) + (batch * stride[0] + head * stride[1] + row * stride[2]) * T::bytes;
}
