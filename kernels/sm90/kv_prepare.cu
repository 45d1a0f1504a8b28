// The preparation in one launch: K to INT8 and V to transposed e4m3 or INT8 (quant/v_codes.cuh), each read from memory once.
//
//   K codes = round((k - mean) / scale of its group), groups (key / 128) * 4 + key % 8 / 2     SageAttention2 (2411.10958), equation 8
//   V codes = round(v / scale of its channel)                                                  same, section 3.2
//   V residuals = sum over each tile's keys of v / scale - code                                docs/numerics.md
//
// Mean and channel scales need all keys of a head before the first code. A cluster of blocks therefore keeps a head's K (or V) in its shared
// memory: what comes in is added up (K) or searched for its largest magnitudes (V), the blocks exchange their partial results, and the codes are
// made from shared memory.
//
// Problem   k, v: [batch, kv_heads, kv_len, head_dim] of IN_T, strided; a job is K or V of one head.
// Grid      clusters of `pieces` blocks of THREADS threads, at most one for each job. With fewer a cluster takes jobs one after the other, contiguous
//           ones, so that K and V alternate.
// Tiles     a block has `tiles_per_piece` tiles of 128 keys of each job. They pass through a ring of SLOTS tiles in shared memory: as a tile is
//           encoded, a tile of the next job takes its place, so that memory does not wait for arithmetic.
// Longer    a block with more than SLOTS tiles sends all through the ring for the statistics, keeps the last SLOTS and reads the others again:
//           from L2 as long as all that is under way fits there.
// In a slot 16-byte chunk c of key n lies at chunk c ^ x(n) (`mixed`): neither eight chunks of a key nor one chunk of the eight keys that a V
//           word's lanes read meet in a bank.
// Constants HEAD_DIM 64, 128, 256; IN_T F16, Bf16, F32; SMOOTH, INT8_PV 0, 1; SLOTS; BLOCKS of a multiprocessor, which share its memory and registers.
#include "abi.cuh"
#include "attn/scales.cuh"
#include "ptx/async_copy.cuh"
#include "ptx/cluster.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/sync.cuh"
#include "quant/residual.cuh"
#include "quant/v_codes.cuh"
#include "tile/elements.cuh"
#include "tile/swizzle.cuh"

constexpr int THREADS = HEAD_DIM == 256 ? 512 : 256;
constexpr int OCTETS = HEAD_DIM / OCTET;
constexpr u32 CODE_BYTES = TILE_KEYS * HEAD_DIM;

/// A thread loads, adds up and (of K) encodes one octet of every KEY_STEPth key.
constexpr int KEY_STEP = THREADS / OCTETS;
constexpr int KEYS = TILE_KEYS / KEY_STEP;
static_assert(KEY_STEP % 8 == 0, "a thread's keys share their scale group");
constexpr int CHUNKS = IN_T::bytes / 2;
constexpr u32 ROW_BYTES = HEAD_DIM * IN_T::bytes;
constexpr u32 SLOT_BYTES = TILE_KEYS * ROW_BYTES;

/// Octets of V that a warp encodes, all 128 keys of each: a lane has the four keys of one word.
constexpr int V_OCTETS = OCTETS * 32 / THREADS;

constexpr int WARPS = THREADS / 32;
/// Rows of partial results in a block: one a warp.
using PartialRows = float[WARPS][HEAD_DIM];

/// Behind the slots in dynamic shared memory.
struct Shared {
    PartialRows partial;
    /// From each block of the cluster, its result for the channels that this block finishes.
    float gathered[HEAD_DIM];
    /// From each block, what it finished: mean of K, or inverse scale of V.
    float of_head[HEAD_DIM];
    /// Largest magnitudes of a tile's groups as bits; three in turn, one to fill, one to read, one to clear.
    u32 group_amax[3][K_GROUPS];
    /// `gathered` and `of_head` are complete.
    u64 all_gathered;
    u64 head_ready;
    /// Tile of slot i has landed.
    u64 full[SLOTS];
};
constexpr u32 SHARED_BYTES = SLOTS * SLOT_BYTES + sizeof(Shared);

