// Attention on 16-bit tensors as they are, on Hopper's warpgroup GEMMs: recipe half. Within a warpgroup the schedule is FlashAttention-3's (2407.08608).
//
//   O[b, h, r, :] = softmax_n(scale q_r . k_n) V,   LSE[b, h, r] = ln sum_n exp(scale q_r . k_n)
//
// Problem   q, o: [batch, q_heads, q_len, head_dim], k, v: [batch, kv_heads, kv_len, head_dim] of IN_T, strided. A work: CONSUMERS x 64 rows of one head.
// Tiles     S = Q K^T: 64 x KEYS a warpgroup.   O += P V: 64 x HEAD_DIM, V read across its rows. Both in f32, in the tensor core's accumulator.
// Roles     one block per multiprocessor walks a fixed sequence of works. Two producer threads copy boxes of the tensors, one Q and K, the other V, through
//           three rings; rows past the last and channels past head_dim arrive as zeros. Each consumer warpgroup has 64 rows of Q.
// Schedule  S of the next tile is asked for before O takes the P V of this one, so that exponentials run beside P V. The next tile may be the first of the
//           next work: while O is stored, its scores are on their way. That work is looked up, and its Q taken, beside the last scores of this one.
// Shared    Q [Q_SLOTS][CONSUMERS x 64 x HEAD_DIM] | K [K_STAGES][KEYS x HEAD_DIM] | V [V_STAGES][KEYS x HEAD_DIM] | barriers
// Constants HEAD_DIM 64, 128, 256; IN_T F16, Bf16; CAUSAL, LSE, CUT_OCTET 0 or 1; CONSUMERS, KEYS, Q_SLOTS, K_STAGES, V_STAGES, TURNS as in README.md.
#include "abi.cuh"
#include "attn/softmax_half.cuh"
#include "ptx/mma_half.cuh"
#include "ptx/tensor_copy.cuh"
#include "ptx/wgmma_half.cuh"
#include "tile/ring.cuh"
#include "tile/store_rows.cuh"
#include "tile/swizzle.cuh"
#include "tile/turns.cuh"

static_assert(HEAD_DIM == 64 || HEAD_DIM == 128 || HEAD_DIM == 256, "other head dimensions are padded to one of these by the copy engine");
static_assert(IN_T::bytes == 2, "operands of 16 bits");

constexpr int WARPGROUP = 128;
constexpr int ROWS = 64;
constexpr int BLOCK_ROWS = CONSUMERS * ROWS;
constexpr int THREADS = (CONSUMERS + 1) * WARPGROUP;
/// Registers a thread: at launch, and after the roles have parted. A block's pool is what it was launched with, not the multiprocessor's.
constexpr int LAUNCH_REGISTERS = CONSUMERS == 2 ? 168 : 128;
constexpr int PRODUCER_REGISTERS = CONSUMERS == 2 ? 24 : 32;
constexpr int CONSUMER_REGISTERS = CONSUMERS == 2 ? 240 : 160;
static_assert(CONSUMERS * CONSUMER_REGISTERS + PRODUCER_REGISTERS <= (CONSUMERS + 1) * LAUNCH_REGISTERS, "the last warpgroup to ask would wait for ever");

/// Bytes of a row of an operand tile, and of a row of one of the boxes that it consists of.
constexpr int WIDTH = HEAD_DIM * 2;
constexpr int BOX_WIDTH = BOX_CHANNELS * 2;
constexpr int BOXES = HEAD_DIM / BOX_CHANNELS;
constexpr u32 Q_BYTES = BLOCK_ROWS * WIDTH;
constexpr u32 TILE_BYTES = KEYS * WIDTH;
/// Q as A operand from registers spares the shared-memory port a fifth of its reads. At HEAD_DIM 256 there is no room for 64 more registers.
constexpr bool Q_IN_REGISTERS = HEAD_DIM < 256;
/// Channels of one P V GEMM.
constexpr int PANEL = HEAD_DIM < 128 ? HEAD_DIM : 128;
constexpr int PANELS = HEAD_DIM / PANEL;

using QRing = Ring<Q_SLOTS>;
using KRing = Ring<K_STAGES>;
using VRing = Ring<V_STAGES>;

