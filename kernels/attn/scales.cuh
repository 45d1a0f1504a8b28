// Symmetric scales: a group's largest magnitude maps to the largest code.
#pragma once
#include "ptx/math.cuh"

/// A group below this counts as zero: scale 1, codes 0.
constexpr float SMALLEST_AMAX = 1e-30f;
constexpr float LARGEST_S8 = 127.f;
constexpr float LARGEST_E4M3 = 448.f;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

struct Scale {
    /// Multiplies a code.
    float value;
    /// Multiplies a number to give its code before rounding.
    float inverse;
};

DEVICE Scale scale_from_amax(float amax, float largest_code) {
    if (amax < SMALLEST_AMAX) return {1.f, 0.f};
    const float value = __fdiv_rn(amax, largest_code);
    return {value, __fdiv_rn(1.f, value)};
}

/// Eight codes of one row, rounded half to even and saturated.
DEVICE void encode_s8(u32 (&word)[2], const float (&x)[8], float inverse) {
    i32 code[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) code[i] = round_half_even(x[i] * inverse);
    word[0] = pack_s8(code[0], code[1], code[2], code[3]);
    word[1] = pack_s8(code[4], code[5], code[6], code[7]);
}
