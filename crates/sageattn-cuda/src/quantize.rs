//! The two launches that quantize K and V: host twin of `quant/kv_statistics.cu` and
//! `quant/kv_encode.cu`.

use sageattn_kernels::abi::PrepareParams;

use crate::buffer::Tensor;
use crate::launch::Launch;
use crate::plan::{Choice, Ranges};
use crate::variant::Prepare;

/// Threads of a block of `kv_statistics`.
pub(crate) const STATISTICS_THREADS: u32 = 256;
/// Half of the blocks take K, half V.
const K_AND_V: u32 = 2;

/// Threads of a block of `kv_encode`.
pub(crate) const fn encode_threads(variant: &Prepare) -> u32 {
    2 * variant.width
}

/// What both kernels are told. `scratch` is the address of the workspace.
pub(crate) fn params(
    choice: &Choice,
    ranges: &Ranges,
    scratch: u64,
    k: Tensor,
    v: Tensor,
) -> PrepareParams {
    let at = |offset: u64| scratch + offset;
    PrepareParams {
        k: k.address,
        v: v.address,
        k_sums: at(ranges.k_sums),
        v_maxima: at(ranges.v_maxima),
        k_mean: at(ranges.k_mean),
        v_scales: at(ranges.v_scales),
        k_scales: at(ranges.k_scales),
        k_codes: at(ranges.k_codes),
        v_codes: at(ranges.v_codes),
        k_stride: k.strides,
        v_stride: v.strides,
        kv_heads: choice.kv_heads,
        kv_len: choice.kv_len,
        head_dim: choice.head_dim,
        tiles: choice.tiles,
        pieces: choice.pieces,
        tiles_per_piece: choice.tiles_per_piece,
        samples: choice.samples,
        reserved: 0,
        next_work: at(ranges.next_work),
    }
}

/// Sums of K and largest magnitudes of V, piece by piece.
pub(crate) fn statistics(choice: &Choice, params: PrepareParams) -> Launch<PrepareParams> {
    Launch {
        grid: choice.batch * choice.kv_heads * choice.pieces * K_AND_V,
        block: STATISTICS_THREADS,
        shared: 0,
        // What ran before may have written K and V: the kernel reads them at once.
        overlaps_previous: false,
        params,
    }
}

/// K and V to tiles of codes.
pub(crate) fn encode(choice: &Choice, params: PrepareParams) -> Launch<PrepareParams> {
    Launch {
        grid: choice.batch * choice.kv_heads * choice.tiles * K_AND_V,
        block: encode_threads(&choice.prepare),
        shared: 0,
        overlaps_previous: choice.overlap,
        params,
    }
}
