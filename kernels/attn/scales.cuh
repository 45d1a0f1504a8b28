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

/// Eight codes of one row: x * by, rounded half to even.
DEVICE void encode_s8(u32 (&word)[2], const float (&x)[8], float by) {
#pragma unroll
    for (int i = 0; i < 2; ++i) word[i] = pack_s8(x[4 * i] * by, x[4 * i + 1] * by, x[4 * i + 2] * by, x[4 * i + 3] * by);
}
