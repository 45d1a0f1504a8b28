// Attention over quantized Q and K: O = softmax(scale * Q K^T) V, online in base 2, tile by tile.
//
//   q_codes [pair, q_padded, QK_DIM], k_codes [pair, kv_padded, QK_DIM]: signed bytes, 16 per vec4
//   values: as values_f16.wgsl or values_i8.wgsl lays them out, 64 keys per tile
//   floats: q_scales [pair, q_groups], k_scales [pair, k_groups], v_scales [pair, HEAD_DIM],
//           lse_bias [pair, q_len]
//   -> out [batch, heads, q_len, head_dim], lse [pair, q_len]
//
// SPLIT, for few queries: a workgroup takes one range of SPLIT_KEYS keys of a KV head, and its rows are
// the queries of all the query heads that share it, each head's on a multiple of four.
//   -> floats: partial_o, partial_stats, as decode.wgsl describes them; merge.wgsl makes O and LSE of them
//
// One workgroup per ROWS queries and pair. An invocation holds four rows: of the scores the four keys
// column, column + 16, + 32, + 48 of a tile; of O four channels of every group of 64. The 16 columns of
// a row meet only in its maximum, once per tile, and in its sums, once at the end.
//
// Workgroup memory `staged`: the rows of Q, then the tile of K; V's tile goes over K (Q_RESIDENT) or
// over both. Rows of codes are QK_STRIDE vec4 apart, an odd number, so that rows read together lie in
// different banks.

const COLUMNS: u32 = 16u;
const KEY_TILE: u32 = 64u;
const THREADS: u32 = ROWS * 4u;
const GROUPS: u32 = PV_DIM / 64u;
const P_STRIDE: u32 = P_VECS + 1u;
const K_AT: u32 = ROWS * QK_STRIDE;
const V_VECS: u32 = CHUNK_GROUPS * 16u;

@group(0) @binding(0) var<uniform> params: AttendParams;
@group(0) @binding(1) var<storage, read_write> q_codes: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read_write> k_codes: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read_write> values: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read_write> floats: array<f32>;
@group(0) @binding(5) var<storage, read_write> out: array<u32>;
@group(0) @binding(6) var<storage, read_write> lse: array<u32>;

var<workgroup> staged: array<vec4<u32>, STAGED_VECS>;
var<workgroup> p_tile: array<vec4<u32>, ROWS * P_STRIDE>;
var<workgroup> columns: array<vec4<f32>, ROWS * 4u>;
var<workgroup> key_scales: array<f32, KEY_TILE>;

// Per row, of the invocation's four: the running maximum (log2 units), the sums over this invocation's
// keys, and the factors of the current tile.
struct State {
    maximum: vec4<f32>,
    sum: vec4<f32>,
    unrounded: vec4<f32>,
    decay: vec4<f32>,
    gain: vec4<f32>,
}

struct Scores {
    r0: vec4<f32>,
    r1: vec4<f32>,
    r2: vec4<f32>,
    r3: vec4<f32>,
}

struct Products {
    r0: vec4<i32>,
    r1: vec4<i32>,
    r2: vec4<i32>,
    r3: vec4<i32>,
}

// exp2(s - maximum). A score equal to the maximum gives exactly 1, also where the compiler fuses the
// product that made s with the subtraction: at large scores the fused difference is far from zero.
fn exponentials(s: vec4<f32>, maximum: f32, boundary: bool) -> vec4<f32> {
    let m = vec4<f32>(maximum);
    let p = select(exp2(s - m), vec4<f32>(1.0), s >= m);
    if (boundary) {
        return select(p, vec4<f32>(), s <= vec4<f32>(MASKED));
    }
    return p;
}

// The factor that moves a row from one maximum to a higher one.
fn decay_to(before: vec4<f32>, after: vec4<f32>) -> vec4<f32> {
    return select(exp2(before - after), vec4<f32>(1.0), before >= after);
}

fn scale_rows(o: mat4x4<f32>, by: vec4<f32>) -> mat4x4<f32> {
    return mat4x4<f32>(o[0] * by.x, o[1] * by.y, o[2] * by.z, o[3] * by.w);
}

