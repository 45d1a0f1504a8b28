// Attention with INT8 Q K^T and 8-bit P V on Hopper's warpgroup GEMMs. INT8_PV 0: P V in e4m3, recipe sage2-i8-f8, SageAttention2 (2411.10958),
// algorithm 1. INT8_PV 1: P V in integers, recipe i8-i8-dyn.
//
//   O[b, h, r, :] = softmax_n(scale q_r . k_n) V,   LSE[b, h, r] = ln sum_n exp(scale q_r . k_n)
//
// Problem   q, o: [batch, q_heads, q_len, head_dim] of IN_T, strided; K and V as codes from kv_encode. A work: CONSUMERS x 64 rows of one head.
// Tiles     S = Q K^T: 64 x 128 a warpgroup, s32.   T = P V: 64 x HEAD_DIM in panels of at most 128, f32, added to O in f32 after each 128 keys
//           (two-level accumulation, section 3.3: the tensor core's own e4m3 accumulator keeps fewer bits). INT8_PV: T is exact in s32, and read as f32 as it
//           is (attn/softmax_u8.cuh).
// Roles     one block per multiprocessor draws works from a counter until none is left. One producer thread draws them, each before the last one's tiles are
//           all under way, and streams their tiles of K and V through a ring of STAGES; a spare warp of the producer's brings their Q to L2. Each
//           consumer warpgroup takes its 64 rows' tiles in order, the masked ones last, in a loop of their own. In its last turn of a work it quantizes
//           its rows of the next work's Q and computes that one's first scores; then it stores O.
// Sums      of P, which O is divided by: P times eight channels of ones, in the tensor core (RUNNING_MAX 1); dot products with ones (INT8_PV).
// V         INT8_PV 0: what its rounding took away is added back to O as a mean over the tiles that a warpgroup's rows see: a spare warp of the producer's adds
//           the tiles' residuals up meanwhile. V's channels lie in an order in which a lane stores eight neighbours of O.
// Schedule  warpgroups take turns: whose turn it is issues {P V of tile j, Q K^T of tile j + 1} as one block of GEMMs and passes on, so that while
//           one multiplies the others exponentiate. Within a warpgroup all is serial; S and T share registers.
//           A stage's full barrier is awaited before the turn, never within it: who holds the turn holds up all others.
//           Where O does not shrink and S and T fit side by side (RUNNING_MAX 0, HEAD_DIM 64), T takes in four tiles before it is added to O, and
//           there are no turns: exponentials bound that shape, whatever the order. Nor are there with INT8_PV: faster or level without.
// Shared    Q [CONSUMERS][64 x HEAD_DIM] | K [STAGES][128 x HEAD_DIM] | V^T [STAGES][HEAD_DIM x 128] | ones [8 x 32] | V's residuals [CONSUMERS][HEAD_DIM] f32 |
//           works, each with V's scales [HEAD_DIM] f32 | K scales [STAGES][4] f32 | barriers
// Constants HEAD_DIM 64, 128, 256; IN_T F16, Bf16, F32; CAUSAL, LSE 0 or 1; RUNNING_MAX 0 or 1, with INT8_PV 1; CONSUMERS and STAGES as in README.md.
#include "attn/softmax.cuh"
#include "attn/softmax_u8.cuh"
#include "ptx/wgmma.cuh"
#include "quant/q_rows.cuh"
#include "sm90/attn_producer.cuh"
#include "tile/store_rows.cuh"
#include "tile/turns.cuh"

static_assert(HEAD_DIM == 64 || HEAD_DIM == 128 || HEAD_DIM == 256, "other head dimensions are padded to one of these by the quantizers");

/// Columns of one GEMM, keys of S and channels of T: equal, so that T fits the registers of S, or of its first part.
constexpr int PANEL = HEAD_DIM < 128 ? HEAD_DIM : 128;
constexpr int PANELS = HEAD_DIM / PANEL;
constexpr int PANEL_WORDS = PANEL / 2;
constexpr int SCORE_PARTS = TILE_KEYS / PANEL;
using Scores = i32[SCORE_PARTS][PANEL_WORDS];
using Partial = i32[PANEL_WORDS];

