// What the warps of a block of attn_i8_f8.cu share: its works, its shared memory and the rings in that.
#pragma once
#include "abi.cuh"
#include "attn/mask.cuh"
#include "ptx/memory.cuh"
#include "tile/elements.cuh"
#include "tile/ring.cuh"

constexpr int WARPGROUP = 128;
constexpr int ROWS = 64;
constexpr int THREADS = (CONSUMERS + 1) * WARPGROUP;
/// Registers a thread after the roles have parted; the pool is 65536.
constexpr int PRODUCER_REGISTERS = CONSUMERS == 2 ? 24 : 32;
constexpr int CONSUMER_REGISTERS = CONSUMERS == 2 ? 240 : 160;
/// What a block is given at its launch, which is all that its warpgroups can share out.
constexpr int LAUNCH_REGISTERS = 65536 / THREADS / 8 * 8;
static_assert(CONSUMERS * CONSUMER_REGISTERS + PRODUCER_REGISTERS <= (CONSUMERS + 1) * LAUNCH_REGISTERS, "the last warpgroup to ask would wait for ever");

constexpr u32 TILE_BYTES = TILE_KEYS * HEAD_DIM;
constexpr u32 SCALE_BYTES = K_GROUPS * sizeof(float);

/// A stage holds K of a tile and V of the one before, which are multiplied in the same turn: in one stream over all works of a block, of which the first
/// stage has no V, and what comes before a work without tiles, or at the end, no K.
using TileRing = Ring<STAGES>;
using TileCursor = Cursor<STAGES>;
/// The producer draws a work while it streams the tiles of the one before, which may be the one behind that which the consumers are at.
constexpr int WORK_SLOTS = 4;
/// Tiles before the end of a work's copies at which the next work is drawn: its Q is then in L2 when it is needed, and blocks still end together.
constexpr int DRAW_AHEAD = 4;
using WorkRing = Ring<WORK_SLOTS>;
using WorkCursor = Cursor<WORK_SLOTS>;
/// V's mean residuals of a warpgroup's rows. Every thread on either side arrives for itself, which orders its own reads and writes; once a work, that
/// costs nothing.
using ResidualRing = Ring<1>;

/// CONSUMERS x 64 rows of one head. `batch` is past the last where there is no work left. A row below 0 is no row, like one past the last.
struct Work {
    u32 batch;
    u32 head;
    u32 kv_head;
    i32 row;
};
static_assert(sizeof(Work) == 16, "one load");

constexpr u32 Q_SLAB = ROWS * HEAD_DIM;
constexpr u32 K_AT = CONSUMERS * Q_SLAB;
constexpr u32 V_AT = K_AT + STAGES * TILE_BYTES;
/// 32 keys of eight channels of V that are one everywhere: P times them is the sum of P.
constexpr u32 ONES_AT = V_AT + STAGES * TILE_BYTES;
constexpr u32 ONES_BYTES = 8 * 32;
constexpr u32 RESIDUALS_AT = ONES_AT + ONES_BYTES;
constexpr u32 CHANNEL_BYTES = HEAD_DIM * sizeof(float);
constexpr u32 V_SCALES_AT = RESIDUALS_AT + CONSUMERS * CHANNEL_BYTES;
constexpr u32 WORK_AT = V_SCALES_AT + WORK_SLOTS * CHANNEL_BYTES;
constexpr u32 SCALES_AT = WORK_AT + WORK_SLOTS * sizeof(Work);
constexpr u32 TILE_RING_AT = SCALES_AT + STAGES * SCALE_BYTES;
constexpr u32 WORK_RING_AT = TILE_RING_AT + TileRing::BYTES;
constexpr u32 RESIDUAL_RINGS_AT = WORK_RING_AT + WorkRing::BYTES;
constexpr u32 SHARED_BYTES = RESIDUAL_RINGS_AT + CONSUMERS * ResidualRing::BYTES;
static_assert(WORK_AT % 16 == 0 && V_SCALES_AT % 16 == 0, "16-byte loads and copies");
static_assert(SHARED_BYTES <= 232448, "a block has 227 KiB of shared memory");
static_assert(Q_SLAB % 1024 == 0 && TILE_BYTES % 1024 == 0, "swizzle atoms start on 1024 bytes");

/// Blocks of rows, over all heads.
DEVICE u32 count_of_works(const AttnParams& params) {
    return params.batch * params.q_heads * params.row_blocks;
}