// The maxima of four rows over their 16 columns, in two steps: each column reduces a quarter of one of
// the rows, and the quarters meet in the vector behind the row's P. That is five vectors read for a
// second barrier, where each column would else read all sixteen.
fn row_max(row: u32, column: u32, x: vec4<f32>) -> vec4<f32> {
    share(row, column, x);
    let own = row + column % 4u;
    let quarter = column / 4u;
    p_tile[own * P_STRIDE + P_VECS][quarter] = bitcast<u32>(max_of(columns[own * 4u + quarter]));
    workgroupBarrier();
    return vec4<f32>(peak_of(row), peak_of(row + 1u), peak_of(row + 2u), peak_of(row + 3u));
}

fn peak_of(row: u32) -> f32 {
    return max_of(bitcast<vec4<f32>>(p_tile[row * P_STRIDE + P_VECS]));
}

fn row_sum(row: u32, column: u32, x: vec4<f32>) -> vec4<f32> {
    share(row, column, x);
    return vec4<f32>(sum_of(row), sum_of(row + 1u), sum_of(row + 2u), sum_of(row + 3u));
}

// Puts one number per row and column where the row's other columns see it. Callers pass a barrier
// between reading and the next call.
fn share(row: u32, column: u32, x: vec4<f32>) {
    columns[row * 4u + column / 4u][column % 4u] = x.x;
    columns[(row + 1u) * 4u + column / 4u][column % 4u] = x.y;
    columns[(row + 2u) * 4u + column / 4u][column % 4u] = x.z;
    columns[(row + 3u) * 4u + column / 4u][column % 4u] = x.w;
    workgroupBarrier();
}

fn max_of(x: vec4<f32>) -> f32 {
    return max(max(x.x, x.y), max(x.z, x.w));
}

fn sum_of(row: u32) -> f32 {
    let at = row * 4u;
    let x = (columns[at] + columns[at + 1u]) + (columns[at + 2u] + columns[at + 3u]);
    return (x.x + x.y) + (x.z + x.w);
}

// Where a row of the queries of `pair` is: itself, or, where heads are packed, `pair` is a KV head's and
// the row one of a query head that shares it. Rows behind the last one repeat its head's.
struct Query {
    pair: u32,
    index: u32,
}

// Rows of a packed head: an invocation's four rows are of one head.
fn pitch() -> u32 {
    return (params.q_len + 3u) & ~3u;
}

fn query_of(pair: u32, row: u32) -> Query {
    if (SPLIT) {
        let head = min(row / pitch(), params.heads_per_kv - 1u);
        return Query(pair * params.heads_per_kv + head, row % pitch());
    }
    return Query(pair, row);
}

fn stage_queries(lane: u32, pair: u32, first_row: u32, chunk: u32) {
    for (var i = lane; i < ROWS * QK_VECS; i += THREADS) {
        let row = i / QK_VECS;
        let vec = i % QK_VECS;
        let query = query_of(pair, first_row + row);
        let at = params.q_codes + (query.pair * params.q_padded + query.index) * (QK_DIM / 16u);
        staged[row * QK_STRIDE + vec] = q_codes[at + chunk * QK_VECS + vec];
    }
}

// Vectors of one staged chunk of K and of V, as they lie in memory and where they are staged. Where an
// invocation has few of them it holds them: HELD_KEYS and HELD_VALUES of them are read well before their
// place is free.
const KEY_VECTORS: u32 = KEY_TILE * QK_VECS;
const VALUE_VECTORS: u32 = V_ROWS * V_VECS;

fn read_key(at: u32, i: u32) -> vec4<u32> {
    return k_codes[at + (i / QK_VECS) * (QK_DIM / 16u) + i % QK_VECS];
}

fn put_key(i: u32, x: vec4<u32>) {
    staged[K_AT + (i / QK_VECS) * QK_STRIDE + i % QK_VECS] = x;
}

fn read_value(at: u32, i: u32) -> vec4<u32> {
    return values[at + (i / V_VECS) * (PV_DIM / 4u) + i % V_VECS];
}

fn stage_keys(lane: u32, at: u32, chunk: u32) {
    for (var i = lane; i < KEY_VECTORS; i += THREADS) {
        put_key(i, read_key(at + chunk * QK_VECS, i));
    }
}

fn stage_values(lane: u32, at: u32, group: u32) {
    for (var i = lane; i < VALUE_VECTORS; i += THREADS) {
        staged[V_AT + i] = read_value(at + group * 16u, i);
    }
}