/// S and T have registers of their own, so that both GEMMs of a step are under way together.
constexpr bool APART = !RUNNING_MAX && HEAD_DIM == 64;
static_assert(RUNNING_MAX || !INT8_PV, "u8 P is relative to its tile's maximum");
/// Whether warpgroups take turns.
constexpr bool TURNS = !APART && !INT8_PV;
/// Whether a register is free for the answer while exponentials are taken.
constexpr bool ASKS_EARLY = !LSE && (INT8_PV || !RUNNING_MAX);
/// Tiles that T takes in before it is added to O, where they are apart. The tensor core keeps fewer bits than f32; up to 16 tiles no error was seen to
/// come of that here (docs/kernels/attn_i8_f8_sm90.md).
constexpr int TILES_OF_PARTIAL = 4;

/// One slice of a panel of S.
template <bool accumulate>
DEVICE void multiply_s8(i32 (&scores)[PANEL_WORDS], u64 q, u64 k) {
    if constexpr (PANEL == 64) {
        wgmma_m64n64k32_s8<accumulate>(scores, q, k);
    } else {
        wgmma_m64n128k32_s8<accumulate>(scores, q, k);
    }
}

/// S = Q K^T, exact in s32.
DEVICE void multiply_qk(Scores& scores, u64 q, u64 k) {
#pragma unroll
    for (int part = 0; part < SCORE_PARTS; ++part) {
        const u64 keys = descriptor_at(k, part * PANEL * PANEL_WIDTH<HEAD_DIM>);
        multiply_s8<false>(scores[part], q, keys);
#pragma unroll
        for (int slice = 1; slice < HEAD_DIM / 32; ++slice) {
            multiply_s8<true>(scores[part], descriptor_at(q, slice_offset<ROWS, HEAD_DIM>(slice)), descriptor_at(keys, slice_offset<TILE_KEYS, HEAD_DIM>(slice)));
        }
    }
}

/// T = P V + (more ? T : 0) for one panel of channels; `more` only where S and T are apart.
DEVICE void multiply_pv(Partial& partial, const u32 (&p)[16], u64 v, bool more = false) {
    const auto multiply = [&](auto slice) {
        constexpr int n = decltype(slice)::value;
        const u64 keys = descriptor_at(v, slice_offset<PANEL, TILE_KEYS>(n));
        if constexpr (INT8_PV) {
            wgmma_k32_u8(partial, p[4 * n], p[4 * n + 1], p[4 * n + 2], p[4 * n + 3], keys, n > 0);
        } else {
            wgmma_k32_e4m3(partial, p[4 * n], p[4 * n + 1], p[4 * n + 2], p[4 * n + 3], keys, n > 0 || more);
        }
    };
    static_assert(TILE_KEYS == 4 * 32, "four slices");
    multiply(Constant<0>{});
    multiply(Constant<1>{});
    multiply(Constant<2>{});
    multiply(Constant<3>{});
}

/// Sums of P: the first and the third word are those of this thread's two rows.
DEVICE void multiply_p_ones(i32 (&sums)[4], const u32 (&p)[16], u64 ones) {
    wgmma_m64n8k32_e4m3<false>(sums, p[0], p[1], p[2], p[3], ones);
    wgmma_m64n8k32_e4m3<true>(sums, p[4], p[5], p[6], p[7], ones);
    wgmma_m64n8k32_e4m3<true>(sums, p[8], p[9], p[10], p[11], ones);
    wgmma_m64n8k32_e4m3<true>(sums, p[12], p[13], p[14], p[15], ones);
}

/// The part of q . k that smoothing took out of the scores, of which each lane of a quad sums its octets.
DEVICE float mean_logit(const AttnParams& params, const Work& work, const u8* row, int lane) {
    const float* const mean = params.k_mean + static_cast<u64>(work.kv_head) * HEAD_DIM;
    float sum = 0.f;
#pragma unroll 1
    for (int octet = lane % 4; octet < HEAD_DIM / OCTET; octet += 4) {
        float x[OCTET];
        widen(x, load_octet<IN_T>(row, octet, params.head_dim, row != nullptr));
#pragma unroll
        for (int i = 0; i < OCTET; ++i) sum = fmaf(x[i], mean[octet * OCTET + i], sum);
    }
    return params.softmax_scale * quad_sum(sum);
}

