// Attention of a few queries to one range of keys, on the tensors' own numbers: the first half of a
// call whose keys are split over workgroups. merge.wgsl puts the ranges together.
//
//   q [batch, heads, q_len, HEAD_DIM], k, v [batch, KV heads, kv_len, HEAD_DIM]: where the caller has them
//   -> floats: partial_o [pack, splits, 8, COLUMNS], one vec4 per channel: its value in four rows
//              partial_stats [pack, splits, 3]: maximum (log2 units), sum of P, sum before rounding
//
// The rows of a KV head are its queries of all the query heads that share it: row r is query
// r % q_len of head r / q_len. A pack is four of them, a vec4 throughout, so that every number read of
// K and V serves four rows.
//
// An invocation holds eight channels (column) of every SLOTS-th key: per step four keys, 16 bytes of
// each (two-byte elements), read one step ahead. K and V go from memory to registers; workgroup memory
// only adds up what the columns of a key have multiplied. The scores of the whole range are kept, so
// there is one maximum, and nothing is rescaled.

const STEP: u32 = 4u * SLOTS;
const STRIDE: u32 = COLUMNS | 1u;

// Below every score, and far from infinity, so that differences stay finite.
const MASKED: f32 = -3.0e38;

@group(0) @binding(0) var<uniform> params: DecodeParams;
@group(0) @binding(1) var<storage, read> q: array<element>;
@group(0) @binding(2) var<storage, read> k: array<element>;
@group(0) @binding(3) var<storage, read> v: array<element>;
@group(0) @binding(4) var<storage, read_write> floats: array<vec4<f32>>;

// Products of a key's columns, STRIDE apart: an odd number, so that keys lie in different banks. Later
// the halves of sums.
var<workgroup> products: array<vec4<f32>, PRODUCTS>;
// The scores of the range, then P.
var<workgroup> scores: array<vec4<f32>, SPLIT>;

// Four rows of Q in eight channels, or of O.
struct Eight {
    c0: vec4<f32>,
    c1: vec4<f32>,
    c2: vec4<f32>,
    c3: vec4<f32>,
    c4: vec4<f32>,
    c5: vec4<f32>,
    c6: vec4<f32>,
    c7: vec4<f32>,
}

// Four keys' channels as they lie in memory.
struct Keys {
    k0: Raw,
    k1: Raw,
    k2: Raw,
    k3: Raw,
}

fn visible_keys(query: u32) -> u32 {
    if (CAUSAL) {
        return u32(clamp(i32(query) + 1 + params.causal_shift, 0, i32(params.kv_len)));
    }
    return params.kv_len;
}

// How many keys a row of the pack sees; none where the pack has no such row.
fn visible_to(row: u32) -> u32 {
    if (row < params.heads_per_kv * params.q_len) {
        return visible_keys(row % params.q_len);
    }
    return 0u;
}

fn query_row(batch: u32, kv_head: u32, row: u32, column: u32) -> Raw {
    if (row < params.heads_per_kv * params.q_len) {
        let head = kv_head * params.heads_per_kv + row / params.q_len;
        return read_q(row_start(params.q, batch, head, row % params.q_len), column);
    }
    return Raw();
}

// The eight channels of four rows, row by row, as four rows of each channel.
fn transposed(a: Raw, b: Raw, c: Raw, d: Raw) -> Eight {
    let low = transpose(mat4x4<f32>(unpack_low(a), unpack_low(b), unpack_low(c), unpack_low(d)));
    let high = transpose(mat4x4<f32>(unpack_high(a), unpack_high(b), unpack_high(c), unpack_high(d)));
    return Eight(low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]);
}

fn keys_of_k(start: u32, key: u32, end: u32, column: u32) -> Keys {
    var keys = Keys();
    if (key < end) { keys.k0 = read_k(start + key * params.k.row, column); }
    if (key + SLOTS < end) { keys.k1 = read_k(start + (key + SLOTS) * params.k.row, column); }
    if (key + 2u * SLOTS < end) { keys.k2 = read_k(start + (key + 2u * SLOTS) * params.k.row, column); }
    if (key + 3u * SLOTS < end) { keys.k3 = read_k(start + (key + 3u * SLOTS) * params.k.row, column); }
    return keys;
}

fn keys_of_v(start: u32, key: u32, end: u32, column: u32) -> Keys {
    var keys = Keys();
    if (key < end) { keys.k0 = read_v(start + key * params.v.row, column); }
    if (key + SLOTS < end) { keys.k1 = read_v(start + (key + SLOTS) * params.v.row, column); }
    if (key + 2u * SLOTS < end) { keys.k2 = read_v(start + (key + 2u * SLOTS) * params.v.row, column); }
    if (key + 3u * SLOTS < end) { keys.k3 = read_v(start + (key + 3u * SLOTS) * params.v.row, column); }
    return keys;
}

