// What the P V GEMM is given of V, per channel. Constant INT8_PV:
//   0  e4m3, largest 448; and what rounding takes from V, so that O can be given back its mean (docs/numerics.md)
//   1  integers of -127 to 127 with V_OFFSET added, unsigned: attn/softmax_u8.cuh says why
#pragma once
#include "attn/scales.cuh"

constexpr float LARGEST_V = INT8_PV ? LARGEST_S8 : LARGEST_E4M3;
constexpr float V_OFFSET = 128.f;
/// Whether residuals are summed. Integers take too little from V to be worth it.
constexpr bool V_RESIDUALS = !INT8_PV;

DEVICE Scale v_scale_from_amax(float amax) {
    const Scale scale = scale_from_amax(amax, LARGEST_V);
    // The offset leaves O by a subtraction, which is not exact: a channel of zeros is to give zero.
    return INT8_PV && amax < SMALLEST_AMAX ? Scale{0.f, 0.f} : scale;
}

/// Codes of four numbers v / scale, the first in the lowest byte: nearest even.
DEVICE u32 encode_four_v(float a, float b, float c, float d) {
    if constexpr (!INT8_PV) return pack_e4m3(a, b, c, d);
    static_assert(V_OFFSET == 128.f, "the offset is the top bit of each byte");
    return pack_s8(a, b, c, d) ^ 0x80808080;
}
