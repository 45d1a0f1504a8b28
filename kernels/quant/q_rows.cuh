// Q as INT8, quantized by the warps that multiply it. SageAttention2 (2411.10958), section 3.1 and equation 8 (PerThread).
#pragma once
#include "attn/scales.cuh"
#include "attn/softmax.cuh"
#include "tile/elements.cuh"
#include "tile/swizzle.cuh"

/// Encodes a warp's 16 rows into rows [16 warp, 16 warp + 16) of the 64-row operand tile at `slab`, and returns the scale of this lane's group.
/// Rows r and r + 8 share a scale: exactly the two rows that lane / 4 = r owns in the fragment of S. `rows[h]` is row lane / 4 + 8 h, null past the
/// last query. The four lanes of a quad take every fourth octet of both rows.
template <class T, int width>
DEVICE float quantize_q_rows(u32 slab, int warp, int lane, const u8* const (&rows)[2], int head_dim, float sign) {
    constexpr int octets = width / OCTET / 4;
    RawOctet<T> raw[2][octets];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int i = 0; i < octets; ++i) raw[h][i] = load_octet<T>(rows[h], lane % 4 + 4 * i, head_dim, rows[h] != nullptr);
    }
    float x[OCTET];
    float amax = 0.f;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int i = 0; i < octets; ++i) {
            widen(x, raw[h][i]);
#pragma unroll
            for (const float element : x) amax = fmaxf(amax, fabsf(element));
        }
    }
    const Scale scale = scale_from_amax(quad_max(amax), LARGEST_S8);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int i = 0; i < octets; ++i) {
            u32 word[2];
            widen(x, raw[h][i]);
            encode_s8(word, x, sign * scale.inverse);
            const int row = 16 * warp + lane / 4 + 8 * h;
            store_shared_8_bytes(slab + swizzled<64, width>(row, (lane % 4 + 4 * i) * OCTET), word[0], word[1]);
        }
    }
    return scale.value;
}