fn multiply(q: Eight, raw: Raw) -> vec4<f32> {
    let x = unpack_low(raw);
    let y = unpack_high(raw);
    return (q.c0 * x.x + q.c1 * x.y + q.c2 * x.z + q.c3 * x.w)
        + (q.c4 * y.x + q.c5 * y.y + q.c6 * y.z + q.c7 * y.w);
}

fn add_key(o: Eight, p: vec4<f32>, raw: Raw) -> Eight {
    let x = unpack_low(raw);
    let y = unpack_high(raw);
    return Eight(
        o.c0 + p * x.x,
        o.c1 + p * x.y,
        o.c2 + p * x.z,
        o.c3 + p * x.w,
        o.c4 + p * y.x,
        o.c5 + p * y.y,
        o.c6 + p * y.z,
        o.c7 + p * y.w,
    );
}

fn round_p(p: vec4<f32>) -> vec4<f32> {
    if (DTYPE == DTYPE_F16) {
        return vec4<f32>(
            unpack2x16float(pack_halves(p.x, p.y)),
            unpack2x16float(pack_halves(p.z, p.w)),
        );
    }
    if (DTYPE == DTYPE_BF16) {
        let bits = vec4<u32>(bf16_bits(p.x), bf16_bits(p.y), bf16_bits(p.z), bf16_bits(p.w));
        return bitcast<vec4<f32>>(bits << vec4<u32>(16u));
    }
    return p;
}

// The largest of one vec4 per invocation.
fn largest_of(lane: u32, x: vec4<f32>) -> vec4<f32> {
    products[lane] = x;
    workgroupBarrier();
    for (var half = THREADS / 2u; half > 0u; half /= 2u) {
        if (lane < half) {
            products[lane] = max(products[lane], products[lane + half]);
        }
        workgroupBarrier();
    }
    let result = products[0];
    workgroupBarrier();
    return result;
}

fn sum_of(lane: u32, x: vec4<f32>) -> vec4<f32> {
    products[lane] = x;
    workgroupBarrier();
    for (var half = THREADS / 2u; half > 0u; half /= 2u) {
        if (lane < half) {
            products[lane] += products[lane + half];
        }
        workgroupBarrier();
    }
    let result = products[0];
    workgroupBarrier();
    return result;
}

fn put(at: u32, o: Eight) {
    const APART = SLOTS / 2u * COLUMNS;
    products[at] = o.c0;
    products[at + APART] = o.c1;
    products[at + 2u * APART] = o.c2;
    products[at + 3u * APART] = o.c3;
    products[at + 4u * APART] = o.c4;
    products[at + 5u * APART] = o.c5;
    products[at + 6u * APART] = o.c6;
    products[at + 7u * APART] = o.c7;
}

