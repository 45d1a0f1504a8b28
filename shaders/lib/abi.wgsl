// Parameter blocks, one per dispatch. `src/abi.rs` holds their twins: same names, same order.
// Offsets and strides of tensors count 32-bit words from the start of their binding.

// Where the rows of a [batch, heads, len, head_dim] tensor lie. A stride that is never walked is 0.
struct View {
    batch: u32,
    head: u32,
    row: u32,
    offset: u32,
}

// The first word of a row.
fn row_start(view: View, batch: u32, head: u32, row: u32) -> u32 {
    return view.offset + batch * view.batch + head * view.head + row * view.row;
}

// The stages that read one of Q, K and V.
struct TensorParams {
    view: View,
    // Heads per batch in the bound slice; a pair is batch * heads + head.
    heads: u32,
    // The first pair and the first block (of rows, of splits) of this dispatch.
    first_pair: u32,
    first_block: u32,
    // Rows per head, and the same padded: codes exist for the padding too.
    len: u32,
    padded_len: u32,
    // Scales per head.
    groups: u32,
    // Partial results per head, and the rows that they are taken over (fewer than len when sampled).
    splits: u32,
    samples: u32,
    // Query heads that share one KV head.
    heads_per_kv: u32,
    // First element of the slice in `data`, in elements of that binding.
    data: u32,
    // First f32 of the slice in `floats`, for each range kept there.
    scales: u32,
    channels: u32,
    partials: u32,
    lse_bias: u32,
    softmax_scale: f32,
    unused: u32,
}

// A few queries against one range of keys each.
struct DecodeParams {
    q: View,
    k: View,
    v: View,
    // KV heads per batch in the bound slice, and how many query heads share one.
    kv_heads: u32,
    heads_per_kv: u32,
    // The first (batch, KV head) pair and the first block, a pack of a split, of this dispatch.
    first_pair: u32,
    first_block: u32,
    // Packs of four query rows per KV head, and ranges of keys.
    packs: u32,
    splits: u32,
    q_len: u32,
    kv_len: u32,
    // How many keys row 0 sees beyond its own index plus one, under a causal mask.
    causal_shift: i32,
    // First vec4 of the slice in `floats`.
    partial_o: u32,
    partial_stats: u32,
    // Softmax scale times log2(e).
    score_scale: f32,
}

// The ranges' results put together.
struct MergeParams {
    out: View,
    // As in DecodeParams; a block is a group of channels of a pack.
    heads: u32,
    heads_per_kv: u32,
    first_pair: u32,
    first_block: u32,
    packs: u32,
    splits: u32,
    q_len: u32,
    // Rows of the packs that each query head takes: q_len, or more where heads are not packed densely.
    pitch: u32,
    // First vec4 of the slice in `floats`.
    partial_o: u32,
    partial_stats: u32,
    // First f32 of the slice in `floats`, for each range kept there.
    v_scales: u32,
    lse_bias: u32,
    // First f32 of the slice in `lse`.
    lse: u32,
    unused0: u32,
    unused1: u32,
    unused2: u32,
}

struct AttendParams {
    out: View,
    // Query heads per batch in the bound slice, and how many of them share one KV head.
    heads: u32,
    heads_per_kv: u32,
    first_pair: u32,
    first_tile: u32,
    // Query tiles per head.
    tiles: u32,
    q_len: u32,
    kv_len: u32,
    q_padded: u32,
    kv_padded: u32,
    // Scales per head.
    q_groups: u32,
    k_groups: u32,
    // How many keys row 0 sees beyond its own index plus one, under a causal mask.
    causal_shift: i32,
    // First vec4<u32> of the slice in each binding.
    q_codes: u32,
    k_codes: u32,
    values: u32,
    // First f32 of the slice in `floats`.
    q_scales: u32,
    k_scales: u32,
    v_scales: u32,
    lse_bias: u32,
    // First f32 of the slice in `lse`.
    lse: u32,
    // Softmax scale times log2(e).
    score_scale: f32,
    // Where keys are split: ranges, and the first vec4 of the slice in `floats` of their results.
    splits: u32,
    partial_o: u32,
    partial_stats: u32,
}
