// Quantizes the rows of Q or K to signed 8-bit codes.
//
// tensor [batch, heads, len, head_dim] -> data: codes [pair, padded_len, QK_DIM], four per word as bytes
//                                         or two per word as f16 (CODES_F16)
//                                         floats: scales [pair, groups]
// K (SUBTRACT_MEAN): the channel means of its head are subtracted first, in f32.
// Q (LSE_BIAS): softmax_scale * (q . mean of its KV head), unquantized, goes to lse_bias [pair, len].
//
// One workgroup per block of BLOCK rows and pair: 16 row lanes by 16 lanes of four channels. Row lane r
// takes rows r, r + 16 ..; they all fall into one group of the block, slot (r % SLOT_MOD) / SLOT_DIV.
// Rows and channels past the end get code 0 and never count in a maximum.

@group(0) @binding(0) var<uniform> params: TensorParams;
@group(0) @binding(1) var<storage, read> tensor: array<element>;
@group(0) @binding(2) var<storage, read_write> data: array<u32>;
@group(0) @binding(3) var<storage, read_write> floats: array<f32>;

const CODES_PER_WORD: u32 = select(4u, 2u, CODES_F16);

// Bits of non-negative floats order as the floats do.
var<workgroup> largest: array<atomic<u32>, SLOTS>;
var<workgroup> products: array<f32, 256>;

fn mean_quad(pair: u32, quad: u32) -> vec4<f32> {
    let at = params.channels + pair * HEAD_DIM;
    let c = 4u * quad;
    var x = vec4<f32>();
    if (c < HEAD_DIM) { x.x = floats[at + c]; }
    if (c + 1u < HEAD_DIM) { x.y = floats[at + c + 1u]; }
    if (c + 2u < HEAD_DIM) { x.z = floats[at + c + 2u]; }
    if (c + 3u < HEAD_DIM) { x.w = floats[at + c + 3u]; }
    return x;
}

fn load_smoothed(start: u32, pair: u32, quad: u32) -> vec4<f32> {
    let x = load_quad(start, quad);
    if (SUBTRACT_MEAN) {
        return x - mean_quad(pair, quad);
    }
    return x;
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let block = params.first_block + group.x;
    let pair = params.first_pair + group.y;
    let batch = pair / params.heads;
    let head = pair % params.heads;
    let row_lane = lane / 16u;
    let quad_lane = lane % 16u;
    let slot = (row_lane % SLOT_MOD) / SLOT_DIV;

    if (lane < SLOTS) {
        atomicStore(&largest[lane], 0u);
    }
    workgroupBarrier();
    var amax = 0.0;
    for (var pass_row = 0u; pass_row < BLOCK; pass_row += 16u) {
        let row = block * BLOCK + pass_row + row_lane;
        if (row < params.len) {
            let start = row_start(params.view, batch, head, row);
            for (var quad = quad_lane; quad < QUADS; quad += 16u) {
                let x = abs(load_smoothed(start, pair, quad));
                amax = max(amax, max(max(x.x, x.y), max(x.z, x.w)));
            }
        }
    }
    atomicMax(&largest[slot], bitcast<u32>(amax));
    workgroupBarrier();

    let scale = code_scale(bitcast<f32>(atomicLoad(&largest[slot])));
    let inverse = vec4<f32>(1.0 / scale);
    if (lane < SLOTS) {
        let own = code_scale(bitcast<f32>(atomicLoad(&largest[lane])));
        let index = block * SLOTS + lane;
        if (index < params.groups) {
            floats[params.scales + pair * params.groups + index] = own;
        }
    }
    for (var pass_row = 0u; pass_row < BLOCK; pass_row += 16u) {
        let row = block * BLOCK + pass_row + row_lane;
        if (row < params.padded_len) {
            let start = row_start(params.view, batch, head, row);
            let codes_at = params.data + (pair * params.padded_len + row) * (QK_DIM / CODES_PER_WORD);
            for (var quad = quad_lane; quad < QK_DIM / 4u; quad += 16u) {
                var code = vec4<i32>();
                if (row < params.len && quad < QUADS) {
                    // The mean of a padding channel is zero, and so is its code.
                    code = codes(load_smoothed(start, pair, quad), inverse);
                }
                if (CODES_F16) {
                    let x = vec4<f32>(code);
                    data[codes_at + 2u * quad] = pack_halves(x.x, x.y);
                    data[codes_at + 2u * quad + 1u] = pack_halves(x.z, x.w);
                } else {
                    data[codes_at + quad] = pack_codes(code);
                }
            }
        }
        if (LSE_BIAS) {
            let kv_heads = params.heads / params.heads_per_kv;
            let kv_pair = batch * kv_heads + head / params.heads_per_kv;
            var product = 0.0;
            if (row < params.len) {
                let start = row_start(params.view, batch, head, row);
                for (var quad = quad_lane; quad < QUADS; quad += 16u) {
                    product += dot(load_quad(start, quad), mean_quad(kv_pair, quad));
                }
            }
            products[lane] = product;
            workgroupBarrier();
            if (quad_lane == 0u && row < params.len) {
                var total = 0.0;
                for (var i = 0u; i < 16u; i++) {
                    total += products[lane + i];
                }
                floats[params.lse_bias + pair * params.len + row] = params.softmax_scale * total;
            }
            workgroupBarrier();
        }
    }
}