// Whether there is an i-th vector to be held: where the invocations share them evenly, always.
fn is_key(i: u32) -> bool {
    return KEY_VECTORS % THREADS == 0u || i < KEY_VECTORS;
}

fn is_value(i: u32) -> bool {
    return VALUE_VECTORS % THREADS == 0u || i < VALUE_VECTORS;
}

fn hold_key(at: u32, i: u32) -> vec4<u32> {
    if (is_key(i)) {
        return read_key(at, i);
    }
    return vec4<u32>();
}

fn hold_value(at: u32, i: u32) -> vec4<u32> {
    if (is_value(i)) {
        return read_value(at, i);
    }
    return vec4<u32>();
}

// Adds the products of the staged channels: four rows against the keys column, + 16, + 32, + 48.
fn multiply(row: u32, column: u32, sums: Products) -> Products {
    var t = sums;
    for (var i = 0u; i < QK_VECS; i++) {
        let q = row * QK_STRIDE + i;
        let k = K_AT + column * QK_STRIDE + i;
        let q0 = staged[q];
        let q1 = staged[q + QK_STRIDE];
        let q2 = staged[q + 2u * QK_STRIDE];
        let q3 = staged[q + 3u * QK_STRIDE];
        let k0 = staged[k];
        let k1 = staged[k + 16u * QK_STRIDE];
        let k2 = staged[k + 32u * QK_STRIDE];
        let k3 = staged[k + 48u * QK_STRIDE];
        t.r0 += vec4<i32>(dot16(q0, k0), dot16(q0, k1), dot16(q0, k2), dot16(q0, k3));
        t.r1 += vec4<i32>(dot16(q1, k0), dot16(q1, k1), dot16(q1, k2), dot16(q1, k3));
        t.r2 += vec4<i32>(dot16(q2, k0), dot16(q2, k1), dot16(q2, k2), dot16(q2, k3));
        t.r3 += vec4<i32>(dot16(q3, k0), dot16(q3, k1), dot16(q3, k2), dot16(q3, k3));
    }
    return t;
}

fn mask_row(s: vec4<f32>, keys: vec4<u32>, visible: u32) -> vec4<f32> {
    return select(vec4<f32>(MASKED), s, keys < vec4<u32>(visible));
}

// Where a row's results go.
struct Place {
    batch: u32,
    head: u32,
    pair: u32,
    scales: u32,
}

// What an invocation holds of a row at the end: four channels of each group, and the row's state.
struct Row {
    o0: vec4<f32>,
    o1: vec4<f32>,
    o2: vec4<f32>,
    o3: vec4<f32>,
    maximum: f32,
    sum: f32,
    unrounded: f32,
}

fn write_row(place: Place, query: u32, column: u32, row: Row) {
    if (query >= params.q_len) {
        return;
    }
    let start = row_start(params.out, place.batch, place.head, query);
    write_group(start, column, row.o0, row.sum, place.scales);
    if (GROUPS > 1u) { write_group(start, column + 16u, row.o1, row.sum, place.scales); }
    if (GROUPS > 2u) { write_group(start, column + 32u, row.o2, row.sum, place.scales); }
    if (GROUPS > 3u) { write_group(start, column + 48u, row.o3, row.sum, place.scales); }
    if (LSE && column == 0u) {
        write_lse(place.pair, query, row.maximum, row.unrounded);
    }
}

// Four channels of four rows, not divided yet: one vector of rows per channel.
fn write_partial(place: u32, quad: u32, o: mat4x4<f32>) {
    if (quad / 2u >= COLUMNS_OF_8) {
        return;
    }
    let rows = transpose(o);
    let at = params.partial_o + place * 8u * COLUMNS_OF_8 + (quad % 2u) * 4u * COLUMNS_OF_8 + quad / 2u;
    write_vector(at, rows[0]);
    write_vector(at + COLUMNS_OF_8, rows[1]);
    write_vector(at + 2u * COLUMNS_OF_8, rows[2]);
    write_vector(at + 3u * COLUMNS_OF_8, rows[3]);
}

