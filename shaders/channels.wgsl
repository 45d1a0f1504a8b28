// Sum or largest magnitude of each channel over the rows of one split of a head.
//
// tensor [batch, heads, len, head_dim] -> floats: partials [pair, split, QUADS * 4]
// One workgroup per split and pair: 16 row lanes by 16 lanes of four channels. The 16 row lanes are
// joined as a tree, here and in channels_finish.wgsl, which keeps the error of a mean near one rounding
// per level instead of one per row.

@group(0) @binding(0) var<uniform> params: TensorParams;
@group(0) @binding(1) var<storage, read> tensor: array<element>;
@group(0) @binding(2) var<storage, read_write> floats: array<f32>;

var<workgroup> lanes: array<vec4<f32>, 256>;

fn join(a: vec4<f32>, b: vec4<f32>) -> vec4<f32> {
    if (LARGEST) {
        return max(a, b);
    }
    return a + b;
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let split = params.first_block + group.x;
    let pair = params.first_pair + group.y;
    let batch = pair / params.heads;
    let head = pair % params.heads;
    let row_lane = lane / 16u;
    let end = min((split + 1u) * SPLIT_ROWS, params.samples);
    for (var first = 0u; first < QUADS; first += 16u) {
        let quad = first + lane % 16u;
        var total = vec4<f32>();
        for (var i = split * SPLIT_ROWS + row_lane; i < end; i += 16u) {
            let x = load_quad(row_start(params.view, batch, head, sampled_row(i)), quad);
            if (LARGEST) {
                total = max(total, abs(x));
            } else {
                total += x;
            }
        }
        lanes[lane] = total;
        workgroupBarrier();
        for (var step = 128u; step >= 16u; step /= 2u) {
            if (lane < step) {
                lanes[lane] = join(lanes[lane], lanes[lane + step]);
            }
            workgroupBarrier();
        }
        if (lane < 16u && quad < QUADS) {
            let at = params.partials + ((pair * params.splits + split) * QUADS + quad) * 4u;
            let x = lanes[lane];
            floats[at] = x.x;
            floats[at + 1u] = x.y;
            floats[at + 2u] = x.z;
            floats[at + 3u] = x.w;
        }
        workgroupBarrier();
    }
}

// floor(i * len / samples) without 64-bit products; the host keeps samples at or below 65536 when it is
// not len itself.
fn sampled_row(i: u32) -> u32 {
    if (params.samples == params.len) {
        return i;
    }
    return i * (params.len / params.samples) + i * (params.len % params.samples) / params.samples;
}
