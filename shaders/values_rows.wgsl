// Lays V out row by row in f16, for kernels that load it as matrices.
//
// tensor [batch, heads, len, head_dim] -> data: [pair, padded_len, PV_DIM] f16, two channels in a word
// Keys and channels past the end are zero, so that P = 0 never meets what is not a number.
// RANGED: see lib/range.wgsl.

@group(0) @binding(0) var<uniform> params: TensorParams;
@group(0) @binding(1) var<storage, read> tensor: array<element>;
@group(0) @binding(2) var<storage, read_write> data: array<vec2<u32>>;
@group(0) @binding(3) var<storage, read_write> floats: array<f32>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let tile = params.first_block + group.x;
    let pair = params.first_pair + group.y;
    let batch = pair / params.heads;
    let head = pair % params.heads;
    // `data` counts vec4 of the slice's binding; a row is PV_DIM / 4 of the vec2 here.
    let tile_at = 2u * params.data + (pair * params.padded_len + 64u * tile) * (PV_DIM / 4u);
    for (var i = lane; i < 16u * PV_DIM; i += 256u) {
        let key = 64u * tile + i / (PV_DIM / 4u);
        let quad = i % (PV_DIM / 4u);
        var x = vec4<f32>();
        if (key < params.len) {
            x = load_quad(row_start(params.view, batch, head, key), quad);
        }
        if (RANGED) {
            x *= inverse_factors(pair, quad);
        }
        data[tile_at + i] = vec2<u32>(pack_halves(x.x, x.y), pack_halves(x.z, x.w));
    }
}
