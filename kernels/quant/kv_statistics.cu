// First launch of the preparation: what the quantizers must know about all keys of a head before they can encode one of them.
//
//   k_sums[h, piece, :]   = sum of the piece's (sampled) keys      SageAttention (2410.02367), section 4.2: K is smoothed by its mean
//   v_maxima[h, piece, :] = max |v| over the piece's keys          SageAttention2 (2411.10958), section 3.2: V is scaled per channel
//
// Problem   k, v: [batch, kv_heads, kv_len, head_dim] of IN_T, strided. Pieces are joined in kv_encode, in order: no atomics, so that the mean is
//           the same bits every time.
// Grid      batch * kv_heads * pieces * 2 blocks of 256 threads: even ones read K, odd ones V.
// Tiles     a thread owns eight channels and every ROW_STEPth key of the piece; the ROW_STEP partial rows meet in shared memory.
// Constants HEAD_DIM 64, 128, 256; IN_T F16, Bf16, F32; SMOOTH 0 (k_sums is not written) or 1.
#include "abi.cuh"
#include "ptx/sync.cuh"
#include "quant/operations.cuh"
#include "tile/elements.cuh"

constexpr int THREADS = 256;
constexpr int OCTETS = HEAD_DIM / OCTET;
constexpr int ROW_STEP = THREADS / OCTETS;
/// Keys that a thread has in flight: 8 loads of 16 bytes a thread keep the memory busy.
constexpr int IN_FLIGHT = 8;
static_assert(THREADS % OCTETS == 0 && HEAD_DIM <= THREADS, "one thread for each channel of the result");

using PartialRows = float[ROW_STEP][HEAD_DIM];

/// Joins keys `key(i)`, begin <= i < end, into one row.
template <class Operation, class Key>
DEVICE void reduce_keys(float* result, PartialRows& partial, const void* base, const i64 (&stride)[3], i64 batch, i64 head, int head_dim, u32 begin, u32 end, Key key) {
    const int octet = threadIdx.x % OCTETS;
    const int lane_row = threadIdx.x / OCTETS;
    float total[OCTET] = {};
    for (u32 first = begin + lane_row; first < end; first += IN_FLIGHT * ROW_STEP) {
        RawOctet<IN_T> raw[IN_FLIGHT];
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; ++i) {
            const u32 at = first + i * ROW_STEP;
            raw[i] = load_octet<IN_T>(row_address<IN_T>(base, stride, batch, head, key(at)), octet, head_dim, at < end);
        }
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; ++i) {
            float x[OCTET];
            widen(x, raw[i]);
#pragma unroll
            for (int e = 0; e < OCTET; ++e) total[e] = Operation::join(total[e], x[e]);
        }
    }
#pragma unroll
    for (int e = 0; e < OCTET; ++e) partial[lane_row][octet * OCTET + e] = total[e];
    __syncthreads();
    if (threadIdx.x < HEAD_DIM) {
        float joined = 0.f;
        for (int row = 0; row < ROW_STEP; ++row) joined = Operation::join(joined, partial[row][threadIdx.x]);
        result[threadIdx.x] = joined;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) kv_statistics(const __grid_constant__ PrepareParams params) {
    __shared__ PartialRows partial;
    allow_next_launch();
    const bool is_v = blockIdx.x % 2;
    const u32 piece = blockIdx.x / 2 % params.pieces;
    const u32 head = blockIdx.x / 2 / params.pieces;
    const u32 batch = head / params.kv_heads;
    const u32 kv_head = head % params.kv_heads;
    const u64 result = (static_cast<u64>(head) * params.pieces + piece) * HEAD_DIM;
    const u32 begin = piece * params.tiles_per_piece * TILE_KEYS;
    const u32 end = min(params.kv_len, begin + params.tiles_per_piece * TILE_KEYS);
    if (is_v) {
        reduce_keys<LargestMagnitude>(params.v_maxima + result, partial, params.v, params.v_stride, batch, kv_head, params.head_dim, begin, end,
                                      [](u32 i) { return static_cast<i64>(i); });
        return;
    }
    if constexpr (!SMOOTH) return;
    if (params.samples == params.kv_len) {
        reduce_keys<Add>(params.k_sums + result, partial, params.k, params.k_stride, batch, kv_head, params.head_dim, begin, end,
                         [](u32 i) { return static_cast<i64>(i); });
        return;
    }
    const u32 share = (params.samples + params.pieces - 1) / params.pieces;
    const u32 first = min(params.samples, piece * share);
    reduce_keys<Add>(params.k_sums + result, partial, params.k, params.k_stride, batch, kv_head, params.head_dim, first, min(params.samples, first + share),
                     [&](u32 i) { return static_cast<i64>(static_cast<u64>(i) * params.kv_len / params.samples); });
}