fn add(at: u32, o: Eight) -> Eight {
    const APART = SLOTS / 2u * COLUMNS;
    return Eight(
        o.c0 + products[at],
        o.c1 + products[at + APART],
        o.c2 + products[at + 2u * APART],
        o.c3 + products[at + 3u * APART],
        o.c4 + products[at + 4u * APART],
        o.c5 + products[at + 5u * APART],
        o.c6 + products[at + 6u * APART],
        o.c7 + products[at + 7u * APART],
    );
}

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    // The packs of a KV head go side by side: what one reads of K and V the others find in a cache.
    let block = params.first_block + group.x;
    let pack = block % params.packs;
    let split = block / params.packs;
    let pair = params.first_pair + group.y;
    let kv_heads = params.heads / params.heads_per_kv;
    let batch = pair / kv_heads;
    let kv_head = pair % kv_heads;
    let column = lane % COLUMNS;
    // Invocations beyond the last slot read no key, and only help where every one of them counts.
    let slot = lane / COLUMNS;
    let row = 4u * pack;

    let visible = vec4<u32>(
        visible_to(row),
        visible_to(row + 1u),
        visible_to(row + 2u),
        visible_to(row + 3u),
    );
    let begin = split * SPLIT;
    let most = max(max(visible.x, visible.y), max(visible.z, visible.w));
    let end = clamp(most, begin, begin + SPLIT);
    let end_of_slot = select(0u, end, slot < SLOTS);

    let q_rows = transposed(
        query_row(batch, kv_head, row, column),
        query_row(batch, kv_head, row + 1u, column),
        query_row(batch, kv_head, row + 2u, column),
        query_row(batch, kv_head, row + 3u, column),
    );
    let k_start = row_start(params.k, batch, kv_head, 0u);
    let v_start = row_start(params.v, batch, kv_head, 0u);

    // Q K^T. An invocation adds up scores of one row.
    let seen = visible_to(row + lane % 4u);
    var peak = MASKED;
    var next = keys_of_k(k_start, begin + slot, end_of_slot, column);
    for (var key = begin; key < end; key += STEP) {
        let keys = next;
        next = keys_of_k(k_start, key + STEP + slot, end_of_slot, column);
        if (slot < SLOTS) {
            products[slot * STRIDE + column] = multiply(q_rows, keys.k0);
            products[(slot + SLOTS) * STRIDE + column] = multiply(q_rows, keys.k1);
            products[(slot + 2u * SLOTS) * STRIDE + column] = multiply(q_rows, keys.k2);
            products[(slot + 3u * SLOTS) * STRIDE + column] = multiply(q_rows, keys.k3);
        }
        workgroupBarrier();
        for (var i = lane; i < 4u * STEP; i += THREADS) {
            let at = (i / 4u) * STRIDE;
            var sum = 0.0;
            for (var c = 0u; c < COLUMNS; c++) {
                sum += products[at + c][i % 4u];
            }
            let s = select(MASKED, sum * params.score_scale, key + i / 4u < seen);
            scores[key - begin + i / 4u][i % 4u] = s;
            peak = max(peak, s);
        }
        workgroupBarrier();
    }

    // Softmax: one maximum for the range. The first keys of V are under way meanwhile.
    next = keys_of_v(v_start, begin + slot, end_of_slot, column);
    let own = vec4<u32>(lane % 4u) == vec4<u32>(0u, 1u, 2u, 3u);
    let maximum = largest_of(lane, select(vec4<f32>(MASKED), vec4<f32>(peak), own));
    var unrounded = vec4<f32>();
    for (var i = lane; i < end - begin; i += THREADS) {
        let s = scores[i];
        // A score equal to the maximum gives exactly 1; a hidden one 0, also where all are hidden.
        var p = select(exp2(s - maximum), vec4<f32>(1.0), s >= maximum);
        p = select(p, vec4<f32>(), s <= vec4<f32>(MASKED));
        unrounded += p;
        scores[i] = round_p(p);
    }
    workgroupBarrier();

    // P V
    var o = Eight();
    var sum = vec4<f32>();
    for (var key = begin; key < end; key += STEP) {
        let keys = next;
        next = keys_of_v(v_start, key + STEP + slot, end_of_slot, column);
        let at = key - begin + slot;
        if (key + slot < end_of_slot) {
            let p = scores[at];
            sum += p;
            o = add_key(o, p, keys.k0);
        }
        if (key + slot + SLOTS < end_of_slot) {
            let p = scores[at + SLOTS];
            sum += p;
            o = add_key(o, p, keys.k1);
        }
        if (key + slot + 2u * SLOTS < end_of_slot) {
            let p = scores[at + 2u * SLOTS];
            sum += p;
            o = add_key(o, p, keys.k2);
        }
        if (key + slot + 3u * SLOTS < end_of_slot) {
            let p = scores[at + 3u * SLOTS];
            sum += p;
            o = add_key(o, p, keys.k3);
        }
    }

    // The slots' parts, halved until one is left.
    for (var half = SLOTS / 2u; half > 0u; half /= 2u) {
        if (slot >= half && slot < 2u * half) {
            put((slot - half) * COLUMNS + column, o);
        }
        workgroupBarrier();
        if (slot < half) {
            o = add(slot * COLUMNS + column, o);
        }
        workgroupBarrier();
    }
    let place = (pair * params.packs + pack) * params.splits + split;
    if (slot == 0u) {
        let at = params.partial_o + place * 8u * COLUMNS + column;
        floats[at] = o.c0;
        floats[at + COLUMNS] = o.c1;
        floats[at + 2u * COLUMNS] = o.c2;
        floats[at + 3u * COLUMNS] = o.c3;
        floats[at + 4u * COLUMNS] = o.c4;
        floats[at + 5u * COLUMNS] = o.c5;
        floats[at + 6u * COLUMNS] = o.c6;
        floats[at + 7u * COLUMNS] = o.c7;
    }
    // Every column of a slot has the same sum: one of them counts.
    let total = sum_of(lane, select(vec4<f32>(), sum, column == 0u));
    var all = vec4<f32>();
    if (LSE) {
        all = sum_of(lane, unrounded);
    }
    if (lane == 0u) {
        let at = params.partial_stats + place * 3u;
        floats[at] = maximum;
        floats[at + 1u] = total;
        floats[at + 2u] = all;
    }
}
