// The softmax and the second product with P in 8 bits, scaled by each row's maximum within the tile, and
// V in signed 8-bit codes; the sums of a tile are exact.
//
// P of a row of a tile is 16 words: word t holds the keys t, t + 16, t + 32 and t + 48 of invocation
// column t, as values_i8.wgsl lays out V. P is rint(255 p) less 128, so that both factors are signed; a
// tile's sum starts from 128 times the sum of V's codes, which undoes it exactly.

const P_VECS: u32 = 4u;
const V_ROWS: u32 = 16u;
const V_TILE_ROWS: u32 = 17u;

// Turns one row's scores against its four keys into P, stores it, and returns the sums of P as it is
// multiplied and before it was rounded.
fn weigh_row(row: u32, column: u32, s: vec4<f32>, maximum: f32, boundary: bool) -> vec2<f32> {
    let p = exponentials(s, maximum, boundary);
    // Added to 1.5 * 2^23, whose last bit is one, 255 p is rounded to nearest even by the adder, and the
    // code is the sum's last byte: no conversion, which GPUs do at a fraction of their rate. The upper
    // bytes are those of 1.5 * 2^23 in each, and go in one subtraction.
    let sums = bitcast<vec4<u32>>(255.0 * p + 12582912.0);
    let codes = (sums.x + (sums.y << 8u) + (sums.z << 16u) + (sums.w << 24u)) - 0x8b400000u;
    let word = codes ^ 0x80808080u;
    p_tile[row * P_STRIDE + column / 4u][column % 4u] = word;
    return vec2<f32>(f32(dot4(word, 0x01010101u) + 512), (p.x + p.y) + (p.z + p.w));
}

// One step of the online softmax for the four rows: P goes to p_tile, the state moves to the new maximum.
fn weigh(row: u32, column: u32, s: Scores, tile_max: vec4<f32>, boundary: bool, state: ptr<function, State>) {
    let r0 = weigh_row(row, column, s.r0, tile_max.x, boundary);
    let r1 = weigh_row(row + 1u, column, s.r1, tile_max.y, boundary);
    let r2 = weigh_row(row + 2u, column, s.r2, tile_max.z, boundary);
    let r3 = weigh_row(row + 3u, column, s.r3, tile_max.w, boundary);
    let maximum = max((*state).maximum, tile_max);
    let decay = decay_to((*state).maximum, maximum);
    let gain = decay_to(tile_max, maximum);
    (*state).maximum = maximum;
    (*state).decay = decay;
    (*state).gain = gain;
    (*state).sum = (*state).sum * decay + gain * vec4<f32>(r0.x, r1.x, r2.x, r3.x);
    (*state).unrounded = (*state).unrounded * decay + gain * vec4<f32>(r0.y, r1.y, r2.y, r3.y);
}

struct TileSums {
    r0: vec4<i32>,
    r1: vec4<i32>,
    r2: vec4<i32>,
    r3: vec4<i32>,
}

fn dot_row(p: u32, v: vec4<u32>) -> vec4<i32> {
    return vec4<i32>(dot4(p, v.x), dot4(p, v.y), dot4(p, v.z), dot4(p, v.w));
}

// Adds the keys of one word of V, four per channel, to four rows of sums.
fn add_word(t: TileSums, p: vec4<u32>, v: vec4<u32>) -> TileSums {
    return TileSums(
        t.r0 + dot_row(p.x, v),
        t.r1 + dot_row(p.y, v),
        t.r2 + dot_row(p.z, v),
        t.r3 + dot_row(p.w, v),
    );
}

fn tile_start(tile_at: u32, group: u32, column: u32) -> TileSums {
    let x = bitcast<vec4<i32>>(values[tile_at + 16u * (PV_DIM / 4u) + 16u * group + column]);
    return TileSums(x, x, x, x);
}

fn add_tile(o: mat4x4<f32>, t: TileSums, state: State) -> mat4x4<f32> {
    return mat4x4<f32>(
        o[0] * state.decay.x + state.gain.x * vec4<f32>(t.r0),
        o[1] * state.decay.y + state.gain.y * vec4<f32>(t.r1),
        o[2] * state.decay.z + state.gain.z * vec4<f32>(t.r2),
        o[3] * state.decay.w + state.gain.w * vec4<f32>(t.r3),
    );
}

// o = o * decay + gain * (P V) for the staged channels: one group of 64, or two that share the reads of P.
fn accumulate(
    row: u32,
    column: u32,
    state: State,
    tile_at: u32,
    group: u32,
    first: ptr<function, mat4x4<f32>>,
    second: ptr<function, mat4x4<f32>>,
) {
    var a = tile_start(tile_at, group, column);
    var b = a;
    if (CHUNK_GROUPS == 2u) {
        b = tile_start(tile_at, group + 1u, column);
    }
    for (var i = 0u; i < P_VECS; i++) {
        let p0 = p_tile[row * P_STRIDE + i];
        let p1 = p_tile[(row + 1u) * P_STRIDE + i];
        let p2 = p_tile[(row + 2u) * P_STRIDE + i];
        let p3 = p_tile[(row + 3u) * P_STRIDE + i];
        let v = V_AT + 4u * i * V_VECS + column;
        let x = vec4<u32>(p0.x, p1.x, p2.x, p3.x);
        let y = vec4<u32>(p0.y, p1.y, p2.y, p3.y);
        let z = vec4<u32>(p0.z, p1.z, p2.z, p3.z);
        let w = vec4<u32>(p0.w, p1.w, p2.w, p3.w);
        a = add_word(a, x, staged[v]);
        a = add_word(a, y, staged[v + V_VECS]);
        a = add_word(a, z, staged[v + 2u * V_VECS]);
        a = add_word(a, w, staged[v + 3u * V_VECS]);
        if (CHUNK_GROUPS == 2u) {
            b = add_word(b, x, staged[v + 16u]);
            b = add_word(b, y, staged[v + V_VECS + 16u]);
            b = add_word(b, z, staged[v + 2u * V_VECS + 16u]);
            b = add_word(b, w, staged[v + 3u * V_VECS + 16u]);
        }
    }
    *first = add_tile(*first, a, state);
    if (CHUNK_GROUPS == 2u) {
        *second = add_tile(*second, b, state);
    }
}
