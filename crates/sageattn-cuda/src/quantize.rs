//! The launches that quantize K and V: host twin of `quant/kv_statistics.cu` and `quant/kv_encode.cu`,
//! or of `sm90/kv_prepare.cu`.

use sageattn_core::DType;
use sageattn_kernels::abi::{K_GROUPS, PrepareParams, TILE_KEYS};

use crate::buffer::Tensor;
use crate::launch::Launch;
use crate::plan::{Choice, Ranges};
use crate::variant::{Prepare, PrepareOnce};

/// Threads of a block of `kv_statistics`.
pub(crate) const STATISTICS_THREADS: u32 = 256;
/// Half of the blocks take K, half V.
const K_AND_V: u32 = 2;

/// Threads of a block of `kv_encode`.
pub(crate) const fn encode_threads(variant: &Prepare) -> u32 {
    2 * variant.width
}

/// Threads of a block of `kv_prepare_sm90`.
pub(crate) const fn once_threads(variant: &PrepareOnce) -> u32 {
    // A thread encodes an octet of each of four (width 64) or eight keys of a tile at a time.
    match variant.width {
        256 => 512,
        _ => 256,
    }
}

/// A tile of K or V in shared memory, as it comes.
pub(crate) const fn tile_bytes(width: u32, dtype: DType) -> u32 {
    #[expect(clippy::cast_possible_truncation, reason = "2 or 4")]
    let element = dtype.size() as u32;
    TILE_KEYS * width * element
}

/// Dynamic shared memory of a block of `kv_prepare_sm90`: tiles, then a row of statistics for each warp,
/// two rows from the other blocks, largest magnitudes of three tiles' groups, and barriers.
pub(crate) const fn once_shared_bytes(variant: &PrepareOnce) -> u32 {
    let tile = tile_bytes(variant.width, variant.dtype);
    let rows = once_threads(variant) / 32 + 2;
    variant.slots * tile + rows * variant.width * 4 + 3 * K_GROUPS * 4 + 8 * (variant.slots + 2)
}

/// What all of them are told. `scratch` is the address of the workspace.
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
        v_residuals: at(ranges.v_residuals),
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
        heads: choice.batch * choice.kv_heads,
        next_work: at(ranges.next_work),
    }
}

/// Sums of K and largest magnitudes of V, piece by piece.
pub(crate) fn statistics(choice: &Choice, params: PrepareParams) -> Launch<PrepareParams> {
    Launch {
        grid: choice.batch * choice.kv_heads * choice.pieces * K_AND_V,
        block: STATISTICS_THREADS,
        cluster: 1,
        shared: 0,
        // What ran before may have written K and V: the kernel reads them at once.
        overlaps_previous: false,
        params,
    }
}

/// K and V to tiles of codes.
pub(crate) fn encode(
    choice: &Choice,
    variant: &Prepare,
    params: PrepareParams,
) -> Launch<PrepareParams> {
    Launch {
        grid: choice.batch * choice.kv_heads * choice.tiles * K_AND_V,
        block: encode_threads(variant),
        cluster: 1,
        shared: 0,
        overlaps_previous: choice.overlap,
        params,
    }
}

/// K and V to tiles of codes in one launch.
pub(crate) fn once(
    choice: &Choice,
    variant: &PrepareOnce,
    clusters: u32,
    params: PrepareParams,
) -> Launch<PrepareParams> {
    Launch {
        grid: clusters * choice.pieces,
        block: once_threads(variant),
        cluster: choice.pieces,
        shared: once_shared_bytes(variant),
        // What ran before may have written K and V: the kernel reads them at once.
        overlaps_previous: false,
        params,
    }
}
