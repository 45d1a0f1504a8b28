//! What host and device agree on: the twin of `abi.cuh`, with the same structs, the same order and the same sizes.
//!
//! Pointers are device addresses; strides count elements, in the order batch, head, row. `README.md` gives the sizes of the ranges.

use bytemuck::{Pod, Zeroable};

/// Keys in one tile of codes, and in one step of the attention loop.
pub const TILE_KEYS: u32 = 128;
/// K scale groups in a tile of keys: key n is in group (n % 8) / 2.
pub const K_GROUPS: u32 = 4;
/// Most pieces into which the keys of one head are cut for the sums of the first launch.
pub const MAX_PIECES: u32 = 32;
/// Query rows of one consumer warpgroup of an attention kernel.
pub const WARPGROUP_ROWS: u32 = 64;
/// Channels of 16 bits that fill a swizzled row of shared memory: `attn_half_sm90` copies tiles in boxes of as many.
pub const BOX_CHANNELS: u32 = 64;

/// Parameters of `kv_statistics`, `kv_encode` and `kv_prepare_sm90`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub struct PrepareParams {
    /// `[batch, kv_heads, kv_len, head_dim]`, elements of `IN_T`.
    pub k: u64,
    /// Same shape and type.
    pub v: u64,
    /// `[batch * kv_heads, pieces, HEAD_DIM]` f32: sum of the sampled keys of each piece.
    pub k_sums: u64,
    /// `[batch * kv_heads, pieces, HEAD_DIM]` f32: largest |V| of each piece.
    pub v_maxima: u64,
    /// `[batch * kv_heads, HEAD_DIM]` f32: what was subtracted from every key; 0 without smoothing.
    pub k_mean: u64,
    /// `[batch * kv_heads, HEAD_DIM]` f32.
    pub v_scales: u64,
    /// `[batch * kv_heads, tiles, HEAD_DIM]` f32: sum over the tile's keys of v / scale - code.
    pub v_residuals: u64,
    /// `[batch * kv_heads, tiles, 4]` f32.
    pub k_scales: u64,
    /// `[batch * kv_heads, tiles, 128 * HEAD_DIM]` bytes.
    pub k_codes: u64,
    /// `[batch * kv_heads, tiles, 128 * HEAD_DIM]` bytes.
    pub v_codes: u64,
    /// Elements from one batch, head, row of K to the next.
    pub k_stride: [i64; 3],
    /// Elements from one batch, head, row of V to the next.
    pub v_stride: [i64; 3],
    /// Heads of K and V.
    pub kv_heads: u32,
    /// Keys in one head.
    pub kv_len: u32,
    /// Of the caller's tensors, at most `HEAD_DIM`.
    pub head_dim: u32,
    /// Tiles of 128 keys in one head: ceil(kv_len / 128).
    pub tiles: u32,
    /// Pieces that each head is cut into, 1 to [`MAX_PIECES`]; for `kv_prepare_sm90` the blocks of a cluster.
    pub pieces: u32,
    /// Tiles in a piece: ceil(tiles / pieces).
    pub tiles_per_piece: u32,
    /// Keys that the mean is taken over: `kv_len`, or fewer for evenly spaced ones.
    pub samples: u32,
    /// batch * `kv_heads`.
    pub heads: u32,
    /// One u32: the counter that the attention blocks draw their work from.
    pub next_work: u64,
}
const _: () = assert!(
    size_of::<PrepareParams>() == 168,
    "PrepareParams in abi.cuh has the same size"
);