constexpr u32 K_AT = Q_SLOTS * Q_BYTES;
constexpr u32 V_AT = K_AT + K_STAGES * TILE_BYTES;
constexpr u32 Q_RING_AT = V_AT + V_STAGES * TILE_BYTES;
constexpr u32 K_RING_AT = Q_RING_AT + QRing::BYTES;
constexpr u32 V_RING_AT = K_RING_AT + KRing::BYTES;
constexpr u32 SHARED_BYTES = V_RING_AT + VRing::BYTES;
static_assert(SHARED_BYTES <= 232448, "a block has 227 KiB of shared memory");
static_assert(Q_BYTES % 1024 == 0 && TILE_BYTES % 1024 == 0, "swizzle atoms start on 1024 bytes");

/// BLOCK_ROWS rows of one head.
struct Work {
    u32 batch;
    u32 head;
    u32 row;
};

/// The works of one block of threads, in order; producer and consumers walk it alike.
struct Works {
    u32 item;
    bool second;

    DEVICE bool any(const HalfParams& params) const {
        return item < params.items;
    }
    /// With a causal mask an item is two blocks of rows of one head, the i-th from the end and the i-th from the start: all items have as many keys
    /// to see. Where the number of blocks is odd, the middle ones are left over and come last.
    DEVICE Work get(const HalfParams& params) const {
        u32 head, block;
        if constexpr (CAUSAL) {
            const u32 pairs = params.row_blocks / 2;
            const u32 paired = params.heads * pairs;
            if (item < paired) {
                head = item / pairs;
                const u32 pair = item % pairs;
                block = second ? pair : params.row_blocks - 1 - pair;
            } else {
                head = item - paired;
                block = pairs;
            }
        } else {
            head = item / params.row_blocks;
            block = item % params.row_blocks;
        }
        return {head / params.q_heads, head % params.q_heads, block * BLOCK_ROWS};
    }
    DEVICE void advance(const HalfParams& params) {
        if constexpr (CAUSAL) {
            second = !second && item < params.heads * (params.row_blocks / 2);
            if (second) return;
        }
        item += gridDim.x;
    }
};

/// Tiles that the rows of a work see at least one key of, together; at least one, so that every work has an end.
DEVICE int tiles_of_work(const HalfParams& params, const Work& work) {
    const u32 end = work.row + BLOCK_ROWS;
    const i64 last_row = static_cast<i64>(end < params.q_len ? end : params.q_len) - 1;
    const int tiles = (last_visible_key<CAUSAL>(last_row, params.diagonal, params.kv_len) + KEYS) / KEYS;
    return tiles > 1 ? tiles : 1;
}

/// Tiles that rows from `row` on see every key of.
DEVICE int unmasked_tiles(const HalfParams& params, u32 row) {
    return (last_visible_key<CAUSAL>(row, params.diagonal, params.kv_len) + 1) / KEYS;
}

/// A warpgroup's share of a work.
struct Task {
    u32 batch;
    u32 head;
    /// The first of its rows.
    u32 row;
    /// Tiles, which the whole block goes through, and how many of them need no mask.
    int tiles;
    int whole_tiles;
};

DEVICE Task task_of(const HalfParams& params, const Works& works, int warpgroup) {
    const Work work = works.get(params);
    const u32 row = work.row + warpgroup * ROWS;
    return {work.batch, work.head, row, tiles_of_work(params, work), unmasked_tiles(params, row)};
}

struct Pipeline {
    u32 shared;

    DEVICE QRing q() const {
        return {shared + Q_RING_AT};
    }
    DEVICE KRing k() const {
        return {shared + K_RING_AT};
    }
    DEVICE VRing v() const {
        return {shared + V_RING_AT};
    }
};

/// `rows` rows of a head from `row` on, in panels of BOX_CHANNELS channels.
template <int rows>
DEVICE void copy_rows(u32 to, const TensorMap& map, u32 row, u32 head, u32 batch, u32 full) {
#pragma unroll
    for (int box = 0; box < BOXES; ++box) {
        tensor_copy_to_shared(to + box * rows * BOX_WIDTH, map, box * BOX_CHANNELS, static_cast<i32>(row), static_cast<i32>(head), static_cast<i32>(batch), full);
    }
}

