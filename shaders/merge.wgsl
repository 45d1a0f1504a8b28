// The second half of a call whose keys are split over workgroups: partial results of each range of keys,
// merged by their maxima and sums, become O and LSE.
//
//   floats: partial_o [pack, splits, 8, COLUMNS], partial_stats [pack, splits, 3], as decode.wgsl writes them
//           v_scales [KV pair, HEAD_DIM], lse_bias [pair, q_len], where the recipe has them
//   -> out [batch, heads, q_len, HEAD_DIM], lse [pair, q_len]
//
// One workgroup per pack of four rows and 32 channels: eight invocations of four channels each by 32
// lanes, each of which takes every 32nd range; the lanes meet at the end, halving.

const QUADS_OF_GROUP: u32 = 8u;
const LANES: u32 = 32u;
const MASKED: f32 = -3.0e38;
const MINUS_INFINITY_BITS: u32 = 0xff800000u;
const LN_2: f32 = 0.6931471805599453;

@group(0) @binding(0) var<uniform> params: MergeParams;
@group(0) @binding(1) var<storage, read_write> floats: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> out: array<u32>;
@group(0) @binding(3) var<storage, read_write> lse: array<u32>;

var<workgroup> maxima: array<vec4<f32>, LANES>;
var<workgroup> halves: array<vec4<f32>, 6u * 128u>;

// Four channels of four rows (o0 is the first channel), and the rows' state.
struct Part {
    o0: vec4<f32>,
    o1: vec4<f32>,
    o2: vec4<f32>,
    o3: vec4<f32>,
    sum: vec4<f32>,
    unrounded: vec4<f32>,
}

// The factor that moves a row from one maximum to another at least as high.
fn decay_to(before: vec4<f32>, after: vec4<f32>) -> vec4<f32> {
    return select(exp2(before - after), vec4<f32>(1.0), before >= after);
}

fn scaled(part: Part, by: vec4<f32>) -> Part {
    return Part(
        part.o0 * by,
        part.o1 * by,
        part.o2 * by,
        part.o3 * by,
        part.sum * by,
        part.unrounded * by,
    );
}

fn added(a: Part, b: Part) -> Part {
    return Part(
        a.o0 + b.o0,
        a.o1 + b.o1,
        a.o2 + b.o2,
        a.o3 + b.o3,
        a.sum + b.sum,
        a.unrounded + b.unrounded,
    );
}

fn put(at: u32, part: Part) {
    halves[at] = part.o0;
    halves[at + 128u] = part.o1;
    halves[at + 256u] = part.o2;
    halves[at + 384u] = part.o3;
    halves[at + 512u] = part.sum;
    halves[at + 640u] = part.unrounded;
}

fn part_at(at: u32) -> Part {
    return Part(
        halves[at],
        halves[at + 128u],
        halves[at + 256u],
        halves[at + 384u],
        halves[at + 512u],
        halves[at + 640u],
    );
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
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let block = params.first_block + group.x;
    let pack = block / CHANNEL_GROUPS;
    let quad = (block % CHANNEL_GROUPS) * QUADS_OF_GROUP + lane % QUADS_OF_GROUP;
    let first = lane / QUADS_OF_GROUP;
    let pair = params.first_pair + group.y;
    let kv_heads = params.heads / params.heads_per_kv;
    let place = (pair * params.packs + pack) * params.splits;

    var part = Part();
    var maximum = vec4<f32>(MASKED);
    for (var split = first; split < params.splits; split += LANES) {
        let stats = params.partial_stats + (place + split) * 3u;
        let peak = floats[stats];
        let before = maximum;
        maximum = max(before, peak);
        // Channels quad * 4 ..: half of the eight of a column.
        let at = params.partial_o + ((place + split) * 8u + quad % 2u * 4u) * COLUMNS + min(quad / 2u, COLUMNS - 1u);
        let own = Part(
            floats[at],
            floats[at + COLUMNS],
            floats[at + 2u * COLUMNS],
            floats[at + 3u * COLUMNS],
            floats[stats + 1u],
            floats[stats + 2u],
        );
        part = added(scaled(part, decay_to(before, maximum)), scaled(own, decay_to(peak, maximum)));
    }

    if (lane % QUADS_OF_GROUP == 0u) {
        maxima[first] = maximum;
    }
    workgroupBarrier();
    var all = maxima[0];
    for (var i = 1u; i < LANES; i++) {
        all = max(all, maxima[i]);
    }
    part = scaled(part, decay_to(maximum, all));
    for (var half = LANES / 2u; half > 0u; half /= 2u) {
        let at = (first % half) * QUADS_OF_GROUP + lane % QUADS_OF_GROUP;
        if (first >= half && first < 2u * half) {
            put(at, part);
        }
        workgroupBarrier();
        if (first < half) {
            part = added(part, part_at(at));
        }
        workgroupBarrier();
    }
    if (first == 0u) {
        let batch = pair / kv_heads;
        let kv_head = pair % kv_heads;
        let row = 4u * pack;
        let o = transpose(mat4x4<f32>(part.o0, part.o1, part.o2, part.o3));
        write_row(batch, kv_head, row, quad, o[0], all.x, part.sum.x, part.unrounded.x);
        write_row(batch, kv_head, row + 1u, quad, o[1], all.y, part.sum.y, part.unrounded.y);
        write_row(batch, kv_head, row + 2u, quad, o[2], all.z, part.sum.z, part.unrounded.z);
        write_row(batch, kv_head, row + 3u, quad, o[3], all.w, part.sum.w, part.unrounded.w);
    }
}
