// Attention over quantized Q and K on matrix cores: Q K^T in signed bytes with 32-bit integer sums,
// P V in f16 with f32 sums. What it computes and binds is what ../attend.wgsl does, tile by tile:
//
//   q_codes [pair, q_padded, QK_DIM], k_codes [pair, kv_padded, QK_DIM]: signed bytes, 16 per uvec4
//   values [pair, kv_padded, PV_DIM]: f16, 8 per uvec4
//   floats: q_scales [pair, q_groups], k_scales [pair, k_groups], v_scales [pair, HEAD_DIM],
//           lse_bias [pair, q_len]
//   -> result [batch, heads, q_len, head_dim], lse [pair, q_len]
//
// A subgroup of 32 holds BLOCKS blocks of 16 queries: their codes, their O, and the scores of one key
// tile, all in registers. Which element of a matrix an invocation holds is not the specification's to
// say: this shader is written for the one layout that `row_half` and `column` below tell, for sums and
// for f16 factors alike, and runs only where matrix_layout.comp found it. Then a sum becomes a factor
// without leaving its invocation, and the four invocations of a row are neighbours.
#version 450
#extension GL_KHR_cooperative_matrix : require
#extension GL_KHR_memory_scope_semantics : require
#extension GL_KHR_shader_subgroup_basic : require
#extension GL_KHR_shader_subgroup_vote : require
#extension GL_KHR_shader_subgroup_shuffle : require
#extension GL_EXT_shader_explicit_arithmetic_types_int8 : require
#extension GL_EXT_shader_explicit_arithmetic_types_float16 : require
#extension GL_EXT_control_flow_attributes : require

// Numbered as `constants` in src/attend/matrix_i8.rs has them.
layout(constant_id = 0) const uint THREADS = 128;
layout(constant_id = 1) const uint BLOCKS = 2;
layout(constant_id = 2) const uint KEY_TILE = 64;
layout(constant_id = 3) const uint STAGES = 1;
layout(constant_id = 4) const uint QK_DIM = 128;
layout(constant_id = 5) const uint PV_DIM = 128;
layout(constant_id = 6) const uint HEAD_DIM = 128;
layout(constant_id = 7) const uint DTYPE = 0;
layout(constant_id = 8) const uint CAUSAL = 0;
layout(constant_id = 9) const uint LSE = 0;
layout(constant_id = 10) const uint LSE_BIAS = 0;
layout(constant_id = 11) const uint V_SCALED = 0;

layout(local_size_x_id = 0, local_size_y = 1, local_size_z = 1) in;

// AttendParams of ../lib/abi.wgsl.
layout(set = 0, binding = 0) uniform Params {
    uvec4 out_view;
    uint heads;
    uint heads_per_kv;
    uint first_pair;
    uint first_tile;
    uint tiles;
    uint q_len;
    uint kv_len;
    uint q_padded;
    uint kv_padded;
    uint q_groups;
    uint k_groups;
    int causal_shift;
    uint q_codes;
    uint k_codes;
    uint values;
    uint q_scales;
    uint k_scales;
    uint v_scales;
    uint lse_bias;
    uint lse;
    float score_scale;
    uint unused0;
    uint unused1;
    uint unused2;
} params;
layout(set = 0, binding = 1) restrict readonly buffer QCodes { uvec4 q_codes[]; };
layout(set = 0, binding = 2) restrict readonly buffer KCodes { uvec4 k_codes[]; };
layout(set = 0, binding = 3) restrict readonly buffer Values { uvec4 values[]; };
layout(set = 0, binding = 4) restrict readonly buffer Floats { float floats[]; };
layout(set = 0, binding = 5) restrict buffer Out { uint result[]; };
layout(set = 0, binding = 6) restrict writeonly buffer Lse { uint lse[]; };

#define SUMS(T) coopmat<T, gl_ScopeSubgroup, 16, 16, gl_MatrixUseAccumulator>
#define CODES_Q coopmat<int8_t, gl_ScopeSubgroup, 16, 32, gl_MatrixUseA>
#define CODES_K coopmat<int8_t, gl_ScopeSubgroup, 32, 16, gl_MatrixUseB>
#define WEIGHTS coopmat<float16_t, gl_ScopeSubgroup, 16, 16, gl_MatrixUseA>
#define VALUES coopmat<float16_t, gl_ScopeSubgroup, 16, 16, gl_MatrixUseB>

