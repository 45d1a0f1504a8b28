// Attention over quantized Q and K on cooperative matrices: O = softmax(scale * Q K^T) V, online in base
// 2, tile by tile.
//
//   q_codes [pair, q_padded, CHANNELS], k_codes [pair, kv_padded, CHANNELS]: whole numbers in f16
//   values [pair, kv_padded, CHANNELS]: f16
//   floats: q_scales [pair, q_groups], k_scales [pair, k_groups], v_scales [pair, HEAD_DIM],
//           lse_bias [pair, q_len]
//   -> out [batch, heads, q_len, head_dim], lse [pair, q_len]
//
// A subgroup computes ROW_MATS * SIDE queries by itself; what a workgroup's subgroups share is the tiles
// of K and V. WGSL shows no element of a matrix, so what is done to single scores is done in workgroup
// memory: S goes out (f32), P comes back (f16).
//
// One step of the loop has Q K^T of the next tile, P V of this one and the softmax between them, which
// depend on each other only from step to step: the matrix unit has work while scores become weights.
// With two tiles each of K and V in workgroup memory one barrier a step is enough.
//
// O is not rescaled when a row's maximum rises: the maximum in use stays until the scores pass it by
// STALE, and P is as large as 2^STALE until then, which f16 holds with the same relative precision. When
// a row must move, and where keys are masked, the loop is left for a careful step, which does the tile's
// softmax over again; O makes a round trip through the room of S. The loop itself has no branch that
// changes O: such a branch costs a copy of O on the way that does not take it.
//
// Workgroup memory is counted in items: vec4 where VECTOR_ITEMS, else single numbers.

const ROWS: u32 = SUBGROUPS * OWN_ROWS;
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
const ROW_ITEMS: u32 = CHANNELS / PER_ITEM;
const KV_STRIDE: u32 = (CHANNELS + 8u) / PER_ITEM;
const SIDE_ITEMS: u32 = SIDE / PER_ITEM;
// K and V are read READ_WIDTH numbers at a time: so many reads are a row, and a tile.
const ROW_READS: u32 = CHANNELS / READ_WIDTH;
const TILE_READS: u32 = KEY_TILE * ROW_READS;
// Where the second tile begins in workgroup memory: there is one, or two that take turns.
const KV_TILE: u32 = KEY_TILE * KV_STRIDE;
//# if DOUBLE
const SECOND: u32 = KV_TILE;
//# else
const SECOND: u32 = 0u;
//# end

// Beyond this a score's last bit is coarse enough for a fused multiply-add to show: such rows take the
// careful way.
const PLAIN_MAXIMUM: f32 = 1024.0;

@group(0) @binding(0) var<uniform> params: AttendParams;
@group(0) @binding(1) var<storage, read_write> q_codes: array<Half>;
@group(0) @binding(2) var<storage, read_write> k_codes: array<Read>;
@group(0) @binding(3) var<storage, read_write> values: array<Read>;
@group(0) @binding(4) var<storage, read_write> floats: array<f32>;
@group(0) @binding(5) var<storage, read_write> out: array<u32>;
@group(0) @binding(6) var<storage, read_write> lse: array<u32>;

// All workgroup memory, in one piece. A matrix is loaded by 16 bytes at a time, but an array alone would
// lie wherever its element's alignment allows: an array of f16 at a multiple of 8, and what is loaded
// from it is wrong without a word (seen on NVIDIA). The first member brings the piece to a multiple of
// 16; every array is whole in 16 bytes.
struct Room {
    // The scores of a tile. Behind each row are four numbers of its own: see `spare`.
    @align(16) s: array<Single, ROWS * S_ITEMS>,
    p: array<Half, ROWS * P_ITEMS>,
    // One or two tiles each, which all subgroups multiply by.
    k: array<Half, SECOND + KV_TILE>,
    v: array<Half, SECOND + KV_TILE>,
//# if K_UNIFORM
//# else
    key_scales: array<vec4<f32>, 2u * TILE_QUADS>,
//# end
}

