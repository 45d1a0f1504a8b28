// Reads four neighbouring channels of a row of `tensor` as f32; channels past HEAD_DIM are zero.

//# if WHOLE_QUADS
// Rows start on 16 bytes and end with a quad: 8 bytes at a time.
alias element = vec2<u32>;

fn load_quad(start: u32, quad: u32) -> vec4<f32> {
    if (4u * quad >= HEAD_DIM) {
        return vec4<f32>();
    }
    if (DTYPE == DTYPE_F32) {
        let at = start / 2u + 2u * quad;
        return vec4<f32>(bitcast<vec2<f32>>(tensor[at]), bitcast<vec2<f32>>(tensor[at + 1u]));
    }
    let pairs = tensor[start / 2u + quad];
    return vec4<f32>(unpack_pair(pairs.x), unpack_pair(pairs.y));
}
//# else
// Words are read only where a channel of this row lies in them.
alias element = u32;

fn load_quad(start: u32, quad: u32) -> vec4<f32> {
    let channel = 4u * quad;
    var x = vec4<f32>();
    if (DTYPE == DTYPE_F32) {
        let at = start + channel;
        if (channel < HEAD_DIM) { x.x = bitcast<f32>(tensor[at]); }
        if (channel + 1u < HEAD_DIM) { x.y = bitcast<f32>(tensor[at + 1u]); }
        if (channel + 2u < HEAD_DIM) { x.z = bitcast<f32>(tensor[at + 2u]); }
        if (channel + 3u < HEAD_DIM) { x.w = bitcast<f32>(tensor[at + 3u]); }
        return x;
    }
    let at = start + 2u * quad;
    if (channel < HEAD_DIM) {
        let pair = unpack_pair(tensor[at]);
        x.x = pair.x;
        if (channel + 1u < HEAD_DIM) { x.y = pair.y; }
    }
    if (channel + 2u < HEAD_DIM) {
        let pair = unpack_pair(tensor[at + 1u]);
        x.z = pair.x;
        if (channel + 3u < HEAD_DIM) { x.w = pair.y; }
    }
    return x;
}
//# end

fn unpack_pair(word: u32) -> vec2<f32> {
    if (DTYPE == DTYPE_BF16) {
        return vec2<f32>(bitcast<f32>(word << 16u), bitcast<f32>(word & 0xffff0000u));
    }
    return unpack2x16float(word);
}
