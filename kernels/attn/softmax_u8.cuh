// Softmax of s8 x s8 scores in base 2, with P in unsigned 8-bit integers on a scale of each tile's own: recipe i8-i8-dyn. Fragments as in softmax.cuh.
//
//   P = round(255 2^(s c - t)), t the row's maximum in the tile        O = sum over tiles of 2^(t - m) (P V), divided by the sum of 2^(t - m) P
//
// m is the row's reference, of O and of the sums: the maximum of its first tile, raised where a tile exceeds it by more than FAR_LOG2 binades. No tile's
// P depends on it, so it may lag behind, and O is rescaled about never.
//
// P     An f16 below 2^-13 counts units of 2^-24, so that the bits of f16(2^-24 P) are round(P): two P are rounded by one instruction, and one more
//       picks the low bytes of four. Their sums are dot products with ones.
// P V   V's codes are stored with V_OFFSET added, so that a tile's P V is an integer of [0, 128 * 255 * 255], below 2^23. The bits of such an integer, read
//       as f32, are that integer times 2^-149: the multiply-add to O takes it as it is. O / (sum of P) is then V_OFFSET too large.
#pragma once
#include "attn/softmax.cuh"
#include "quant/v_codes.cuh"

/// log2 of 2^-24 P where P is largest.
constexpr float U8_TOP_LOG2 = 7.9943535f - 24.f;
/// What O and the sums are multiplied by, beside 2^-149: so much that nothing that counts is subnormal.
constexpr float SUM_UNIT = 0x1p100f;
/// How far a tile's maximum may lie above the reference.
constexpr float FAR_LOG2 = 10.f;
/// Up to here units in the last place of a logit are too small to lift P to 256.
constexpr float LARGEST_FINE_LOGIT = 16384.f;
/// No score times this is larger. A multiplier is known before the scores are.
constexpr float LARGEST_FINE_MULTIPLIER = LARGEST_FINE_LOGIT / (HEAD_DIM * LARGEST_S8 * LARGEST_S8);
/// LSE's sum is of 2^-24 P: log2 of what it is multiplied by where P is largest.
constexpr float UNROUNDED_LOG2 = INT8_PV ? U8_TOP_LOG2 + 100.f : 0.f;

/// Largest logits of this thread's two rows in a tile, rounded down.
struct TileMaximum {
    float of_row[2];

    /// Whether the reference must be raised.
    DEVICE bool is_far(const RowState& rows) const {
        return fmaxf(of_row[0] - rows.reference[0], of_row[1] - rows.reference[1]) > FAR_LOG2;
    }
    /// Raises the references to these, if they are higher; sums shrink, and O has to, by `shrink`.
    DEVICE void raise_reference(float (&shrink)[2], RowState& rows) const {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const float before = rows.reference[row];
            rows.reference[row] = fmaxf(before, of_row[row]);
            shrink[row] = exp2_approx(before - rows.reference[row]);
            rows.sum[row] *= shrink[row];
            rows.unrounded[row] *= shrink[row];
        }
    }
};

/// P of one tile as A operand of the PV GEMM, in the order of `exponentials`; this thread's sums of P and, for LSE, of 2^-24 P before rounding.
template <bool masked, bool limited>
DEVICE void exponentials_u8(u32 (&p)[16], u32 (&sums)[2], float (&unrounded)[2], const Logits& scores, float c, const TileMaximum& maximum, const i32 (&last)[2]) {
    float subtrahend[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        // Rounded down, so that P of the largest score cannot vanish.
        subtrahend[row] = sub_round_down(maximum.of_row[row], U8_TOP_LOG2);
        sums[row] = 0;
        unrounded[row] = 0.f;
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        float e[8];
        eight_exponentials<masked, limited>(e, unrounded, scores, j, c, subtrahend, U8_TOP_LOG2, last);
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const u32 two = pack_f16(e[2 * row], e[2 * row + 1]), other_two = pack_f16(e[2 * row + 4], e[2 * row + 5]);
            p[2 * j + row] = pick_bytes<0x6420>(two, other_two);
            sums[row] = dot_u8(p[2 * j + row], FOUR_ONES_U8, sums[row]);
        }
    }
}

/// Adds a tile's sums to those of the row, as O is to take its P V: by `weight`.
DEVICE void add_sums(RowState& rows, float (&weight)[2], const TileMaximum& maximum, const u32 (&sums)[2], const float (&unrounded)[2]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        weight[row] = exp2_approx(maximum.of_row[row] - rows.reference[row]) * SUM_UNIT;
        rows.sum[row] = fmaf(__uint_as_float(sums[row]), weight[row], rows.sum[row]);
        if constexpr (SUM_UNROUNDED) rows.unrounded[row] = fmaf(unrounded[row], weight[row], rows.unrounded[row]);
    }
}