fn write_vector(at: u32, x: vec4<f32>) {
    floats[4u * at] = x.x;
    floats[4u * at + 1u] = x.y;
    floats[4u * at + 2u] = x.z;
    floats[4u * at + 3u] = x.w;
}

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    var work = group.xy;
    if (!SPLIT) {
        work = work_of(group.xy, groups.xy);
    }
    // A query head's, or where heads are packed a KV head's.
    let pair = params.first_pair + work.y;
    let batch = pair / params.heads;
    let head = pair % params.heads;
    let kv_heads = params.heads / params.heads_per_kv;
    let kv_pair = select(batch * kv_heads + head / params.heads_per_kv, pair, SPLIT);
    var tile = params.first_tile + work.x;
    var begin = 0u;
    if (SPLIT) {
        begin = (tile / params.tiles) * SPLIT_KEYS;
        tile = tile % params.tiles;
    } else if (CAUSAL) {
        tile = params.tiles - 1u - tile;
    }
    let first_row = tile * ROWS;
    let column = lane % COLUMNS;
    let row = 4u * (lane / COLUMNS);
    let q_pair = query_of(pair, first_row + row).pair;
    let query = query_of(pair, first_row + row).index;

    let visible = vec4<u32>(
        visible_keys(query),
        visible_keys(query + 1u),
        visible_keys(query + 2u),
        visible_keys(query + 3u),
    );
    // The keys that any row of the workgroup sees, and those that every row sees.
    var end = visible_keys(min(first_row + ROWS, params.q_len) - 1u);
    var unmasked = visible_keys(first_row);
    if (SPLIT) {
        end = min(visible_keys(params.q_len - 1u), begin + SPLIT_KEYS);
        unmasked = visible_keys(0u);
    }

    let row_scale = params.score_scale * vec4<f32>(
        q_scale(q_pair, query),
        q_scale(q_pair, query + 1u),
        q_scale(q_pair, query + 2u),
        q_scale(q_pair, query + 3u),
    );
    if (Q_RESIDENT) {
        stage_queries(lane, pair, first_row, 0u);
    }

    var state = State();
    state.maximum = vec4<f32>(MASKED);
    var o0 = mat4x4<f32>();
    var o1 = mat4x4<f32>();
    var o2 = mat4x4<f32>();
    var o3 = mat4x4<f32>();
    // Padded to whole tiles: the first is there even where no key is seen.
    let k_start = params.k_codes + kv_pair * params.kv_padded * (QK_DIM / 16u);
    //# for l in HELD_KEYS
    var key_$l = hold_key(k_start + begin * (QK_DIM / 16u), lane + $lu * THREADS);
    //# end
    for (var key = begin; key < end; key += KEY_TILE) {
        let k_at = k_start + key * (QK_DIM / 16u);
        let v_at = params.values
            + (kv_pair * (params.kv_padded / KEY_TILE) + key / KEY_TILE) * (V_TILE_ROWS * (PV_DIM / 4u));
        let boundary = key + KEY_TILE > unmasked;

        // Q K^T
        if (lane < KEY_TILE) {
            key_scales[lane] = k_scale(kv_pair, key + lane);
        }
        var products = Products();
        for (var chunk = 0u; chunk < QK_CHUNKS; chunk++) {
            if (!Q_RESIDENT) {
                stage_queries(lane, pair, first_row, chunk);
            }
            //# if HELD_KEYS
            //# for l in HELD_KEYS
            if (is_key(lane + $lu * THREADS)) { put_key(lane + $lu * THREADS, key_$l); }
            //# end
            //# else
            stage_keys(lane, k_at, chunk);
            //# end
            workgroupBarrier();
            products = multiply(row, column, products);
            if (chunk + 1u < QK_CHUNKS) {
                workgroupBarrier();
            }
        }

        //# for l in HELD_VALUES
        let value_$l = hold_value(v_at, lane + $lu * THREADS);
        //# end

        // Softmax
        var s: Scores;
        //# if ONE_KEY_SCALE
        let scales = row_scale * key_scales[column];
        s.r0 = vec4<f32>(products.r0) * scales.x;
        s.r1 = vec4<f32>(products.r1) * scales.y;
        s.r2 = vec4<f32>(products.r2) * scales.z;
        s.r3 = vec4<f32>(products.r3) * scales.w;
        //# else
        let scales = vec4<f32>(
            key_scales[column],
            key_scales[column + 16u],
            key_scales[column + 32u],
            key_scales[column + 48u],
        );
        s.r0 = vec4<f32>(products.r0) * row_scale.x * scales;
        s.r1 = vec4<f32>(products.r1) * row_scale.y * scales;
        s.r2 = vec4<f32>(products.r2) * row_scale.z * scales;
        s.r3 = vec4<f32>(products.r3) * row_scale.w * scales;
        //# end
        if (boundary) {
            let keys = vec4<u32>(key + column) + vec4<u32>(0u, 16u, 32u, 48u);
            s.r0 = mask_row(s.r0, keys, visible.x);
            s.r1 = mask_row(s.r1, keys, visible.y);
            s.r2 = mask_row(s.r2, keys, visible.z);
            s.r3 = mask_row(s.r3, keys, visible.w);
        }
        let own_max = vec4<f32>(
            max(max(s.r0.x, s.r0.y), max(s.r0.z, s.r0.w)),
            max(max(s.r1.x, s.r1.y), max(s.r1.z, s.r1.w)),
            max(max(s.r2.x, s.r2.y), max(s.r2.z, s.r2.w)),
            max(max(s.r3.x, s.r3.y), max(s.r3.z, s.r3.w)),
        );
        // The barriers inside also end the reading of K: V may take its place.
        let tile_max = row_max(row, column, own_max);
        weigh(row, column, s, tile_max, boundary, &state);

        // P V
        //# if HELD_VALUES
        //# for l in HELD_VALUES
        if (is_value(lane + $lu * THREADS)) { staged[V_AT + lane + $lu * THREADS] = value_$l; }
        //# end
        //# else
        stage_values(lane, v_at, 0u);
        //# end
        workgroupBarrier();
        // Behind the last tile it is read again: a branch would cost more.
        let next_key = min(key + KEY_TILE, params.kv_padded - KEY_TILE);
        //# for l in HELD_KEYS
        key_$l = hold_key(k_start + next_key * (QK_DIM / 16u), lane + $lu * THREADS);
        //# end
        accumulate(row, column, state, v_at, 0u, &o0, &o1);
        if (CHUNK_GROUPS == 1u && GROUPS > 1u) {
            workgroupBarrier();
            stage_values(lane, v_at, 1u);
            workgroupBarrier();
            accumulate(row, column, state, v_at, 1u, &o1, &o2);
        }
        if (GROUPS > 2u) {
            workgroupBarrier();
            stage_values(lane, v_at, 2u);
            workgroupBarrier();
            accumulate(row, column, state, v_at, 2u, &o2, &o3);
        }
        if (CHUNK_GROUPS == 1u && GROUPS > 3u) {
            workgroupBarrier();
            stage_values(lane, v_at, 3u);
            workgroupBarrier();
            var none = mat4x4<f32>();
            accumulate(row, column, state, v_at, 3u, &o3, &none);
        }
        workgroupBarrier();
    }

    let sum = row_sum(row, column, state.sum);
    workgroupBarrier();
    var unrounded = vec4<f32>();
    if (LSE) {
        unrounded = row_sum(row, column, state.unrounded);
    }
    if (SPLIT) {
        let packs = params.heads_per_kv * (pitch() / 4u);
        let pack = (first_row + row) / 4u;
        if (pack < packs) {
            let at = (pair * packs + pack) * params.splits + begin / SPLIT_KEYS;
            write_partial(at, column, o0);
            if (GROUPS > 1u) { write_partial(at, column + 16u, o1); }
            if (GROUPS > 2u) { write_partial(at, column + 32u, o2); }
            if (GROUPS > 3u) { write_partial(at, column + 48u, o3); }
            if (column == 0u) {
                write_vector(params.partial_stats + at * 3u, state.maximum);
                write_vector(params.partial_stats + at * 3u + 1u, sum);
                write_vector(params.partial_stats + at * 3u + 2u, unrounded);
            }
        }
        return;
    }
    let place = Place(batch, head, pair, params.v_scales + kv_pair * HEAD_DIM);
    write_row(place, query, column, Row(o0[0], o1[0], o2[0], o3[0], state.maximum.x, sum.x, unrounded.x));
    write_row(place, query + 1u, column, Row(o0[1], o1[1], o2[1], o3[1], state.maximum.y, sum.y, unrounded.y));
    write_row(place, query + 2u, column, Row(o0[2], o1[2], o2[2], o3[2], state.maximum.z, sum.z, unrounded.z));
    write_row(place, query + 3u, column, Row(o0[3], o1[3], o2[3], o3[3], state.maximum.w, sum.w, unrounded.w));
}