/// Offset of a 16-byte chunk of a key in its slot.
DEVICE u32 chunk_offset(u32 key, u32 chunk) {
    const u32 mixed = key / 2 % 4 | key / 16 % 2 * 4;
    return key * ROW_BYTES + (chunk ^ mixed) * 16;
}

/// K or V of one head.
struct Job {
    bool is_v;
    u32 head;

    /// Last head first: the attention kernel then finds in the cache what it begins with.
    DEVICE Job(const PrepareParams& params, u32 index) : is_v(index % 2), head(params.heads - 1 - index / 2) {}

    /// Whether every tile must be seen before the first is encoded.
    DEVICE bool two_passes(const PrepareParams& params) const {
        return is_v || (SMOOTH && params.samples == params.kv_len);
    }
    DEVICE const u8* row(const PrepareParams& params, i64 row) const {
        return row_address<IN_T>(is_v ? params.v : params.k, is_v ? params.v_stride : params.k_stride, head / params.kv_heads, head % params.kv_heads, row);
    }
    /// Bytes from a row to the next.
    DEVICE i64 row_step(const PrepareParams& params) const {
        return (is_v ? params.v_stride : params.k_stride)[2] * IN_T::bytes;
    }
};

/// The tiles of every job that are this block's.
struct Share {
    u32 first_tile;
    u32 tiles;
};

/// Octet and first key of this thread.
struct Place {
    u32 octet = threadIdx.x % OCTETS;
    u32 first_key = threadIdx.x / OCTETS;
};

/// The sequence of tiles that pass through the ring: of each job all of this block's tiles, then those that must be read again. Position p of it
/// takes slot p % SLOTS.
struct Loader {
    u32 job;
    u32 last_job;
    /// Position of the next tile, and its number in the job, counted on through the second pass.
    u32 position = 0;
    u32 index = 0;
    /// Tiles to read again.
    u32 again = 0;
    /// This thread's octet of its first key of that tile, and bytes from a key to the next.
    const u8* from = nullptr;
    i64 step = 0;

    DEVICE void begin_job(const PrepareParams& params, const Share& share) {
        const Job of(params, job);
        const Place place;
        index = 0;
        again = of.two_passes(params) && share.tiles > SLOTS ? share.tiles - SLOTS : 0;
        step = of.row_step(params);
        from = of.row(params, static_cast<i64>(share.first_tile) * TILE_KEYS + place.first_key) + place.octet * OCTET * IN_T::bytes;
    }
    /// Starts what the ring has room for, given that all positions below `freed` have been used.
    DEVICE void advance(const PrepareParams& params, const Share& share, u32 slots, u32 barriers, u32 freed) {
        const Place place;
        while (position < freed + SLOTS && job < last_job) {
            if (index == share.tiles) from -= static_cast<i64>(share.tiles) * TILE_KEYS * step;
            const u32 tile = share.first_tile + (index < share.tiles ? index : index - share.tiles);
            const u32 keys = params.kv_len - tile * TILE_KEYS;
            const u32 slot = position % SLOTS;
#pragma unroll
            for (int i = 0; i < KEYS; ++i) {
                const u32 key = place.first_key + KEY_STEP * i;
#pragma unroll
                for (int c = 0; c < CHUNKS; ++c) {
                    const int channel = place.octet * OCTET + c * 16 / IN_T::bytes;
                    const int bytes = max(0, min(16, (static_cast<int>(params.head_dim) - channel) * IN_T::bytes));
                    copy_16_bytes_async(slots + slot * SLOT_BYTES + chunk_offset(key, place.octet * CHUNKS + c), from + 16 * c, key < keys ? bytes : 0);
                }
                from += KEY_STEP * step;
            }
            arrive_when_copied(barriers + 8 * slot);
            ++position;
            if (++index == share.tiles + again && ++job < last_job) begin_job(params, share);
        }
    }
};

