// Attention over quantized Q and K on cooperative matrices: O = softmax(scale * Q K^T) V, online in base
// 2, tile by tile.
//
//   q_codes [pair, q_padded, CHANNELS], k_codes [pair, kv_padded, CHANNELS]: whole numbers in f16
//   values [pair, kv_padded, CHANNELS]: f16
//   floats: q_scales [pair, q_groups], k_scales [pair, k_groups], v_scales [pair, HEAD_DIM],
//           lse_bias [pair, q_len]
//   -> out [batch, heads, q_len, head_dim], lse [pair, q_len]
//
// A subgroup computes ROW_MATS * SIDE queries. WGSL shows no element of a matrix, so what is done to
// single scores is done in workgroup memory: S goes out (f32), P comes back (f16). There each invocation
// has whole rows to itself: no row is ever shared, and nothing is reduced across invocations.
//
// The same holds for O, so it is not rescaled when a row's maximum rises: the maximum in use stays until
// the scores pass it by STALE, and P is as large as 2^STALE until then, which f16 holds with the same
// relative precision. When a row must move, O makes a round trip through the room of S.
//
// Workgroup memory is counted in items: vec4 where VECTOR_ITEMS, else single numbers.

const ROWS: u32 = SUBGROUPS * ROW_MATS * SIDE;
const THREADS: u32 = SUBGROUPS * LANES;
const OWN_ROWS: u32 = ROW_MATS * SIDE;
const CHUNK_QUADS: u32 = CHUNK_MATS * SIDE / 4u;
// Items per f16 or f32 number, as a divisor: pointers and strides of matrices count items.
//# if VECTOR_ITEMS
const PER_ITEM: u32 = 4u;
//# else
const PER_ITEM: u32 = 1u;
//# end
const S_ITEMS: u32 = S_STRIDE / PER_ITEM;
const P_ITEMS: u32 = P_STRIDE / PER_ITEM;
const Q_ITEMS: u32 = CHANNELS / PER_ITEM;
const V_ITEMS: u32 = CHANNELS / PER_ITEM;
const SIDE_ITEMS: u32 = SIDE / PER_ITEM;

// Beyond this a score's last bit is coarse enough for a fused multiply-add to show: such rows take the
// careful way.
const PLAIN_MAXIMUM: f32 = 1024.0;

@group(0) @binding(0) var<uniform> params: AttendParams;
@group(0) @binding(1) var<storage, read_write> q_codes: array<Half>;
@group(0) @binding(2) var<storage, read_write> k_codes: array<Half>;
@group(0) @binding(3) var<storage, read_write> values: array<Half>;
@group(0) @binding(4) var<storage, read_write> floats: array<f32>;
@group(0) @binding(5) var<storage, read_write> out: array<u32>;
@group(0) @binding(6) var<storage, read_write> lse: array<u32>;

// All workgroup memory, in one piece. A matrix is loaded by 16 bytes at a time, but an array alone would
// lie wherever its element's alignment allows: an array of f16 at a multiple of 8, and what is loaded
// from it is wrong without a word (seen on NVIDIA). The first member brings the piece to a multiple of
// 16; every array before the last ones is whole in 16 bytes.
struct Room {
    @align(16) s: array<Single, ROWS * S_ITEMS>,
//# if K_UNIFORM
//# else
    key_scales: array<vec4<f32>, TILE_QUADS>,
//# end
    p: array<Half, ROWS * P_ITEMS>,
//# if STAGED
    // The tiles of K and V that all subgroups multiply by.
    k: array<Half, KEY_TILE * KV_STRIDE>,
    v: array<Half, KEY_TILE * KV_STRIDE>,
//# end
    row_sums: array<f32, SPLIT * ROWS>,
    // Whether a row must move to a new maximum: 1, and O is still zero; 2, and O must move as well.
    moving: u32,
}

var<workgroup> room: Room;
//# if STAGED

const KV_STRIDE: u32 = (CHANNELS + 8u) / PER_ITEM;
const KV_ITEMS: u32 = KEY_TILE * CHANNELS / PER_ITEM;

const ROW_ITEMS: u32 = CHANNELS / PER_ITEM;

