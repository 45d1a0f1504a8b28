// Online softmax of s8 x s8 scores in base 2, with P in e4m3. SageAttention2 (2411.10958), section 3 and algorithm 1.
//
// A thread holds two rows of a 64 x 128 tile of scores: word 4j + 2h + e is row 8h + lane / 4, key 8j + 2 (lane % 4) + e. The four lanes of a quad
// share the rows, and each lane's keys share one K scale (PerThread groups), so that one multiplier `c` per thread and tile turns its scores into
// base-2 logits. Every c is >= 0: a negative softmax scale is folded into the sign of Q's codes.
//
// P = 2^(s c - m), where m is the reference of the row. Constant RUNNING_MAX:
//   1  m is the row's running maximum less 8: P of the largest logit is a power of two, which e4m3 holds exactly. O divides by the sum of P as e4m3
//      holds it, so that the weights of a row sum to one: the rounding of a weight that dominates its row cancels, and where the logits are so large
//      that one unit in their last place is many binades, so does the saturation of P.
//   0  m is lazy. e4m3 keeps its relative precision over 15 binades below 448, so m need not be the maximum: it only has to keep P in range. It is
//      set 3 below the maximum of the row's first tile and moves when a thread's sum of P exceeds 448: P >= 0, so a sum that does not is proof that
//      no P saturates. The maximum, its shuffles and the rescaling of O leave the loop; the rare tile takes its exponentials twice. O divides by that
//      sum, in f32. 2 to 5 % more error, up to a tenth less time (docs/kernels/attn_i8_f8_sm90.md).
#pragma once
#include "attn/mask.cuh"
#include "attn/quad.cuh"
#include "attn/scales.cuh"
#include "ptx/sync.cuh"

/// log2 of P at the row's maximum when m is set: an exact power of two, so that the largest P rounds to itself.
constexpr float P_START_LOG2 = RUNNING_MAX ? 8.f : 3.f;
/// Lazy reference: a thread's sum of P over its 32 keys of a row that proves that none saturated.
constexpr float SAFE_SUM = LARGEST_E4M3;
/// Lazy reference: how far it moves for a row whose sum was not safe although its maximum has not grown.
constexpr float REFERENCE_STEP = 2.f;
/// Lazy reference: no P above it when a tile is taken again. log2 of 448, where e4m3 saturates: the sum then counts P as e4m3 holds it, and rows of the
/// warp whose sums were safe get the same P again.
constexpr float P_LIMIT_LOG2 = 8.8073549f;
/// m of a row that has seen no key. Finite, so that no difference of two references is NaN.
constexpr float NO_REFERENCE = -3e38f;
/// Below every score: no product of s8 rows reaches it (256 * 127 * 127 < 2^23). As a float, exact.
constexpr i32 NO_SCORE = -(1 << 24);
/// Bound of c: scores are below 2^23, so that c times a score stays finite.
constexpr float LARGEST_MULTIPLIER = 1e31f;
/// No sum of 32 P is larger, unless logits are so large that their rounding alone lifts P: LSE must stay finite there.
constexpr float LARGEST_SUM = 32 * 512.f;
/// Whether the sum of P before rounding is wanted: as divisor, or for LSE.
constexpr bool SUM_UNROUNDED = LSE || !RUNNING_MAX;

/// Scores as floats: one part, in the terms of largest_scores.
using Logits = float[1][64];

/// The scores as floats, exactly: below 2^24. What follows reads these, so that the integers need not outlive the conversion.
/// The GEMM may have given the 128 keys in parts.
template <int parts, int words>
DEVICE void scores_to_float(Logits& x, const i32 (&scores)[parts][words]) {
    static_assert(parts * words == 64, "a 64 x 128 tile");
#pragma unroll
    for (int i = 0; i < 64; ++i) x[0][i] = to_float(scores[i / words][i % words]);
}

/// The state of this thread's two rows.
struct RowState {
    float reference[2] = {NO_REFERENCE, NO_REFERENCE};
    /// The sum of P as it is multiplied.
    float sum[2] = {0.f, 0.f};
    /// This lane's share of the sum of P before rounding.
    float unrounded[2] = {0.f, 0.f};
};