/// An octet of one key as it is in memory.
DEVICE RawOctet<IN_T> read_octet(u32 slot, u32 key, u32 octet) {
    RawOctet<IN_T> raw;
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) load_shared_16_bytes(raw.word[c], slot + chunk_offset(key, octet * CHUNKS + c));
    return raw;
}

struct SumOfKeys {
    float total[OCTET] = {};

    DEVICE void add(const RawOctet<IN_T>& raw) {
        float x[OCTET];
        widen(x, raw);
#pragma unroll
        for (int e = 0; e < OCTET; ++e) total[e] += x[e];
    }
    DEVICE void result(float (&x)[OCTET]) const {
#pragma unroll
        for (int e = 0; e < OCTET; ++e) x[e] = total[e];
    }
    DEVICE static float join(float a, float b) {
        return a + b;
    }
};

/// Magnitudes are ordered as their bits are: no conversion before the end.
struct LargestOfKeys {
    RawOctet<IN_T> largest = {};

    DEVICE void add(const RawOctet<IN_T>& raw) {
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
#pragma unroll
            for (int i = 0; i < 4; ++i) largest.word[c][i] = larger_magnitudes(IN_T{}, largest.word[c][i], raw.word[c][i]);
        }
    }
    DEVICE void result(float (&x)[OCTET]) const {
        widen(x, largest);
    }
    DEVICE static float join(float a, float b) {
        return fmaxf(a, b);
    }
};

/// Joins the threads' octets to one row of the block: lanes of one octet first, then the warps, each in order. The channel's value for threads below
/// HEAD_DIM.
template <class Statistic>
DEVICE float join_block(Shared& shared, const Statistic& statistic) {
    float x[OCTET];
    statistic.result(x);
#pragma unroll
    for (int distance = OCTETS; distance < 32; distance *= 2) {
#pragma unroll
        for (int e = 0; e < OCTET; ++e) x[e] = Statistic::join(x[e], __shfl_xor_sync(~0u, x[e], distance));
    }
    const int lane = threadIdx.x % 32;
    if (lane < OCTETS) {
#pragma unroll
        for (int e = 0; e < OCTET; ++e) shared.partial[threadIdx.x / 32][lane % OCTETS * OCTET + e] = x[e];
    }
    __syncthreads();
    if (threadIdx.x >= HEAD_DIM) return 0.f;
    float joined = shared.partial[0][threadIdx.x];
#pragma unroll
    for (int warp = 1; warp < WARPS; ++warp) joined = Statistic::join(joined, shared.partial[warp][threadIdx.x]);
    return joined;
}

DEVICE void encode_k(const PrepareParams& params, Shared& shared, u32 slot, const Job& job, u32 tile, u32 round) {
    const Place place;
    const u32 keys = min(params.kv_len - tile * TILE_KEYS, static_cast<u32>(TILE_KEYS));
    float mean[OCTET];
#pragma unroll
    for (int e = 0; e < OCTET; ++e) mean[e] = shared.of_head[place.octet * OCTET + e];
    float x[KEYS][OCTET];
    float amax = 0.f;
#pragma unroll
    for (int i = 0; i < KEYS; ++i) {
        const u32 key = place.first_key + KEY_STEP * i;
        widen(x[i], read_octet(slot, key, place.octet));
#pragma unroll
        for (int e = 0; e < OCTET; ++e) {
            x[i][e] = key < keys ? x[i][e] - mean[e] : 0.f;
            amax = fmaxf(amax, fabsf(x[i][e]));
        }
    }
    // A warp's lanes have keys of one group, or of two: lanes of the lower and of the upper half.
    const u32 group = place.first_key % 8 / 2;
    u32(&group_amax)[K_GROUPS] = shared.group_amax[round % 3];
    if constexpr (OCTETS >= 16) {
        const u32 largest = warp_max(__float_as_uint(amax));
        if (threadIdx.x % 32 == 0) shared_max(shared_address(&group_amax[group]), largest);
    } else {
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            const u32 largest = warp_max(threadIdx.x % 32 / 16 == half ? __float_as_uint(amax) : 0);
            if (threadIdx.x % 32 == half * 16) shared_max(shared_address(&group_amax[group]), largest);
        }
    }
    __syncthreads();

    const Scale scale = scale_from_amax(__uint_as_float(group_amax[group]), LARGEST_S8);
    // Its readers have passed the barrier above; it is filled again after the next one.
    if (threadIdx.x < K_GROUPS) shared.group_amax[(round + 2) % 3][threadIdx.x] = 0;
    const u64 of_all = static_cast<u64>(job.head) * params.tiles + tile;
    u8* const codes = params.k_codes + of_all * CODE_BYTES;