/// Row lane / 4 + 8 h of this thread's warp, within its warpgroup.
DEVICE u32 row_of_thread(int h) {
    return threadIdx.x % WARPGROUP / 32 * 16 + threadIdx.x % 32 / 4 + 8 * h;
}

/// Q of the warpgroup's rows into its slab; returns what turns a score times a K scale into a base-2 logit.
DEVICE float load_q(const AttnParams& params, const Work& work, int warpgroup, u32 slab) {
    const u8* q_row[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) q_row[h] = query_row(params, params.q, params.q_stride, work, work.row + warpgroup * ROWS + row_of_thread(h));
    const float sign = params.softmax_scale < 0.f ? -1.f : 1.f;
    // All warps have read the slab; then, all have written it.
    named_barrier_wait<WARPGROUP>(Turns<CONSUMERS>::FIRST_BARRIER + CONSUMERS + warpgroup);
    const float q_scale = quantize_q_rows<IN_T, HEAD_DIM, CONSUMER_REGISTERS / 3>(slab, threadIdx.x / 32 % 4, threadIdx.x % 32, q_row, params.head_dim, sign);
    fence_async_proxy();
    named_barrier_wait<WARPGROUP>(Turns<CONSUMERS>::FIRST_BARRIER + CONSUMERS + warpgroup);
    return fminf(fabsf(params.softmax_scale) * LOG2_E * q_scale, LARGEST_MULTIPLIER);
}

/// O / (sum of P) and V's mean residuals, times V's channel scales; both in shared memory at these addresses. A row without keys has sum 0 and gives 0.
DEVICE void store_output(const AttnParams& params, const Work& work, i32 first_row, u32 v_scales, u32 residuals, const float (&output)[HEAD_DIM / 2], const RowState& rows) {
    const int lane = threadIdx.x % 32;
    u8* o_row[2];
    float normalize[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const float sum = INT8_PV ? quad_sum(rows.sum[h]) : RUNNING_MAX ? rows.sum[h] : quad_sum(rows.unrounded[h]);
        normalize[h] = sum > 0.f ? __fdividef(1.f, sum) : 0.f;
        o_row[h] = query_row(params, params.o, params.o_stride, work, first_row + row_of_thread(h));
        if constexpr (CAUSAL) {
            // Rows that see no key are few: a choice for each number costs more.
            if (sum == 0.f) {
#pragma unroll 1
                for (int column = 0; column < HEAD_DIM; column += 32) store_finite_octet(IN_T{}, o_row[h], {}, column + lane % 4 * OCTET, params.head_dim);
                o_row[h] = nullptr;
            }
        }
    }
    // The order of V's channels gives this lane eight neighbours of 32.
    const int lane_channel = lane % 4 * OCTET;
    float scale[2][OCTET / 4][4], residual[2][OCTET / 4][4];
    const auto load = [&](int column) {
#pragma unroll
        for (int i = 0; i < OCTET / 4; ++i) {
            const u32 at = (column + lane_channel + 4 * i) * sizeof(float);
            load_shared_floats(scale[column / 32 % 2][i], v_scales + at);
            if constexpr (V_RESIDUALS) load_shared_floats(residual[column / 32 % 2][i], residuals + at);
        }
    };
    // Ahead of the stores that wait for these; stores of cut octets leave no registers for it.
    constexpr int AHEAD = CUT_OCTET ? 0 : 32;
    if (AHEAD > 0) load(0);
#pragma unroll
    for (int column = 0; column < HEAD_DIM; column += 32) {
        if (column + AHEAD < HEAD_DIM) load(column + AHEAD);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float x[OCTET];
#pragma unroll
            for (int i = 0; i < OCTET; ++i) {
                const float sum = output[column / 2 + 4 * (i / 2) + 2 * h + i % 2];
                const float addend = V_RESIDUALS ? residual[column / 32 % 2][i / 4][i % 4] : -V_OFFSET;
                x[i] = fmaf(sum, normalize[h], addend) * scale[column / 32 % 2][i / 4][i % 4];
            }
            // Rounded weights and a mean of its own can lead out of the range of V, and O's type may end there.
            store_finite_octet(IN_T{}, o_row[h], x, column + lane_channel, params.head_dim);
        }
    }
}

