// What the attention kernels have in common: who sees what, scales, and results on their way out.

// Below every score (their product cannot reach it: see `supports`), and far from infinity, so that
// differences stay finite.
const MASKED: f32 = -3.0e38;
const MINUS_INFINITY_BITS: u32 = 0xff800000u;
const LN_2: f32 = 0.6931471805599453;

// Heads whose tiles start in turns under a causal mask: enough that the tiles at the end of a dispatch are
// short, few enough that their keys stay in a cache.
const BAND: u32 = 8u;

// The tile and the (batch, head) pair of a workgroup, both counted from the dispatch's first. Workgroups
// start in the order of their number, columns of the grid first. Under a causal mask the last queries see the
// most keys: in each band of heads their tiles start first, so that no long tile runs alone at the end.
fn work_of(group: vec2<u32>, groups: vec2<u32>) -> vec2<u32> {
    if (CAUSAL) {
        let number = group.y * groups.x + group.x;
        let first = number / (BAND * groups.x) * BAND;
        let heads = min(BAND, groups.y - first);
        let within = number - first * groups.x;
        return vec2<u32>(within / heads, first + within % heads);
    }
    return group;
}

// How many keys, from the first, a query sees.
fn visible_keys(row: u32) -> u32 {
    if (CAUSAL) {
        return u32(clamp(i32(row) + 1 + params.causal_shift, 0, i32(params.kv_len)));
    }
    return params.kv_len;
}

fn q_scale(pair: u32, row: u32) -> f32 {
    let group = (row / Q_BLOCK) * Q_SLOTS + (row % Q_SLOT_MOD) / Q_SLOT_DIV;
    return floats[params.q_scales + pair * params.q_groups + min(group, params.q_groups - 1u)];
}

fn k_scale(pair: u32, key: u32) -> f32 {
    let group = (key / K_BLOCK) * K_SLOTS + (key % K_SLOT_MOD) / K_SLOT_DIV;
    return floats[params.k_scales + pair * params.k_groups + min(group, params.k_groups - 1u)];
}

// Writes four channels of a row of O: the sums over V, divided by the sum of P.
fn write_group(start: u32, quad: u32, o: vec4<f32>, sum: f32, scales: u32) {
    let channel = 4u * quad;
    if (channel >= HEAD_DIM) {
        return;
    }
    // A row that sees no key has no sum: O is zero.
    var x = vec4<f32>();
    if (sum > 0.0) {
        x = o / sum;
    }
    if (V_SCALED) {
        x.x *= floats[scales + channel];
        if (channel + 1u < HEAD_DIM) { x.y *= floats[scales + channel + 1u]; }
        if (channel + 2u < HEAD_DIM) { x.z *= floats[scales + channel + 2u]; }
        if (channel + 3u < HEAD_DIM) { x.w *= floats[scales + channel + 3u]; }
    }
    store_quad(start, quad, x);
}

// The log-sum-exp of a row, from its maximum (log2 units) and its sum of unrounded P.
fn write_lse(pair: u32, query: u32, maximum: f32, unrounded: f32) {
    let at = pair * params.q_len + query;
    var bits = MINUS_INFINITY_BITS;
    if (unrounded > 0.0) {
        var x = (maximum + log2(unrounded)) * LN_2;
        if (LSE_BIAS) {
            x += floats[params.lse_bias + at];
        }
        bits = bitcast<u32>(x);
    }
    lse[params.lse + at] = bits;
}