var<workgroup> room: Room;

// Orders what a subgroup's invocations write to workgroup memory and read of each other's.
fn subgroup_order() {
//# if SUBGROUP_ORDER
    subgroupBarrier();
//# else
    workgroupBarrier();
//# end
}

// Where the i-th part of a tile lies, of those that an invocation stages.
fn kv_place(lane: u32, i: u32) -> u32 {
//# if STAGE_EVEN
    return (lane / ROW_READS + i * (THREADS / ROW_READS)) * KV_STRIDE + lane % ROW_READS * (READ_WIDTH / PER_ITEM);
//# else
    let at = i * THREADS + lane;
    return (at / ROW_READS) * KV_STRIDE + at % ROW_READS * (READ_WIDTH / PER_ITEM);
//# end
}

// Which part that is. Past the end of a tile: one that is there, and is not stored.
fn kv_part(lane: u32, i: u32) -> u32 {
//# if STAGE_WHOLE
    return i * THREADS + lane;
//# else
    return min(i * THREADS + lane, TILE_READS - 1u);
//# end
}

fn kv_is_there(lane: u32, i: u32) -> bool {
//# if STAGE_WHOLE
    return true;
//# else
    return i * THREADS + lane < TILE_READS;
//# end
}

//# if VECTOR_ITEMS
// Four f16 in two words. WGSL has no cast between the two; compilers see through the detour.
fn halves(words: vec2<u32>) -> vec4<f16> {
    return vec4<f16>(vec4<f32>(unpack2x16float(words.x), unpack2x16float(words.y)));
}

//# end
fn put_k(at: u32, x: Read) {
//# if VECTOR_ITEMS
    room.k[at] = halves(x.xy);
    room.k[at + 1u] = halves(x.zw);
//# else
    room.k[at] = x;
//# end
}

fn put_v(at: u32, x: Read) {
//# if VECTOR_ITEMS
    room.v[at] = halves(x.xy);
    room.v[at + 1u] = halves(x.zw);
//# else
    room.v[at] = x;
//# end
}

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

// The numbers behind a row of scores, which keep the rows in different banks. In the loop those of row 0
// are signals to the whole workgroup; after it a row has there its sums of P.
fn spare(row: u32, i: u32) -> f32 {
//# if VECTOR_ITEMS
    return room.s[row * S_ITEMS + TILE_QUADS][i];
//# else
    return room.s[row * S_ITEMS + KEY_TILE + i];
//# end
}

fn set_spare(row: u32, i: u32, x: f32) {
//# if VECTOR_ITEMS
    room.s[row * S_ITEMS + TILE_QUADS][i] = x;
//# else
    room.s[row * S_ITEMS + KEY_TILE + i] = x;
//# end
}

// The j-th quad of a row that an invocation works on. Where several share a row they take quads in turns.
// Where one has all, it takes pairs in either order: `part` is 0 or 1. Both ways, invocations that go to
// memory together meet in no bank.
fn part_quad(j: u32, part: u32) -> u32 {
    if (SPLIT > 1u) {
        return j * SPLIT + part;
    }
    if (j % 2u == 0u) {
        return j + part;
    }
    return j - part;
}

// The factor that makes scores of the products of a row with four keys.
fn score_scale(row_scale: f32, tile_scale: f32, tile_quads: u32, quad: u32) -> vec4<f32> {
//# if K_UNIFORM
    return vec4<f32>(row_scale * tile_scale);
//# else
    return row_scale * room.key_scales[tile_quads + quad];
//# end
}