DEVICE void produce_q_and_k(const HalfParams& params, Pipeline pipeline) {
    Cursor<Q_SLOTS> q_at;
    Cursor<K_STAGES> k_at;
    for (Works works{blockIdx.x, false}; works.any(params); works.advance(params)) {
        const Work work = works.get(params);
        pipeline.q().open(q_at, Q_BYTES, [&](u32 full) {
            copy_rows<BLOCK_ROWS>(pipeline.shared + q_at.stage() * Q_BYTES, params.q_map, work.row, work.head, work.batch, full);
        });
        q_at.advance();
        const int tiles = tiles_of_work(params, work);
        const u32 kv_head = work.head / params.q_heads_per_kv_head;
        for (int tile = 0; tile < tiles; ++tile) {
            pipeline.k().open(k_at, TILE_BYTES, [&](u32 full) {
                copy_rows<KEYS>(pipeline.shared + K_AT + k_at.stage() * TILE_BYTES, params.k_map, tile * KEYS, kv_head, work.batch, full);
            });
            k_at.advance();
        }
    }
}

DEVICE void produce_v(const HalfParams& params, Pipeline pipeline) {
    Cursor<V_STAGES> v_at;
    for (Works works{blockIdx.x, false}; works.any(params); works.advance(params)) {
        const Work work = works.get(params);
        const int tiles = tiles_of_work(params, work);
        const u32 kv_head = work.head / params.q_heads_per_kv_head;
        for (int tile = 0; tile < tiles; ++tile) {
            pipeline.v().open(v_at, TILE_BYTES, [&](u32 full) {
                copy_rows<KEYS>(pipeline.shared + V_AT + v_at.stage() * TILE_BYTES, params.v_map, tile * KEYS, kv_head, work.batch, full);
            });
            v_at.advance();
        }
    }
}

/// A descriptor moved by sixteenths of bytes. The same in every lane, which a shuffle tells the compiler: descriptors live in uniform registers.
DEVICE u64 moved(u64 descriptor, u32 by) {
    const u32 low = __shfl_sync(~0u, static_cast<u32>(descriptor) + by, 0);
    return descriptor >> 32 << 32 | low;
}

/// Of a warp's 16 rows of Q word i is row lane / 4 + 8 (i % 2), channels 16 `step` + 8 (i / 2) + 2 (lane % 4) and the next.
DEVICE void load_rows(u32 (&word)[4], u32 slot, int warpgroup, int step) {
    const int lane = threadIdx.x % 32;
    const int row = warpgroup * ROWS + threadIdx.x % WARPGROUP / 32 * 16 + lane % 16;
    load_matrices(word, slot + swizzled<BLOCK_ROWS, WIDTH>(row, 32 * step + 16 * (lane / 16)));
}

/// Q of a warpgroup as A operand of the GEMM, taken from where its slot of shared memory holds it.
template <bool in_registers>
struct QOperand;

/// In registers.
template <>
struct QOperand<true> {
    u32 word[HEAD_DIM / 16][4];

    DEVICE void take(u32 slot, int warpgroup) {
#pragma unroll
        for (int step = 0; step < HEAD_DIM / 16; ++step) load_rows(word[step], slot, warpgroup, step);
    }
    DEVICE const u32 (&operand(int step) const)[4] {
        return word[step];
    }
    /// The same of this warp alone.
    DEVICE void fragment(u32 (&rows)[4], int step, u32, int) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) rows[i] = word[step][i];
    }
};

/// In the slot itself, which is in use for as long.
template <>
struct QOperand<false> {
    u64 descriptor;

    DEVICE void take(u32 slot, int warpgroup) {
        descriptor = moved(operand_descriptor<WIDTH>(slot), warpgroup * ROWS * BOX_WIDTH / 16);
    }
    DEVICE u64 operand(int step) const {
        return descriptor + slice_offset<BLOCK_ROWS, WIDTH>(step) / 16;
    }
    DEVICE void fragment(u32 (&rows)[4], int step, u32 slot, int warpgroup) const {
        load_rows(rows, slot, warpgroup, step);
    }
};

