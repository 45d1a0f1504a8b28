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
// An invocation holds eight channels (column) of every SLOTS-th key, in two sets of four keys that take
// turns: each is on its way again as soon as it has been multiplied, and neither is copied, which would
// wait for it. K and V go from memory to registers; workgroup memory only adds up what the columns of a key have
// multiplied. The scores of the whole range are kept, so there is one maximum, and nothing is rescaled.

// Keys of one set, and of a turn of both.
const SET: u32 = 4u * SLOTS;
const TURN: u32 = 2u * SET;
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

// The keys key, + SLOTS, + 2 SLOTS, + 3 SLOTS; behind the last one it is read again, and its P is 0.
fn keys_of_k(start: u32, key: u32, last: u32, column: u32) -> Keys {
    let row = params.k.row;
    return Keys(
        read_k(start + min(key, last) * row, column),
        read_k(start + min(key + SLOTS, last) * row, column),
        read_k(start + min(key + 2u * SLOTS, last) * row, column),
        read_k(start + min(key + 3u * SLOTS, last) * row, column),
    );
}

fn keys_of_v(start: u32, key: u32, last: u32, column: u32) -> Keys {
    let row = params.v.row;
    return Keys(
        read_v(start + min(key, last) * row, column),
        read_v(start + min(key + SLOTS, last) * row, column),
        read_v(start + min(key + 2u * SLOTS, last) * row, column),
        read_v(start + min(key + 3u * SLOTS, last) * row, column),
    );
}

fn multiply(q: Eight, raw: Raw) -> vec4<f32> {
    let x = unpack_low(raw);
    let y = unpack_high(raw);
    return (q.c0 * x.x + q.c1 * x.y + q.c2 * x.z + q.c3 * x.w)
        + (q.c4 * y.x + q.c5 * y.y + q.c6 * y.z + q.c7 * y.w);
}

// Products of four keys, for the sums over their columns.
fn put_products(q: Eight, keys: Keys, key: u32, column: u32) {
    products[key * STRIDE + column] = multiply(q, keys.k0);
    products[(key + SLOTS) * STRIDE + column] = multiply(q, keys.k1);
    products[(key + 2u * SLOTS) * STRIDE + column] = multiply(q, keys.k2);
    products[(key + 3u * SLOTS) * STRIDE + column] = multiply(q, keys.k3);
}

// The scores of one set's keys, the first of them at `at`; of those that an invocation adds up, the
// largest.
fn put_scores(lane: u32, at: u32, key: u32, seen: u32) -> f32 {
    var peak = MASKED;
    for (var i = lane; i < 4u * SET; i += THREADS) {
        let start = (i / 4u) * STRIDE;
        var sum = 0.0;
        for (var c = 0u; c < COLUMNS; c++) {
            sum += products[start + c][i % 4u];
        }
        let s = select(MASKED, sum * params.score_scale, key + i / 4u < seen);
        scores[at + i / 4u][i % 4u] = s;
        peak = max(peak, s);
    }
    return peak;
}

// What an invocation has of O: eight channels of four rows, and their sum of P.
struct Output {
    o: Eight,
    sum: vec4<f32>,
}

fn add_key(out: Output, p: vec4<f32>, raw: Raw) -> Output {
    let x = unpack_low(raw);
    let y = unpack_high(raw);
    let o = out.o;
    return Output(
        Eight(
            o.c0 + p * x.x,
            o.c1 + p * x.y,
            o.c2 + p * x.z,
            o.c3 + p * x.w,
            o.c4 + p * y.x,
            o.c5 + p * y.y,
            o.c6 + p * y.z,
            o.c7 + p * y.w,
        ),
        out.sum + p,
    );
}

fn add_keys(out: Output, keys: Keys, at: u32) -> Output {
    let a = add_key(out, scores[at], keys.k0);
    let b = add_key(a, scores[at + SLOTS], keys.k1);
    let c = add_key(b, scores[at + 2u * SLOTS], keys.k2);
    return add_key(c, scores[at + 3u * SLOTS], keys.k3);
}

fn round_p(p: vec4<f32>) -> vec4<f32> {
    if (DTYPE == DTYPE_F16) {
        // In integers: a compiler that sees numbers packed and unpacked at once may leave out both, and
        // the rounding with them (NVIDIA's does).
        return vec4<f32>(
            unpack2x16float(f16_bits(p.x) | (f16_bits(p.y) << 16u)),
            unpack2x16float(f16_bits(p.z) | (f16_bits(p.w) << 16u)),
        );
    }
    if (DTYPE == DTYPE_BF16) {
        let bits = vec4<u32>(bf16_bits(p.x), bf16_bits(p.y), bf16_bits(p.z), bf16_bits(p.w));
        return bitcast<vec4<f32>>(bits << vec4<u32>(16u));
    }
    return p;
}

