// Q as INT8, quantized by the warps that multiply it. SageAttention2 (2411.10958), section 3.1 and equation 8 (PerThread).
#pragma once
#include "attn/scales.cuh"
#include "attn/softmax.cuh"
#include "tile/elements.cuh"
#include "tile/swizzle.cuh"

/// Encodes a warp's 16 rows into rows [16 warp, 16 warp + 16) of the 64-row operand tile at `slab`, and returns the scale of this lane's group.
/// Rows r and r + 8 share a scale: exactly the two rows that lane / 4 = r owns in the fragment of S. `rows[h]` is row lane / 4 + 8 h, null past the
/// last query. The four lanes of a quad take every fourth octet of both rows. With more than `registers` words a lane reads its octets again.
template <class T, int width, int registers>
DEVICE float quantize_q_rows(u32 slab, int warp, int lane, const u8* const (&rows)[2], int head_dim, float sign) {
    constexpr int octets = width / OCTET / 4;
    constexpr bool keeps = 2 * octets * OCTET_WORDS<T> <= registers;
    const auto load = [&](int h, int i) { return load_octet<T>(rows[h], lane % 4 + 4 * i, head_dim, rows[h] != nullptr); };
    RawOctet<T> raw[2][octets];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int i = 0; keeps && i < octets; ++i) raw[h][i] = load(h, i);
    }
    // Magnitudes are ordered as their bits are: no conversion before the end.
    RawOctet<T> largest = {};
#pragma unroll(keeps ? octets : 1)
    for (int i = 0; i < octets; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const RawOctet<T> octet = keeps ? raw[h][i] : load(h, i);
#pragma unroll
            for (int w = 0; w < OCTET_WORDS<T>; ++w) largest.word[w / 4][w % 4] = larger_magnitudes(T{}, largest.word[w / 4][w % 4], octet.word[w / 4][w % 4]);
        }
    }
    float x[OCTET];
    widen(x, largest);
    float amax = x[0];
#pragma unroll
    for (int e = 1; e < OCTET; ++e) amax = fmaxf(amax, x[e]);
    const Scale scale = scale_from_amax(quad_max(amax), LARGEST_S8);
    const u32 to = slab + swizzled<64, width>(16 * warp + lane / 4, lane % 4 * OCTET);
#pragma unroll(keeps ? octets : 1)
    for (int i = 0; i < octets; ++i) {
        // Within a panel the swizzle of 32 bytes further is an XOR of its own; the row eight further has the same.
        constexpr int panel = PANEL_WIDTH<width>;
        const u32 at = (to ^ 4 * OCTET * i % panel) + 4 * OCTET * i / panel * (64 * panel);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            u32 word[2];
            widen(x, keeps ? raw[h][i] : load(h, i));
            encode_s8(word, x, sign * scale.inverse);
            store_shared_8_bytes(at + h * 8 * panel, word[0], word[1]);
        }
    }
    return scale.value;
}
