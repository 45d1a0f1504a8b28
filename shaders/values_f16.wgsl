// Lays V out for the f16 P V product.
//
// tensor [batch, heads, len, head_dim] -> data: [pair, tile, 32, PV_DIM] words
// Word (w, c) of a tile of 64 keys holds channel c, as f16, of the keys w / 2 + 32 * (w % 2) and 16
// later: the two that the attention kernel's invocation w / 2 has as neighbours in its P. Keys and
// channels past the end are zero, so that P = 0 never meets what is not a number.
// RANGED: each channel is divided by its power of two from channels_finish.wgsl.

@group(0) @binding(0) var<uniform> params: TensorParams;
@group(0) @binding(1) var<storage, read> tensor: array<element>;
@group(0) @binding(2) var<storage, read_write> data: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read_write> floats: array<f32>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let tile = params.first_block + group.x;
    let pair = params.first_pair + group.y;
    let batch = pair / params.heads;
    let head = pair % params.heads;
    let tile_at = params.data + (pair * (params.padded_len / 64u) + tile) * (8u * PV_DIM);
    for (var i = lane; i < 8u * PV_DIM; i += 256u) {
        let w = i / (PV_DIM / 4u);
        let quad = i % (PV_DIM / 4u);
        let key = 64u * tile + w / 2u + 32u * (w % 2u);
        var a = vec4<f32>();
        var b = vec4<f32>();
        if (key < params.len) {
            a = load_quad(row_start(params.view, batch, head, key), quad);
        }
        if (key + 16u < params.len) {
            b = load_quad(row_start(params.view, batch, head, key + 16u), quad);
        }
        if (RANGED) {
            let inverse = inverse_factors(pair, quad);
            a *= inverse;
            b *= inverse;
        }
        data[tile_at + i] = vec4<u32>(
            pack_halves(a.x, b.x),
            pack_halves(a.y, b.y),
            pack_halves(a.z, b.z),
            pack_halves(a.w, b.w),
        );
    }
}
