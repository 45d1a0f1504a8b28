// Signed 8-bit codes: symmetric, round half to even, clamped to +-127.

// The scale of a group from its largest magnitude; a group of zeros gets scale 1 and so codes 0.
fn code_scale(amax: f32) -> f32 {
    return select(amax / 127.0, 1.0, amax < 1e-30);
}

fn codes(x: vec4<f32>, inverse_scale: vec4<f32>) -> vec4<i32> {
    return vec4<i32>(clamp(round(x * inverse_scale), vec4<f32>(-127.0), vec4<f32>(127.0)));
}

fn pack_codes(code: vec4<i32>) -> u32 {
    let byte = bitcast<vec4<u32>>(code) & vec4<u32>(0xffu);
    return byte.x | (byte.y << 8u) | (byte.z << 16u) | (byte.w << 24u);
}