#pragma unroll
    for (int i = 0; i < KEYS; ++i) {
        u32 word[2];
        encode_s8(word, x[i], scale.inverse);
        store_8_bytes(codes + swizzled<TILE_KEYS, HEAD_DIM>(place.first_key + KEY_STEP * i, place.octet * OCTET), word[0], word[1]);
    }
    if (place.octet == 0 && place.first_key % 2 == 0 && place.first_key < 8) params.k_scales[of_all * K_GROUPS + group] = scale.value;
}

/// Within each 16 keys the order is 0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15: the four neighbours that the PV GEMM takes from one register are then the
/// keys that the same thread holds in the fragment of S (attn/softmax.cuh). A lane has word `lane` of a channel's 32.
DEVICE void encode_v(const PrepareParams& params, const Shared& shared, u32 slot, const Job& job, u32 tile) {
    const u32 lane = threadIdx.x % 32;
    const u32 first_key = lane / 4 * 16 + lane % 4 * 2;
    RawOctet<IN_T> raw[V_OCTETS][4];
#pragma unroll
    for (int part = 0; part < V_OCTETS; ++part) {
#pragma unroll
        for (u32 i = 0; i < 4; ++i) raw[part][i] = read_octet(slot, first_key + i % 2 + i / 2 * 8, threadIdx.x / 32 * V_OCTETS + part);
    }
    __syncthreads();

    const u64 of_all = static_cast<u64>(job.head) * params.tiles + tile;
    u8* const codes = params.v_codes + of_all * CODE_BYTES;
    // Of neighbouring channels in one word.
    u32 residual[V_OCTETS * OCTET / 2];
#pragma unroll
    for (int part = 0; part < V_OCTETS; ++part) {
        const u32 octet = threadIdx.x / 32 * V_OCTETS + part;
        u32 of_channel[OCTET];
        float x[4][OCTET];
#pragma unroll
        for (int i = 0; i < 4; ++i) widen(x[i], raw[part][i]);
#pragma unroll
        for (u32 e = 0; e < OCTET; ++e) {
            const float by = shared.of_head[octet * OCTET + e];
#pragma unroll
            for (int i = 0; i < 4; ++i) x[i][e] *= by;
            const u32 word = encode_four_v(x[0][e], x[1][e], x[2][e], x[3][e]);
            store_4_bytes(codes + swizzled<HEAD_DIM, TILE_KEYS>(row_of_channel(octet * OCTET + e), lane * 4), word);
            if constexpr (V_RESIDUALS) of_channel[e] = residual_of_word(x[0][e], x[1][e], x[2][e], x[3][e], word);
        }
        if constexpr (V_RESIDUALS) {
#pragma unroll
            for (int pair = 0; pair < OCTET / 2; ++pair) residual[part * OCTET / 2 + pair] = join_halves(of_channel[2 * pair], of_channel[2 * pair + 1]);
        }
    }
    if constexpr (!V_RESIDUALS) return;
    constexpr u32 PAIRS = V_OCTETS * OCTET / 2, SHARERS = 32 / PAIRS;
    float sum[2];
    unpack_f16(sum_over_warp(residual), sum[0], sum[1]);
    float* const to = params.v_residuals + of_all * HEAD_DIM + threadIdx.x / 32 * V_OCTETS * OCTET + lane / SHARERS * 2;
    if (lane % SHARERS == 0) store_8_bytes(to, __float_as_uint(sum[0]), __float_as_uint(sum[1]));
}

