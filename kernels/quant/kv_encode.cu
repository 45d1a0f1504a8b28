// Second launch of the preparation: K to INT8 and V to transposed e4m3 or INT8 (quant/v_codes.cuh), in tiles that the attention kernel copies as they are.
//
//   K codes = round((k - mean) / scale of its group), groups (key / 128) * 4 + key % 8 / 2     SageAttention2 (2411.10958), equation 8
//   V codes = round(v / scale of its channel)                                                  same, section 3.2
//   V residuals = sum over each tile's keys of v / scale - code                                docs/numerics.md
//
// Problem   k, v: [batch, kv_heads, kv_len, head_dim] of IN_T, strided; the statistics of kv_statistics.
// Grid      batch * kv_heads * tiles * 2 blocks of 2 * HEAD_DIM threads: even ones encode 128 keys of K, odd ones of V.
// K tile    128 rows of HEAD_DIM bytes, swizzled (tile/swizzle.cuh). A thread owns eight channels of every 16th key, so that all its keys lie in
//           one scale group. Keys past kv_len get code 0 and do not count.
// V tile    HEAD_DIM rows of 128 bytes, swizzled. Within each 16 keys the order is 0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15: the four neighbours that
//           the PV GEMM takes from one register are then the keys that the same thread holds in the fragment of S (attn/softmax.cuh).
//           A thread reads eight channels of the four keys of such a word, encodes eight words, and the block turns them in shared memory.
// Constants HEAD_DIM 64, 128, 256; IN_T F16, Bf16, F32; SMOOTH, INT8_PV 0 or 1.
#include "abi.cuh"
#include "attn/scales.cuh"
#include "ptx/sync.cuh"
#include "quant/operations.cuh"
#include "quant/residual.cuh"
#include "quant/v_codes.cuh"
#include "tile/elements.cuh"
#include "tile/swizzle.cuh"

constexpr int THREADS = 2 * HEAD_DIM;
constexpr int OCTETS = HEAD_DIM / OCTET;
constexpr u32 TILE_BYTES = TILE_KEYS * HEAD_DIM;

/// Keys of a K tile in one thread.
constexpr int KEYS = TILE_KEYS * OCTETS / THREADS;
constexpr int KEY_STEP = TILE_KEYS / KEYS;
static_assert(KEY_STEP == 16, "a multiple of 8, so that a thread's keys share their group");

/// Words of four keys in a row of a V tile, of which a thread encodes those of WORD_ROUNDS octets.
constexpr int WORDS = TILE_KEYS / 4;
constexpr int WORD_ROUNDS = OCTETS * WORDS / THREADS;
static_assert(WORD_ROUNDS == 2, "two words of eight channels a thread");

/// One (batch, kv head) and tile.
struct Place {
    u32 head;
    u32 batch;
    u32 kv_head;
    u32 tile;
};

/// Joins the pieces' values of channel threadIdx.x, in order. The loads of eight pieces are in flight together.
template <class Operation>
DEVICE float join_pieces(const float* of_all_heads, const PrepareParams& params, const Place& place) {
    const float* const from = of_all_heads + static_cast<u64>(place.head) * params.pieces * HEAD_DIM + threadIdx.x;
    float total = 0.f;
    for (u32 first = 0; first < params.pieces; first += 8) {
        float x[8];
#pragma unroll
        for (u32 i = 0; i < 8; ++i) x[i] = first + i < params.pieces ? from[(first + i) * HEAD_DIM] : 0.f;
#pragma unroll
        for (u32 i = 0; i < 8; ++i) total = Operation::join(total, x[i]);
    }
    return total;
}