/// LSE = ln(sum of P) + reference, in natural units, and what smoothing took away. -inf for a row without keys.
DEVICE void store_lse(const AttnParams& params, const Work& work, i32 first_row, const RowState& rows) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const u32 row = first_row + row_of_thread(h);
        const float sum = quad_sum(rows.unrounded[h]);
        const float mean_part = mean_logit(params, work, query_row(params, params.q, params.q_stride, work, row), lane);
        const float logarithm = sum > 0.f ? (rows.reference[h] + (log2_approx(sum) - UNROUNDED_LOG2)) * LN_2 + mean_part : -__int_as_float(0x7f800000);
        if (row < params.q_len && lane % 4 == 0) params.lse[(static_cast<u64>(work.batch) * params.q_heads + work.head) * params.q_len + row] = logarithm;
    }
}

DEVICE void consume(const AttnParams& params, Pipeline pipeline, int warpgroup) {
    const TileRing ring = pipeline.tiles();
    const u32 slab = pipeline.shared + warpgroup * Q_SLAB;
    const u64 q = operand_descriptor<HEAD_DIM>(slab);
    const u64 k_stages = operand_descriptor<HEAD_DIM>(pipeline.shared + K_AT);
    const u64 v_stages = operand_descriptor<TILE_KEYS>(pipeline.shared + V_AT);
    const u64 ones = operand_descriptor<32>(pipeline.shared + ONES_AT);
    const Turns<CONSUMERS, TURNS> turns{static_cast<u32>(warpgroup)};
    const ResidualRing residual_ring = pipeline.residual(warpgroup);
    TileCursor at;
    WorkCursor work_at;
    Scores scores;
    // What turns a score times a K scale into a base-2 logit; a score of the current tile.
    float q_multiplier = 0.f, multiplier = 0.f;
    // INT8_PV: whether a logit of this warp's may be so large that P must be kept in range.
    bool may_be_coarse = false;
    // The work's first scores have been computed behind the last tile of the work before.
    bool begun = false;
    turns.open();

    const auto issue_qk = [&]() {
        wgmma_fence();
        multiply_qk(scores, q, descriptor_at(k_stages, at.stage() * TILE_BYTES));
        wgmma_commit();
    };
    const auto k_multiplier = [&]() {
        const u32 scale = pipeline.shared + SCALES_AT + at.stage() * SCALE_BYTES + threadIdx.x % 4 * sizeof(float);
        const float c = fminf(q_multiplier * load_shared_float(scale), LARGEST_MULTIPLIER);
        if constexpr (INT8_PV) may_be_coarse = any_lane(c > LARGEST_FINE_MULTIPLIER);
        return c;
    };

    for (;; work_at.advance()) {
        pipeline.work().wait(work_at);
        const Work work = work_in_slot(pipeline, work_at);
        if (work.batch >= params.batch) break;
        const i32 first_row = work.row + warpgroup * ROWS;
        const int own_tiles = visible_tiles(params, first_row);
        const int whole_tiles = unmasked_tiles(params, first_row);
        Partial apart = {};
        Partial& partial = APART ? apart : scores[0];
        float output[HEAD_DIM / 2] = {};
        RowState rows;
        // By which what was summed before this tile is multiplied; O takes it when T is added, or at once where that is rare.
        float shrink[2] = {1.f, 1.f};
        // INT8_PV: by which the tile's T is multiplied.
        float weight[2];

        const auto add_pv = [&](const u32 (&p)[16], auto panel) {
            constexpr int n = decltype(panel)::value;
            constexpr bool with_sums = RUNNING_MAX && !INT8_PV && n == PANELS - 1;
            i32 sums[4];
            wgmma_fence();
            if constexpr (with_sums) multiply_p_ones(sums, p, ones);
            multiply_pv(partial, p, descriptor_at(v_stages, at.stage() * TILE_BYTES + n * (PANEL * TILE_KEYS)));
            wgmma_commit();
            wgmma_wait<0>();
            wgmma_result(partial);
            if constexpr (with_sums) wgmma_result(sums);
#pragma unroll
            for (int i = 0; i < PANEL_WORDS; ++i) {
                float& sum = output[n * PANEL_WORDS + i];
                const float addend = __int_as_float(partial[i]);
                const int row = fragment_row(i);
                sum = INT8_PV ? fmaf(addend, weight[row], sum) : RUNNING_MAX ? fmaf(sum, shrink[row], addend) : sum + addend;
            }
            if constexpr (with_sums) {
#pragma unroll
                for (int row = 0; row < 2; ++row) rows.sum[row] = fmaf(rows.sum[row], shrink[row], __int_as_float(sums[2 * row]));
            }
        };
        const auto last_columns = [&](i32 (&last)[2], int tile) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const i32 key = last_visible_key<CAUSAL>(first_row + row_of_thread(h), params.diagonal, params.kv_len);
                last[h] = key - tile * TILE_KEYS - 2 * (threadIdx.x % 4);
            }
        };
        // T, where it is apart, to O.
        const auto merge_partial = [&]() {
#pragma unroll
            for (int i = 0; i < PANEL_WORDS; ++i) output[i] += __int_as_float(partial[i]);
        };
        // A row's reference is not lower than its first tile asks for; O is not there yet, or shrinks.
        const auto raise = [&](auto masked, const bool (&must)[2], const Logits& logits, const i32 (&last)[2], int tile) {
            float top[2];
            largest_scores<decltype(masked)::value>(top, logits, last);
            raise_reference<decltype(masked)::value>(shrink, rows, must, top, multiplier);
            if (APART && tile % TILES_OF_PARTIAL > 0) {
                // T is then 0 and still added to: whether it is must be the same in all warps of the warpgroup, and not all come here.
                merge_partial();
#pragma unroll
                for (auto& word : partial) word = 0;
            }
#pragma unroll
            for (int i = 0; i < HEAD_DIM / 2; ++i) output[i] *= shrink[fragment_row(i)];
        };
        // P, and the state of its rows.
        const auto softmax = [&](auto masked, u32 (&p)[16], int tile) {
            constexpr bool is_masked = decltype(masked)::value;
            i32 last[2];
            float unrounded[2];
            Logits logits;
            if constexpr (is_masked) last_columns(last, tile);
            if constexpr (INT8_PV) {
                TileMaximum maximum;
                u32 sums[2];
                const auto step = [&](auto coarse) {
                    i32 top[2];
                    largest_scores<is_masked>(top, scores, last);
                    scores_to_float(logits, scores);
                    maximum = {largest_logit<is_masked>(to_float(top[0]), multiplier), largest_logit<is_masked>(to_float(top[1]), multiplier)};
                    exponentials_u8<is_masked, decltype(coarse)::value>(p, sums, unrounded, logits, multiplier, maximum, last);
                };
                if (may_be_coarse) {
                    // Other numbers for all the compiler knows: conversions that both ways share it makes ahead of the branch, and not beside the exponentials.
#pragma unroll
                    for (auto& part : scores) wgmma_result(part);
                    step(Constant<true>{});
                } else {
                    step(Constant<false>{});
                }
                if (any_lane(maximum.is_far(rows))) {
                    maximum.raise_reference(shrink, rows);
#pragma unroll
                    for (int i = 0; i < HEAD_DIM / 2; ++i) output[i] *= shrink[fragment_row(i)];
                }
                add_sums(rows, weight, maximum, sums, unrounded);
            } else if constexpr (RUNNING_MAX) {
                i32 top[2];
                largest_scores<is_masked>(top, scores, last);
                scores_to_float(logits, scores);
                follow_maximum<is_masked>(shrink, rows, top, multiplier);
                exponentials<is_masked, false>(p, unrounded, logits, multiplier, rows.reference, last);
                if constexpr (SUM_UNROUNDED) {
#pragma unroll
                    for (int row = 0; row < 2; ++row) rows.unrounded[row] = fmaf(rows.unrounded[row], shrink[row], fminf(unrounded[row], LARGEST_SUM));
                }
            } else {
                scores_to_float(logits, scores);
                exponentials<is_masked, false>(p, unrounded, logits, multiplier, rows.reference, last);
                if (any_lane(fmaxf(unrounded[0], unrounded[1]) > SAFE_SUM)) {
                    raise(masked, {quad_max(unrounded[0]) > SAFE_SUM, quad_max(unrounded[1]) > SAFE_SUM}, logits, last, tile);
                    exponentials<is_masked, true>(p, unrounded, logits, multiplier, rows.reference, last);
                }
#pragma unroll
                for (int row = 0; row < 2; ++row) rows.unrounded[row] += unrounded[row];
            }
        };
        // Drawn when most tiles of this one have been read: to be asked for no earlier.
        const auto next_work = [&]() {
            WorkCursor next_at = work_at;
            next_at.advance();
            pipeline.work().wait(next_at);
            return work_in_slot(pipeline, next_at);
        };
        // O += P V, and the next scores, as one block of GEMMs in this warpgroup's turn. Nothing else is in it: the others wait. The next scores of the
        // last tile are the first of the next work.
        const auto attend_tile = [&](auto masked, auto last, int tile) {
            constexpr bool is_last = decltype(last)::value;
            u32 p[16];
            // Asked for ahead of the exponentials: behind them nothing would hide the answer's latency.
            const bool is_full = ASKS_EARLY && ring.is_full(at);
            softmax(masked, p, tile);
            // The stage that this one's last V is in belongs to the next work, too, and this warpgroup's rows see nothing there: it stays until then.
            bool keeps = false;
            if constexpr (is_last) {
                if (own_tiles == tiles_of_work(params, work_in_slot(pipeline, work_at))) {
                    const Work next = next_work();
                    keeps = joins(params, next);
                    if (keeps && visible_tiles(params, next.row + warpgroup * ROWS) > 0) {
                        q_multiplier = load_q(params, next, warpgroup, slab);
                        begun = true;
                        keeps = false;
                    }
                }
            }
            if (!is_full) ring.wait(at);
            turns.wait();
            if constexpr (APART) {
                wgmma_fence();
                multiply_pv(partial, p, descriptor_at(v_stages, at.stage() * TILE_BYTES), tile % TILES_OF_PARTIAL > 0);
            } else {
                add_pv(p, Constant<0>{});
                if constexpr (PANELS == 2) add_pv(p, Constant<1>{});
            }
            // Where these are not this warpgroup's next scores, Q meets what lies in K's part of the stage, and nobody reads them: a branch among the GEMMs
            // costs more.
            issue_qk();
            turns.pass();
            multiplier = k_multiplier();
            wgmma_wait<0>();
            if constexpr (APART) wgmma_result(partial);
#pragma unroll
            for (auto& part : scores) wgmma_result(part);
            if (!keeps) {
                // Every lane has read its K scale.
                __syncwarp();
                ring.release(at, elect_one());
                at.advance();
            }
            if (APART && tile % TILES_OF_PARTIAL == TILES_OF_PARTIAL - 1) merge_partial();
        };

        // No more than there are; said to the compiler, it keeps less in local memory.
        const int unmasked = min(whole_tiles, own_tiles);
        if (!begun && tiles_of_work(params, work) > 0) {
            if (own_tiles > 0) q_multiplier = load_q(params, work, warpgroup, slab);
            ring.wait(at);
            if (own_tiles > 0) {
                issue_qk();
                multiplier = k_multiplier();
                wgmma_wait<0>();
#pragma unroll
                for (auto& part : scores) wgmma_result(part);
            }
            __syncwarp();
            ring.release(at, elect_one());
            at.advance();
        }
        if (!RUNNING_MAX && own_tiles > 0) {
            i32 last[2], top[2];
            if (unmasked > 0) {
                largest_scores<false>(top, scores, last);
            } else {
                last_columns(last, 0);
                largest_scores<true>(top, scores, last);
            }
            first_reference(rows, top, multiplier);
        }
        begun = false;
        int tile = 0;
