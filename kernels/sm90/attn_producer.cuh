// What the producer's warpgroup of attn_i8_f8.cu does: one thread draws works and streams their tiles, one warp looks ahead.
#pragma once
#include "ptx/bulk_copy.cuh"
#include "quant/v_codes.cuh"
#include "sm90/attn_block.cuh"

/// Draws works until there are none, publishes each with its channel scales of V, and streams its tiles.
DEVICE void produce(const AttnParams& params, Pipeline pipeline) {
    const TileRing ring = pipeline.tiles();
    TileCursor at;
    WorkCursor work_at;
    const auto publish = [&](u32 index) {
        const Work work = decode_work(params, index);
        const bool any = work.batch < params.batch;
        pipeline.work().open(work_at, any ? CHANNEL_BYTES : 0, [&](u32 full) {
            store_shared_16_bytes(pipeline.shared + WORK_AT + work_at.stage() * sizeof(Work), work.batch, work.head, work.kv_head, work.row);
            if (!any) return;
            const u32 to = pipeline.shared + V_SCALES_AT + work_at.stage() * CHANNEL_BYTES;
            bulk_copy_to_shared(to, params.v_scales + static_cast<u64>(work.kv_head) * HEAD_DIM, CHANNEL_BYTES, full);
        });
        work_at.advance();
        return work;
    };
    const auto copy_v = [&](u64 tile, u32 full) {
        bulk_copy_to_shared(pipeline.shared + V_AT + at.stage() * TILE_BYTES, params.v_codes + tile * TILE_BYTES, TILE_BYTES, full);
    };
    // Whether V of the last tile is still to be copied.
    bool owes_v = false;
    u64 last_v = 0;
    u32 index = blockIdx.x;
    for (Work work = publish(index); work.batch < params.batch;) {
        const bool first = index == blockIdx.x;
        const u64 head = static_cast<u64>(work.kv_head) * params.tiles;
        const int tiles = tiles_of_work(params, work);
        // Once more than there are tiles, so that a work without tiles is followed by another, too.
        for (int tile = 0; tile <= tiles; ++tile) {
            if (tile == max(tiles - DRAW_AHEAD, 0)) {
                index = gridDim.x + atomic_increment(params.next_work, count_of_works(params) - 1);
                work = publish(index);
            }
            if (tile == tiles) break;
            // At the launch all multiprocessors ask at once: Q and the first K come first, then the second stage, then all others. (One stage is opened
            // when the one before has been read, in any case, and that barrier may be two phases on.)
            if (tile == 1 && first) mbarrier_wait(ring.full(0), 0);
            if (STAGES > 1 && tile == 2 && first) mbarrier_wait(ring.empty(0), 0);
            ring.open(at, TILE_BYTES + SCALE_BYTES + (owes_v ? TILE_BYTES : 0), [&](u32 full) {
                if (owes_v) copy_v(last_v, full);
                bulk_copy_to_shared(pipeline.shared + K_AT + at.stage() * TILE_BYTES, params.k_codes + (head + tile) * TILE_BYTES, TILE_BYTES, full);
                bulk_copy_to_shared(pipeline.shared + SCALES_AT + at.stage() * SCALE_BYTES, params.k_scales + (head + tile) * K_GROUPS, SCALE_BYTES, full);
            });
            at.advance();
            owes_v = true;
            last_v = head + tile;
        }
        // Nothing follows, or not at once: readers would wait for works that cannot be published before they have read this.
        if (owes_v && !joins(params, work)) {
            ring.open(at, TILE_BYTES, [&](u32 full) { copy_v(last_v, full); });
            at.advance();
            owes_v = false;
        }
    }
}

/// Rows of a work's Q towards L2, by a warp: a line a lane.
DEVICE void prefetch_q(const AttnParams& params, const Work& work) {
    constexpr int LINE = 128;
    const u32 bytes = params.head_dim * IN_T::bytes;
    if (work.batch >= params.batch) return;
    for (u32 at = threadIdx.x % 32 * LINE;; at += 32 * LINE) {
        const u32 row = at / (HEAD_DIM * IN_T::bytes), within = at % (HEAD_DIM * IN_T::bytes);
        if (row >= CONSUMERS * ROWS) return;
        const u8* const from = query_row(params, params.q, params.q_stride, work, work.row + row);
        if (from && within < bytes) prefetch_to_l2(from + within);
    }
}

/// For each warpgroup, what rounding took from V, as a mean over the keys of the tiles that its rows see, by a warp.
DEVICE void average_residuals(const AttnParams& params, Pipeline pipeline, const Work& work, WorkCursor work_at) {
    constexpr int CHANNELS = HEAD_DIM / 32;
    constexpr int VECTOR = CHANNELS < 4 ? CHANNELS : 4;
    /// Tiles whose loads are in flight together: as many as the producer's few registers hold, and still faster than tiles are multiplied.
    constexpr int AHEAD = 8 / CHANNELS;
    const u32 first_channel = threadIdx.x % 32 * VECTOR;
    const float* from = params.v_residuals + static_cast<u64>(work.kv_head) * params.tiles * HEAD_DIM + first_channel;
    float sum[CHANNELS] = {};
    int tile = 0;
    for (int warpgroup = 0; warpgroup < CONSUMERS; ++warpgroup) {
        const int tiles = visible_tiles(params, work.row + warpgroup * ROWS);
#pragma unroll AHEAD
        for (; tile < tiles; ++tile, from += HEAD_DIM) {
#pragma unroll
            for (int i = 0; i < CHANNELS; i += VECTOR) {
                float x[VECTOR];
                load_floats(x, from + 32 * i);
#pragma unroll
                for (int e = 0; e < VECTOR; ++e) sum[i + e] += x[e];
            }
        }
        const u32 keys = min(static_cast<u32>(tiles) * TILE_KEYS, params.kv_len);
        const float inverse = keys > 0 ? __fdividef(1.f, static_cast<float>(keys)) : 0.f;
        const ResidualRing ring = pipeline.residual(warpgroup);
        mbarrier_wait(ring.empty(0), residual_of_work(work_at).parity() ^ 1);
#pragma unroll
        for (int i = 0; i < CHANNELS; i += 2) {
            const u32 channel = first_channel + i / VECTOR * VECTOR * 32 + i % VECTOR;
            const u32 to = pipeline.shared + RESIDUALS_AT + warpgroup * CHANNEL_BYTES + channel * sizeof(float);
            store_shared_8_bytes(to, __float_as_uint(sum[i] * inverse), __float_as_uint(sum[i + 1] * inverse));
        }
        mbarrier_arrive(ring.full(0));
    }
}

/// A warp's way through the works, ahead of the consumers: Q towards L2, and V's mean residuals.
DEVICE void look_ahead(const AttnParams& params, Pipeline pipeline) {
    bool first = true;
    for (WorkCursor work_at;; work_at.advance()) {
        pipeline.work().wait(work_at);
        const Work work = work_in_slot(pipeline, work_at);
        if (work.batch >= params.batch) return;
        // The first work's has been asked for, and without a tile nobody wants it.
        if (!first && tiles_of_work(params, work) > 0) prefetch_q(params, work);
        first = false;
        if constexpr (V_RESIDUALS) average_residuals(params, pipeline, work, work_at);
        __syncwarp();
        pipeline.work().release(work_at, elect_one());
    }
}