// The sum of a row's P, from all who had a part of it.
fn row_sum(row: u32) -> f32 {
    var sum = spare(row, 0u);
    for (var part = 1u; part < SPLIT; part++) {
        sum += spare(row, part);
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

// A row's tile where some row's maximum may move, keys may be masked, or scores are so large that a
// difference of scores must not be fused with the product that made them: exactly 1 where a score is the
// maximum. All who share a row look at all of it and come to the same maximum.
struct Moved {
    sum: f32,
    maximum: f32,
}

fn move_row(
    row: u32,
    part: u32,
    key: u32,
    visible: u32,
    row_scale: f32,
    tile_scale: f32,
    tile_quads: u32,
    before: f32,
) -> Moved {
    var top = vec4<f32>(MASKED);
    for (var j = 0u; j < TILE_QUADS; j++) {
        let s = s_quad(row, j) * score_scale(row_scale, tile_scale, tile_quads, j);
        top = max(top, select(s, vec4<f32>(MASKED), is_masked(key, j, visible)));
    }
    var maximum = before;
    if (largest(top) > before + STALE) {
        maximum = largest(top);
    }
    let m = vec4<f32>(maximum);
    var sum = vec4<f32>();
    for (var j = 0u; j < PART_QUADS; j++) {
        let quad = part_quad(j, part);
        let s = s_quad(row, quad) * score_scale(row_scale, tile_scale, tile_quads, quad);
        var p = select(exp2(s - m), vec4<f32>(1.0), s == m);
        p = select(p, vec4<f32>(), is_masked(key, quad, visible));
        sum += p;
        set_p_quad(row, quad, p);
    }
    return Moved(total(sum), maximum);
}

//# block SUMS
// S of a tile of K. The sums are of whole numbers, exact in any order, so they may be taken in two
// chains, neither of which waits for the other.
//# for m in ROW_MATS
//# for n in KEY_MATS
//# for e in CHAINS
var sums$m_$n_$e = Sums();
//# end
//# end
//# end
//# for c in CHAIN_MATS
//# for e in CHAINS
{
//# for n in KEY_MATS
    let b$n = coopLoad<Other>(&room.k[k_at + $nu * SIDE * KV_STRIDE + ($cu * CHAINS + $eu) * SIDE_ITEMS], KV_STRIDE);
//# for m in ROW_MATS
    sums$m_$n_$e = coopMultiplyAdd(q$m_$c_$e, b$n, sums$m_$n_$e);
//# end
//# end
}
//# end
//# end
//# end

//# block STORES
// The same into this subgroup's room.
//# for m in ROW_MATS
//# for n in KEY_MATS
//# if TWO_CHAINS
let products$m_$n = sums$m_$n_0 + sums$m_$n_1;
//# else
let products$m_$n = sums$m_$n_0;
//# end
coopStoreT(products$m_$n, &room.s[s_at + $mu * SIDE * S_ITEMS + $nu * SIDE_ITEMS], S_ITEMS);
//# end
//# end
//# end

//# block READS
// K of the tile after the next and V of the next one.
let next_k = k_start + min(key + 2u * KEY_TILE, last) * ROW_READS;
let next_v = v_start + min(key + KEY_TILE, last) * ROW_READS;
//# for i in STAGE
let k$i = k_codes[next_k + kv_part(lane, $iu)];
let v$i = values[next_v + kv_part(lane, $iu)];
//# end
//# if K_UNIFORM
let after_scale = k_scale(kv_pair, key + 2u * KEY_TILE);
//# end
//# end

//# block P_LOADS
//# for m in ROW_MATS
//# for n in KEY_MATS
let p$m_$n = coopLoadT<Factor>(&room.p[p_at + $mu * SIDE * P_ITEMS + $nu * SIDE_ITEMS], P_ITEMS);
//# end
//# end
//# end

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
//# if MANY_SUBGROUPS
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_invocation_id) own_lane: u32,
//# end
) {
//# if MANY_SUBGROUPS
    let own = subgroup * OWN_ROWS;
//# else
    let own = 0u;
    let own_lane = lane;
//# end
    let work = work_of(group.xy, groups.xy);
    let pair = params.first_pair + work.y;
    let batch = pair / params.heads;
    let head = pair % params.heads;
    let kv_heads = params.heads / params.heads_per_kv;
    let kv_pair = batch * kv_heads + head / params.heads_per_kv;
    var tile = params.first_tile + work.x;
    if (CAUSAL) {
        tile = params.tiles - 1u - tile;
    }
    let first_row = tile * ROWS;
    // The keys that any row of the workgroup sees, and those that every row sees.
    let end = visible_keys(min(first_row + ROWS, params.q_len) - 1u);
    let unmasked = visible_keys(first_row);
    // Whole tiles are read, from memory that the padding of whole blocks keeps inside the bindings: the
    // last tile is read once more instead of one past the end.
    let last = ((end + KEY_TILE - 1u) / KEY_TILE - min(end, 1u)) * KEY_TILE;
    // KEY_TILE, as a number that compilers do not know: else they unroll the loop eightfold, and so much
    // code does not stay in the instruction cache.
    let step = min(params.kv_padded, KEY_TILE);

    // The offsets of the bindings count 16 bytes.
    // A subgroup's rows lie all before the end of the padding or all behind it. Those behind are no
    // queries': any codes will do.
    let own_row = select(0u, first_row + own, first_row + own < params.q_padded);
    let q_at = (params.q_codes * 8u + (pair * params.q_padded + own_row) * CHANNELS) / PER_ITEM;
    let k_start = (params.k_codes * 8u + kv_pair * params.kv_padded * CHANNELS) / READ_WIDTH;
    let v_start = (params.values * 8u + kv_pair * params.kv_padded * CHANNELS) / READ_WIDTH;
    let s_at = own * S_ITEMS;
    let p_at = own * P_ITEMS;

    // The rows that are this invocation's, or its part of one: see `part_quad`.
    let own_quad = own_lane / 4u;
//# if ROW_IS_SHARED
    let part = own_quad % SPLIT;
    let sharer = part;
//# else
    let part = (own_quad ^ (own_quad / 2u)) % 2u;
    let sharer = 0u;
//# end
//# for r in LANE_ROWS
    let row$r = own + own_lane % 4u + own_quad / SPLIT * 4u + $ru * LANES;
    let visible$r = visible_keys(first_row + row$r);
    let scale$r = params.score_scale * q_scale(pair, first_row + row$r);
    var maximum$r = MASKED;
    var sum$r = 0.0;
//# end
    if (lane == 0u) {
        // Signals name a key: none yet.
        set_spare(0u, 0u, -1.0);
        set_spare(0u, 1u, -1.0);
        set_spare(0u, 2u, -1.0);
    }

//# for m in ROW_MATS
//# for c in CHAIN_MATS
//# for e in CHAINS
    let q$m_$c_$e = coopLoadT<Factor>(&q_codes[q_at + $mu * SIDE * ROW_ITEMS + ($cu * CHAINS + $eu) * SIDE_ITEMS], ROW_ITEMS);
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

    // The first tiles of K and V, and the second of K where it has room.
    let second_k = k_start + min(KEY_TILE, last) * ROW_READS;
//# for i in STAGE
    if (kv_is_there(lane, $iu)) {
        put_k(kv_place(lane, $iu), k_codes[k_start + kv_part(lane, $iu)]);
        put_v(kv_place(lane, $iu), values[v_start + kv_part(lane, $iu)]);
//# if DOUBLE
        put_k(SECOND + kv_place(lane, $iu), k_codes[second_k + kv_part(lane, $iu)]);
//# end
    }
//# end
//# if K_UNIFORM
    var tile_scale = k_scale(kv_pair, 0u);
    var next_scale = k_scale(kv_pair, KEY_TILE);
//# else
    let tile_scale = 0.0;
    let next_scale = 0.0;
    for (var i = lane; i < 2u * TILE_QUADS; i += THREADS) {
        let n = 4u * i;
        room.key_scales[i] = vec4<f32>(
            k_scale(kv_pair, n),
            k_scale(kv_pair, n + 1u),
            k_scale(kv_pair, n + 2u),
            k_scale(kv_pair, n + 3u),
        );
    }
//# end
    workgroupBarrier();
//# if READ_AHEAD
    // Beyond these, what is read from memory in one step goes to workgroup memory in the next: it has a
    // whole step to arrive.
    let third_k = k_start + min(2u * KEY_TILE, last) * ROW_READS;
    let second_v = v_start + min(KEY_TILE, last) * ROW_READS;
//# for i in STAGE
    var k$i = k_codes[third_k + kv_part(lane, $iu)];
    var v$i = values[second_v + kv_part(lane, $iu)];
//# end
//# end

    // Where this tile and the next one have their room: 0 and 1 of two, in turns.
    var here = 0u;
    var key = 0u;
    {
        let k_at = 0u;
//# use SUMS
//# use STORES
    }
//# if DOUBLE
//# else
    workgroupBarrier();
//# for i in STAGE
    if (kv_is_there(lane, $iu)) {
        put_k(kv_place(lane, $iu), k_codes[second_k + kv_part(lane, $iu)]);
    }
//# end
    workgroupBarrier();
//# end
    loop {
        subgroup_order();
        if (key >= end) {
            break;
        }
        // The careful step: S of this tile is there, P is to be made, or made again.
//# for r in LANE_ROWS
        let moved$r = move_row(row$r, part, key, visible$r, scale$r, tile_scale, here * TILE_QUADS, maximum$r);
        var decay$r = 1.0;
        if (moved$r.maximum > maximum$r) {
            decay$r = exp2(maximum$r - moved$r.maximum);
            if (key > 0u) {
                set_spare(0u, 2u, f32(key));
            }
        }
        maximum$r = moved$r.maximum;
        sum$r = sum$r * decay$r + moved$r.sum;
//# end
        workgroupBarrier();
        // The same for all of the workgroup. Once or not at all; a loop, because naga takes the condition
        // of an `if` round matrices for one that may differ.
        var moving = spare(0u, 2u) == f32(key);
        while (moving) {
            // Each subgroup for itself, through its own room of S.
//# for h in CHUNKS
//# for m in ROW_MATS
//# for d in CHUNK_MATS
            coopStoreT(o$m_$h_$d, &room.s[s_at + $mu * SIDE * S_ITEMS + $du * SIDE_ITEMS], S_ITEMS);
//# end
//# end
            subgroup_order();
//# for r in LANE_ROWS
            for (var j = sharer; j < CHUNK_QUADS; j += SPLIT) {
                set_s_quad(row$r, j, s_quad(row$r, j) * decay$r);
            }
//# end
            subgroup_order();
//# for m in ROW_MATS
//# for d in CHUNK_MATS
            o$m_$h_$d = coopLoadT<Sums>(&room.s[s_at + $mu * SIDE * S_ITEMS + $du * SIDE_ITEMS], S_ITEMS);
//# end
//# end
            subgroup_order();
//# end
            moving = false;
        }

//# if V_FIRST
        // What a careful step made needs no check, and is summed.
        var is_checked = true;
//# for r in LANE_ROWS
        var weighed$r = vec4<f32>();
//# end
//# end
        loop {
            // P V of this tile; Q K^T and the softmax of the next one.
            let there = 1u - here;
            let k_at = there * SECOND;
            let v_at = here * SECOND;
            // What is read from memory goes to workgroup memory at the end of this step or of the next. NVIDIA's
            // compiler lets no read be on its way across a barrier, so where a step has two, reads begin with it.
//# if READ_FIRST
//# use READS
//# end
//# if P_FIRST
//# use P_LOADS
//# end
//# if V_FIRST
//# for n in KEY_MATS
//# for h in CHUNKS
//# for d in CHUNK_MATS
            let v$n_$h_$d = coopLoadT<Other>(&room.v[v_at + $nu * SIDE * KV_STRIDE + ($hu * CHUNK_MATS + $du) * SIDE_ITEMS], KV_STRIDE);
//# end
//# end
//# end
//# end
//# use SUMS
//# if V_FIRST
            // The same for all of the workgroup: a signal of this tile's is overwritten two barriers on. Asked
            // behind the products, which need not wait for the answer.
            if (!is_checked && (key + KEY_TILE > unmasked || spare(0u, here) == f32(key))) {
                break;
            }
            is_checked = false;
//# for r in LANE_ROWS
            sum$r += total(weighed$r);
            weighed$r = vec4<f32>();
//# end
//# end
//# use STORES
//# if READ_BEHIND
//# use READS
//# end
//# if P_FIRST
//# else
//# use P_LOADS
//# end
            subgroup_order();

            // All scores are read before any weight is written: reads do not pass writes.
//# for r in LANE_ROWS
//# for j in PART_QUADS
            let s$r_$j = s_quad(row$r, part_quad($ju, part));
//# end
//# end
//# for n in KEY_MATS
            {
                let b_at = v_at + $nu * SIDE * KV_STRIDE;
//# for h in CHUNKS
//# for d in CHUNK_MATS
//# if V_FIRST
                let b$h_$d = v$n_$h_$d;
//# else
                let b$h_$d = coopLoadT<Other>(&room.v[b_at + ($hu * CHUNK_MATS + $du) * SIDE_ITEMS], KV_STRIDE);
//# end
//# for m in ROW_MATS
                o$m_$h_$d = coopMultiplyAdd(p$m_$n, b$h_$d, o$m_$h_$d);
//# end
//# end
//# end
            }
//# end
//# for r in LANE_ROWS
//# if V_FIRST
//# else
            var weighed$r = vec4<f32>();
//# end
            var above$r = vec4<f32>(-STALE);
//# for j in PART_QUADS
            {
                let quad = part_quad($ju, part);
                let x = s$r_$j * score_scale(scale$r, next_scale, there * TILE_QUADS, quad) - vec4<f32>(maximum$r);
                above$r = max(above$r, x);
                let p = exp2(x);
                weighed$r += p;
                set_p_quad(row$r, quad, p);
            }
//# end
//# end

            key += step;
//# for r in LANE_ROWS
            if (largest(above$r) > STALE || abs(maximum$r) > PLAIN_MAXIMUM) {
                set_spare(0u, there, f32(key));
            }
//# end
//# if DOUBLE
            // What has arrived takes the places of the tiles that the last step read.
//# else
            // What has arrived takes the places of the tiles just read, when all have read them.
            workgroupBarrier();
//# end
//# for i in STAGE
            if (kv_is_there(lane, $iu)) {
                put_k(v_at + kv_place(lane, $iu), k$i);
                put_v(k_at + kv_place(lane, $iu), v$i);
            }
//# end
//# if READ_AHEAD
            let next_k = k_start + min(key + 2u * KEY_TILE, last) * ROW_READS;
            let next_v = v_start + min(key + KEY_TILE, last) * ROW_READS;
//# for i in STAGE
            k$i = k_codes[next_k + kv_part(lane, $iu)];
            v$i = values[next_v + kv_part(lane, $iu)];
//# end
//# end
//# if K_UNIFORM
            tile_scale = next_scale;
//# if READ_AHEAD
            next_scale = k_scale(kv_pair, key + KEY_TILE);
//# else
            next_scale = after_scale;
//# end
//# else
            for (var i = lane; i < TILE_QUADS; i += THREADS) {
                let n = key + KEY_TILE + 4u * i;
                room.key_scales[here * TILE_QUADS + i] = vec4<f32>(
                    k_scale(kv_pair, n),
                    k_scale(kv_pair, n + 1u),
                    k_scale(kv_pair, n + 2u),
                    k_scale(kv_pair, n + 3u),
                );
            }
//# end
            here = there;
            workgroupBarrier();
//# if V_FIRST
//# else
            // The same for all of the workgroup: a signal of this tile's is overwritten two barriers on.
            if (key + KEY_TILE > unmasked || spare(0u, there) == f32(key)) {
                break;
            }
//# for r in LANE_ROWS
            sum$r += total(weighed$r);
//# end
//# end
        }
    }

    workgroupBarrier();
//# for r in LANE_ROWS
    set_spare(row$r, sharer, sum$r);
//# end
    workgroupBarrier();
//# for r in LANE_ROWS
    if (LSE && sharer == 0u && first_row + row$r < params.q_len) {
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