/// The largest score of each row in this thread, masked columns apart. As integers where they are still there: that instruction takes three numbers.
template <bool masked, class Score, int parts, int words>
DEVICE void largest_scores(Score (&top)[2], const Score (&scores)[parts][words], const i32 (&last)[2]) {
    constexpr Score none = NO_SCORE;
    top[0] = top[1] = none;
#pragma unroll
    for (int i = 0; i < 64; i += 2) {
        const int row = fragment_row(i);
        Score a = scores[i / words][i % words], b = scores[i / words][i % words + 1];
        if constexpr (masked) {
            a = fragment_column(i) <= last[row] ? a : none;
            b = fragment_column(i + 1) <= last[row] ? b : none;
        }
        top[row] = max(max(top[row], a), b);
    }
}

/// Largest base-2 logit of a row in the tile, rounded down: P of a row's largest logit is then never below its power of two, so that it cannot
/// vanish however large the logits are.
template <bool masked>
DEVICE float largest_logit(float top, float c) {
    return quad_max(masked && top == NO_SCORE ? NO_REFERENCE : mul_round_down(top, c));
}

/// Moves the references to P_START_LOG2 below the maximum of all scores so far, and gives the factors by which sums and O shrink.
template <bool masked>
DEVICE void follow_maximum(float (&shrink)[2], RowState& rows, const i32 (&top)[2], float c) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        const float before = rows.reference[row];
        const float after = fmaxf(before, sub_round_down(largest_logit<masked>(to_float(top[row]), c), P_START_LOG2));
        shrink[row] = exp2_approx(before - after);
        rows.reference[row] = after;
    }
}

/// Lazy reference: from the maximum of a row's first tile. Never NaN, as no reference is.
DEVICE void first_reference(RowState& rows, const i32 (&top)[2], float c) {
#pragma unroll
    for (int row = 0; row < 2; ++row) rows.reference[row] = fmaxf(sub_round_down(largest_logit<true>(to_float(top[row]), c), P_START_LOG2), NO_REFERENCE);
}

/// Lazy reference: moves those that `must` move to P_START_LOG2 below the maximum of this tile, or where that is no higher (P is small, but there is
/// much of it) two binades up, where the sum is a quarter; sums shrink, and O has to, by `shrink`.
template <bool masked>
DEVICE void raise_reference(float (&shrink)[2], RowState& rows, const bool (&must)[2], const float (&top)[2], float c) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        const float from_maximum = sub_round_down(largest_logit<masked>(top[row], c), P_START_LOG2);
        const float before = rows.reference[row];
        const float after = !must[row] ? before : from_maximum > before ? from_maximum : before + REFERENCE_STEP;
        shrink[row] = exp2_approx(before - after);
        rows.reference[row] = after;
        rows.unrounded[row] *= shrink[row];
    }
}

/// 2^(score c - subtrahend) of the eight scores from word 8 j of the fragment, added to `unrounded` where that is wanted.
/// `masked`: 0 in the columns behind `last`, each row's last visible one less 2 c.
/// `limited`: exponents are at most `limit`, for rows whose logits are so large that rounding alone could lift P out of range.
template <bool masked, bool limited>
DEVICE void eight_exponentials(float (&e)[8], float (&unrounded)[2], const Logits& scores, int j, float c, const float (&subtrahend)[2], float limit, const i32 (&last)[2]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int word = 8 * j + i;
        const int row = fragment_row(word);
        float exponent = __fmaf_rn(scores[0][word], c, -subtrahend[row]);
        if constexpr (limited) exponent = fminf(exponent, limit);
        e[i] = exp2_approx(exponent);
        if constexpr (masked) e[i] = fragment_column(word) <= last[row] ? e[i] : 0.f;
        if constexpr (SUM_UNROUNDED) unrounded[row] += e[i];
    }
}

/// P of one tile as A operand of the PV GEMM: k-step t of 32 keys reads words 4t .. 4t + 3. Each word holds a row's keys 2c, 2c + 1, 8 + 2c, 9 + 2c
/// of 16, c = lane % 4, which the instruction takes for four neighbours: V's keys are stored in that order (quant/kv_encode.cu).
template <bool masked, bool limited>
DEVICE void exponentials(u32 (&p)[16], float (&unrounded)[2], const Logits& scores, float c, const float (&reference)[2], const i32 (&last)[2]) {
    unrounded[0] = unrounded[1] = 0.f;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        float e[8];
        eight_exponentials<masked, limited>(e, unrounded, scores, j, c, reference, P_LIMIT_LOG2, last);
        p[2 * j] = pack_e4m3(e[0], e[1], e[4], e[5]);
        p[2 * j + 1] = pack_e4m3(e[2], e[3], e[6], e[7]);
    }
}