DEVICE void encode_k(const PrepareParams& params, const Place& place) {
    __shared__ float mean[HEAD_DIM];
    __shared__ u32 amax_bits[K_GROUPS];
    const int octet = threadIdx.x % OCTETS;
    const int first_key = threadIdx.x / OCTETS;
    const u32 keys = min(params.kv_len - place.tile * TILE_KEYS, static_cast<u32>(TILE_KEYS));

    RawOctet<IN_T> raw[KEYS];
#pragma unroll
    for (int i = 0; i < KEYS; ++i) {
        const u32 key = first_key + KEY_STEP * i;
        const i64 row = static_cast<i64>(place.tile) * TILE_KEYS + key;
        raw[i] = load_octet<IN_T>(row_address<IN_T>(params.k, params.k_stride, place.batch, place.kv_head, row), octet, params.head_dim, key < keys);
    }
    wait_for_previous_launch();
    if (threadIdx.x < HEAD_DIM) {
        float sum = 0.f;
        if constexpr (SMOOTH) sum = __fdiv_rn(join_pieces<Add>(params.k_sums, params, place), static_cast<float>(params.samples));
        mean[threadIdx.x] = sum;
        if (place.tile == 0) params.k_mean[static_cast<u64>(place.head) * HEAD_DIM + threadIdx.x] = sum;
    }
    if (threadIdx.x < K_GROUPS) amax_bits[threadIdx.x] = 0;
    __syncthreads();

    float x[KEYS][OCTET];
    float amax = 0.f;
#pragma unroll
    for (int i = 0; i < KEYS; ++i) {
        widen(x[i], raw[i]);
#pragma unroll
        for (int e = 0; e < OCTET; ++e) {
            x[i][e] = first_key + KEY_STEP * i < keys ? x[i][e] - mean[octet * OCTET + e] : 0.f;
            amax = fmaxf(amax, fabsf(x[i][e]));
        }
    }
    // Magnitudes are ordered as their bits are.
    const int group = first_key % 8 / 2;
#pragma unroll
    for (int g = 0; g < K_GROUPS; ++g) {
        const u32 largest = warp_max(g == group ? __float_as_uint(amax) : 0);
        if (threadIdx.x % 32 == 0) shared_max(shared_address(&amax_bits[g]), largest);
    }
    __syncthreads();

    const Scale scale = scale_from_amax(__uint_as_float(amax_bits[group]), LARGEST_S8);
    const u64 tile = static_cast<u64>(place.head) * params.tiles + place.tile;
    u8* const codes = params.k_codes + tile * TILE_BYTES;
#pragma unroll
    for (int i = 0; i < KEYS; ++i) {
        u32 word[2];
        encode_s8(word, x[i], scale.inverse);
        store_8_bytes(codes + swizzled<TILE_KEYS, HEAD_DIM>(first_key + KEY_STEP * i, octet * OCTET), word[0], word[1]);
    }
    if (octet == 0 && first_key % 2 == 0 && first_key < 8) params.k_scales[tile * K_GROUPS + group] = scale.value;
}

DEVICE void encode_v(const PrepareParams& params, const Place& place) {
    __shared__ float inverse[HEAD_DIM];
    __shared__ __align__(16) u32 turned[HEAD_DIM][WORDS];
    /// Of 16 keys each; two channels in a word.
    __shared__ u32 residual[TILE_KEYS / 16][HEAD_DIM / 2];
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    const u32 keys = min(params.kv_len - place.tile * TILE_KEYS, static_cast<u32>(TILE_KEYS));

    // A warp takes 8 octets of the 4 words of 16 keys.
    RawOctet<IN_T> raw[WORD_ROUNDS][4];
#pragma unroll
    for (int round = 0; round < WORD_ROUNDS; ++round) {
        const int part = warp * WORD_ROUNDS + round;
        const int octet = part / 8 * 8 + lane % 8;
        const int pair = part % 8 * 16 + lane / 8 * 2;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const u32 key = pair + i % 2 + i / 2 * 8;
            const i64 row = static_cast<i64>(place.tile) * TILE_KEYS + key;
            raw[round][i] = load_octet<IN_T>(row_address<IN_T>(params.v, params.v_stride, place.batch, place.kv_head, row), octet, params.head_dim, key < keys);
        }
    }
    wait_for_previous_launch();
    if (threadIdx.x < HEAD_DIM) {
        const float amax = join_pieces<LargestMagnitude>(params.v_maxima, params, place);
        const Scale scale = v_scale_from_amax(amax);
        inverse[threadIdx.x] = scale.inverse;
        if (place.tile == 0) params.v_scales[static_cast<u64>(place.head) * HEAD_DIM + threadIdx.x] = scale.value;
    }
    __syncthreads();

    // In `turned`, chunk c of four words of channel d lies at chunk c ^ (d / 8 % 8): the 32 lanes then write to 32 banks.
