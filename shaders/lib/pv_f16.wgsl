// The softmax and the second product with P and V in f16, sums in f32.
//
// P of a row of a tile is 32 words: words 2t and 2t + 1 hold the keys t, t + 16 and t + 32, t + 48 of
// invocation column t, as values_f16.wgsl lays out V.

const P_VECS: u32 = 8u;
const V_ROWS: u32 = 32u;
const V_TILE_ROWS: u32 = 32u;

// Turns one row's scores against its four keys into P, stores it, and returns the sums of P as it is
// multiplied and before it was rounded.
fn weigh_row(row: u32, column: u32, s: vec4<f32>, maximum: f32, boundary: bool) -> vec2<f32> {
    let p = exponentials(s, maximum, boundary);
    let low = pack_halves(p.x, p.y);
    let high = pack_halves(p.z, p.w);
    let at = row * P_STRIDE + column / 2u;
    let word = 2u * (column % 2u);
    p_tile[at][word] = low;
    p_tile[at][word + 1u] = high;
    let a = unpack2x16float(low);
    let b = unpack2x16float(high);
    return vec2<f32>((a.x + a.y) + (b.x + b.y), (p.x + p.y) + (p.z + p.w));
}

// One step of the online softmax for the four rows: P goes to p_tile, the state moves to the new maximum.
fn weigh(row: u32, column: u32, s: Scores, tile_max: vec4<f32>, boundary: bool, state: ptr<function, State>) {
    let maximum = max((*state).maximum, tile_max);
    let decay = decay_to((*state).maximum, maximum);
    let r0 = weigh_row(row, column, s.r0, maximum.x, boundary);
    let r1 = weigh_row(row + 1u, column, s.r1, maximum.y, boundary);
    let r2 = weigh_row(row + 2u, column, s.r2, maximum.z, boundary);
    let r3 = weigh_row(row + 3u, column, s.r3, maximum.w, boundary);
    (*state).maximum = maximum;
    (*state).decay = decay;
    (*state).sum = (*state).sum * decay + vec4<f32>(r0.x, r1.x, r2.x, r3.x);
    (*state).unrounded = (*state).unrounded * decay + vec4<f32>(r0.y, r1.y, r2.y, r3.y);
}

// Adds the keys of one word of V, two per channel, to four rows of O.
fn add_pair(o: mat4x4<f32>, p: vec4<u32>, v: vec4<u32>) -> mat4x4<f32> {
    let x = unpack2x16float(v.x);
    let y = unpack2x16float(v.y);
    let z = unpack2x16float(v.z);
    let w = unpack2x16float(v.w);
    let a = vec4<f32>(x.x, y.x, z.x, w.x);
    let b = vec4<f32>(x.y, y.y, z.y, w.y);
    let p0 = unpack2x16float(p.x);
    let p1 = unpack2x16float(p.y);
    let p2 = unpack2x16float(p.z);
    let p3 = unpack2x16float(p.w);
    return mat4x4<f32>(
        o[0] + p0.x * a + p0.y * b,
        o[1] + p1.x * a + p1.y * b,
        o[2] + p2.x * a + p2.y * b,
        o[3] + p3.x * a + p3.y * b,
    );
}

// o = o * decay + P V for the staged channels: one group of 64, or two that share the reads of P.
fn accumulate(
    row: u32,
    column: u32,
    state: State,
    tile_at: u32,
    group: u32,
    first: ptr<function, mat4x4<f32>>,
    second: ptr<function, mat4x4<f32>>,
) {
    var a = scale_rows(*first, state.decay);
    var b = *second;
    if (CHUNK_GROUPS == 2u) {
        b = scale_rows(b, state.decay);
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
        a = add_pair(a, x, staged[v]);
        a = add_pair(a, y, staged[v + V_VECS]);
        a = add_pair(a, z, staged[v + 2u * V_VECS]);
        a = add_pair(a, w, staged[v + 3u * V_VECS]);
        if (CHUNK_GROUPS == 2u) {
            b = add_pair(b, x, staged[v + 16u]);
            b = add_pair(b, y, staged[v + V_VECS + 16u]);
            b = add_pair(b, z, staged[v + 2u * V_VECS + 16u]);
            b = add_pair(b, w, staged[v + 3u * V_VECS + 16u]);
        }
    }
    *first = a;
    *second = b;
}