/// S = Q K^T.
DEVICE void multiply_qk(float (&scores)[KEYS / 2], const QOperand<Q_IN_REGISTERS>& q, u64 k) {
#pragma unroll
    for (int step = 0; step < HEAD_DIM / 16; ++step) {
        wgmma_scores(IN_T{}, scores, q.operand(step), k + slice_offset<KEYS, WIDTH>(step) / 16, step > 0);
    }
}

/// The same for the 16 rows of one warp, which need not wait for its warpgroup.
DEVICE void multiply_qk_alone(float (&scores)[KEYS / 2], const QOperand<Q_IN_REGISTERS>& q, u32 q_slot, int warpgroup, u32 k) {
    const int lane = lane_here();
    const int key = lane / 16 * 8 + lane % 8, channel_bytes = lane / 8 % 2 * 16;
#pragma unroll
    for (int i = 0; i < KEYS / 2; ++i) scores[i] = 0.f;
    // Only registers need an index that the compiler knows.
    constexpr int unrolled = Q_IN_REGISTERS ? HEAD_DIM / 16 : 1;
#pragma unroll unrolled
    for (int step = 0; step < HEAD_DIM / 16; ++step) {
        u32 rows[4], keys[4];
        q.fragment(rows, step, q_slot, warpgroup);
#pragma unroll
        for (int j = 0; j < KEYS / 16; ++j) {
            load_matrices(keys, k + swizzled<KEYS, WIDTH>(16 * j + key, 32 * step + channel_bytes));
            mma_k16(IN_T{}, scores + 8 * j, rows, keys[0], keys[1]);
            mma_k16(IN_T{}, scores + 8 * j + 4, rows, keys[2], keys[3]);
        }
    }
}

/// O = P V + (accumulate ? O : 0).
DEVICE void multiply_pv(float (&output)[PANELS][PANEL / 2], const u32 (&p)[KEYS / 4], u64 v, bool accumulate) {
#pragma unroll
    for (int panel = 0; panel < PANELS; ++panel) {
#pragma unroll
        for (int slice = 0; slice < KEYS / 16; ++slice) {
            const u64 values = v + (panel * PANEL / BOX_CHANNELS * KEYS * BOX_WIDTH + slice * 16 * BOX_WIDTH) / 16;
            wgmma_values(IN_T{}, output[panel], p[4 * slice], p[4 * slice + 1], p[4 * slice + 2], p[4 * slice + 3], values, slice > 0 || accumulate);
        }
    }
}

/// Row lane / 4 + 8 h of this thread's warp, within its warpgroup.
DEVICE u32 row_of_thread(int h) {
    return threadIdx.x % WARPGROUP / 32 * 16 + threadIdx.x % 32 / 4 + 8 * h;
}

/// O / (sum of P), and LSE. A row without keys has sum 0 and gives 0 and -inf.
DEVICE void store_rows(const HalfParams& params, const Task& task, const float (&output)[PANELS][PANEL / 2], const RowState& rows, float c) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const u32 row = task.row + row_of_thread(h);
        const bool real = row < params.q_len;
        const float sum = quad_sum(rows.sum[h]);
        const float normalize = sum > 0.f ? __fdividef(1.f, sum) : 0.f;
        u8* const o_row = real ? const_cast<u8*>(row_address<IN_T>(params.o, params.o_stride, task.batch, task.head, row)) : nullptr;
#pragma unroll
        for (int column = 0; column < HEAD_DIM; column += 32) {
            float x[8];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int word = column % PANEL / 2 + 4 * i + 2 * h;
                x[2 * i] = output[column / PANEL][word] * normalize;
                x[2 * i + 1] = output[column / PANEL][word + 1] * normalize;
            }
            store_32_columns(IN_T{}, o_row, x, column, params.head_dim, lane);
        }
        if constexpr (LSE) {
            const float logarithm = sum == 0.f ? -__int_as_float(0x7f800000) : (rows.reference[h] * c + log2_approx(sum)) * LN_2;
            if (real && lane % 4 == 0) params.lse[(static_cast<u64>(task.batch) * params.q_heads + task.head) * params.q_len + row] = logarithm;
        }
    }
}