#pragma unroll 1
        for (; tile < min(unmasked, own_tiles - 1); ++tile) attend_tile(Unmasked{}, Constant<false>{}, tile);
#pragma unroll 1
        for (; tile < own_tiles - 1; ++tile) attend_tile(Masked{}, Constant<false>{}, tile);
        if (tile < unmasked) {
            attend_tile(Unmasked{}, Constant<true>{}, tile++);
        } else if (tile < own_tiles) {
            attend_tile(Masked{}, Constant<true>{}, tile++);
        }
        if (APART && own_tiles % TILES_OF_PARTIAL > 0) merge_partial();

        const Work done = work_in_slot(pipeline, work_at);
        // LSE first: it reads Q again, and O takes the registers that it needs.
        if constexpr (LSE) store_lse(params, done, done.row + warpgroup * ROWS, rows);
        if constexpr (V_RESIDUALS) residual_ring.wait(residual_of_work(work_at));
        store_output(params, done, done.row + warpgroup * ROWS, pipeline.shared + V_SCALES_AT + work_at.stage() * CHANNEL_BYTES,
                     pipeline.shared + RESIDUALS_AT + warpgroup * CHANNEL_BYTES, output, rows);
        if constexpr (V_RESIDUALS) residual_ring.release({}, true);
        // Tiles that only later warpgroups of the block see.
        for (const int tiles = tiles_of_work(params, done); tile < tiles; ++tile) {
            // The last one's V may be in one stage with the next work's K.
            if (tile + 1 < tiles || !joins(params, next_work())) {
                ring.wait(at);
                ring.release(at, elect_one());
                at.advance();
            }
            turns.wait();
            turns.pass();
        }
        // Every lane has read V's scales.
        __syncwarp();
        pipeline.work().release(work_at, elect_one());
    }
    turns.close();
}