// The largest of each row, of which an invocation has one number: its row is lane % 4.
fn largest_of(lane: u32, x: f32) -> vec4<f32> {
    products[lane / 4u][lane % 4u] = x;
    workgroupBarrier();
    var result = products[0];
    for (var i = 1u; i < THREADS / 4u; i++) {
        result = max(result, products[i]);
    }
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

// Half of the slots hand over what they have.
const APART: u32 = SLOTS / 2u * COLUMNS;

fn put(at: u32, out: Output) {
    products[at] = out.o.c0;
    products[at + APART] = out.o.c1;
    products[at + 2u * APART] = out.o.c2;
    products[at + 3u * APART] = out.o.c3;
    products[at + 4u * APART] = out.o.c4;
    products[at + 5u * APART] = out.o.c5;
    products[at + 6u * APART] = out.o.c6;
    products[at + 7u * APART] = out.o.c7;
    products[at + 8u * APART] = out.sum;
}

fn add(at: u32, out: Output) -> Output {
    return Output(
        Eight(
            out.o.c0 + products[at],
            out.o.c1 + products[at + APART],
            out.o.c2 + products[at + 2u * APART],
            out.o.c3 + products[at + 3u * APART],
            out.o.c4 + products[at + 4u * APART],
            out.o.c5 + products[at + 5u * APART],
            out.o.c6 + products[at + 6u * APART],
            out.o.c7 + products[at + 7u * APART],
        ),
        out.sum + products[at + 8u * APART],
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
    // Invocations beyond the last slot read what others read, and are not counted.
    let slot = lane / COLUMNS;
    let first = slot % SLOTS;
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
    let last = max(end, 1u) - 1u;

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
    var even = keys_of_k(k_start, begin + first, last, column);
    var odd = keys_of_k(k_start, begin + SET + first, last, column);
    for (var key = begin; key < end; key += TURN) {
        if (slot < SLOTS) {
            put_products(q_rows, even, first, column);
        }
        even = keys_of_k(k_start, key + TURN + first, last, column);
        workgroupBarrier();
        peak = max(peak, put_scores(lane, key - begin, key, seen));
        workgroupBarrier();
        if (slot < SLOTS) {
            put_products(q_rows, odd, first, column);
        }
        odd = keys_of_k(k_start, key + TURN + SET + first, last, column);
        workgroupBarrier();
        peak = max(peak, put_scores(lane, key - begin + SET, key + SET, seen));
        workgroupBarrier();
    }

    // Softmax: one maximum for the range. The first keys of V are under way meanwhile.
    even = keys_of_v(v_start, begin + first, last, column);
    odd = keys_of_v(v_start, begin + SET + first, last, column);
    let maximum = largest_of(lane, peak);
    var unrounded = vec4<f32>();
    for (var i = lane; i < (end - begin + TURN - 1u) / TURN * TURN; i += THREADS) {
        let s = scores[i];
        // A score equal to the maximum gives exactly 1; a hidden one 0, also where all are hidden.
        var p = select(exp2(s - maximum), vec4<f32>(1.0), s >= maximum);
        p = select(p, vec4<f32>(), s <= vec4<f32>(MASKED));
        unrounded += p;
        scores[i] = round_p(p);
    }
    workgroupBarrier();

    // P V
    var out = Output();
    for (var key = begin; key < end; key += TURN) {
        out = add_keys(out, even, key - begin + first);
        even = keys_of_v(v_start, key + TURN + first, last, column);
        out = add_keys(out, odd, key - begin + SET + first);
        odd = keys_of_v(v_start, key + TURN + SET + first, last, column);
    }

    // The slots' parts, halved until one is left.
    for (var half = SLOTS / 2u; half > 0u; half /= 2u) {
        if (slot >= half && slot < 2u * half) {
            put((slot - half) * COLUMNS + column, out);
        }
        workgroupBarrier();
        if (slot < half) {
            out = add(slot * COLUMNS + column, out);
        }
        workgroupBarrier();
    }
    let place = (pair * params.packs + pack) * params.splits + split;
    if (slot == 0u) {
        let at = params.partial_o + place * 8u * COLUMNS + column;
        floats[at] = out.o.c0;
        floats[at + COLUMNS] = out.o.c1;
        floats[at + 2u * COLUMNS] = out.o.c2;
        floats[at + 3u * COLUMNS] = out.o.c3;
        floats[at + 4u * COLUMNS] = out.o.c4;
        floats[at + 5u * COLUMNS] = out.o.c5;
        floats[at + 6u * COLUMNS] = out.o.c6;
        floats[at + 7u * COLUMNS] = out.o.c7;
    }
    var all = vec4<f32>();
    if (LSE) {
        all = sum_of(lane, unrounded);
    }
    if (lane == 0u) {
        let at = params.partial_stats + place * 3u;
        floats[at] = maximum;
        floats[at + 1u] = out.sum;
        floats[at + 2u] = all;
    }
}
