//! Twin of abi.cuh: same structs, same order, same sizes. Pointers are device addresses.

use std::mem::offset_of;

/// Keys in one tile of codes, and in one step of the attention loop.
pub const TILE_KEYS: u32 = 128;
/// K scale groups in a tile of keys: key n is in group (n % 8) / 2.
pub const K_GROUPS: u32 = 4;
/// Most pieces into which the keys of one head are cut for the sums of the first launch.
pub const MAX_PIECES: u32 = 32;

/// Parameters of `kv_statistics` and `kv_encode`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PrepareParams {
    /// [batch, kv_heads, kv_len, head_dim], elements of IN_T.
    pub k: u64,
    /// As `k`.
    pub v: u64,
    /// [batch * kv_heads, pieces, HEAD_DIM]: sum of the sampled keys of a piece.
    pub k_sums: u64,
    /// [batch * kv_heads, pieces, HEAD_DIM]: largest |V| of a piece.
    pub v_maxima: u64,
    /// [batch * kv_heads, HEAD_DIM]: what was subtracted from every key; 0 without smoothing.
    pub k_mean: u64,
    /// [batch * kv_heads, HEAD_DIM].
    pub v_scales: u64,
    /// [batch * kv_heads, tiles, 4].
    pub k_scales: u64,
    /// [batch * kv_heads, tiles, 128 * HEAD_DIM bytes].
    pub k_codes: u64,
    /// As `k_codes`.
    pub v_codes: u64,
    /// Batch, head, row; elements.
    pub k_stride: [i64; 3],
    /// As `k_stride`.
    pub v_stride: [i64; 3],
    /// Heads of K and V.
    pub kv_heads: u32,
    /// Keys of one head.
    pub kv_len: u32,
    /// Of the caller's tensors, at most HEAD_DIM.
    pub head_dim: u32,
    /// Tiles of 128 keys in one head.
    pub tiles: u32,
    /// Pieces that each head is cut into, 1 to MAX_PIECES.
    pub pieces: u32,
    /// Tiles in a piece.
    pub tiles_per_piece: u32,
    /// Keys that the mean is taken over.
    pub samples: u32,
    /// Zero.
    pub reserved: u32,
    /// The counter that the attention blocks draw their work from; kv_encode sets it to 0.
    pub next_work: u64,
}
const _: () = assert!(size_of::<PrepareParams>() == 160);

impl PrepareParams {
    /// Where each field lies, in bytes: what the compiler of the kernels is asked to confirm.
    pub const OFFSETS: &[(&'static str, usize)] = &[
        ("k", offset_of!(PrepareParams, k)),
        ("v", offset_of!(PrepareParams, v)),
        ("k_sums", offset_of!(PrepareParams, k_sums)),
        ("v_maxima", offset_of!(PrepareParams, v_maxima)),
        ("k_mean", offset_of!(PrepareParams, k_mean)),
        ("v_scales", offset_of!(PrepareParams, v_scales)),
        ("k_scales", offset_of!(PrepareParams, k_scales)),
        ("k_codes", offset_of!(PrepareParams, k_codes)),
        ("v_codes", offset_of!(PrepareParams, v_codes)),
        ("k_stride", offset_of!(PrepareParams, k_stride)),
        ("v_stride", offset_of!(PrepareParams, v_stride)),
        ("kv_heads", offset_of!(PrepareParams, kv_heads)),
        ("kv_len", offset_of!(PrepareParams, kv_len)),
        ("head_dim", offset_of!(PrepareParams, head_dim)),
        ("tiles", offset_of!(PrepareParams, tiles)),
        ("pieces", offset_of!(PrepareParams, pieces)),
        (
            "tiles_per_piece",
            offset_of!(PrepareParams, tiles_per_piece),
        ),
        ("samples", offset_of!(PrepareParams, samples)),
        ("reserved", offset_of!(PrepareParams, reserved)),
        ("next_work", offset_of!(PrepareParams, next_work)),
    ];
}

/// Parameters of `attn_i8_f8_sm90`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct AttnParams {
    /// [batch, q_heads, q_len, head_dim], elements of IN_T.
    pub q: u64,
    /// As `q`.
    pub o: u64,
    /// [batch, q_heads, q_len]; natural logarithm. Read only with LSE.
    pub lse: u64,
    /// From `kv_encode`.
    pub k_codes: u64,
    /// From `kv_encode`.
    pub v_codes: u64,
    /// From `kv_encode`.
    pub k_scales: u64,
    /// From `kv_encode`.
    pub v_scales: u64,
    /// Read only with LSE.
    pub k_mean: u64,
    /// Batch, head, row; elements.
    pub q_stride: [i64; 3],
    /// As `q_stride`.
    pub o_stride: [i64; 3],
    /// Independent calls.
    pub batch: u32,
    /// Heads of Q and O.
    pub q_heads: u32,
    /// q_heads / kv_heads.
    pub q_heads_per_kv_head: u32,
    /// Rows of one head of Q.
    pub q_len: u32,
    /// Keys of one head.
    pub kv_len: u32,
    /// Of the caller's tensors, at most HEAD_DIM.
    pub head_dim: u32,
    /// Tiles of 128 keys in one head: ceil(kv_len / 128).
    pub tiles: u32,
    /// Blocks of query rows in one head: ceil(q_len / rows of a block).
    pub row_blocks: u32,
    /// batch * q_heads * row_blocks.
    pub works: u32,
    /// Multiplies q . k before the softmax; any finite value.
    pub softmax_scale: f32,
    /// With CAUSAL, row r sees key n if n <= r + diagonal: 0 for top-left, kv_len - q_len for
    /// bottom-right.
    pub diagonal: i64,
    /// Counter of the next block of rows; 0 before the launch and after it.
    pub next_work: u64,
}
const _: () = assert!(size_of::<AttnParams>() == 168);

impl AttnParams {
    /// Where each field lies, in bytes: what the compiler of the kernels is asked to confirm.
    pub const OFFSETS: &[(&'static str, usize)] = &[
        ("q", offset_of!(AttnParams, q)),
        ("o", offset_of!(AttnParams, o)),
        ("lse", offset_of!(AttnParams, lse)),
        ("k_codes", offset_of!(AttnParams, k_codes)),
        ("v_codes", offset_of!(AttnParams, v_codes)),
        ("k_scales", offset_of!(AttnParams, k_scales)),
        ("v_scales", offset_of!(AttnParams, v_scales)),
        ("k_mean", offset_of!(AttnParams, k_mean)),
        ("q_stride", offset_of!(AttnParams, q_stride)),
        ("o_stride", offset_of!(AttnParams, o_stride)),
        ("batch", offset_of!(AttnParams, batch)),
        ("q_heads", offset_of!(AttnParams, q_heads)),
        (
            "q_heads_per_kv_head",
            offset_of!(AttnParams, q_heads_per_kv_head),
        ),
        ("q_len", offset_of!(AttnParams, q_len)),
        ("kv_len", offset_of!(AttnParams, kv_len)),
        ("head_dim", offset_of!(AttnParams, head_dim)),
        ("tiles", offset_of!(AttnParams, tiles)),
        ("row_blocks", offset_of!(AttnParams, row_blocks)),
        ("works", offset_of!(AttnParams, works)),
        ("softmax_scale", offset_of!(AttnParams, softmax_scale)),
        ("diagonal", offset_of!(AttnParams, diagonal)),
        ("next_work", offset_of!(AttnParams, next_work)),
    ];
}