/// A block's way through its jobs.
struct Block {
    const PrepareParams& params;
    Shared& shared;
    u32 slots;
    Share share;
    Loader loader;
    /// First position of the job.
    u32 position = 0;
    /// Tiles of K encoded so far.
    u32 round = 0;

    DEVICE u32 slot(u32 at) const {
        return slots + at % SLOTS * SLOT_BYTES;
    }
    DEVICE void wait(u32 at) const {
        mbarrier_wait(shared_address(&shared.full[at % SLOTS]), at / SLOTS % 2);
    }
    DEVICE void free_below(u32 at) {
        loader.advance(params, share, slots, shared_address(shared.full), at);
    }

    /// Sends the job's tiles past the threads, each of which looks at what it has loaded itself; those that are not kept make room for others.
    template <class Statistic>
    DEVICE void collect(Statistic& statistic) {
        const Place place;
        for (u32 i = 0; i < share.tiles; ++i) {
            wait(position + i);
#pragma unroll
            for (int k = 0; k < KEYS; ++k) statistic.add(read_octet(slot(position + i), place.first_key + KEY_STEP * k, place.octet));
            if (i + SLOTS < share.tiles) free_below(position + i + 1);
        }
    }

    /// The sampled keys, straight from memory: this block's share of them.
    DEVICE void collect_samples(SumOfKeys& statistic, const Job& job, u32 rank) {
        const Place place;
        const u32 each = (params.samples + params.pieces - 1) / params.pieces;
        const u32 first = min(params.samples, rank * each);
        const u32 end = min(params.samples, first + each);
        for (u32 i = first + place.first_key; i < end; i += KEY_STEP) {
            const i64 key = static_cast<i64>(static_cast<u64>(i) * params.kv_len / params.samples);
            statistic.add(load_octet<IN_T>(job.row(params, key), place.octet, params.head_dim, true));
        }
    }

    /// From the threads' statistics to `of_head`. Each block finishes the channels of its rank: it is given all blocks' results, joins them in order
    /// and gives every block what `finish` makes of that.
    template <class Statistic, class Finish>
    DEVICE void exchange(const Statistic& statistic, u32 rank, u32 parity, Finish finish) {
        const u32 gathered = shared_address(shared.gathered);
        const u32 of_head = shared_address(shared.of_head);
        const u32 all_gathered = shared_address(&shared.all_gathered);
        const u32 head_ready = shared_address(&shared.head_ready);
        const u32 channels = HEAD_DIM / params.pieces;
        const u32 part = threadIdx.x / channels;
        const u32 within = threadIdx.x % channels;
        // After this every thread has read the last job's `of_head`, so that others may send the next.
        const float joined = join_block(shared, statistic);
        if (params.pieces == 1) {
            // Without a cluster there is no storing into one: an illegal instruction.
            if (threadIdx.x < HEAD_DIM) shared.of_head[threadIdx.x] = finish(joined, threadIdx.x, true);
            __syncthreads();
            return;
        }
        if (threadIdx.x < HEAD_DIM) {
            store_to_block(shared_address_of(part, gathered + 4 * (rank * channels + within)), joined, shared_address_of(part, all_gathered));
            if (threadIdx.x == 0) {
                mbarrier_expect(all_gathered, 4 * HEAD_DIM);
                mbarrier_arrive(all_gathered);
                mbarrier_expect(head_ready, 4 * HEAD_DIM);
                mbarrier_arrive(head_ready);
            }
            mbarrier_wait(all_gathered, parity);
            float total = 0.f;
            for (u32 block = 0; block < params.pieces; ++block) total = Statistic::join(total, shared.gathered[block * channels + within]);
            const u32 channel = rank * channels + within;
            store_to_block(shared_address_of(part, of_head + 4 * channel), finish(total, channel, part == 0), shared_address_of(part, head_ready));
        }
        mbarrier_wait(head_ready, parity);
    }

