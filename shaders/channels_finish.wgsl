// Joins the partial results of channels.wgsl to one number per channel.
//
// floats: partials [pair, split, QUADS * 4] -> channels [pair, HEAD_DIM]
// One workgroup per pair: 16 split lanes by 16 lanes of four channels, then a tree.

@group(0) @binding(0) var<uniform> params: TensorParams;
@group(0) @binding(1) var<storage, read_write> floats: array<f32>;

var<workgroup> lanes: array<vec4<f32>, 256>;

fn join(a: vec4<f32>, b: vec4<f32>) -> vec4<f32> {
    if (LARGEST) {
        return max(a, b);
    }
    return a + b;
}

// The factor that turns what is stored for V back into V: the power of two that brings a channel to at
// most 32768, half the range of f16. Smaller channels stay as they are.
fn range_factor(amax: f32) -> f32 {
    let bits = bitcast<u32>(amax);
    if (bits <= 0x47000000u || bits >= 0x7f800000u) {
        return 1.0;
    }
    let above = (bits - 0x47000000u + 0x7fffffu) >> 23u;
    return bitcast<f32>((127u + above) << 23u);
}

fn finish(x: f32) -> f32 {
    if (FINISH == FINISH_MEAN) {
        return x / f32(params.samples);
    }
    if (FINISH == FINISH_RANGE) {
        return range_factor(x);
    }
    return code_scale(x);
}

fn store(pair: u32, channel: u32, x: f32) {
    if (channel < HEAD_DIM) {
        floats[params.channels + pair * HEAD_DIM + channel] = finish(x);
    }
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let pair = params.first_pair + group.y;
    for (var first = 0u; first < QUADS; first += 16u) {
        let quad = first + lane % 16u;
        var total = vec4<f32>();
        if (quad < QUADS) {
            for (var split = lane / 16u; split < params.splits; split += 16u) {
                let at = params.partials + ((pair * params.splits + split) * QUADS + quad) * 4u;
                let x = vec4<f32>(floats[at], floats[at + 1u], floats[at + 2u], floats[at + 3u]);
                total = join(total, x);
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
            let x = lanes[lane];
            store(pair, 4u * quad, x.x);
            store(pair, 4u * quad + 1u, x.y);
            store(pair, 4u * quad + 2u, x.z);
            store(pair, 4u * quad + 3u, x.w);
        }
        workgroupBarrier();
    }
}
