//! Host twins of the parameter blocks in `lib/abi.wgsl`: same names, same order, same layout.

use bytemuck::{Pod, Zeroable};

/// Where the rows of a tensor lie, in 32-bit words from the start of its binding.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct View {
    /// Words from one batch to the next.
    pub batch: u32,
    /// Words from one head to the next.
    pub head: u32,
    /// Words from one row to the next.
    pub row: u32,
    /// The first word.
    pub offset: u32,
}

/// Parameters of the stages that read one of Q, K and V.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
pub struct TensorParams {
    /// The tensor read.
    pub view: View,
    /// Heads per batch in the bound slice.
    pub heads: u32,
    /// First (batch, head) pair of the dispatch.
    pub first_pair: u32,
    /// First block of rows, or of splits, of the dispatch.
    pub first_block: u32,
    /// Rows per head.
    pub len: u32,
    /// Rows per head of the codes.
    pub padded_len: u32,
    /// Scales per head.
    pub groups: u32,
    /// Partial results per head.
    pub splits: u32,
    /// Rows that the partial results are taken over.
    pub samples: u32,
    /// Query heads that share one KV head.
    pub heads_per_kv: u32,
    /// First element of the slice in the binding `data`.
    pub data: u32,
    /// First scale of the slice in the binding `floats`.
    pub scales: u32,
    /// First per-channel number of the slice in `floats`.
    pub channels: u32,
    /// First partial result of the slice in `floats`.
    pub partials: u32,
    /// First LSE correction of the slice in `floats`.
    pub lse_bias: u32,
    /// The softmax scale.
    pub softmax_scale: f32,
    /// Padding to 16 bytes.
    pub unused: u32,
}

/// Parameters of the decoding kernel.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
pub struct DecodeParams {
    /// The queries.
    pub q: View,
    /// The keys.
    pub k: View,
    /// The values.
    pub v: View,
    /// KV heads per batch in the bound slice.
    pub kv_heads: u32,
    /// Query heads that share one KV head.
    pub heads_per_kv: u32,
    /// First (batch, KV head) pair of the dispatch.
    pub first_pair: u32,
    /// First block, a pack of a split, of the dispatch.
    pub first_block: u32,
    /// Packs of four query rows per KV head.
    pub packs: u32,
    /// Ranges of keys.
    pub splits: u32,
    /// Queries per head.
    pub q_len: u32,
    /// Keys per head.
    pub kv_len: u32,
    /// How many keys row 0 sees beyond one, under a causal mask.
    pub causal_shift: i32,
    /// First partial result of the slice in the binding `floats`, in `vec4`.
    pub partial_o: u32,
    /// First statistics of the slice in `floats`, in `vec4`.
    pub partial_stats: u32,
    /// Softmax scale times log2(e).
    pub score_scale: f32,
}

/// Parameters of the merging kernel.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
pub struct MergeParams {
    /// The output.
    pub out: View,
    /// Query heads per batch in the bound slice.
    pub heads: u32,
    /// Query heads that share one KV head.
    pub heads_per_kv: u32,
    /// First (batch, KV head) pair of the dispatch.
    pub first_pair: u32,
    /// First block, a group of channels of a pack, of the dispatch.
    pub first_block: u32,
    /// Packs of four query rows per KV head.
    pub packs: u32,
    /// Ranges of keys.
    pub splits: u32,
    /// Queries per head.
    pub q_len: u32,
    /// Rows of the packs that each query head takes.
    pub pitch: u32,
    /// First partial result of the slice in the binding `floats`, in `vec4`.
    pub partial_o: u32,
    /// First statistics of the slice in `floats`, in `vec4`.
    pub partial_stats: u32,
    /// First V scale of the slice in `floats`.
    pub v_scales: u32,
    /// First LSE correction of the slice in `floats`.
    pub lse_bias: u32,
    /// First element of the slice in the binding `lse`.
    pub lse: u32,
    /// Padding to 16 bytes.
    pub unused0: u32,
    /// Padding to 16 bytes.
    pub unused1: u32,
    /// Padding to 16 bytes.
    pub unused2: u32,
}

/// Parameters of the attention kernel.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
pub struct AttendParams {
    /// The output.
    pub out: View,
    /// Query heads per batch in the bound slice.
    pub heads: u32,
    /// Query heads that share one KV head.
    pub heads_per_kv: u32,
    /// First (batch, head) pair of the dispatch.
    pub first_pair: u32,
    /// First query tile of the dispatch.
    pub first_tile: u32,
    /// Query tiles per head.
    pub tiles: u32,
    /// Queries per head.
    pub q_len: u32,
    /// Keys per head.
    pub kv_len: u32,
    /// Rows per head of Q's codes.
    pub q_padded: u32,
    /// Rows per head of K's codes.
    pub kv_padded: u32,
    /// Scales per head of Q.
    pub q_groups: u32,
    /// Scales per head of K.
    pub k_groups: u32,
    /// How many keys row 0 sees beyond one, under a causal mask.
    pub causal_shift: i32,
    /// First `vec4<u32>` of the slice in the binding `q_codes`.
    pub q_codes: u32,
    /// First `vec4<u32>` of the slice in the binding `k_codes`.
    pub k_codes: u32,
    /// First `vec4<u32>` of the slice in the binding `values`.
    pub values: u32,
    /// First Q scale of the slice in the binding `floats`.
    pub q_scales: u32,
    /// First K scale of the slice in `floats`.
    pub k_scales: u32,
    /// First V scale of the slice in `floats`.
    pub v_scales: u32,
    /// First LSE correction of the slice in `floats`.
    pub lse_bias: u32,
    /// First element of the slice in the binding `lse`.
    pub lse: u32,
    /// Softmax scale times log2(e).
    pub score_scale: f32,
    /// Ranges of keys, where they are split.
    pub splits: u32,
    /// First partial result of the slice in `floats`, in `vec4`.
    pub partial_o: u32,
    /// First statistics of the slice in `floats`, in `vec4`.
    pub partial_stats: u32,
}
