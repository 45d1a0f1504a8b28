// What the decoding kernels have in common: who sees what, eight channels of four query rows, and what a
// key adds to them. The rows of a KV head are its queries of all the query heads that share it: row r is
// query r % q_len of head r / q_len. A pack is four of them, a vec4 throughout, so that every number read of
// K and V serves four rows.

// Below every score, and far from infinity, so that differences stay finite.
const MASKED: f32 = -3.0e38;

@group(0) @binding(0) var<uniform> params: DecodeParams;
@group(0) @binding(1) var<storage, read> q: array<element>;
@group(0) @binding(2) var<storage, read> k: array<element>;
@group(0) @binding(3) var<storage, read> v: array<element>;
@group(0) @binding(4) var<storage, read_write> floats: array<vec4<f32>>;

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

// What a workgroup works on: a range of keys of one KV head, and a pack of its rows.
struct Work {
    pair: u32,
    batch: u32,
    kv_head: u32,
    pack: u32,
    split: u32,
}

// The packs of a KV head go side by side: what one reads of K and V the others find in a cache.
fn work_of(group: vec2<u32>) -> Work {
    let block = params.first_block + group.x;
    let split = block / params.packs;
    let pair = params.first_pair + group.y;
    let batch = pair / params.kv_heads;
    return Work(pair, batch, pair - batch * params.kv_heads, block - split * params.packs, split);
}

// The four rows of a pack, as they lie in memory, and how many keys each sees: none where there is no such
// row, whose numbers are the last row's.
struct Rows {
    row0: Raw,
    row1: Raw,
    row2: Raw,
    row3: Raw,
    visible: vec4<u32>,
}

// A row: which query of which of the KV head's query heads.
struct Place {
    head: u32,
    query: u32,
    there: bool,
}

// The row behind another, without a division; the same one behind the last.
fn next_row(place: Place, there: bool) -> Place {
    let wraps = place.query + 1u == params.q_len;
    let head = place.head + select(0u, 1u, there && wraps);
    let query = select(place.query, select(place.query + 1u, 0u, wraps), there);
    return Place(head, query, there);
}

fn visible_keys(place: Place) -> u32 {
    if (!place.there) {
        return 0u;
    }
    if (CAUSAL) {
        return u32(clamp(i32(place.query) + 1 + params.causal_shift, 0, i32(params.kv_len)));
    }
    return params.kv_len;
}

fn query_row(work: Work, place: Place, column: u32) -> Raw {
    let head = work.kv_head * params.heads_per_kv + place.head;
    return read_q(row_start(params.q, work.batch, head, place.query), column);
}

fn rows_of(work: Work, column: u32) -> Rows {
    let row = 4u * work.pack;
    let rows = params.heads_per_kv * params.q_len;
    let head = row / params.q_len;
    let place0 = Place(head, row - head * params.q_len, true);
    let place1 = next_row(place0, row + 1u < rows);
    let place2 = next_row(place1, row + 2u < rows);
    let place3 = next_row(place2, row + 3u < rows);
    return Rows(
        query_row(work, place0, column),
        query_row(work, place1, column),
        query_row(work, place2, column),
        query_row(work, place3, column),
        vec4<u32>(
            visible_keys(place0),
            visible_keys(place1),
            visible_keys(place2),
            visible_keys(place3),
        ),
    );
}

// The eight channels of four rows, row by row, as four rows of each channel.
fn transposed(rows: Rows) -> Eight {
    let low = transpose(mat4x4<f32>(
        unpack_low(rows.row0),
        unpack_low(rows.row1),
        unpack_low(rows.row2),
        unpack_low(rows.row3),
    ));
    let high = transpose(mat4x4<f32>(
        unpack_high(rows.row0),
        unpack_high(rows.row1),
        unpack_high(rows.row2),
        unpack_high(rows.row3),
    ));
    return Eight(low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]);
}

fn multiply(q: Eight, raw: Raw) -> vec4<f32> {
    let x = unpack_low(raw);
    let y = unpack_high(raw);
    return (q.c0 * x.x + q.c1 * x.y + q.c2 * x.z + q.c3 * x.w)
        + (q.c4 * y.x + q.c5 * y.y + q.c6 * y.z + q.c7 * y.w);
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

// P of a score under its row's maximum. A score equal to it gives exactly 1; a hidden one 0, also where all
// are hidden.
fn p_of(s: vec4<f32>, maximum: vec4<f32>) -> vec4<f32> {
    let p = select(exp2(s - maximum), vec4<f32>(1.0), s >= maximum);
    return select(p, vec4<f32>(), s <= vec4<f32>(MASKED));
}

// P, which is at most 1, rounded to the tensors' type, to nearest even. In integers: a compiler that sees
// numbers packed and unpacked at once may leave out both, and the rounding with them (NVIDIA's does).
fn round_p(p: vec4<f32>) -> vec4<f32> {
    let bits = bitcast<vec4<u32>>(p);
    if (DTYPE == DTYPE_F16) {
        let odd = (bits >> vec4<u32>(13u)) & vec4<u32>(1u);
        let rounded = (bits + vec4<u32>(0xfffu) + odd) & vec4<u32>(0xffffe000u);
        // Below 2^-14 f16 has multiples of 2^-24: behind 0.5 so has f32, and its adder rounds.
        let multiple = bitcast<vec4<u32>>(p + 0.5) - vec4<u32>(0x3f000000u);
        let small = vec4<f32>(multiple) * 5.9604644775390625e-8;
        return select(bitcast<vec4<f32>>(rounded), small, p < vec4<f32>(6.103515625e-5));
    }
    if (DTYPE == DTYPE_BF16) {
        let odd = (bits >> vec4<u32>(16u)) & vec4<u32>(1u);
        return bitcast<vec4<f32>>((bits + vec4<u32>(0x7fffu) + odd) & vec4<u32>(0xffff0000u));
    }
    return p;
}
