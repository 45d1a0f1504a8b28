// What rounding to e4m3 takes from V, summed over a tile's keys: O adds its mean back (docs/numerics.md).
//
// In f16: a difference of neighbours is exact there, and what is lost of v / scale before it (11 bits) is far below what e4m3 loses (4).
#pragma once
#include "ptx/math.cuh"

/// Sum over four values of value - code, `codes` being what pack_e4m3 made of them: two partial sums, one in each half.
DEVICE u32 residual_of_word(float a, float b, float c, float d, u32 codes) {
    u32 low, high;
    unpack_e4m3(codes, low, high);
    return add_f16x2(subtract_f16x2(pack_f16(a, b), low), subtract_f16x2(pack_f16(c, d), high));
}

/// The sums of two words in one: the first word's in the lower half.
DEVICE u32 join_halves(u32 first, u32 second) {
    return add_f16x2(pick_bytes<0x5410>(first, second), pick_bytes<0x7632>(first, second));
}

/// Adds `count` words of 16-bit pairs over the warp's lanes. Lane l returns the sum of word l / (32 / count), as all lanes that share it do.
template <int count>
DEVICE u32 sum_over_warp(u32 (&word)[count]) {
    static_assert(count == 4 || count == 8, "of one or two octets of channels");
    int distance = 16;
#pragma unroll
    for (int kept = count / 2; kept > 0; kept /= 2, distance /= 2) {
        const bool upper = threadIdx.x & distance;
#pragma unroll
        for (int i = 0; i < kept; ++i) {
            const u32 received = __shfl_xor_sync(~0u, upper ? word[i] : word[i + kept], distance);
            word[i] = add_f16x2(upper ? word[i + kept] : word[i], received);
        }
    }
#pragma unroll
    for (; distance > 0; distance /= 2) word[0] = add_f16x2(word[0], __shfl_xor_sync(~0u, word[0], distance));
    return word[0];
}
