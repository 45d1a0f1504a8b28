//! The attention launch that does not quantize, on Hopper: host twin of `sm90/attn_half.cu`.

use sageattn_core::{Divisor, Error, KeyOrder, Reference, Rounding};
use sageattn_kernels::abi::{HalfParams, WARPGROUP_ROWS};

use crate::buffer::Tensor;
use crate::launch::Launch;
use crate::plan::half::HalfChoice;
use crate::tensor_map;
use crate::variant::Half;

const WARPGROUP_THREADS: u32 = 128;
/// Full and empty barrier of a stage of one ring, in bytes.
const STAGE_BARRIERS: u32 = 16;
const ELEMENT: u32 = 2;

/// Sum of a thread's P of one row and tile up to which its reference stays: `attn/softmax_half.cuh`.
pub(crate) const SAFE_SUM: f32 = 4096.0;

/// How the kernel rounds P: `attn/softmax_half.cuh`.
pub(crate) fn rounding(variant: &Half) -> Rounding {
    Rounding {
        key_tile: variant.tile.keys as usize,
        key_order: KeyOrder::Ascending,
        reference: Reference::Sum {
            start: 0.0,
            limit: SAFE_SUM,
        },
        divisor: Divisor::UnroundedP,
    }
}

/// Rows of Q in one block.
pub(crate) const fn rows(variant: &Half) -> u32 {
    variant.tile.consumers * WARPGROUP_ROWS
}

/// Dynamic shared memory of a block: slots of Q, stages of K and of V, and the barriers of three rings.
pub(crate) const fn shared_bytes(variant: &Half) -> u32 {
    let row = ELEMENT * variant.width;
    let tile = &variant.tile;
    let stages = tile.k_stages + tile.v_stages;
    tile.q_slots * rows(variant) * row
        + stages * tile.keys * row
        + (tile.q_slots + stages) * STAGE_BARRIERS
}

/// Threads of a block: the consumers, and one more warpgroup for the producers.
pub(crate) const fn threads(variant: &Half) -> u32 {
    (variant.tile.consumers + 1) * WARPGROUP_THREADS
}

/// The whole call: attention of Q over K and V as they lie in memory. `lse` is the address of the
/// log-sum-exp, where it is asked for.
pub(crate) fn attend(
    choice: &HalfChoice,
    [q, k, v]: [Tensor; 3],
    o: Tensor,
    lse: Option<u64>,
) -> Result<Launch<HalfParams>, Error> {
    let variant = &choice.variant;
    let map = |name, tensor: &Tensor, heads, len, rows| {
        let shape = [choice.batch, heads, len, choice.head_dim];
        tensor_map::encode(name, tensor, shape, variant.dtype, rows)
    };
    Ok(Launch {
        // Each walks a fixed sequence of items.
        grid: choice.items.min(choice.multiprocessors),
        block: threads(variant),
        cluster: 1,
        shared: shared_bytes(variant),
        // What ran before may have written the tensors: the kernel reads them at once.
        overlaps_previous: false,
        params: HalfParams {
            q_map: map("q", &q, choice.q_heads, choice.q_len, rows(variant))?,
            k_map: map("k", &k, choice.kv_heads, choice.kv_len, variant.tile.keys)?,
            v_map: map("v", &v, choice.kv_heads, choice.kv_len, variant.tile.keys)?,
            o: o.address,
            lse: lse.unwrap_or(0),
            o_stride: o.strides,
            diagonal: choice.diagonal,
            heads: choice.batch * choice.q_heads,
            q_heads: choice.q_heads,
            q_heads_per_kv_head: choice.q_heads / choice.kv_heads,
            q_len: choice.q_len,
            kv_len: choice.kv_len,
            head_dim: choice.head_dim,
            row_blocks: choice.row_blocks,
            items: choice.items,
            softmax_scale: choice.softmax_scale,
            reserved: [0; 11],
        },
    })
}
