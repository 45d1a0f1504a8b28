// Online softmax of f32 scores in base 2, with P in the tensors' 16-bit type. FlashAttention-2 (2307.08691), algorithm 1.
//
// A thread holds two rows of a tile of scores: word 4j + 2h + e is row 8h + lane / 4, key 8j + 2 (lane % 4) + e, which is also how the A operand of
// the next GEMM wants its pairs: P is packed where it stands.
//
// P = 2^((s - m) c), c = |scale| log2(e) > 0. A negative scale turns the scores' signs beforehand. m is the row's reference: the running maximum of its
// scores, or with STALE > 0 one that scores may exceed by STALE binades before it moves to the maximum. Softmax is exact either way, and P rounds with
// the same relative error: it is at most 2^STALE, and what underflows is smaller by as much.
#pragma once
#include "attn/mask.cuh"
#include "attn/quad.cuh"
#include "attn/scales.cuh"
#include "ptx/sync.cuh"

static_assert(STALE >= 0 && STALE < 16, "f16 ends at 2^16");
/// Reference of a row that has seen no key. Finite, so that no difference of two maxima is NaN.
constexpr float NO_REFERENCE = -3e38f;
/// Smallest c: a scale of 0 still must keep -inf, a masked score, at -inf, and moves no other logit by a bit.
constexpr float SMALLEST_MULTIPLIER = 1.17549435e-38f;
/// Largest slack, so that the first score of a row moves the reference whatever c is.
constexpr float LARGEST_SLACK = 1e38f;
/// Largest logit whose product may be rounded before the maximum is subtracted: half an ulp of it is 2^-13.
constexpr float LARGEST_PLAIN_LOGIT = 4096.f;

/// How scores become exponents.
struct Exponents {
    /// Binades for a score of 1.
    float c;
    /// STALE binades, as a score.
    float slack;
};

DEVICE Exponents exponents_of(float softmax_scale) {
    const float c = fmaxf(fabsf(softmax_scale) * LOG2_E, SMALLEST_MULTIPLIER);
    return {c, fminf(__fdividef(STALE, c), LARGEST_SLACK)};
}

/// The state of this thread's two rows.
struct RowState {
    float reference[2] = {NO_REFERENCE, NO_REFERENCE};
    /// This lane's share of the sum of P.
    float sum[2] = {0.f, 0.f};
    /// Whether a reference of the warp is too large a logit to be multiplied before it is subtracted.
    bool large = false;
};

/// What becomes of the sums and O of earlier tiles when references move.
struct Shrink {
    /// Whether one of the warp's has moved; if not, there is nothing to multiply.
    bool moved;
    float by[2];
};

/// -inf behind each row's last visible column, which is given less 2 (lane % 4).
template <int words>
DEVICE void mask_scores(float (&s)[words], const i32 (&last)[2]) {
#pragma unroll
    for (int i = 0; i < words; ++i) s[i] = fragment_column(i) <= last[fragment_row(i)] ? s[i] : -__int_as_float(0x7f800000);
}

template <int words>
DEVICE void negate_scores(float (&s)[words]) {
#pragma unroll
    for (int i = 0; i < words; ++i) s[i] = -s[i];
}

/// The exponent of a row's reference; 0 where there is none, so that a masked score stays -inf.
DEVICE float exponent_offset(const RowState& rows, int row, float multiplier) {
    return rows.reference[row] == NO_REFERENCE ? 0.f : rows.reference[row] * multiplier;
}

/// Moves the references of rows whose largest score, `top` in this thread, is too far above.
DEVICE Shrink move_references(RowState& rows, const float (&top)[2], Exponents exponents) {
    Shrink shrink{true, {1.f, 1.f}};
    // The maximum of the quad takes four shuffles, which the next exponential waits for, and multiplying O a twelfth of the loop's instructions.
    if constexpr (STALE > 0) {
        shrink.moved = any_lane(top[0] - rows.reference[0] > exponents.slack || top[1] - rows.reference[1] > exponents.slack);
    }
    if (!shrink.moved) return shrink;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        const float maximum = quad_max(top[row]);
        const float before = rows.reference[row];
        const float after = STALE == 0 ? fmaxf(before, maximum) : maximum - before > exponents.slack ? maximum : before;
        shrink.by[row] = exp2_approx((before - after) * exponents.c);
        rows.reference[row] = after;
        rows.sum[row] *= shrink.by[row];
    }
    rows.large = any_lane(fmaxf(fabsf(exponent_offset(rows, 0, exponents.c)), fabsf(exponent_offset(rows, 1, exponents.c))) > LARGEST_PLAIN_LOGIT);
    return shrink;
}

/// Scores to P, not yet rounded, in place. Returns the sum of this thread's P.
template <int words>
DEVICE float scores_to_p(float (&s)[words], Shrink& shrink, RowState& rows, Exponents exponents) {
    // Two chains a row: one would wait for itself.
    float chain[2][2] = {{s[0], s[1]}, {s[2], s[3]}};
#pragma unroll
    for (int i = 4; i < words; ++i) chain[fragment_row(i)][i % 2] = fmaxf(chain[fragment_row(i)][i % 2], s[i]);
    const float top[2] = {fmaxf(chain[0][0], chain[0][1]), fmaxf(chain[1][0], chain[1][1])};
    shrink = move_references(rows, top, exponents);
    float multiplier = exponents.c;
    float offset[2] = {exponent_offset(rows, 0, multiplier), exponent_offset(rows, 1, multiplier)};
    if (rows.large) {
        // Differences first: products as large as these are rounded by binades.
#pragma unroll
        for (int i = 0; i < words; ++i) s[i] = (s[i] - exponent_offset(rows, fragment_row(i), 1.f)) * multiplier;
        multiplier = 1.f;
        offset[0] = offset[1] = 0.f;
    }
    float sum[2][2] = {};
#pragma unroll
    for (int i = 0; i < words; ++i) {
        const int row = fragment_row(i);
        s[i] = exp2_approx(__fmaf_rn(s[i], multiplier, -offset[row]));
        sum[row][i % 2] += s[i];
    }
    const float tile_sum[2] = {sum[0][0] + sum[0][1], sum[1][0] + sum[1][1]};
    rows.sum[0] += tile_sum[0];
    rows.sum[1] += tile_sum[1];
    return tile_sum[0] + tile_sum[1];
}
