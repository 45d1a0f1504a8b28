// Online softmax of f32 scores in base 2, with P in the tensors' 16-bit type. FlashAttention-2 (2307.08691), algorithm 1.
//
// A thread holds two rows of a tile of scores: word 4j + 2h + e is row 8h + lane / 4, key 8j + 2 (lane % 4) + e, which is also how the A operand of
// the next GEMM wants its pairs: P is packed where it stands.
//
// P = 2^((s - m) c), c = |scale| log2(e) > 0. A negative scale turns the scores' signs beforehand. m is the row's reference: the maximum of its first tile,
// until a thread's sum of P over a tile exceeds SAFE_SUM. P >= 0, so a sum that does not is proof that every P is in range, and the loop has neither
// maxima nor their shuffles; where one does, the tile's scores are computed once more, and m becomes their maximum. Softmax is exact either way, and P
// rounds with the same relative error: what underflows is smaller by as much.
#pragma once
#include "attn/mask.cuh"
#include "attn/quad.cuh"
#include "attn/scales.cuh"
#include "ptx/sync.cuh"

/// Sum of a thread's P of one row of a tile that is safe. f16 ends at 2^16; and 48 keys whose P are at most 1 must be.
constexpr float SAFE_SUM = 4096.f;
/// Reference of a row that has seen no key. Finite, so that no difference of two maxima is NaN.
constexpr float NO_REFERENCE = -3e38f;
/// Smallest c: a scale of 0 still must keep -inf, a masked score, at -inf, and moves no other logit by a bit.
constexpr float SMALLEST_MULTIPLIER = 1.17549435e-38f;
/// Largest logit whose product may be rounded before the maximum is subtracted: half an ulp of it is 2^-13.
constexpr float LARGEST_PLAIN_LOGIT = 4096.f;

/// Binades for a score of 1.
DEVICE float multiplier_of(float softmax_scale) {
    return fmaxf(fabsf(softmax_scale) * LOG2_E, SMALLEST_MULTIPLIER);
}

/// The state of this thread's two rows.
struct RowState {
    float reference[2] = {NO_REFERENCE, NO_REFERENCE};
    /// This lane's share of the sum of P.
    float sum[2] = {0.f, 0.f};
    /// Whether one of the warp's is too large a logit to be multiplied before it is subtracted.
    bool large = false;
    /// Whether a row of the warp has no reference.
    bool fresh = true;

    DEVICE bool has_reference(int row) const {
        return reference[row] != NO_REFERENCE;
    }
    /// What scores may be compared with: a masked score less it is -inf.
    DEVICE float reference_or_zero(int row) const {
        return has_reference(row) ? reference[row] : 0.f;
    }
};

/// What becomes of the sums and O of earlier tiles when references move.
struct Shrink {
    /// Whether one of the warp's has moved; if not, there is nothing to multiply.
    bool moved = false;
    float by[2] = {1.f, 1.f};
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

/// The references of rows that `must` move become the maxima of these scores.
template <int words>
DEVICE Shrink move_references(RowState& rows, const bool (&must)[2], const float (&s)[words], float c) {
    // Two chains a row: one would wait for itself.
    float chain[2][2] = {{s[0], s[1]}, {s[2], s[3]}};
#pragma unroll
    for (int i = 4; i < words; ++i) chain[fragment_row(i)][i % 2] = fmaxf(chain[fragment_row(i)][i % 2], s[i]);
    Shrink shrink;
    shrink.moved = true;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        const float maximum = quad_max(fmaxf(chain[row][0], chain[row][1]));
        const float before = rows.reference[row];
        rows.reference[row] = must[row] ? fmaxf(before, maximum) : before;
        shrink.by[row] = exp2_approx((before - rows.reference[row]) * c);
        rows.sum[row] *= shrink.by[row];
    }
    rows.large = any_lane(fmaxf(fabsf(rows.reference_or_zero(0)), fabsf(rows.reference_or_zero(1))) * c > LARGEST_PLAIN_LOGIT);
    rows.fresh = any_lane(!rows.has_reference(0) || !rows.has_reference(1));
    return shrink;
}

/// P = 2^(score multiplier - offset).
struct Exponents {
    float multiplier;
    float offset[2];
};

/// Scores to exponents, for references that are too large to be subtracted after: products as large as these are rounded by binades.
template <int words>
DEVICE Exponents subtract_first(float (&s)[words], const RowState& rows, float c) {
#pragma unroll
    for (int i = 0; i < words; ++i) {
        const int row = fragment_row(i);
        s[i] = (s[i] - rows.reference_or_zero(row)) * c;
    }
    return {1.f, {0.f, 0.f}};
}

/// Scores to P, not yet rounded, in place, and this thread's sums of it.
template <int words>
DEVICE void scores_to_p(float (&s)[words], float (&sum)[2], const Exponents& exponents) {
    float chain[2][2] = {};
#pragma unroll
    for (int i = 0; i < words; ++i) {
        const int row = fragment_row(i);
        s[i] = exp2_approx(__fmaf_rn(s[i], exponents.multiplier, -exponents.offset[row]));
        chain[row][i % 2] += s[i];
    }
    sum[0] = chain[0][0] + chain[0][1];
    sum[1] = chain[1][0] + chain[1][1];
}
