// Quantizes V per channel and lays it out for the 8-bit P V product.
//
// tensor [batch, heads, len, head_dim], floats: scales [pair, HEAD_DIM]
//   -> data: [pair, tile, 17, PV_DIM] words
// Word (w, c) of a tile of 64 keys, w < 16, holds the codes of channel c of the keys w, w + 16, w + 32
// and w + 48: the four that the attention kernel's invocation w packs in its P. Row 16 holds 128 times
// the sum of the tile's codes of each channel: P is stored less 128 to fit a signed byte, and this gives
// it back. Keys and channels past the end have code 0.

@group(0) @binding(0) var<uniform> params: TensorParams;
@group(0) @binding(1) var<storage, read> tensor: array<element>;
@group(0) @binding(2) var<storage, read_write> data: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read_write> floats: array<f32>;

var<workgroup> sums: array<atomic<i32>, PV_DIM>;
// One over the scales, computed once: a division each.
var<workgroup> inverses: array<vec4<f32>, PV_DIM / 4u>;

fn inverse_scale(pair: u32, channel: u32) -> f32 {
    if (channel >= HEAD_DIM) {
        return 1.0;
    }
    return 1.0 / floats[params.scales + pair * HEAD_DIM + channel];
}

fn key_codes(view: View, batch: u32, head: u32, key: u32, quad: u32, inverse: vec4<f32>) -> vec4<i32> {
    if (key >= params.len) {
        return vec4<i32>();
    }
    return codes(load_quad(row_start(view, batch, head, key), quad), inverse);
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let tile = params.first_block + group.x;
    let pair = params.first_pair + group.y;
    let batch = pair / params.heads;
    let head = pair % params.heads;
    let quads = PV_DIM / 4u;
    let tile_at = params.data + (pair * (params.padded_len / 64u) + tile) * (17u * quads);
    if (lane < PV_DIM) {
        atomicStore(&sums[lane], 0);
    }
    if (lane < quads) {
        let c = 4u * lane;
        inverses[lane] = vec4<f32>(
            inverse_scale(pair, c),
            inverse_scale(pair, c + 1u),
            inverse_scale(pair, c + 2u),
            inverse_scale(pair, c + 3u),
        );
    }
    workgroupBarrier();
    for (var i = lane; i < 16u * quads; i += 256u) {
        let w = i / quads;
        let quad = i % quads;
        let c = 4u * quad;
        let inverse = inverses[quad];
        let key = 64u * tile + w;
        let k0 = key_codes(params.view, batch, head, key, quad, inverse);
        let k1 = key_codes(params.view, batch, head, key + 16u, quad, inverse);
        let k2 = key_codes(params.view, batch, head, key + 32u, quad, inverse);
        let k3 = key_codes(params.view, batch, head, key + 48u, quad, inverse);
        let total = k0 + k1 + k2 + k3;
        atomicAdd(&sums[c], total.x);
        atomicAdd(&sums[c + 1u], total.y);
        atomicAdd(&sums[c + 2u], total.z);
        atomicAdd(&sums[c + 3u], total.w);
        data[tile_at + i] = vec4<u32>(
            pack_codes(vec4<i32>(k0.x, k1.x, k2.x, k3.x)),
            pack_codes(vec4<i32>(k0.y, k1.y, k2.y, k3.y)),
            pack_codes(vec4<i32>(k0.z, k1.z, k2.z, k3.z)),
            pack_codes(vec4<i32>(k0.w, k1.w, k2.w, k3.w)),
        );
    }
    workgroupBarrier();
    if (lane < quads) {
        let c = 4u * lane;
        let total = vec4<i32>(
            atomicLoad(&sums[c]),
            atomicLoad(&sums[c + 1u]),
            atomicLoad(&sums[c + 2u]),
            atomicLoad(&sums[c + 3u]),
        );
        data[tile_at + 16u * quads + lane] = bitcast<vec4<u32>>(128 * total);
    }
}
