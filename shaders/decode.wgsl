// Attention of a few queries to one range of keys, on the tensors' own numbers: the first half of a
// call whose keys are split over workgroups. merge.wgsl puts the ranges together.
//
//   q [batch, heads, q_len, HEAD_DIM], k, v [batch, KV heads, kv_len, HEAD_DIM]: where the caller has them
//   -> floats: partial_o [pack, splits, 8, COLUMNS], one vec4 per channel: its value in four rows
//              partial_stats [pack, splits, 3]: maximum (log2 units), sum of P, sum before rounding
//
// Everywhere; where subgroups can add up what the columns of a key have multiplied, decode_shuffled.wgsl is
// faster. Rows and packs: lib/decode.wgsl.
//
// An invocation holds eight channels (column) of every SLOTS-th key, in two sets of four keys that take
// turns: each is on its way again as soon as it has been multiplied, and neither is copied, which would
// wait for it. K and V go from memory to registers; workgroup memory only adds up what the columns of a key have
// multiplied. The scores of the whole range are kept, so there is one maximum, and nothing is rescaled.

// Keys of one set, and of a turn of both.
const SET: u32 = 4u * SLOTS;
const TURN: u32 = 2u * SET;
const STRIDE: u32 = COLUMNS | 1u;

// Products of a key's columns, STRIDE apart: an odd number, so that keys lie in different banks. Later
// the halves of sums.
var<workgroup> products: array<vec4<f32>, PRODUCTS>;
// The scores of the range, then P.
var<workgroup> scores: array<vec4<f32>, SPLIT>;

// Four keys' channels as they lie in memory.
struct Keys {
    k0: Raw,
    k1: Raw,
    k2: Raw,
    k3: Raw,
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

fn add_keys(out: Output, keys: Keys, at: u32) -> Output {
    let a = add_key(out, scores[at], keys.k0);
    let b = add_key(a, scores[at + SLOTS], keys.k1);
    let c = add_key(b, scores[at + 2u * SLOTS], keys.k2);
    return add_key(c, scores[at + 3u * SLOTS], keys.k3);
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
    let work = work_of(group.xy);
    let column = lane % COLUMNS;
    // Invocations beyond the last slot read what others read, and are not counted.
    let slot = lane / COLUMNS;
    let first = slot % SLOTS;
    let rows = rows_of(work, column);
    let begin = work.split * SPLIT;
    let most = max(max(rows.visible.x, rows.visible.y), max(rows.visible.z, rows.visible.w));
    let end = clamp(most, begin, begin + SPLIT);
    let last = max(end, 1u) - 1u;

    let q_rows = transposed(rows);
    let k_start = row_start(params.k, work.batch, work.kv_head, 0u);
    let v_start = row_start(params.v, work.batch, work.kv_head, 0u);

    // Q K^T. An invocation adds up scores of one row.
    let seen = rows.visible[lane % 4u];
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
        let p = p_of(scores[i], maximum);
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
    let place = (work.pair * params.packs + work.pack) * params.splits + work.split;
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