#pragma unroll
    for (int round = 0; round < WORD_ROUNDS; ++round) {
        const int part = warp * WORD_ROUNDS + round;
        const int octet = part / 8 * 8 + lane % 8;
        const int chunk = part % 8 ^ octet % 8;
        float x[4][OCTET];
#pragma unroll
        for (int i = 0; i < 4; ++i) widen(x[i], raw[round][i]);
        u32 of_channel[OCTET];
#pragma unroll
        for (int e = 0; e < OCTET; ++e) {
            const int channel = octet * OCTET + e;
            const float by = inverse[channel];
#pragma unroll
            for (int i = 0; i < 4; ++i) x[i][e] *= by;
            const u32 word = encode_four_v(x[0][e], x[1][e], x[2][e], x[3][e]);
            turned[channel][chunk * 4 + lane / 8] = word;
            if constexpr (V_RESIDUALS) of_channel[e] = residual_of_word(x[0][e], x[1][e], x[2][e], x[3][e], word);
        }
        if constexpr (V_RESIDUALS) {
#pragma unroll
            for (int pair = 0; pair < OCTET / 2; ++pair) {
                u32 sum = join_halves(of_channel[2 * pair], of_channel[2 * pair + 1]);
                // The four lanes that have the other words of these 16 keys.
                sum = add_f16x2(sum, __shfl_xor_sync(~0u, sum, 8));
                sum = add_f16x2(sum, __shfl_xor_sync(~0u, sum, 16));
                if (lane < 8) residual[part % 8][octet * OCTET / 2 + pair] = sum;
            }
        }
    }
    __syncthreads();

    const u64 of_all = static_cast<u64>(place.head) * params.tiles + place.tile;
    if (V_RESIDUALS && threadIdx.x < HEAD_DIM / 2) {
        float total[2] = {0.f, 0.f};
#pragma unroll
        for (int i = 0; i < TILE_KEYS / 16; ++i) {
            float x[2];
            unpack_f16(residual[i][threadIdx.x], x[0], x[1]);
            total[0] += x[0];
            total[1] += x[1];
        }
        store_8_bytes(params.v_residuals + of_all * HEAD_DIM + 2 * threadIdx.x, __float_as_uint(total[0]), __float_as_uint(total[1]));
    }
    u8* const codes = params.v_codes + of_all * TILE_BYTES;
#pragma unroll
    for (int at = threadIdx.x; at < HEAD_DIM * 8; at += THREADS) {
        const int channel = at / 8;
        const int chunk = at % 8;
        u32 word[4];
        load_shared_16_bytes(word, shared_address(&turned[channel][(chunk ^ channel / OCTET % 8) * 4]));
        store_16_bytes(codes + swizzled<HEAD_DIM, TILE_KEYS>(row_of_channel(channel), chunk * 16), word[0], word[1], word[2], word[3]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) kv_encode(const __grid_constant__ PrepareParams params) {
    allow_next_launch();
    Place place;
    const u32 block = blockIdx.x / 2;
    place.tile = block % params.tiles;
    // Last head first: what kv_statistics read last is still in the cache, and so is for the attention kernel what is written last.
    place.head = gridDim.x / 2 / params.tiles - 1 - block / params.tiles;
    place.batch = place.head / params.kv_heads;
    place.kv_head = place.head % params.kv_heads;
    if (blockIdx.x == 0 && threadIdx.x == 0) *params.next_work = 0;
    if (blockIdx.x % 2) {
        encode_v(params, place);
    } else {
        encode_k(params, place);
    }
}