/// Parameters of `attn_i8_f8_sm90`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub struct AttnParams {
    /// `[batch, q_heads, q_len, head_dim]`, elements of `IN_T`.
    pub q: u64,
    /// Same shape and type.
    pub o: u64,
    /// `[batch, q_heads, q_len]` f32, natural logarithm. Written only with `LSE`.
    pub lse: u64,
    /// As in [`PrepareParams`].
    pub k_codes: u64,
    /// As in [`PrepareParams`].
    pub v_codes: u64,
    /// As in [`PrepareParams`].
    pub k_scales: u64,
    /// As in [`PrepareParams`].
    pub v_scales: u64,
    /// As in [`PrepareParams`].
    pub v_residuals: u64,
    /// As in [`PrepareParams`]. Read only with `LSE`.
    pub k_mean: u64,
    /// Elements from one batch, head, row of Q to the next.
    pub q_stride: [i64; 3],
    /// Elements from one batch, head, row of O to the next.
    pub o_stride: [i64; 3],
    /// Batches.
    pub batch: u32,
    /// Heads of Q and O.
    pub q_heads: u32,
    /// `q_heads / kv_heads`.
    pub q_heads_per_kv_head: u32,
    /// Queries in one head.
    pub q_len: u32,
    /// Keys in one head.
    pub kv_len: u32,
    /// Of the caller's tensors, at most `HEAD_DIM`.
    pub head_dim: u32,
    /// Tiles of 128 keys in one head: ceil(kv_len / 128).
    pub tiles: u32,
    /// Blocks of query rows in one head: ceil(q_len / (64 * `CONSUMERS`)).
    pub row_blocks: u32,
    /// Heads whose blocks are taken in turn: first the last block of each, then the one before of each.
    pub heads_together: u32,
    /// Multiplies q . k before the softmax; any finite value.
    pub softmax_scale: f32,
    /// With `CAUSAL`, row r sees key n if n <= r + diagonal: 0 for top-left, kv_len - q_len for bottom-right.
    pub diagonal: i64,
    /// One u32, the counter of the next work: 0 before the launch and after it.
    pub next_work: u64,
}
const _: () = assert!(
    size_of::<AttnParams>() == 176,
    "AttnParams in abi.cuh has the same size"
);

/// A tensor as the driver encodes it for the copy engine: address, extents, strides, box, swizzle.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct TensorMap(pub [u64; 16]);

/// Parameters of `attn_half_sm90`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct HalfParams {
    /// `[batch, q_heads, q_len, head_dim]` of `IN_T` in boxes of [`BOX_CHANNELS`] channels and
    /// 64 * `CONSUMERS` rows.
    pub q_map: TensorMap,
    /// `[batch, kv_heads, kv_len, head_dim]` in boxes of [`BOX_CHANNELS`] channels and `KEYS` rows.
    pub k_map: TensorMap,
    /// As `k_map`.
    pub v_map: TensorMap,
    /// `[batch, q_heads, q_len, head_dim]`, elements of `IN_T`.
    pub o: u64,
    /// `[batch, q_heads, q_len]` f32, natural logarithm. Written only with `LSE`.
    pub lse: u64,
    /// Elements from one batch, head, row of O to the next.
    pub o_stride: [i64; 3],
    /// With `CAUSAL`, row r sees key n if n <= r + diagonal: 0 for top-left, kv_len - q_len for bottom-right.
    pub diagonal: i64,
    /// batch * q_heads.
    pub heads: u32,
    /// Heads of Q and O.
    pub q_heads: u32,
    /// `q_heads / kv_heads`.
    pub q_heads_per_kv_head: u32,
    /// Queries in one head.
    pub q_len: u32,
    /// Keys in one head.
    pub kv_len: u32,
    /// Of the caller's tensors, at most `HEAD_DIM`.
    pub head_dim: u32,
    /// Blocks of query rows in one head: ceil(q_len / (64 * `CONSUMERS`)).
    pub row_blocks: u32,
    /// heads * row_blocks; with `CAUSAL` heads * ceil(row_blocks / 2), of two blocks of rows each.
    pub items: u32,
    /// Multiplies q . k before the softmax; any finite value.
    pub softmax_scale: f32,
    /// 0.
    pub reserved: [u32; 11],
}
const _: () = assert!(
    size_of::<HalfParams>() == 512,
    "HalfParams in abi.cuh has the same size"
);
