// What host and device agree on. Twin of src/abi.rs: same structs, same order, same sizes.
//
// Strides count elements, in the order batch, head, row; the head dimension has stride 1. Rows of the caller's tensors start on 16 bytes.
// The codes are private to these kernels: whole tiles of 128 keys, each laid out as the tensor core reads it (tile/swizzle.cuh), so that a tile is
// one contiguous copy. README.md gives every range's size and the address of a single code.
#pragma once
#include "ptx/tensor_copy.cuh"
#include "ptx/types.cuh"

/// Keys in one tile of codes, and in one step of the attention loop.
constexpr int TILE_KEYS = 128;
/// K scale groups in a tile of keys: key n is in group (n % 8) / 2.
constexpr int K_GROUPS = 4;
/// Most pieces into which the keys of one head are cut for the sums of the first launch.
constexpr int MAX_PIECES = 32;
/// Channels of 16 bits that fill a swizzled row of shared memory: attn_half_sm90 copies tiles in boxes of as many.
constexpr int BOX_CHANNELS = 64;

/// Parameters of `kv_statistics`, `kv_encode` and `kv_prepare_sm90`.
struct PrepareParams {
    /// [batch, kv_heads, kv_len, head_dim], elements of IN_T.
    const void* k;
    const void* v;
    /// [batch * kv_heads, pieces, HEAD_DIM]: sum of the sampled keys, largest |V|, one row a piece.
    float* k_sums;
    float* v_maxima;
    /// [batch * kv_heads, HEAD_DIM]: what was subtracted from every key; 0 without smoothing.
    float* k_mean;
    /// [batch * kv_heads, HEAD_DIM].
    float* v_scales;
    /// [batch * kv_heads, tiles, HEAD_DIM]: sum over the tile's keys of v / scale - code.
    float* v_residuals;
    /// [batch * kv_heads, tiles, 4].
    float* k_scales;
    /// [batch * kv_heads, tiles, 128 * HEAD_DIM bytes].
    u8* k_codes;
    u8* v_codes;
    i64 k_stride[3];
    i64 v_stride[3];
    u32 kv_heads;
    u32 kv_len;
    /// Of the caller's tensors, at most HEAD_DIM.
    u32 head_dim;
    /// Tiles of 128 keys in one head: ceil(kv_len / 128).
    u32 tiles;
    /// Pieces that each head is cut into, 1 to MAX_PIECES (kv_prepare_sm90: blocks of a cluster), and tiles in a piece: ceil(tiles / pieces).
    u32 pieces;
    u32 tiles_per_piece;
    /// Keys that the mean is taken over: kv_len, or fewer for evenly spaced ones (key floor(i * kv_len / samples), i < samples).
    u32 samples;
    /// batch * kv_heads.
    u32 heads;
    /// The counter that the attention blocks draw their work from; kv_encode or kv_prepare_sm90 sets it to 0.
    u32* next_work;
};
static_assert(sizeof(PrepareParams) == 168, "PrepareParams in src/abi.rs has the same size");

/// Parameters of `attn_i8_f8_sm90`.
struct AttnParams {
    /// [batch, q_heads, q_len, head_dim], elements of IN_T.
    const void* q;
    void* o;
    /// [batch, q_heads, q_len]; natural logarithm. Read only with LSE.
    float* lse;
    const u8* k_codes;
    const u8* v_codes;
    const float* k_scales;
    const float* v_scales;
    const float* v_residuals;
    /// Read only with LSE.
    const float* k_mean;
    i64 q_stride[3];
    i64 o_stride[3];
    u32 batch;
    u32 q_heads;
    /// q_heads / kv_heads.
    u32 q_heads_per_kv_head;
    u32 q_len;
    u32 kv_len;
    u32 head_dim;
    /// Tiles of 128 keys in one head: ceil(kv_len / 128).
    u32 tiles;
    /// Blocks of query rows in one head: ceil(q_len / rows of a block).
    u32 row_blocks;
    /// Heads whose blocks are taken in turn: first the last block of each, then the one before of each.
    u32 heads_together;
    /// Multiplies q . k before the softmax; any finite value.
    float softmax_scale;
    /// With CAUSAL, row r sees key n if n <= r + diagonal: 0 for top-left, kv_len - q_len for bottom-right.
    i64 diagonal;
    /// Counter of the next block of rows; 0 before the launch and after it.
    u32* next_work;
};
static_assert(sizeof(AttnParams) == 176, "AttnParams in src/abi.rs has the same size");

/// Parameters of `attn_half_sm90`.
struct HalfParams {
    /// [batch, q_heads, q_len, head_dim] of IN_T in boxes of BOX_CHANNELS channels and 64 * CONSUMERS rows.
    TensorMap q_map;
    /// [batch, kv_heads, kv_len, head_dim] in boxes of BOX_CHANNELS channels and KEYS rows.
    TensorMap k_map;
    TensorMap v_map;
    /// [batch, q_heads, q_len, head_dim], elements of IN_T.
    void* o;
    /// [batch, q_heads, q_len]; natural logarithm. Written only with LSE.
    float* lse;
    i64 o_stride[3];
    /// With CAUSAL, row r sees key n if n <= r + diagonal: 0 for top-left, kv_len - q_len for bottom-right.
    i64 diagonal;
    /// batch * q_heads.
    u32 heads;
    u32 q_heads;
    /// q_heads / kv_heads.
    u32 q_heads_per_kv_head;
    u32 q_len;
    u32 kv_len;
    u32 head_dim;
    /// Blocks of query rows in one head: ceil(q_len / rows of a block).
    u32 row_blocks;
    /// heads * row_blocks; with CAUSAL heads * ceil(row_blocks / 2), two blocks of rows each.
    u32 items;
    /// Multiplies q . k before the softmax; any finite value.
    float softmax_scale;
    u32 reserved[11];
};
static_assert(sizeof(HalfParams) == 512, "HalfParams in src/abi.rs has the same size");
