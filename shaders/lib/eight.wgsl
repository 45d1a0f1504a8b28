// Eight neighbouring channels of a row of Q, K or V: a Raw as it lies in memory, read early and
// unpacked late, so that many reads are under way at once.

// 16-bit elements fill the first vector; of f32 each has four.
struct Raw {
    first: vec4<u32>,
    second: vec4<u32>,
}

// The first four channels, and the last.
fn unpack_low(raw: Raw) -> vec4<f32> {
    if (DTYPE == DTYPE_F32) {
        return bitcast<vec4<f32>>(raw.first);
    }
    return vec4<f32>(unpack_pair(raw.first.x), unpack_pair(raw.first.y));
}

fn unpack_high(raw: Raw) -> vec4<f32> {
    if (DTYPE == DTYPE_F32) {
        return bitcast<vec4<f32>>(raw.second);
    }
    return vec4<f32>(unpack_pair(raw.first.z), unpack_pair(raw.first.w));
}

fn unpack_pair(word: u32) -> vec2<f32> {
    if (DTYPE == DTYPE_BF16) {
        return vec2<f32>(bitcast<f32>(word << 16u), bitcast<f32>(word & 0xffff0000u));
    }
    return unpack2x16float(word);
}
