//! The attention launch on Hopper: host twin of `sm90/attn_i8_f8.cu`.

use sageattn_core::{Divisor, KeyOrder, Reference, Rounding};
use sageattn_kernels::abi::{AttnParams, K_GROUPS, TILE_KEYS, WARPGROUP_ROWS};

use crate::buffer::Tensor;
use crate::launch::Launch;
use crate::plan::{Choice, Ranges};
use crate::variant::Attend;

const WARPGROUP_THREADS: u32 = 128;
/// Full and empty barrier of a stage of one ring, in bytes.
const STAGE_BARRIERS: u32 = 16;
/// Works that the producer has drawn and the consumers not yet finished.
const WORK_SLOTS: u32 = 4;
const WORK_BYTES: u32 = 16;
/// Eight channels of ones for 32 keys.
const ONES_BYTES: u32 = 8 * 32;

/// How the kernel rounds P: `attn/softmax.cuh`.
pub(crate) const fn rounding(variant: &Attend) -> Rounding {
    Rounding {
        key_tile: TILE_KEYS as usize,
        key_order: KeyOrder::Ascending,
        reference: if variant.running_max {
            Reference::Maximum { stale: 0.0 }
        } else {
            // P_START_LOG2 and SAFE_SUM.
            Reference::Sum {
                start: 3.0,
                limit: 448.0,
            }
        },
        divisor: if variant.running_max {
            Divisor::RoundedP
        } else {
            Divisor::UnroundedP
        },
    }
}

/// Dynamic shared memory of a block: for each warpgroup Q, V's residuals and their two barriers, then stages
/// of K, V, K's scales and two barriers, ones, then the works, their barriers and V's scales for each.
pub(crate) const fn shared_bytes(variant: &Attend) -> u32 {
    let residuals = 4 * variant.width;
    let warpgroup = WARPGROUP_ROWS * variant.width + residuals + STAGE_BARRIERS;
    let tile = TILE_KEYS * variant.width;
    let k_scales = K_GROUPS * 4;
    let v_scales = 4 * variant.width;
    let stage = 2 * tile + k_scales + STAGE_BARRIERS;
    let work = STAGE_BARRIERS + WORK_BYTES + v_scales;
    variant.consumers * warpgroup + variant.stages * stage + ONES_BYTES + WORK_SLOTS * work
}

/// Threads of a block: the consumers, and one more warpgroup for the producer.
pub(crate) const fn threads(variant: &Attend) -> u32 {
    (variant.consumers + 1) * WARPGROUP_THREADS
}

/// Attention of Q over the codes of K and V. `scratch` is the address of the workspace, `lse` that of
/// the log-sum-exp, where it is asked for.
pub(crate) fn attend(
    choice: &Choice,
    ranges: &Ranges,
    scratch: u64,
    q: Tensor,
    o: Tensor,
    lse: Option<u64>,
) -> Launch<AttnParams> {
    let variant = &choice.attend;
    let at = |offset: u64| scratch + offset;
    Launch {
        // Each draws works until none is left.
        grid: choice.works.min(choice.multiprocessors),
        block: threads(variant),
        cluster: 1,
        shared: shared_bytes(variant),
        overlaps_previous: choice.overlap,
        params: AttnParams {
            q: q.address,
            o: o.address,
            lse: lse.unwrap_or(0),
            k_codes: at(ranges.k_codes),
            v_codes: at(ranges.v_codes),
            k_scales: at(ranges.k_scales),
            v_scales: at(ranges.v_scales),
            v_residuals: at(ranges.v_residuals),
            k_mean: at(ranges.k_mean),
            q_stride: q.strides,
            o_stride: o.strides,
            batch: choice.batch,
            q_heads: choice.q_heads,
            q_heads_per_kv_head: choice.q_heads / choice.kv_heads,
            q_len: choice.q_len,
            kv_len: choice.kv_len,
            head_dim: choice.head_dim,
            tiles: choice.tiles,
            row_blocks: choice.row_blocks,
            heads_together: choice.heads_together,
            softmax_scale: choice.softmax_scale,
            diagonal: choice.diagonal,
            next_work: at(ranges.next_work),
        },
    }
}
