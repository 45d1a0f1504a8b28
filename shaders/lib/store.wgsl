// Writes four neighbouring channels of a row of `out`. The row starts on a word and this invocation
// owns every word of its four channels, so the one word that a row's end may share with the bytes
// behind it is read, merged and written back by one invocation only.

fn store_quad(start: u32, quad: u32, x: vec4<f32>) {
    let channel = 4u * quad;
    if (DTYPE == DTYPE_F32) {
        let at = start + channel;
        if (channel < HEAD_DIM) { out[at] = bitcast<u32>(x.x); }
        if (channel + 1u < HEAD_DIM) { out[at + 1u] = bitcast<u32>(x.y); }
        if (channel + 2u < HEAD_DIM) { out[at + 2u] = bitcast<u32>(x.z); }
        if (channel + 3u < HEAD_DIM) { out[at + 3u] = bitcast<u32>(x.w); }
        return;
    }
    let at = start + 2u * quad;
    store_pair(at, channel, x.x, x.y);
    store_pair(at + 1u, channel + 2u, x.z, x.w);
}

fn store_pair(at: u32, channel: u32, a: f32, b: f32) {
    if (channel + 1u < HEAD_DIM) {
        out[at] = round_16(a) | (round_16(b) << 16u);
    } else if (channel < HEAD_DIM) {
        out[at] = (out[at] & 0xffff0000u) | round_16(a);
    }
}

fn round_16(x: f32) -> u32 {
    if (DTYPE == DTYPE_BF16) {
        return bf16_bits(x);
    }
    return f16_bits(x);
}