// Where the i-th item of a tile lies, of those that an invocation stages.
fn kv_place(lane: u32, i: u32) -> u32 {
//# if STAGE_EVEN
    return (lane / ROW_ITEMS) * KV_STRIDE + lane % ROW_ITEMS + i * (THREADS / ROW_ITEMS) * KV_STRIDE;
//# else
    let at = i * THREADS + lane;
    return (at / ROW_ITEMS) * KV_STRIDE + at % ROW_ITEMS;
//# end
}

// Which item that is. Past the end of a tile: one that is there, and is not stored.
fn kv_item(lane: u32, i: u32) -> u32 {
//# if STAGE_WHOLE
    return i * THREADS + lane;
//# else
    return min(i * THREADS + lane, KV_ITEMS - 1u);
//# end
}

fn kv_is_there(lane: u32, i: u32) -> bool {
//# if STAGE_WHOLE
    return true;
//# else
    return i * THREADS + lane < KV_ITEMS;
//# end
}
//# end

fn s_quad(row: u32, quad: u32) -> vec4<f32> {
//# if VECTOR_ITEMS
    return room.s[row * S_ITEMS + quad];
//# else
    let at = row * S_ITEMS + 4u * quad;
    return vec4<f32>(room.s[at], room.s[at + 1u], room.s[at + 2u], room.s[at + 3u]);
//# end
}

fn set_s_quad(row: u32, quad: u32, x: vec4<f32>) {
//# if VECTOR_ITEMS
    room.s[row * S_ITEMS + quad] = x;
//# else
    let at = row * S_ITEMS + 4u * quad;
    room.s[at] = x.x;
    room.s[at + 1u] = x.y;
    room.s[at + 2u] = x.z;
    room.s[at + 3u] = x.w;
//# end
}

fn set_p_quad(row: u32, quad: u32, p: vec4<f32>) {
    let x = vec4<f16>(p);
//# if VECTOR_ITEMS
    room.p[row * P_ITEMS + quad] = x;
//# else
    let at = row * P_ITEMS + 4u * quad;
    room.p[at] = x.x;
    room.p[at + 1u] = x.y;
    room.p[at + 2u] = x.z;
    room.p[at + 3u] = x.w;
//# end
}

// The factor that makes scores of the products of a row with four keys.
fn score_scale(row_scale: f32, tile_scale: f32, quad: u32) -> vec4<f32> {
//# if K_UNIFORM
    return vec4<f32>(row_scale * tile_scale);
//# else
    return row_scale * room.key_scales[quad];
//# end
}

// The sum of a row's P, from all who had a part of it.
fn row_sum(row: u32) -> f32 {
    var sum = room.row_sums[row];
    for (var part = 1u; part < SPLIT; part++) {
        sum += room.row_sums[part * ROWS + row];
    }
    return sum;
}

fn is_masked(key: u32, quad: u32, visible: u32) -> vec4<bool> {
    return vec4<u32>(key + 4u * quad) + vec4<u32>(0u, 1u, 2u, 3u) >= vec4<u32>(visible);
}

fn largest(x: vec4<f32>) -> f32 {
    return max(max(x.x, x.y), max(x.z, x.w));
}

fn total(x: vec4<f32>) -> f32 {
    return (x.x + x.y) + (x.z + x.w);
}

// P of one row of a tile against a maximum, and how far the scores pass it.
struct Weighed {
    sum: f32,
    above: f32,
}

//# for b in TWO
fn weigh_$b(row: u32, first: u32, key: u32, visible: u32, row_scale: f32, tile_scale: f32, maximum: f32) -> Weighed {
    var sum = vec4<f32>();
    var above = vec4<f32>(MASKED);
//# for j in PART_QUADS
    {
        let quad = first + $ju;
        var x = s_quad(row, quad) * score_scale(row_scale, tile_scale, quad) - vec4<f32>(maximum);
        if ($bu == 1u) {
            x = select(x, vec4<f32>(MASKED), is_masked(key, quad, visible));
        }
        above = max(above, x);
        let p = exp2(x);
        sum += p;
        set_p_quad(row, quad, p);
    }
//# end
    return Weighed(total(sum), largest(above));
}
//# end

// The same where some row's maximum must move, or is so large that a difference of scores must not be
// fused with the product that made them: exactly 1 where a score is the maximum. All who share a row
// look at all of it and come to the same maximum.
struct Moved {
    sum: f32,
    maximum: f32,
}