#if INT8_PV
#define ENTRY attn_i8_i8_sm90
#else
#define ENTRY attn_i8_f8_sm90
#endif
extern "C" __global__ void __launch_bounds__(THREADS, 1) ENTRY(const __grid_constant__ AttnParams params) {
    extern __shared__ __align__(1024) u8 dynamic_shared[];
    const Pipeline pipeline{shared_address(dynamic_shared)};
    const int warpgroup = __shfl_sync(~0u, threadIdx.x / WARPGROUP, 0);
    if (threadIdx.x == 0) {
        if (pipeline.shared % 1024 != 0) __trap();
        pipeline.tiles().init(4 * CONSUMERS);
        // The consumers' warps, and the one that looks ahead.
        pipeline.work().init(4 * CONSUMERS + 1);
        for (int i = 0; i < CONSUMERS; ++i) pipeline.residual(i).init(WARPGROUP, 32);
        mbarrier_init_fence();
    }
    for (u32 at = threadIdx.x * 16; at < ONES_BYTES; at += THREADS * 16) {
        store_shared_16_bytes(pipeline.shared + ONES_AT + at, FOUR_ONES_E4M3, FOUR_ONES_E4M3, FOUR_ONES_E4M3, FOUR_ONES_E4M3);
    }
    fence_async_proxy();
    __syncthreads();
    // Q is the caller's: it does not wait for the preparation.
    if (threadIdx.x / 32 == CONSUMERS * 4 + 1) prefetch_q(params, decode_work(params, blockIdx.x));
    wait_for_previous_launch();

    if (warpgroup == CONSUMERS) {
        release_registers_down_to<PRODUCER_REGISTERS>();
        const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0) % 4;
        if (threadIdx.x == CONSUMERS * WARPGROUP) produce(params, pipeline);
        if (warp == 1) look_ahead(params, pipeline);
    } else {
        take_registers_up_to<CONSUMER_REGISTERS>();
        consume(params, pipeline, warpgroup);
    }
}