    DEVICE void run(u32 index, u32 rank, u32 parity) {
        const Job job(params, index);
        const u64 row = static_cast<u64>(job.head) * HEAD_DIM;
        const bool two_passes = job.two_passes(params);
        if (job.is_v) {
            LargestOfKeys statistic;
            collect(statistic);
            exchange(statistic, rank, parity, [&](float amax, u32 channel, bool writes) {
                const Scale scale = v_scale_from_amax(amax);
                if (writes) params.v_scales[row + channel] = scale.value;
                return scale.inverse;
            });
        } else {
            SumOfKeys statistic;
            if constexpr (SMOOTH) {
                if (two_passes) {
                    collect(statistic);
                } else {
                    collect_samples(statistic, job, rank);
                }
            }
            exchange(statistic, rank, parity, [&](float sum, u32 channel, bool writes) {
                const float mean = SMOOTH ? __fdiv_rn(sum, static_cast<float>(params.samples)) : 0.f;
                if (writes) params.k_mean[row + channel] = mean;
                return mean;
            });
        }

        const u32 again = two_passes && share.tiles > SLOTS ? share.tiles - SLOTS : 0;
        for (u32 i = 0; i < share.tiles; ++i) {
            // The kept ones first.
            const u32 at = position + again + i;
            const u32 tile = share.first_tile + (again + i) % share.tiles;
            wait(at);
            if (job.is_v) {
                encode_v(params, shared, slot(at), job, tile);
            } else {
                encode_k(params, shared, slot(at), job, tile, round++);
            }
            free_below(at + 1);
        }
        position += again + share.tiles;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) kv_prepare_sm90(const __grid_constant__ PrepareParams params) {
    extern __shared__ __align__(128) u8 dynamic[];
    Shared& shared = *reinterpret_cast<Shared*>(dynamic + SLOTS * SLOT_BYTES);
    allow_next_launch();
    const u32 rank = cluster_rank();
    const u32 cluster = blockIdx.x / params.pieces;
    const u32 clusters = gridDim.x / params.pieces;
    if (blockIdx.x == 0 && threadIdx.x == 0) *params.next_work = 0;
    if (threadIdx.x == 0) {
        for (u32 i = 0; i < SLOTS; ++i) mbarrier_init(shared_address(&shared.full[i]), THREADS);
        mbarrier_init(shared_address(&shared.all_gathered), 1);
        mbarrier_init(shared_address(&shared.head_ready), 1);
        mbarrier_init_fence();
    }
    if (threadIdx.x < 3 * K_GROUPS) shared.group_amax[threadIdx.x / K_GROUPS][threadIdx.x % K_GROUPS] = 0;
    __syncthreads();
    if (params.pieces > 1) cluster_arrive();

    const u32 jobs = 2 * params.heads;
    const u32 each = (jobs + clusters - 1) / clusters;
    const u32 first = min(jobs, cluster * each);
    const u32 last = min(jobs, first + each);
    const u32 first_tile = min(params.tiles, rank * params.tiles_per_piece);
    const Share share{first_tile, min(params.tiles - first_tile, params.tiles_per_piece)};
    Block block{params, shared, shared_address(dynamic), share, Loader{share.tiles == 0 ? last : first, last}};
    if (block.loader.job < last) block.loader.begin_job(params, share);
    block.free_below(0);
    // Barriers of all blocks are ready.
    if (params.pieces > 1) cluster_wait();
    for (u32 job = first; job < last; ++job) block.run(job, rank, (job - first) % 2);
}
