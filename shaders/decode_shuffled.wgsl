// decode.wgsl for devices with subgroups of one size, where a key's columns are a power of two that lies within a
// subgroup: the same ranges, packs and partial results.
//
// What the columns of a key have multiplied is added up by shuffles, so subgroups wait for each other at the
// maximum and at the end only, and workgroup memory holds the scores and nothing else: more workgroups at a
// time, and no barrier between a read and the next.
//
// It is small on purpose. Keys and values drive the instructions of the last call out of every cache, and
// fetching them again costs more than any of them: two keys a set, two sets in turns, and no loop written out
// twice. What keeps the memory busy is many invocations.

const WARPS: u32 = THREADS / LANES;
// Keys of one set of all invocations, of a turn of both sets, and of an invocation's slot in a set.
const SET: u32 = 2u * (THREADS / COLUMNS);
const TURN: u32 = 2u * SET;
// A column's bits say what it has of a set's scores when they are added up: the uppermost which key, the
// next two which row. Where there are more, the columns that they tell apart all have it.
const KEY_BIT: u32 = COLUMNS / 2u;
const ROW_UPPER: u32 = COLUMNS / 4u;
const ROW_LOWER: u32 = COLUMNS / 8u;

// The scores of the range, then P, then what the subgroups have of O: 8 vectors for each column and one for the
// sum of P.
var<workgroup> room: array<vec4<f32>, ROOM>;
var<workgroup> peaks: array<vec4<f32>, WARPS>;

// Two keys' channels as they lie in memory.
struct Keys {
    k0: Raw,
    k1: Raw,
}

// A key and the next; behind the last one it is read again, and its P is 0.
fn keys_of_k(start: u32, key: u32, last: u32, column: u32) -> Keys {
    let row = params.k.row;
    return Keys(
        read_k(start + min(key, last) * row, column),
        read_k(start + min(key + 1u, last) * row, column),
    );
}

fn keys_of_v(start: u32, key: u32, last: u32, column: u32) -> Keys {
    let row = params.v.row;
    return Keys(
        read_v(start + min(key, last) * row, column),
        read_v(start + min(key + 1u, last) * row, column),
    );
}

fn row_of(column: u32) -> u32 {
    return (column / ROW_LOWER) % 4u;
}

// The scores of a set's keys, the first of them at `at`; of those that an invocation has, the largest so far.
// Partners hand over the half that the other one keeps: 4, 2 and 1 shuffles add up as much as 8 times 3 would.
fn put_scores(q: Eight, keys: Keys, at: u32, key: u32, seen: u32, column: u32, peak: f32) -> f32 {
    let a = multiply(q, keys.k0);
    let b = multiply(q, keys.k1);
    let second = (column & KEY_BIT) != 0u;
    let rows = select(a, b, second) + subgroupShuffleXor(select(b, a, second), KEY_BIT);
    let upper = (column & ROW_UPPER) != 0u;
    let pair = select(rows.xy, rows.zw, upper) + subgroupShuffleXor(select(rows.zw, rows.xy, upper), ROW_UPPER);
    let odd = (column & ROW_LOWER) != 0u;
    var sum = select(pair.x, pair.y, odd) + subgroupShuffleXor(select(pair.y, pair.x, odd), ROW_LOWER);
    for (var bit = ROW_LOWER / 2u; bit > 0u; bit /= 2u) {
        sum += subgroupShuffleXor(sum, bit);
    }
    let own = select(0u, 1u, second);
    let s = select(MASKED, sum * params.score_scale, key + own < seen);
    if (column % ROW_LOWER == 0u) {
        room[at + own][row_of(column)] = s;
    }
    return max(peak, s);
}

fn add_keys(out: Output, keys: Keys, at: u32) -> Output {
    return add_key(add_key(out, room[at], keys.k0), room[at + 1u], keys.k1);
}

// The largest of each row, of which an invocation has one number. The other bits of an invocation's number
// in its subgroup tell keys apart.
fn largest_of(subgroup: u32, own_lane: u32, x: f32) -> vec4<f32> {
    var most = x;
    for (var bit = KEY_BIT; bit < LANES; bit *= 2u) {
        most = max(most, subgroupShuffleXor(most, bit));
    }
    if (own_lane < KEY_BIT && own_lane % ROW_LOWER == 0u) {
        peaks[subgroup][row_of(own_lane)] = most;
    }
    workgroupBarrier();
    var result = peaks[0];
    for (var i = 1u; i < WARPS; i++) {
        result = max(result, peaks[i]);
    }
    return result;
}

// The same of every slot of a subgroup: added up.
fn over_slots(x: vec4<f32>) -> vec4<f32> {
    var result = x;
    for (var bit = COLUMNS; bit < LANES; bit *= 2u) {
        result += subgroupShuffleXor(result, bit);
    }
    return result;
}

