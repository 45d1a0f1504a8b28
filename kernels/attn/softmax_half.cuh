// Online softmax of f32 scores in base 2, with P in the tensors' 16-bit type. FlashAttention-2 (2307.08691), algorithm 1.
//
// A thread holds two rows of a tile of scores: word 4j + 2h + e is row 8h + lane / 4, key 8j + 2 (lane % 4) + e, which is also how the A operand of
// the next GEMM wants its pairs: P is packed where it stands.
//
// P = 2^((s - m) c), m the running maximum of the row's scores, c = |scale| log2(e) > 0. A negative scale turns the scores' signs beforehand.
#pragma once
#include "attn/mask.cuh"
#include "attn/quad.cuh"
#include "attn/scales.cuh"
#include "ptx/sync.cuh"

/// Maximum of a row that has seen no key. Finite, so that no difference of two maxima is NaN.
constexpr float NO_MAXIMUM = -3e38f;
/// Smallest c: a scale of 0 still must keep -inf, a masked score, at -inf, and moves no other logit by a bit.
constexpr float SMALLEST_MULTIPLIER = 1.17549435e-38f;
/// Largest logit whose product may be rounded before the maximum is subtracted: half an ulp of it is 2^-13.
constexpr float LARGEST_PLAIN_LOGIT = 4096.f;

/// The state of this thread's two rows.
struct RowState {
    float maximum[2] = {NO_MAXIMUM, NO_MAXIMUM};
    /// This lane's share of the sum of P.
    float sum[2] = {0.f, 0.f};
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

/// Scores to P, not yet rounded, in place. `shrink`: by what sums and O of earlier tiles are multiplied. Returns the sum of this thread's P.
template <int words>
DEVICE float scores_to_p(float (&s)[words], float (&shrink)[2], RowState& rows, float c) {
    // Two chains a row: one would wait for itself.
    float top[2][2] = {{rows.maximum[0], s[0]}, {rows.maximum[1], s[2]}};
#pragma unroll
    for (int i = 0; i < words; ++i) {
        float& chain = top[fragment_row(i)][i % 2];
        chain = fmaxf(chain, s[i]);
    }
    float reference[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        const float maximum = quad_max(fmaxf(top[row][0], top[row][1]));
        shrink[row] = exp2_approx((rows.maximum[row] - maximum) * c);
        rows.maximum[row] = maximum;
        rows.sum[row] *= shrink[row];
        reference[row] = maximum == NO_MAXIMUM ? 0.f : maximum;
    }
    float multiplier = c;
    if (any_lane(fmaxf(fabsf(reference[0] * c), fabsf(reference[1] * c)) > LARGEST_PLAIN_LOGIT)) {
        // Differences first: products as large as these are rounded by binades.
#pragma unroll
        for (int i = 0; i < words; ++i) s[i] = (s[i] - reference[fragment_row(i)]) * c;
        multiplier = 1.f;
        reference[0] = reference[1] = 0.f;
    }
    const float offset[2] = {reference[0] * multiplier, reference[1] * multiplier};
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