const uint DTYPE_F16 = 0;
const uint DTYPE_BF16 = 1;
const uint DTYPE_F32 = 2;

const uint ROWS = THREADS / 32 * BLOCKS * 16;
const uint K_STEPS = QK_DIM / 32;
const uint KEYS = KEY_TILE / 16;
const uint CHANNELS = PV_DIM / 16;

// Staged rows lie an odd number of 16-byte vectors apart: eight neighbours fall into different banks.
const uint K_VECS = QK_DIM / 16;
const uint V_VECS = PV_DIM / 8;
const uint K_STRIDE = K_VECS | 1;
const uint V_STRIDE = V_VECS | 1;
const uint V_AT = KEY_TILE * K_STRIDE;
const uint STAGE = V_AT + KEY_TILE * V_STRIDE;
shared uvec4 staged[STAGES * STAGE];

// 1.5 * 2^23: sums start from its bits. An integer below 2^22 added to them is the float with that integer
// added, so that the sums are floats without a conversion.
const int BIAS_BITS = 0x4b400000;
const float BIAS = 12582912.0;
// Below every biased sum.
const float LOWEST = 8388608.0;
// Below every score.
const float MASKED = -3.0e38;
const uint MINUS_INFINITY_BITS = 0xff800000u;
// -2^100: it stays there whatever sum is added to its bits.
const int HIDDEN_BITS = int(0xf1800000);
// How far above the maximum in use, in log2 units, a row's scores may rise: P stays below 2^8 and O is
// rescaled seldom.
const float STALE = 8.0;
// Below it every P of a tile is 1, and a hidden key's still 0.
const float SMALLEST = 1e-27;
const float LN_2 = 0.6931471805599453;

// Element e of a 16 x 16 matrix: which of an invocation's two rows, and which column.
uint row_half(uint e) { return e / 4; }
uint column(uint lane, uint e) { return lane % 4 * 2 + e % 2 + e / 2 % 2 * 8; }

// How many keys, from the first, a query sees.
uint visible_keys(uint row) {
    if (CAUSAL != 0) {
        return uint(clamp(int(row) + 1 + params.causal_shift, 0, int(params.kv_len)));
    }
    return params.kv_len;
}

// The largest and the sum over the four invocations of a row.
float row_max(float x) {
    x = max(x, subgroupShuffleXor(x, 1));
    return max(x, subgroupShuffleXor(x, 2));
}

float row_sum(float x) {
    x += subgroupShuffleXor(x, 1);
    return x + subgroupShuffleXor(x, 2);
}

// The vectors of a tile of keys and of values that an invocation stages.
const uint K_LOADS = (KEY_TILE * K_VECS + THREADS - 1) / THREADS;
const uint V_LOADS = (KEY_TILE * V_VECS + THREADS - 1) / THREADS;

void load_keys(uint kv_pair, uint key, out uvec4 next[K_LOADS]) {
    uint from = params.k_codes + (kv_pair * params.kv_padded + key) * K_VECS;
    [[unroll]] for (uint n = 0; n < K_LOADS; n++) {
        uint i = n * THREADS + gl_LocalInvocationIndex;
        if (KEY_TILE * K_VECS % THREADS == 0 || i < KEY_TILE * K_VECS) { next[n] = k_codes[from + i]; }
    }
}

void load_values(uint kv_pair, uint key, out uvec4 next[V_LOADS]) {
    uint from = params.values + (kv_pair * params.kv_padded + key) * V_VECS;
    [[unroll]] for (uint n = 0; n < V_LOADS; n++) {
        uint i = n * THREADS + gl_LocalInvocationIndex;
        if (KEY_TILE * V_VECS % THREADS == 0 || i < KEY_TILE * V_VECS) { next[n] = values[from + i]; }
    }
}

