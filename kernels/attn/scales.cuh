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

/// x * by, rounded half to even, in the low byte: 1.5 * 2^23 leaves no bits for a fraction. |x * by| is at most 127 and a few ulp, since `by` comes
/// from the largest |x|, so that nothing saturates.
DEVICE u32 low_byte_code(float x, float by) {
    constexpr float no_fraction = 12582912.f;
    return __float_as_uint(__fadd_rn(__fmul_rn(x, by), no_fraction));
}

DEVICE u32 encode_four_s8(const float* x, float by) {
    const u32 low = pick_bytes<0x0040>(low_byte_code(x[0], by), low_byte_code(x[1], by));
    const u32 high = pick_bytes<0x0040>(low_byte_code(x[2], by), low_byte_code(x[3], by));
    return pick_bytes<0x5410>(low, high);
}

/// Eight codes of one row.
DEVICE void encode_s8(u32 (&word)[2], const float (&x)[8], float by) {
    word[0] = encode_four_s8(x, by);
    word[1] = encode_four_s8(x + 4, by);
}
