// Arithmetic and conversions whose rounding or instruction matters.
#pragma once
#include "ptx/types.cuh"

/// 2^x; 0 below the normal range. PTX ISA 9.7.3.22, ex2. Without .ftz the compiler adds a range reduction of three instructions.
DEVICE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/// PTX ISA 9.7.3.20, lg2.
DEVICE float log2_approx(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/// a * b rounded towards minus infinity. PTX ISA 9.7.3.5, mul.
DEVICE float mul_round_down(float a, float b) {
    float y;
    asm("mul.rm.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}

/// a - b rounded towards minus infinity. PTX ISA 9.7.3.4, sub.
DEVICE float sub_round_down(float a, float b) {
    float y;
    asm("sub.rm.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}

/// PTX ISA 9.7.9.21, cvt.
DEVICE float to_float(i32 x) {
    float y;
    asm("cvt.rn.f32.s32 %0, %1;" : "=f"(y) : "r"(x));
    return y;
}

/// Bytes of two words, picked by the nibbles of `selector`. PTX ISA 9.7.9.7, prmt.
template <u32 selector>
DEVICE u32 pick_bytes(u32 a, u32 b) {
    u32 word;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(word) : "r"(a), "r"(b), "n"(selector));
    return word;
}

/// The larger of the two lower and of the two upper halves. PTX ISA 9.7.1.14, max.
DEVICE u32 max_u16x2(u32 a, u32 b) {
    u32 word;
    asm("max.u16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
    return word;
}

/// Four floats as e4m3 bytes, the first in the lowest: nearest even, saturated at +-448. PTX ISA 9.7.9.21, cvt.
DEVICE u32 pack_e4m3(float a, float b, float c, float d) {
    u32 word;
    asm("{ .reg .b16 low, high;\n"
        "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
        "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
        "mov.b32 %0, {low, high}; }"
        : "=r"(word)
        : "f"(a), "f"(b), "f"(c), "f"(d));
    return word;
}

/// Four floats as signed bytes, the first in the lowest: nearest even, saturated; NaN gives 0. ptxas makes one instruction of
/// two roundings and a packing. PTX ISA 9.7.9.21, cvt, and 9.7.9.22, cvt.pack.
DEVICE u32 pack_s8(float a, float b, float c, float d) {
    u32 word;
    asm("{ .reg .s32 a, b, c, d;\n"
        "cvt.rni.s32.f32 a, %1;\n"
        "cvt.rni.s32.f32 b, %2;\n"
        "cvt.rni.s32.f32 c, %3;\n"
        "cvt.rni.s32.f32 d, %4;\n"
        "cvt.pack.sat.s8.s32.b32 c, d, c, 0;\n"
        "cvt.pack.sat.s8.s32.b32 %0, b, a, c; }"
        : "=r"(word)
        : "f"(a), "f"(b), "f"(c), "f"(d));
    return word;
}

/// Four e4m3 bytes as halves, exactly: the lower two and the upper two. PTX ISA 9.7.9.21, cvt.
DEVICE void unpack_e4m3(u32 word, u32& low, u32& high) {
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.rn.f16x2.e4m3x2 %0, l; cvt.rn.f16x2.e4m3x2 %1, h; }"
        : "=r"(low), "=r"(high)
        : "r"(word));
}

/// PTX ISA 9.7.4.1, add.
DEVICE u32 add_f16x2(u32 a, u32 b) {
    u32 sum;
    asm("add.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
    return sum;
}

/// PTX ISA 9.7.4.2, sub.
DEVICE u32 subtract_f16x2(u32 a, u32 b) {
    u32 difference;
    asm("sub.f16x2 %0, %1, %2;" : "=r"(difference) : "r"(a), "r"(b));
    return difference;
}

/// 1.0 four times.
constexpr u32 FOUR_ONES_E4M3 = 0x38383838;
/// 1 four times.
constexpr u32 FOUR_ONES_U8 = 0x01010101;

/// Sum over the four bytes of a b, unsigned, plus c. PTX ISA 9.7.1.23, dp4a.
DEVICE u32 dot_u8(u32 a, u32 b, u32 c) {
    u32 sum;
    asm("dp4a.u32.u32 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
    return sum;
}

/// Two halves in one word, the first in the lower. PTX ISA 9.7.9.21, cvt.
DEVICE u32 pack_f16(float a, float b) {
    u32 word;
    asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(word) : "f"(a), "f"(b));
    return word;
}

/// The largest finite number where x is infinite; NaN stays. PTX ISA 9.7.3.11 and 12, min and max.
DEVICE float limit_to_finite(float x) {
    float y;
    asm("{ .reg .f32 upper;\n"
        "min.NaN.f32 upper, %1, 0f7f7fffff;\n"
        "max.NaN.f32 %0, upper, 0fff7fffff; }"
        : "=f"(y)
        : "f"(x));
    return y;
}

/// The same as pack_f16, with the largest finite number where it would be infinity; NaN stays. PTX ISA 9.7.9.21, cvt.
DEVICE u32 pack_finite_f16(float a, float b) {
    u32 word;
    asm("cvt.rn.satfinite.f16x2.f32 %0, %2, %1;" : "=r"(word) : "f"(a), "f"(b));
    return word;
}
DEVICE u32 pack_finite_bf16(float a, float b) {
    u32 word;
    asm("cvt.rn.satfinite.bf16x2.f32 %0, %2, %1;" : "=r"(word) : "f"(a), "f"(b));
    return word;
}

/// Two bfloat16 in one word, the first in the lower. PTX ISA 9.7.9.21, cvt.
DEVICE u32 pack_bf16(float a, float b) {
    u32 word;
    asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(word) : "f"(a), "f"(b));
    return word;
}

/// The lower or upper half of a word, widened. PTX ISA 9.7.9.21, cvt.
DEVICE void unpack_f16(u32 word, float& low, float& high) {
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }"
        : "=f"(low), "=f"(high)
        : "r"(word));
}

/// A bfloat16 is the upper half of a float.
DEVICE void unpack_bf16(u32 word, float& low, float& high) {
    low = __uint_as_float(word << 16);
    high = __uint_as_float(word & 0xffff0000u);
}