fn move_row(row: u32, first: u32, key: u32, visible: u32, row_scale: f32, tile_scale: f32, before: f32) -> Moved {
    var top = vec4<f32>(MASKED);
    for (var j = 0u; j < TILE_QUADS; j++) {
        let s = s_quad(row, j) * score_scale(row_scale, tile_scale, j);
        top = max(top, select(s, vec4<f32>(MASKED), is_masked(key, j, visible)));
    }
    var maximum = before;
    if (largest(top) > before + STALE) {
        maximum = largest(top);
    }
    let m = vec4<f32>(maximum);
    var sum = vec4<f32>();
    for (var j = first; j < first + PART_QUADS; j++) {
        let s = s_quad(row, j) * score_scale(row_scale, tile_scale, j);
        var p = select(exp2(s - m), vec4<f32>(1.0), s == m);
        p = select(p, vec4<f32>(), is_masked(key, j, visible));
        sum += p;
        set_p_quad(row, j, p);
    }
    return Moved(total(sum), maximum);
}

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
//# if MANY_SUBGROUPS
    @builtin(subgroup_id) subgroup: u32,
//# end
) {
//# if MANY_SUBGROUPS
    let own = subgroup * OWN_ROWS;
//# else
    let own = 0u;
//# end
    let pair = params.first_pair + group.y;
    let batch = pair / params.heads;
    let head = pair % params.heads;
    let kv_heads = params.heads / params.heads_per_kv;
    let kv_pair = batch * kv_heads + head / params.heads_per_kv;
    var tile = params.first_tile + group.x;
    if (CAUSAL) {
        // The last queries see the most keys: they start first, so that no long tile runs alone.
        tile = params.tiles - 1u - tile;
    }
    let first_row = tile * ROWS;
    // The keys that any row of the workgroup sees, and those that every row sees.
    let end = visible_keys(min(first_row + ROWS, params.q_len) - 1u);
    let unmasked = visible_keys(first_row);

    // The offsets of the bindings count 16 bytes.
    // A subgroup's rows lie all before the end of the padding or all behind it. Those behind are no
    // queries': any codes will do.
    let own_row = select(0u, first_row + own, first_row + own < params.q_padded);
    let q_at = (params.q_codes * 8u + (pair * params.q_padded + own_row) * CHANNELS) / PER_ITEM;
    let k_start = (params.k_codes * 8u + kv_pair * params.kv_padded * CHANNELS) / PER_ITEM;
    let v_start = (params.values * 8u + kv_pair * params.kv_padded * CHANNELS) / PER_ITEM;
    let s_at = own * S_ITEMS;
    let p_at = own * P_ITEMS;

    // The rows that are this invocation's, or its part of one: any will do, barriers order all.
    let part = lane / ROWS;
    let first = part * PART_QUADS;
//# for r in LANE_ROWS
    let row$r = lane % ROWS + $ru * THREADS;
    let visible$r = visible_keys(first_row + row$r);
    let scale$r = params.score_scale * q_scale(pair, first_row + row$r);
    var maximum$r = MASKED;
    var sum$r = 0.0;
//# end
    if (lane == 0u) {
        room.moving = 0u;
    }

//# if Q_RESIDENT
//# for m in ROW_MATS
//# for c in QK_MATS
    let q$m_$c = coopLoadT<Factor>(&q_codes[q_at + $mu * SIDE * Q_ITEMS + $cu * SIDE_ITEMS], Q_ITEMS);
//# end
//# end
//# end
//# for m in ROW_MATS
//# for h in CHUNKS
//# for d in CHUNK_MATS
    var o$m_$h_$d = Sums();
//# end
//# end
//# end

//# if STAGED
    // K and V travel through registers; AHEAD, while a tile is multiplied the next one is on its way.
    // Whole tiles are read, from memory that the padding of whole blocks keeps inside the bindings: the
    // last tile is read once more instead of one past the end.
    let last = ((end + KEY_TILE - 1u) / KEY_TILE - min(end, 1u)) * KEY_TILE;
//# for i in STAGE
    var k$i = k_codes[k_start + kv_item(lane, $iu)];
    var v$i = values[v_start + kv_item(lane, $iu)];
//# end
//# for i in STAGE
    if (kv_is_there(lane, $iu)) {
        room.k[kv_place(lane, $iu)] = k$i;
    }
//# if AHEAD
    k$i = k_codes[k_start + min(KEY_TILE, last) * Q_ITEMS + kv_item(lane, $iu)];
//# end
//# end
    workgroupBarrier();
//# end
//# if ROLLED
    // KEY_TILE, as a number that compilers do not know: else they unroll the loop eightfold, and
    // workgroups at different places of so much code push each other out of the instruction cache.
    let step = min(params.kv_padded, KEY_TILE);
//# else
    let step = KEY_TILE;
//# end
    for (var key = 0u; key < end; key += step) {
        let boundary = key + KEY_TILE > unmasked;

        // Q K^T
//# for g in KEY_GROUPS
        {
//# for m in ROW_MATS
//# for n in KEY_STEP
            var s$m_$n = Sums();
//# end
//# end
//# if STAGED
            let k_at = $gu * KEY_STEP * SIDE * KV_STRIDE;
//# else
            let k_at = k_start + (key + $gu * KEY_STEP * SIDE) * Q_ITEMS;
//# end
//# for c in QK_MATS
            {
//# for m in ROW_MATS
//# if Q_RESIDENT
                let a$m = q$m_$c;
//# else
                let a$m = coopLoadT<Factor>(&q_codes[q_at + $mu * SIDE * Q_ITEMS + $cu * SIDE_ITEMS], Q_ITEMS);
//# end
//# end
//# for n in KEY_STEP
//# if STAGED
                let b$n = coopLoad<Other>(&room.k[k_at + $nu * SIDE * KV_STRIDE + $cu * SIDE_ITEMS], KV_STRIDE);
//# else
                let b$n = coopLoad<Other>(&k_codes[k_at + $nu * SIDE * Q_ITEMS + $cu * SIDE_ITEMS], Q_ITEMS);
//# end
//# for m in ROW_MATS
                s$m_$n = coopMultiplyAdd(a$m, b$n, s$m_$n);
//# end
//# end
            }
//# end
//# for m in ROW_MATS
//# for n in KEY_STEP
            coopStoreT(s$m_$n, &room.s[s_at + $mu * SIDE * S_ITEMS + ($gu * KEY_STEP + $nu) * SIDE_ITEMS], S_ITEMS);
//# end
//# end
        }
//# end
//# if K_UNIFORM
        let tile_scale = k_scale(kv_pair, key);
//# else
        let tile_scale = 0.0;
        for (var i = lane; i < TILE_QUADS; i += THREADS) {
            let n = key + 4u * i;
            room.key_scales[i] = vec4<f32>(
                k_scale(kv_pair, n),
                k_scale(kv_pair, n + 1u),
                k_scale(kv_pair, n + 2u),
                k_scale(kv_pair, n + 3u),
            );
        }
//# end
        workgroupBarrier();
//# if STAGED
        // Every subgroup is done with this tile of K and with the last one of V.
//# if AHEAD
        let next_v = min(key + KEY_TILE, last) * V_ITEMS;
        let next_k = min(key + 2u * KEY_TILE, last) * Q_ITEMS;
//# else
        let next_v = key * V_ITEMS;
        let next_k = min(key + KEY_TILE, last) * Q_ITEMS;
//# for i in STAGE
        v$i = values[v_start + next_v + kv_item(lane, $iu)];
        k$i = k_codes[k_start + next_k + kv_item(lane, $iu)];
//# end
//# end
//# for i in STAGE
        if (kv_is_there(lane, $iu)) {
            room.k[kv_place(lane, $iu)] = k$i;
            room.v[kv_place(lane, $iu)] = v$i;
        }
//# end
//# if AHEAD
//# for i in STAGE
        v$i = values[v_start + next_v + kv_item(lane, $iu)];
        k$i = k_codes[k_start + next_k + kv_item(lane, $iu)];
//# end
//# end
//# end

        // Softmax
//# for r in LANE_ROWS
        var weighed$r = Weighed();
        if (boundary) {
            weighed$r = weigh_1(row$r, first, key, visible$r, scale$r, tile_scale, maximum$r);
        } else {
            weighed$r = weigh_0(row$r, first, key, visible$r, scale$r, tile_scale, maximum$r);
        }
        if (weighed$r.above > STALE || abs(maximum$r) > PLAIN_MAXIMUM) {
            room.moving = select(2u, 1u, key == 0u);
        }
//# end
        let move_now = workgroupUniformLoad(&room.moving);
        if (move_now == 0u) {
//# for r in LANE_ROWS
            sum$r += weighed$r.sum;
//# end
        } else {
//# for r in LANE_ROWS
            let moved$r = move_row(row$r, first, key, visible$r, scale$r, tile_scale, maximum$r);
            var decay$r = 1.0;
            if (moved$r.maximum > maximum$r) {
                decay$r = exp2(maximum$r - moved$r.maximum);
            }
            maximum$r = moved$r.maximum;
            sum$r = sum$r * decay$r + moved$r.sum;
//# end
            if (lane == 0u) {
                room.moving = 0u;
            }
            workgroupBarrier();
            if (move_now > 1u) {
//# for h in CHUNKS
//# for m in ROW_MATS
//# for d in CHUNK_MATS
                coopStoreT(o$m_$h_$d, &room.s[s_at + $mu * SIDE * S_ITEMS + $du * SIDE_ITEMS], S_ITEMS);
//# end
//# end
                workgroupBarrier();
//# for r in LANE_ROWS
                for (var j = part; j < CHUNK_QUADS; j += SPLIT) {
                    set_s_quad(row$r, j, s_quad(row$r, j) * decay$r);
                }
//# end
                workgroupBarrier();
//# for m in ROW_MATS
//# for d in CHUNK_MATS
                o$m_$h_$d = coopLoadT<Sums>(&room.s[s_at + $mu * SIDE * S_ITEMS + $du * SIDE_ITEMS], S_ITEMS);
//# end
//# end
                workgroupBarrier();
//# end
            }
        }

        // P V
//# for n in KEY_MATS
        {
//# if STAGED
            let v_at = $nu * SIDE * KV_STRIDE;
//# else
            let v_at = v_start + (key + $nu * SIDE) * V_ITEMS;
//# end
//# for m in ROW_MATS
            let p$m = coopLoadT<Factor>(&room.p[p_at + $mu * SIDE * P_ITEMS + $nu * SIDE_ITEMS], P_ITEMS);
//# end
//# for h in CHUNKS
//# for d in CHUNK_MATS
//# if STAGED
            let b$h_$d = coopLoadT<Other>(&room.v[v_at + ($hu * CHUNK_MATS + $du) * SIDE_ITEMS], KV_STRIDE);
//# else
            let b$h_$d = coopLoadT<Other>(&values[v_at + ($hu * CHUNK_MATS + $du) * SIDE_ITEMS], V_ITEMS);
//# end
//# for m in ROW_MATS
            o$m_$h_$d = coopMultiplyAdd(p$m, b$h_$d, o$m_$h_$d);
//# end
//# end
//# end
        }
//# end
    }

//# for r in LANE_ROWS
    room.row_sums[part * ROWS + row$r] = sum$r;
//# end
    workgroupBarrier();
//# for r in LANE_ROWS
    if (LSE && part == 0u && first_row + row$r < params.q_len) {
        write_lse(pair, first_row + row$r, maximum$r, row_sum(row$r));
    }
//# end
    let scales = params.v_scales + kv_pair * HEAD_DIM;
//# for h in CHUNKS
    workgroupBarrier();
//# for m in ROW_MATS
//# for d in CHUNK_MATS
    coopStoreT(o$m_$h_$d, &room.s[s_at + $mu * SIDE * S_ITEMS + $du * SIDE_ITEMS], S_ITEMS);
//# end
//# end
    workgroupBarrier();
    for (var i = lane; i < ROWS * CHUNK_QUADS; i += THREADS) {
        let row = i / CHUNK_QUADS;
        let quad = i % CHUNK_QUADS;
        if (first_row + row < params.q_len) {
            let start = row_start(params.out, batch, head, first_row + row);
            write_group(start, $hu * CHUNK_QUADS + quad, s_quad(row, quad), row_sum(row), scales);
        }
    }
//# end
}
