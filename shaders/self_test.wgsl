// Runs the instructions that the kernels rely on and that drivers have been seen to get wrong.
// data [case, 4]: two operands in, the results of one case out.

@group(0) @binding(0) var<storage, read_write> data: array<vec4<u32>>;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    if (id.x < arrayLength(&data)) {
        let a = data[id.x].x;
        let b = data[id.x].y;
        let dot = bitcast<u32>(dot4I8Packed(a, b));
        let packed = pack2x16float(vec2<f32>(bitcast<f32>(a), bitcast<f32>(b)));
        let unpacked = unpack2x16float(b);
        data[id.x] = vec4<u32>(dot, packed, bitcast<u32>(unpacked.x), bitcast<u32>(unpacked.y));
    }
}