// Where the n-th of an invocation's vectors goes, in rows of so many vectors so far apart. Where
// invocations take whole rows at a time, that is a constant beyond the first.
uint slot(uint n, uint vecs, uint stride) {
    uint t = gl_LocalInvocationIndex;
    if (THREADS % vecs == 0) {
        return n * (THREADS / vecs * stride) + t / vecs * stride + t % vecs;
    }
    uint i = n * THREADS + t;
    return i / vecs * stride + i % vecs;
}

void stage_keys(uint at, uvec4 next[K_LOADS]) {
    [[unroll]] for (uint n = 0; n < K_LOADS; n++) {
        uint i = n * THREADS + gl_LocalInvocationIndex;
        if (KEY_TILE * K_VECS % THREADS == 0 || i < KEY_TILE * K_VECS) {
            staged[at + slot(n, K_VECS, K_STRIDE)] = next[n];
        }
    }
}

void stage_values(uint at, uvec4 next[V_LOADS]) {
    [[unroll]] for (uint n = 0; n < V_LOADS; n++) {
        uint i = n * THREADS + gl_LocalInvocationIndex;
        if (KEY_TILE * V_VECS % THREADS == 0 || i < KEY_TILE * V_VECS) {
            staged[at + V_AT + slot(n, V_VECS, V_STRIDE)] = next[n];
        }
    }
}

float q_scale(uint pair, uint row) {
    return floats[params.q_scales + pair * params.q_groups + min(row / 128, params.q_groups - 1)];
}

float k_scale(uint kv_pair, uint key) {
    return floats[params.k_scales + kv_pair * params.k_groups + min(key / 64, params.k_groups - 1)];
}

// Two neighbouring channels of a row of `result`. A row starts on a word and its last word may be shared
// with the bytes behind it, which stay.
void store_pair(uint start, uint channel, vec2 x, uint scales) {
    if (channel >= HEAD_DIM) {
        return;
    }
    bool both = channel + 1 < HEAD_DIM;
    if (V_SCALED != 0) {
        x.x *= floats[scales + channel];
        if (both) { x.y *= floats[scales + channel + 1]; }
    }
    if (DTYPE == DTYPE_F32) {
        result[start + channel] = floatBitsToUint(x.x);
        if (both) { result[start + channel + 1] = floatBitsToUint(x.y); }
        return;
    }
    uint word;
    if (DTYPE == DTYPE_F16) {
        word = packHalf2x16(x);
    } else {
        // To nearest even. Sums of finite values of bf16's own range are no NaN.
        uvec2 bits = floatBitsToUint(x);
        bits = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
        word = bits.x | bits.y << 16;
    }
    uint at = start + channel / 2;
    result[at] = both ? word : result[at] & 0xffff0000u | word & 0xffffu;
}

// As in lib/attention.wgsl: in each band of heads the tiles of the last queries, which see the most keys,
// start first.
const uint BAND = 8;

uvec2 work_of(uvec2 group, uvec2 groups) {
    if (CAUSAL == 0) {
        return group;
    }
    const uint number = group.y * groups.x + group.x;
    const uint first = number / (BAND * groups.x) * BAND;
    const uint heads = min(BAND, groups.y - first);
    const uint within = number - first * groups.x;
    return uvec2(within / heads, first + within % heads);
}

