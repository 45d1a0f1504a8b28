// The second half of a call whose keys are split over workgroups: partial results of each range of keys,
// merged by their maxima and sums, become O and LSE.
//
//   floats: partial_o [pack, splits, 8, COLUMNS], partial_stats [pack, splits, 3], as decode.wgsl writes them
//           v_scales [KV pair, HEAD_DIM], lse_bias [pair, q_len], where the recipe has them
//   -> out [batch, heads, q_len, HEAD_DIM], lse [pair, q_len]
//
// One workgroup per pack of four rows and 32 channels: an invocation takes one channel of every eighth
// range, then 32 of them each put together four channels of one row. It is small on purpose: the keys
// have just gone through every cache, and its instructions come from memory.

const CHANNELS: u32 = 32u;
const LANES: u32 = 8u;
const MASKED: f32 = -3.0e38;
const MINUS_INFINITY_BITS: u32 = 0xff800000u;
const LN_2: f32 = 0.6931471805599453;

@group(0) @binding(0) var<uniform> params: MergeParams;
@group(0) @binding(1) var<storage, read_write> floats: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> out: array<u32>;
@group(0) @binding(3) var<storage, read_write> lse: array<u32>;

// Per lane, which has every eighth range: the rows' maximum, sum of P, and sum before rounding.
var<workgroup> states: array<vec4<f32>, 3u * LANES>;
// Per lane and channel: O of the rows.
var<workgroup> parts: array<vec4<f32>, LANES * CHANNELS>;

// The factor that moves a row from one maximum to another at least as high.
fn decay_to(before: vec4<f32>, after: vec4<f32>) -> vec4<f32> {
    return select(exp2(before - after), vec4<f32>(1.0), before >= after);
}

fn float_at(at: u32) -> f32 {
    return floats[at / 4u][at % 4u];
}

// V's scales of four channels; those behind the last channel are not used.
fn scales_of(kv_pair: u32, quad: u32) -> vec4<f32> {
    let at = params.v_scales + kv_pair * HEAD_DIM + 4u * quad;
    let last = HEAD_DIM - 1u - 4u * quad;
    return vec4<f32>(
        float_at(at),
        float_at(at + min(1u, last)),
        float_at(at + min(2u, last)),
        float_at(at + min(3u, last)),
    );
}

// One row's four channels, divided by the row's sum. A row that sees no key has none: O is zero.
fn write_row(batch: u32, kv_head: u32, row: u32, quad: u32, o: vec4<f32>, maximum: f32, sum: f32, unrounded: f32) {
    let query = row % params.pitch;
    if (row >= params.heads_per_kv * params.pitch || query >= params.q_len) {
        return;
    }
    let head = kv_head * params.heads_per_kv + row / params.pitch;
    if (4u * quad < HEAD_DIM) {
        var x = vec4<f32>();
        if (sum > 0.0) {
            x = o / sum;
        }
        if (V_SCALED) {
            x *= scales_of(batch * (params.heads / params.heads_per_kv) + kv_head, quad);
        }
        store_quad(row_start(params.out, batch, head, query), quad, x);
    }
    if (LSE && quad == 0u) {
        let at = (batch * params.heads + head) * params.q_len + query;
        var bits = MINUS_INFINITY_BITS;
        if (unrounded > 0.0) {
            var x = (maximum + log2(unrounded)) * LN_2;
            if (LSE_BIAS) {
                x += float_at(params.lse_bias + at);
            }
            bits = bitcast<u32>(x);
        }
        lse[params.lse + at] = bits;
    }
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) index: u32) {
    let block = params.first_block + group.x;
    let pack = block / CHANNEL_GROUPS;
    let first_channel = (block % CHANNEL_GROUPS) * CHANNELS;
    let channel = first_channel + index % CHANNELS;
    let lane = index / CHANNELS;
    let pair = params.first_pair + group.y;
    let place = (pair * params.packs + pack) * params.splits;

    // Channels behind the last column repeat it, and are not written.
    let at = params.partial_o + channel % 8u * COLUMNS + min(channel / 8u, COLUMNS - 1u);
    var o = vec4<f32>();
    var maximum = vec4<f32>(MASKED);
    var sum = vec4<f32>();
    var unrounded = vec4<f32>();
    for (var split = lane; split < params.splits; split += LANES) {
        let stats = params.partial_stats + (place + split) * 3u;
        let own = floats[at + (place + split) * 8u * COLUMNS];
        let peak = floats[stats];
        let after = max(maximum, peak);
        let keep = decay_to(maximum, after);
        let take = decay_to(peak, after);
        maximum = after;
        o = o * keep + own * take;
        sum = sum * keep + floats[stats + 1u] * take;
        if (LSE) {
            unrounded = unrounded * keep + floats[stats + 2u] * take;
        }
    }
    parts[index] = o;
    if (index % CHANNELS == 0u) {
        states[lane] = maximum;
        states[LANES + lane] = sum;
        states[2u * LANES + lane] = unrounded;
    }
    workgroupBarrier();

    // Four rows by eight quads of channels.
    if (index >= 32u) {
        return;
    }
    let row = index / 8u;
    let quad = index % 8u;
    var all = MASKED;
    for (var i = 0u; i < LANES; i++) {
        all = max(all, states[i][row]);
    }
    var x = vec4<f32>();
    var total = 0.0;
    var total_unrounded = 0.0;
    for (var i = 0u; i < LANES; i++) {
        let peak = states[i][row];
        let take = select(exp2(peak - all), 1.0, peak >= all);
        let c = i * CHANNELS + 4u * quad;
        x += take * vec4<f32>(parts[c][row], parts[c + 1u][row], parts[c + 2u][row], parts[c + 3u][row]);
        total += take * states[LANES + i][row];
        total_unrounded += take * states[2u * LANES + i][row];
    }
    let kv_heads = params.heads / params.heads_per_kv;
    write_row(
        pair / kv_heads,
        pair % kv_heads,
        4u * pack + row,
        first_channel / 4u + quad,
        x,
        all,
        total,
        total_unrounded,
    );
}