/// Blocks of rows end with the head's last 64: it is the first block that may have fewer, the one that sees the fewest keys. Such blocks come last, when
/// a multiprocessor has room for a small work.
DEVICE Work decode_work(const AttnParams& params, u32 index) {
    const u32 heads = params.batch * params.q_heads;
    const i32 slabs = (params.q_len + ROWS - 1) / ROWS;
    const i32 missing = params.row_blocks * CONSUMERS - slabs;
    const u32 whole_blocks = params.row_blocks - (missing > 0 ? 1 : 0);
    u32 head, block = 0;
    if (index < heads * whole_blocks) {
        // With a causal mask the last rows see the most keys: the longest works of these heads start first.
        const u32 first_head = index / (params.heads_together * whole_blocks) * params.heads_together;
        const u32 together = min(params.heads_together, heads - first_head);
        const u32 within = index - first_head * whole_blocks;
        head = first_head + within % together;
        block = params.row_blocks - 1 - within / together;
    } else {
        head = index - heads * whole_blocks;
    }
    Work work;
    work.batch = index < count_of_works(params) ? head / params.q_heads : params.batch;
    work.head = head % params.q_heads;
    work.kv_head = work.batch * (params.q_heads / params.q_heads_per_kv_head) + work.head / params.q_heads_per_kv_head;
    work.row = (static_cast<i32>(block * CONSUMERS) - missing) * ROWS;
    return work;
}

/// Tiles that rows [row, row + ROWS) see at least one key of. Rows past the head's last do not count.
DEVICE int visible_tiles(const AttnParams& params, i32 row) {
    if (row < 0) return 0;
    const u32 last_row = min(static_cast<u32>(row) + ROWS, params.q_len) - 1;
    return (last_visible_key<CAUSAL>(last_row, params.diagonal, params.kv_len) + TILE_KEYS) / TILE_KEYS;
}

/// Tiles that rows [row, row + ROWS) see every key of.
DEVICE int unmasked_tiles(const AttnParams& params, i32 row) {
    return (last_visible_key<CAUSAL>(row, params.diagonal, params.kv_len) + 1) / TILE_KEYS;
}

/// Tiles that the rows of a work see, together: those that its last rows see.
DEVICE int tiles_of_work(const AttnParams& params, const Work& work) {
    return visible_tiles(params, work.row + (CONSUMERS - 1) * ROWS);
}

/// Whether a work's first tile of K is in one stage with the last tile of V of the work before.
DEVICE bool joins(const AttnParams& params, const Work& work) {
    return work.batch < params.batch && tiles_of_work(params, work) > 0;
}

/// The rings of a block and what they carry.
struct Pipeline {
    u32 shared;

    DEVICE TileRing tiles() const {
        return {shared + TILE_RING_AT};
    }
    DEVICE WorkRing work() const {
        return {shared + WORK_RING_AT};
    }
    DEVICE ResidualRing residual(int warpgroup) const {
        return {shared + RESIDUAL_RINGS_AT + warpgroup * ResidualRing::BYTES};
    }
};

/// The work in a slot, read again when it is needed: kept across the loop it would cost the registers that the loop has not got.
DEVICE Work work_in_slot(Pipeline pipeline, WorkCursor at) {
    u32 word[4];
    load_shared_16_bytes(word, pipeline.shared + WORK_AT + at.stage() * sizeof(Work));
    // The same in every lane, which a shuffle tells the compiler.
    return {__shfl_sync(~0u, word[0], 0), __shfl_sync(~0u, word[1], 0), __shfl_sync(~0u, word[2], 0), static_cast<i32>(__shfl_sync(~0u, word[3], 0))};
}

/// Each work uses the one stage of a warpgroup's residuals once.
DEVICE Cursor<1> residual_of_work(WorkCursor at) {
    static_assert((WORK_SLOTS & (WORK_SLOTS - 1)) == 0, "the cursor counts works");
    return {at.count};
}

/// Address of a query's row in q or o, null past the last and (as unsigned) before the first.
DEVICE u8* query_row(const AttnParams& params, const void* base, const i64 (&stride)[3], const Work& work, u32 row) {
    return row < params.q_len ? const_cast<u8*>(row_address<IN_T>(base, stride, work.batch, work.head, row)) : nullptr;
}