void main() {
    const uint lane = gl_SubgroupInvocationID;
    const uvec2 work = work_of(gl_WorkGroupID.xy, gl_NumWorkGroups.xy);
    const uint pair = params.first_pair + work.y;
    const uint batch = pair / params.heads;
    const uint head = pair % params.heads;
    const uint kv_pair = batch * (params.heads / params.heads_per_kv) + head / params.heads_per_kv;
    uint tile = params.first_tile + work.x;
    if (CAUSAL != 0) {
        tile = params.tiles - 1 - tile;
    }
    const uint group_row = tile * ROWS;
    const uint first_row = group_row + gl_SubgroupID * (BLOCKS * 16);
    // The keys that any row of the workgroup sees, and those that every row of the subgroup sees.
    const uint end = visible_keys(min(group_row + ROWS, params.q_len) - 1);
    const uint unmasked = visible_keys(first_row);

    CODES_Q q[BLOCKS * K_STEPS];
    SUMS(float) o[BLOCKS * CHANNELS];
    // The rows of a subgroup lie in one block of 128, which has one scale.
    const float factor = abs(params.score_scale) * q_scale(pair, first_row);
    // Of an invocation's rows, two a block: the maximum in use in log2 units, and the sum of its P.
    float maximum[BLOCKS * 2];
    float sum[BLOCKS * 2];
    [[unroll]] for (uint r = 0; r < BLOCKS; r++) {
        // Rows past the padding are no queries': any codes will do.
        uint row = first_row + r * 16;
        uint from = params.q_codes + (pair * params.q_padded + (row < params.q_padded ? row : 0)) * K_VECS;
        [[unroll]] for (uint k = 0; k < K_STEPS; k++) {
            coopMatLoad(q[r * K_STEPS + k], q_codes, from + k * 2, K_VECS, gl_CooperativeMatrixLayoutRowMajor);
            // The largest score belongs to the largest sum only while factors are positive.
            if (params.score_scale < 0.0) { q[r * K_STEPS + k] = -q[r * K_STEPS + k]; }
        }
        [[unroll]] for (uint c = 0; c < CHANNELS; c++) {
            o[r * CHANNELS + c] = SUMS(float)(0.0);
        }
        [[unroll]] for (uint h = 0; h < 2; h++) {
            maximum[r * 2 + h] = MASKED;
            sum[r * 2 + h] = 0.0;
        }
    }

    uvec4 k_next[K_LOADS];
    uvec4 v_next[V_LOADS];
    if (end > 0) {
        load_keys(kv_pair, 0, k_next);
        load_values(kv_pair, 0, v_next);
    }
    uint stage = 0;
    for (uint key = 0; key < end; key += KEY_TILE) {
        // With one stage every subgroup must have read the last tile. With two they read the other stage,
        // and whoever is so far has passed the barrier behind which nobody reads this one.
        if (STAGES == 1) { barrier(); }
        const uint at = stage * STAGE;
        stage_keys(at, k_next);
        stage_values(at, v_next);
        barrier();
        stage = STAGES == 1 ? 0 : stage ^ 1;
        // On their way while this tile is computed.
        if (key + KEY_TILE < end) {
            load_keys(kv_pair, key + KEY_TILE, k_next);
            load_values(kv_pair, key + KEY_TILE, v_next);
        }

        // Q K^T. Where a key is hidden its sum starts far below all others instead.
        SUMS(int) s[BLOCKS * KEYS];
        [[unroll]] for (uint i = 0; i < BLOCKS * KEYS; i++) { s[i] = SUMS(int)(BIAS_BITS); }
        if (key + KEY_TILE > unmasked) {
            [[unroll]] for (uint r = 0; r < BLOCKS; r++) {
                [[unroll]] for (uint h = 0; h < 2; h++) {
                    uint visible = visible_keys(first_row + r * 16 + h * 8 + lane / 4);
                    [[unroll]] for (uint n = 0; n < KEYS; n++) {
                        [[unroll]] for (uint e = 0; e < 4; e++) {
                            if (key + n * 16 + column(lane, e) >= visible) { s[r * KEYS + n][h * 4 + e] = HIDDEN_BITS; }
                        }
                    }
                }
            }
        }
        [[unroll]] for (uint k = 0; k < K_STEPS; k++) {
            [[unroll]] for (uint n = 0; n < KEYS; n++) {
                CODES_K codes;
                coopMatLoad(codes, staged, at + n * 16 * K_STRIDE + k * 2, K_STRIDE, gl_CooperativeMatrixLayoutColumnMajor);
                [[unroll]] for (uint r = 0; r < BLOCKS; r++) {
                    s[r * KEYS + n] = coopMatMulAdd(q[r * K_STEPS + k], codes, s[r * KEYS + n]);
                }
            }
        }

        // The tile's maxima, in sums and as scores in log2 units.
        const float scale = max(factor * k_scale(kv_pair, key), SMALLEST);
        float top[BLOCKS * 2];
        float score[BLOCKS * 2];
        bool raise = false;
        [[unroll]] for (uint i = 0; i < BLOCKS * 2; i++) {
            float x = LOWEST;
            [[unroll]] for (uint n = 0; n < KEYS; n++) {
                [[unroll]] for (uint e = 0; e < 4; e++) {
                    x = max(x, intBitsToFloat(s[i / 2 * KEYS + n][i % 2 * 4 + e]));
                }
            }
            top[i] = row_max(x);
            score[i] = top[i] > LOWEST ? (top[i] - BIAS) * scale : MASKED;
            raise = raise || score[i] > maximum[i] + STALE;
        }
        if (subgroupAny(raise)) {
            [[unroll]] for (uint r = 0; r < BLOCKS; r++) {
                SUMS(float) decays;
                [[unroll]] for (uint h = 0; h < 2; h++) {
                    uint i = r * 2 + h;
                    bool raised = score[i] > maximum[i] + STALE;
                    float decay = raised ? exp2(maximum[i] - score[i]) : 1.0;
                    maximum[i] = raised ? score[i] : maximum[i];
                    sum[i] *= decay;
                    [[unroll]] for (uint e = 0; e < 4; e++) { decays[h * 4 + e] = decay; }
                }
                [[unroll]] for (uint c = 0; c < CHANNELS; c++) {
                    o[r * CHANNELS + c] = o[r * CHANNELS + c] * decays;
                }
            }
        }

        // P, relative to the maximum in use. Differences of sums are exact, so that the row's largest
        // score gets the same power of two however large scores are.
        WEIGHTS p[BLOCKS * KEYS];
        [[unroll]] for (uint i = 0; i < BLOCKS * 2; i++) {
            float offset = score[i] - maximum[i];
            [[unroll]] for (uint n = 0; n < KEYS; n++) {
                [[unroll]] for (uint e = 0; e < 4; e++) {
                    uint element = i % 2 * 4 + e;
                    float below = intBitsToFloat(s[i / 2 * KEYS + n][element]) - top[i];
                    float x = exp2(fma(below, scale, offset));
                    sum[i] += x;
                    p[i / 2 * KEYS + n][element] = float16_t(x);
                }
            }
        }

        // P V
        [[unroll]] for (uint n = 0; n < KEYS; n++) {
            [[unroll]] for (uint c = 0; c < CHANNELS; c++) {
                VALUES v;
                coopMatLoad(v, staged, at + V_AT + n * 16 * V_STRIDE + c * 2, V_STRIDE, gl_CooperativeMatrixLayoutRowMajor);
                [[unroll]] for (uint r = 0; r < BLOCKS; r++) {
                    o[r * CHANNELS + c] = coopMatMulAdd(p[r * KEYS + n], v, o[r * CHANNELS + c]);
                }
            }
        }
    }

    [[unroll]] for (uint i = 0; i < BLOCKS * 2; i++) {
        float whole = row_sum(sum[i]);
        uint row = first_row + i / 2 * 16 + i % 2 * 8 + lane / 4;
        // A row that sees no key has no sum: O is zero.
        bool some = visible_keys(row) > 0;
        float inverse = some ? 1.0 / whole : 0.0;
        if (row >= params.q_len) {
            continue;
        }
        uint start = params.out_view.w + batch * params.out_view.x + head * params.out_view.y + row * params.out_view.z;
        [[unroll]] for (uint c = 0; c < CHANNELS; c++) {
            [[unroll]] for (uint e = 0; e < 4; e += 2) {
                SUMS(float) tile_of = o[i / 2 * CHANNELS + c];
                vec2 x = vec2(tile_of[i % 2 * 4 + e], tile_of[i % 2 * 4 + e + 1]) * inverse;
                store_pair(start, c * 16 + column(lane, e), x, params.v_scales + kv_pair * HEAD_DIM);
            }
        }
        if (LSE != 0 && lane % 4 == 0) {
            uint at = pair * params.q_len + row;
            uint bits = MINUS_INFINITY_BITS;
            if (some) {
                float x = (maximum[i] + log2(whole)) * LN_2;
                if (LSE_BIAS != 0) { x += floats[params.lse_bias + at]; }
                bits = floatBitsToUint(x);
            }
            lse[params.lse + at] = bits;
        }
    }
}