fn sum_of(subgroup: u32, own_lane: u32, x: vec4<f32>) -> vec4<f32> {
    var sum = x;
    for (var bit = 1u; bit < LANES; bit *= 2u) {
        sum += subgroupShuffleXor(sum, bit);
    }
    if (own_lane == 0u) {
        peaks[subgroup] = sum;
    }
    workgroupBarrier();
    sum = peaks[0];
    for (var i = 1u; i < WARPS; i++) {
        sum += peaks[i];
    }
    return sum;
}

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_invocation_id) own_lane: u32,
) {
    let work = work_of(group.xy);
    let lane = subgroup * LANES + own_lane;
    let column = lane % COLUMNS;
    let first = 2u * (lane / COLUMNS);
    let rows = rows_of(work, column);
    let begin = work.split * SPLIT;
    let most = max(max(rows.visible.x, rows.visible.y), max(rows.visible.z, rows.visible.w));
    let end = clamp(most, begin, begin + SPLIT);
    let last = max(end, 1u) - 1u;
    let k_start = row_start(params.k, work.batch, work.kv_head, 0u);
    let v_start = row_start(params.v, work.batch, work.kv_head, 0u);

    // Q K^T. There is one turn at least, also where no row sees a key: compilers leave reads that may not
    // be needed for later.
    var even = keys_of_k(k_start, begin + first, last, column);
    var odd = keys_of_k(k_start, begin + SET + first, last, column);
    let q_rows = transposed(rows);
    let seen = rows.visible[row_of(column)];
    var peak = MASKED;
    var key = 0u;
    loop {
        let at = key + first;
        peak = put_scores(q_rows, even, at, begin + at, seen, column, peak);
        even = keys_of_k(k_start, begin + TURN + at, last, column);
        peak = put_scores(q_rows, odd, at + SET, begin + SET + at, seen, column, peak);
        odd = keys_of_k(k_start, begin + TURN + SET + at, last, column);
        continuing {
            key += TURN;
            break if begin + key >= end;
        }
    }

    // Softmax: one maximum for the range.
    even = keys_of_v(v_start, begin + first, last, column);
    odd = keys_of_v(v_start, begin + SET + first, last, column);
    let maximum = largest_of(subgroup, own_lane, peak);
    var unrounded = vec4<f32>();
    for (var i = lane; i < key; i += THREADS) {
        let p = p_of(room[i], maximum);
        unrounded += p;
        room[i] = round_p(p);
    }
    workgroupBarrier();

    // P V
    var out = Output();
    key = 0u;
    loop {
        let at = key + first;
        out = add_keys(out, even, at);
        even = keys_of_v(v_start, begin + TURN + at, last, column);
        out = add_keys(out, odd, at + SET);
        odd = keys_of_v(v_start, begin + TURN + SET + at, last, column);
        continuing {
            key += TURN;
            break if begin + key >= end;
        }
    }

    // The slots of a subgroup, then the subgroups.
    let o = out.o;
    let all = Output(
        Eight(
            over_slots(o.c0),
            over_slots(o.c1),
            over_slots(o.c2),
            over_slots(o.c3),
            over_slots(o.c4),
            over_slots(o.c5),
            over_slots(o.c6),
            over_slots(o.c7),
        ),
        over_slots(out.sum),
    );
    workgroupBarrier();
    if (own_lane < COLUMNS) {
        let at = subgroup * 9u * COLUMNS + column;
        room[at] = all.o.c0;
        room[at + COLUMNS] = all.o.c1;
        room[at + 2u * COLUMNS] = all.o.c2;
        room[at + 3u * COLUMNS] = all.o.c3;
        room[at + 4u * COLUMNS] = all.o.c4;
        room[at + 5u * COLUMNS] = all.o.c5;
        room[at + 6u * COLUMNS] = all.o.c6;
        room[at + 7u * COLUMNS] = all.o.c7;
        room[at + 8u * COLUMNS] = all.sum;
    }
    workgroupBarrier();
    let place = (work.pair * params.packs + work.pack) * params.splits + work.split;
    let to = params.partial_o + place * 8u * COLUMNS;
    let stats = params.partial_stats + place * 3u;
    // All vectors of O, and the first column's sum of P.
    for (var i = lane; i <= 8u * COLUMNS; i += THREADS) {
        var x = room[i];
        for (var other = 1u; other < WARPS; other++) {
            x += room[i + other * 9u * COLUMNS];
        }
        floats[select(stats + 1u, to + i, i < 8u * COLUMNS)] = x;
    }
    if (LSE) {
        unrounded = sum_of(subgroup, own_lane, unrounded);
    }
    if (lane == 0u) {
        floats[stats] = maximum;
        floats[stats + 2u] = unrounded;
    }
}
