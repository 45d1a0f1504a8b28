// Online softmax of s8 x s8 scores in base 2, with P in e4m3. SageAttention2 (2411.10958), section 3 and algorithm 1.
//
// A thread holds two rows of a 64 x 128 tile of scores: word 4j + 2h + e is row 8h + lane / 4, key 8j + 2 (lane % 4) + e. The four lanes of a quad
// share the rows, and each lane's keys share one K scale (PerThread groups), so that one multiplier `c` per thread and tile turns its scores into
// base-2 logits. Every c is >= 0: a negative softmax scale is folded into the sign of Q's codes.
//
// P = 2^(s c - m), where m is the reference of the row. e4m3 keeps its relative precision over 15 binades below 448, so m need not be the running
// maximum: it only has to keep P in range. It is set P_START_LOG2 below the maximum of the row's first tile and moves when a thread's sum of P
// exceeds 448: P >= 0, so a sum that does not is proof that no P saturates. That sum is needed for the row sum anyway, so the maximum, its
// shuffles and the rescaling of O leave the loop. Where it fires, the row takes the tile's true maximum and its warp redoes P from the scores.
//
// Constant: RUNNING_MAX 0 for that, or 1 to keep m at the running maximum less 8 in every tile. P of the largest logit is then a power of two, which
// e4m3 holds exactly: a few per cent less error, for a few per cent of the speed (docs/kernels/attn_i8_f8_sm90.md).
#pragma once
#include "attn/mask.cuh"
#include "attn/quad.cuh"
#include "attn/scales.cuh"
#include "ptx/sync.cuh"

/// log2 of P at the row's maximum when m is set. An exact power of two, so that the largest P rounds to itself.
constexpr float P_START_LOG2 = RUNNING_MAX ? 8.f : 3.f;
/// A thread's sum of P over its 32 keys of a row that proves that none saturated: all P are >= 0, and with the running maximum none is above 2^8,
/// but for the rounding of huge logits.
constexpr float SAFE_SUM = RUNNING_MAX ? 33 * 256.f : LARGEST_E4M3;
/// How far a row moves its reference whose sum was not safe although its maximum has not grown.
constexpr float REFERENCE_STEP = RUNNING_MAX ? 0.f : 2.f;
/// No P above it: 2^8.8 < 448.
constexpr float P_LIMIT_LOG2 = 8.8f;
/// m of a row that has seen no key. Finite, so that no difference of two references is NaN.
constexpr float NO_REFERENCE = -3e38f;
/// Below every score: no product of s8 rows reaches it (256 * 127 * 127 < 2^23).
constexpr float NO_SCORE = -16777216.f;
/// Bound of c: scores are below 2^23, so that c times a score stays finite.
constexpr float LARGEST_MULTIPLIER = 1e31f;

/// The scores as floats, exactly: below 2^24. Everything after the GEMM reads these, so that the integers need not outlive the conversion.
/// The GEMM may have given the 128 keys in parts.
template <int parts, int words>
DEVICE void scores_to_float(float (&x)[64], const i32 (&scores)[parts][words]) {
    static_assert(parts * words == 64, "a 64 x 128 tile");
#pragma unroll
    for (int i = 0; i < 64; ++i) x[i] = to_float(scores[i / words][i % words]);
}

/// The state of this thread's two rows.
struct RowState {
    float reference[2] = {NO_REFERENCE, NO_REFERENCE};
    /// This lane's share of the sum of P.
    float sum[2] = {0.f, 0.f};
};

/// P of one tile as A operand of the PV GEMM: k-step t of 32 keys reads words 4t .. 4t + 3. Each word holds a row's keys 2c, 2c + 1, 8 + 2c, 9 + 2c
/// of 16, c = lane % 4, which the instruction takes for four neighbours: V's keys are stored in that order (quant/kv_encode.cu).
/// `masked`: P is 0 in the columns behind `last`, each row's last visible one less 2 c.
/// `limited`: clamp the exponent, for rows whose logits are so large that rounding alone could lift P out of range.
template <bool masked, bool limited>
DEVICE void exponentials(u32 (&p)[16], float (&tile_sum)[2], const float (&scores)[64], float c, const float (&reference)[2], const i32 (&last)[2]) {
    tile_sum[0] = tile_sum[1] = 0.f;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        float e[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int word = 8 * j + i;
            const int row = fragment_row(word);
            float exponent = __fmaf_rn(scores[word], c, -reference[row]);
            if constexpr (limited) exponent = fminf(exponent, P_LIMIT_LOG2);
            e[i] = exp2_approx(exponent);
            if constexpr (masked) e[i] = fragment_column(word) <= last[row] ? e[i] : 0.f;
            tile_sum[row] += e[i];
        }
        p[2 * j] = pack_e4m3(e[0], e[1], e[4], e[5]);
        p[2 * j + 1] = pack_e4m3(e[2], e[3], e[6], e[7]);
    }
}

/// The largest score of each row in this thread, masked columns apart.
template <bool masked>
DEVICE void largest_scores(float (&top)[2], const float (&scores)[64], const i32 (&last)[2]) {
    top[0] = top[1] = NO_SCORE;
#pragma unroll
    for (int word = 0; word < 64; ++word) {
        const int row = fragment_row(word);
        if (!masked || fragment_column(word) <= last[row]) top[row] = fmaxf(top[row], scores[word]);
    }
}

/// Moves the references of the rows that `must` move, and gives the factors by which sums and O shrink: to P_START_LOG2 below the maximum of this
/// tile, or where that is no higher (P is small, but there is much of it) two binades up, where the sum is a quarter.
/// The products round down: a row's largest logit is then never below its maximum, so its P cannot vanish however large the logits are.
DEVICE void raise_reference(float (&shrink)[2], RowState& rows, const bool (&must)[2], const float (&top)[2], float c) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        const float maximum = quad_max(top[row] == NO_SCORE ? NO_REFERENCE : mul_round_down(top[row], c));
        const float from_maximum = sub_round_down(maximum, P_START_LOG2);
        const float before = rows.reference[row];
        const float after = !must[row] ? before : from_maximum > before ? from_maximum : before + REFERENCE_STEP;
        shrink[row] = exp2_approx(before - after);
        rows.reference[row] = after;
        rows.sum[row] *= shrink[row];
    }
}