DEVICE void consume(const HalfParams& params, Pipeline pipeline, int warpgroup) {
    const QRing q_ring = pipeline.q();
    const KRing k_ring = pipeline.k();
    const VRing v_ring = pipeline.v();
    const u64 k_stages = operand_descriptor<WIDTH>(pipeline.shared + K_AT);
    const u64 v_stages = transposed_descriptor<KEYS>(pipeline.shared + V_AT);
    Cursor<Q_SLOTS> q_at;
    Cursor<K_STAGES> k_at;
    Cursor<V_STAGES> v_at;
    const Turns<CONSUMERS, TURNS> turns{static_cast<u32>(warpgroup)};
    const bool negative = params.softmax_scale < 0.f;
    const float c = multiplier_of(params.softmax_scale);

    Works works{blockIdx.x, false};
    Task task = task_of(params, works, warpgroup);
    int tile = 0;
    // The one after it. Where registers allow, known from when the last scores of this one are asked for.
    Task next = task;
    bool more = false;

    QOperand<Q_IN_REGISTERS> q;
    float scores[KEYS / 2];
    float output[PANELS][PANEL / 2];
    u32 p[KEYS / 4];
    RowState rows;
    Shrink shrink;

    const auto look_ahead = [&]() {
        works.advance(params);
        more = works.any(params);
        if (more) next = task_of(params, works, warpgroup);
    };
    const auto release_q = [&]() {
        q_ring.release(q_at, elect_one());
        q_at.advance();
    };
    // Q of the current or the next work. Once in registers, its slot is free.
    const auto take_q = [&]() {
        q_ring.wait(q_at);
        q.take(pipeline.shared + q_at.stage() * Q_BYTES, warpgroup);
        if constexpr (Q_IN_REGISTERS) {
            __syncwarp();
            release_q();
        }
    };
    const auto issue_qk = [&]() {
        const u64 k = moved(k_stages, k_at.stage() * (TILE_BYTES / 16));
        wgmma_fence();
        multiply_qk(scores, q, k);
        wgmma_commit();
    };
    const auto hide_keys = [&]() {
        i32 last[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const i32 key = last_visible_key<CAUSAL>(task.row + row_of_thread(h), params.diagonal, params.kv_len);
            last[h] = key - tile * KEYS - 2 * (threadIdx.x % 4);
        }
        mask_scores(scores, last);
    };
    // Whether scores of `tile` need more than their exponentials. Known before they are there, and one branch: nothing hides what stands between the two.
    const auto is_special = [&]() {
        return negative || tile >= task.whole_tiles || rows.fresh || rows.large;
    };
    const auto prepare_scores = [&](bool moves, const bool (&must_move)[2]) {
        if (negative) negate_scores(scores);
        if (tile >= task.whole_tiles) hide_keys();
        if (moves) shrink = move_references(rows, must_move, scores, c);
        return rows.large ? subtract_first(scores, rows, c) : Exponents{c, {rows.reference_or_zero(0) * c, rows.reference_or_zero(1) * c}};
    };
    // Scores of `tile` of the current work, which are complete, to P. Where a P could be out of range they are computed again: the stage of K is still there.
    const auto softmax = [&](bool special) {
        shrink.moved = false;
        Exponents exponents{c, {rows.reference[0] * c, rows.reference[1] * c}};
        if (special) exponents = prepare_scores(rows.fresh, {!rows.has_reference(0), !rows.has_reference(1)});
        float sum[2];
        scores_to_p(scores, sum, exponents);
        // The stage of K could be given back before. But this branch keeps the exponentials ahead of that arrival, and with it of the wait for P V, which
        // ptxas would otherwise move in front of them.
        if (any_lane(fmaxf(sum[0], sum[1]) > SAFE_SUM)) {
            const bool unsafe[2] = {quad_max(sum[0]) > SAFE_SUM, quad_max(sum[1]) > SAFE_SUM};
            wgmma_wait<0>();
            multiply_qk_alone(scores, q, pipeline.shared + q_at.stage() * Q_BYTES, warpgroup, pipeline.shared + K_AT + k_at.stage() * TILE_BYTES);
            scores_to_p(scores, sum, prepare_scores(true, unsafe));
            // Every lane has read K.
            __syncwarp();
        }
#pragma unroll
        for (int row = 0; row < 2; ++row) rows.sum[row] += sum[row];
        k_ring.release(k_at, elect_one());
        k_at.advance();
        if (tile + 1 == task.tiles) {
            if constexpr (!Q_IN_REGISTERS) {
                release_q();
            } else if (more) {
                take_q();
            }
        }
    };
    const auto pack = [&]() {
#pragma unroll
        for (int i = 0; i < KEYS / 4; ++i) p[i] = pack_pair(IN_T{}, scores[2 * i], scores[2 * i + 1]);
    };
    const auto issue_pv = [&](bool accumulate) {
        multiply_pv(output, p, moved(v_stages, v_at.stage() * (TILE_BYTES / 16)), accumulate);
        wgmma_commit();
    };
    const auto finish_pv = [&]() {
        wgmma_wait<0>();
#pragma unroll
        for (int panel = 0; panel < PANELS; ++panel) wgmma_result(output[panel]);
        v_ring.release(v_at, elect_one());
        v_at.advance();
    };

    turns.open();
    take_q();
    k_ring.wait(k_at);
    issue_qk();
    if (Q_IN_REGISTERS && task.tiles == 1) look_ahead();
    wgmma_wait<0>();
    wgmma_result(scores);
    softmax(true);
    pack();

    // P of a tile is there, and the next scores are asked for before it is multiplied: also across works.
#pragma unroll 1
    for (;;) {
        const bool accumulate = tile > 0;
        const bool ends = tile + 1 == task.tiles;
        const Task done = task;
        const RowState done_rows = rows;
        ++tile;
        if (ends) {
            if constexpr (!Q_IN_REGISTERS) look_ahead();
            if (!more) break;
            task = next;
            tile = 0;
            rows = RowState{};
            if constexpr (!Q_IN_REGISTERS) take_q();
        }
        k_ring.wait(k_at);
        v_ring.wait(v_at);
        turns.wait();
        issue_qk();
        issue_pv(accumulate);
        turns.pass();
        if (Q_IN_REGISTERS && tile + 1 == task.tiles) look_ahead();
        const bool special = is_special();
        wgmma_wait<1>();
        wgmma_result(scores);
        softmax(special);
        finish_pv();
        if (ends) {
            store_rows(params, done, output, done_rows, c);
        } else if (shrink.moved) {
#pragma unroll
            for (int panel = 0; panel < PANELS; ++panel) {
#pragma unroll
                for (int i = 0; i < PANEL / 2; ++i) output[panel][i] *= shrink.by[fragment_row(i)];
            }
        }
        pack();
    }
    turns.close();
    v_ring.wait(v_at);
    wgmma_fence();
    issue_pv(tile > 1);
    finish_pv();
    store_rows(params, task, output, rows, c);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attn_half_sm90(const __grid_constant__ HalfParams params) {
    extern __shared__ __align__(1024) u8 dynamic_shared[];
    const Pipeline pipeline{shared_address(dynamic_shared)};
    const int warpgroup = __shfl_sync(~0u, threadIdx.x / WARPGROUP, 0);
    if (threadIdx.x == 0) {
        if (pipeline.shared % 1024 != 0) __trap();
        pipeline.q().init(4 * CONSUMERS);
        pipeline.k().init(4 * CONSUMERS);
        pipeline.v().init(4 * CONSUMERS);
        mbarrier_init_fence();
        prefetch_tensor_map(params.q_map);
        prefetch_tensor_map(params.k_map);
        prefetch_tensor_map(params.v_map);
    }
    __syncthreads();

    if (warpgroup == CONSUMERS) {
        release_registers_down_to<PRODUCER_REGISTERS>();
        if (threadIdx.x == CONSUMERS * WARPGROUP) produce_q_and_k(params, pipeline);
        if (threadIdx.x == CONSUMERS * WARPGROUP + 32) produce_v(params, pipeline);
    } else {
        take_registers_up_to<CONSUMER_REGISTERS>();
        consume(params, pipeline, warpgroup);
    }
}
