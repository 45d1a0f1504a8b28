// Products of packed signed 8-bit integers. NATIVE_DOT says that this device's dot4I8Packed was tested
// and is right; the long way round gives the same integers.

fn dot4(a: u32, b: u32) -> i32 {
    if (NATIVE_DOT) {
        return dot4I8Packed(a, b);
    }
    let x = bitcast<i32>(a);
    let y = bitcast<i32>(b);
    return ((x << 24u) >> 24u) * ((y << 24u) >> 24u)
        + ((x << 16u) >> 24u) * ((y << 16u) >> 24u)
        + ((x << 8u) >> 24u) * ((y << 8u) >> 24u)
        + (x >> 24u) * (y >> 24u);
}

fn dot16(a: vec4<u32>, b: vec4<u32>) -> i32 {
    return dot4(a.x, b.x) + dot4(a.y, b.y) + dot4(a.z, b.z) + dot4(a.w, b.w);
}
