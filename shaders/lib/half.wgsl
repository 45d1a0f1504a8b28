// f32 to 16-bit floats, round to nearest even, in integer arithmetic: WGSL leaves the rounding of
// pack2x16float to the device. NATIVE_PACK says that this device's was tested and rounds so.

fn f16_bits(x: f32) -> u32 {
    let bits = bitcast<u32>(x);
    let sign = (bits >> 16u) & 0x8000u;
    let magnitude = bits & 0x7fffffffu;
    if (magnitude >= 0x47800000u) {
        // 65536 and beyond, infinity, NaN (kept quiet).
        return sign | select(0x7c00u, 0x7e00u, magnitude > 0x7f800000u);
    }
    if (magnitude < 0x38800000u) {
        // Below 2^-14 the result is subnormal: a multiple of 2^-24. Adding 0.5 leaves an f32 whose
        // last bit is 2^-24, rounded by the adder itself.
        return sign | (bitcast<u32>(bitcast<f32>(magnitude) + 0.5) - 0x3f000000u);
    }
    let odd = (magnitude >> 13u) & 1u;
    return sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13u);
}

fn bf16_bits(x: f32) -> u32 {
    let bits = bitcast<u32>(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return (bits >> 16u) | 0x40u;
    }
    return (bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u;
}

fn pack_halves(a: f32, b: f32) -> u32 {
    if (NATIVE_PACK) {
        return pack2x16float(vec2<f32>(a, b));
    }
    return f16_bits(a) | (f16_bits(b) << 16u);
}
