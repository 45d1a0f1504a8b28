// A fragment's rows to the caller's tensor, in its element type. Bytes from head_dim to the row's stride are never written.
#pragma once
#include "tile/elements.cuh"

DEVICE u32 pack_pair(F16, float a, float b) {
    return pack_f16(a, b);
}
DEVICE u32 pack_pair(Bf16, float a, float b) {
    return pack_bf16(a, b);
}
DEVICE u32 pack_finite_pair(F16, float a, float b) {
    return pack_finite_f16(a, b);
}
DEVICE u32 pack_finite_pair(Bf16, float a, float b) {
    return pack_finite_bf16(a, b);
}

/// Eight neighbours of one row, from channel `first`, packed. `row` is null where there is none.
template <class T>
DEVICE void store_octet(T, u8* row, const u32 (&word)[4], int first, int head_dim) {
    if (!row || first >= head_dim) return;
    if (!CUT_OCTET || first + OCTET <= head_dim) {
        store_16_bytes(row + first * T::bytes, word[0], word[1], word[2], word[3]);
    } else {
#pragma unroll
        for (int i = 0; i < OCTET - 1; ++i) {
            if (first + i < head_dim) reinterpret_cast<u16*>(row)[first + i] = static_cast<u16>(word[i / 2] >> 16 * (i % 2));
        }
    }
}

/// The same of numbers of which those that the type has no finite number for become its largest.
template <class T>
DEVICE void store_finite_octet(T type, u8* row, const float (&x)[OCTET], int first, int head_dim) {
    u32 word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) word[i] = pack_finite_pair(type, x[2 * i], x[2 * i + 1]);
    store_octet(type, row, word, first, head_dim);
}
DEVICE void store_finite_octet(F32, u8* row, const float (&x)[OCTET], int first, int head_dim) {
    if (!row) return;
    float* const to = reinterpret_cast<float*>(row) + first;
    u32 word[OCTET];
#pragma unroll
    for (int i = 0; i < OCTET; ++i) word[i] = __float_as_uint(limit_to_finite(x[i]));
    if (first + OCTET <= head_dim) {
        store_16_bytes(to, word[0], word[1], word[2], word[3]);
        store_16_bytes(to + 4, word[4], word[5], word[6], word[7]);
    } else {
#pragma unroll
        for (int i = 0; i < OCTET - 1; ++i) {
            if (first + i < head_dim) to[i] = __uint_as_float(word[i]);
        }
    }
}

/// After it, word i of lane c of each quad is what word c of lane i was.
DEVICE void transpose_in_quad(u32 (&word)[4], int lane) {
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
        const bool upper = lane & bit;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i & bit) continue;
            const u32 received = __shfl_xor_sync(~0u, upper ? word[i] : word[i | bit], bit);
            if (upper) {
                word[i] = received;
            } else {
                word[i | bit] = received;
            }
        }
    }
}

/// 32 columns from `column` of one row, of which this lane has `x[2 i]`, `x[2 i + 1]` at column + 8 i + 2 (lane % 4): 16-bit types first swap
/// within the quad, so that each lane stores eight neighbours at once. `row` is null past the last query; all lanes must call.
template <class T>
DEVICE void store_32_columns(T type, u8* row, const float (&x)[8], int column, int head_dim, int lane) {
    u32 word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) word[i] = pack_pair(type, x[2 * i], x[2 * i + 1]);
    transpose_in_quad(word, lane);
    store_octet(type, row, word, column + 8 * (lane % 4), head_dim);
}
