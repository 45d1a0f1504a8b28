// A fragment's rows to the caller's tensor, in its element type. Bytes from head_dim to the row's stride are never written.
#pragma once
#include "tile/elements.cuh"

DEVICE u32 pack_pair(F16, float a, float b) {
    return pack_f16(a, b);
}
DEVICE u32 pack_pair(Bf16, float a, float b) {
    return pack_bf16(a, b);
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
    const int first = column + 8 * (lane % 4);
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

/// f32: a quad's eight columns are 32 bytes as they are.
DEVICE void store_32_columns(F32, u8* row, const float (&x)[8], int column, int head_dim, int lane) {
    if (!row) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int first = column + 8 * i + 2 * (lane % 4);
        float* const to = reinterpret_cast<float*>(row) + first;
        if (first + 2 <= head_dim) {
            store_8_bytes(to, __float_as_uint(x[2 * i]), __float_as_uint(x[2 * i + 1]));
        } else if (first < head_dim) {
            *to = x[2 * i];
        }
    }
}
