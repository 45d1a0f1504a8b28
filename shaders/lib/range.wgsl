// The factors that bring V's channels into the range of f16. RANGED: each channel is divided by its
// power of two from channels_finish.wgsl, so the multiplication is exact.

fn inverse_factor(pair: u32, channel: u32) -> f32 {
    if (channel >= HEAD_DIM) {
        return 1.0;
    }
    return 1.0 / floats[params.scales + pair * HEAD_DIM + channel];
}

fn inverse_factors(pair: u32, quad: u32) -> vec4<f32> {
    let c = 4u * quad;
    return vec4<f32>(
        inverse_factor(pair, c),
        inverse_factor(pair, c + 1u),
        inverse_factor(pair, c + 2u),
        inverse_factor(pair, c + 3u),
    );
}
