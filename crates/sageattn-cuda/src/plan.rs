//! Which kernels, with which tiles, over which scratch.

use sageattn_core::scratch::{Scratch, ScratchType};
use sageattn_core::{Align, DType, Mask, Outputs, Problem, Recipe, Smooth};
use sageattn_kernels::abi::{K_GROUPS, TILE_KEYS, WARPGROUP_ROWS};

use crate::variant::{Attend, Prepare, PvCodes, Variant, WIDTHS};

pub(crate) mod half;
mod prepare;
mod run;

pub(crate) use self::prepare::Preparation;
use self::prepare::{once, preparation};
pub(crate) use self::run::{CudaPlan, Prepared, Stages};

/// Blocks of one launch that CUDA allows in the x dimension.
const MAX_GRID: u64 = (1 << 31) - 1;

/// Channels that a thread loads together.
const OCTET: u32 = 8;

/// What the choice depends on beside problem and recipe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Machine {
    /// Streaming multiprocessors.
    pub(crate) multiprocessors: u32,
    /// A kernel may start before the one ahead of it has ended, also in graphs.
    pub(crate) overlap: bool,
    /// Blocks of the largest cluster that the device places; 0 for none.
    pub(crate) largest_cluster: u32,
    /// How the caller wants row maxima kept; `None` leaves it to [`row_maximum`].
    pub(crate) row_maximum: Option<RowMaximum>,
}

/// How `sage2-i8-f8` keeps a row's maximum, which P is relative to.
///
/// Softmax is exact either way; what differs is the scale at which P is rounded to e4m3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowMaximum {
    /// Follows the scores tile by tile (`FlashAttention`, 2205.14135, section 3.1): the largest weight of
    /// a row is held exactly.
    Running,
    /// Goes stale until P is about to leave e4m3's range. Up to a tenth faster, and 2 to 5 % more error.
    Lazy,
}

impl RowMaximum {
    pub(crate) const NAMED: [(&str, Self); 2] = [("lazy", Self::Lazy), ("running", Self::Running)];
}

/// Few keys: the running maximum is as fast or faster (a row's maximum is still moving), and where few
/// weights dominate a row, as they do in short rows of trained models, holding the largest exactly is worth
/// most. From 1024 keys on the lazy one takes up to a tenth less time on an H100; with V's residuals added
/// back it stays within the recipe's bounds (`docs/kernels/attn_i8_f8_sm90.md`).
const fn row_maximum(kv_len: u32) -> RowMaximum {
    if kv_len < 1024 {
        RowMaximum::Running
    } else {
        RowMaximum::Lazy
    }
}

/// The kernels for one problem and the numbers that their launches follow from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Choice {
    pub(crate) prepare: Preparation,
    pub(crate) attend: Attend,
    pub(crate) batch: u32,
    pub(crate) q_heads: u32,
    pub(crate) kv_heads: u32,
    pub(crate) q_len: u32,
    pub(crate) kv_len: u32,
    pub(crate) head_dim: u32,
    /// Tiles of 128 keys in one head.
    pub(crate) tiles: u32,
    /// Blocks that share the statistics of one head (a cluster, where K and V are read once), and tiles
    /// of each.
    pub(crate) pieces: u32,
    pub(crate) tiles_per_piece: u32,
    /// Keys that the mean is taken over.
    pub(crate) samples: u32,
    /// Blocks of query rows in one head, and in all.
    pub(crate) row_blocks: u32,
    pub(crate) works: u32,
    /// Heads whose blocks are taken in turn, the longest first.
    pub(crate) heads_together: u32,
    pub(crate) multiprocessors: u32,
    pub(crate) softmax_scale: f32,
    /// Row r sees key n when n <= r + diagonal.
    pub(crate) diagonal: i64,
    /// Kernels that wait for their predecessor themselves start early.
    pub(crate) overlap: bool,
}

/// Chooses kernels and tiles, or says what is missing. Pure: tests run it without a GPU.
pub(crate) fn choose(
    problem: &Problem,
    recipe: &Recipe,
    machine: Machine,
) -> Result<Choice, Vec<String>> {
    let shape = problem.shape();
    let mut missing = Vec::new();
    let pv = match recipe.with_smooth(Smooth::Mean) {
        Recipe::SAGE2_I8_F8 => PvCodes::E4m3,
        Recipe::I8_I8_DYN => PvCodes::Int8,
        _ => {
            missing.push(format!(
                "recipe {recipe}: this version has sage2-i8-f8, i8-i8-dyn and half"
            ));
            PvCodes::E4m3
        }
    };
    let (causal, diagonal) = diagonal(problem, &mut missing);

    let head_dim = small(shape.head_dim);
    let width = width(shape.head_dim);
    let cut = !head_dim.is_multiple_of(OCTET);
    let (consumers, stages) = tile(width);

    let (batch, kv_heads) = (small(shape.batch), small(shape.kv_heads));
    let (q_heads, kv_len) = (small(shape.q_heads), small(shape.kv_len));
    let tiles = kv_len.div_ceil(TILE_KEYS);
    let prepare = Prepare {
        width,
        dtype: problem.dtype(),
        smooth: recipe.smooth != Smooth::Off,
        cut,
        pv,
    };
    let (prepare, pieces, tiles_per_piece) = preparation(prepare, batch * kv_heads, tiles, machine);
    let samples = match recipe.smooth {
        Smooth::Sampled(n) => n.get().min(kv_len),
        Smooth::Off | Smooth::Mean => kv_len,
    };
    let row_blocks = small(shape.q_len).div_ceil(consumers * WARPGROUP_ROWS);

    for (what, heads, per_head) in [
        ("keys", batch * kv_heads, 2 * tiles),
        ("queries", batch * q_heads, row_blocks),
    ] {
        let blocks = u64::from(heads) * u64::from(per_head);
        if blocks > MAX_GRID {
            missing.push(format!(
                "{blocks} blocks of {what}: one launch has at most {MAX_GRID}"
            ));
        }
    }
    if !missing.is_empty() {
        return Err(missing);
    }
    Ok(Choice {
        prepare,
        attend: Attend {
            width,
            dtype: problem.dtype(),
            causal,
            lse: problem.outputs() == Outputs::OAndLse,
            cut,
            pv,
            running_max: pv == PvCodes::Int8
                || machine.row_maximum.unwrap_or(row_maximum(kv_len)) == RowMaximum::Running,
            consumers,
            stages,
        },
        batch,
        q_heads,
        kv_heads,
        q_len: small(shape.q_len),
        kv_len,
        head_dim,
        tiles,
        pieces,
        tiles_per_piece,
        samples,
        row_blocks,
        works: batch * q_heads * row_blocks,
        heads_together: if causal {
            let codes = 2 * u64::from(tiles) * u64::from(TILE_KEYS * width);
            heads_together(batch * q_heads, q_heads / kv_heads, codes, machine)
        } else {
            1
        },
        multiprocessors: machine.multiprocessors,
        softmax_scale: problem.softmax_scale(),
        diagonal,
        overlap: machine.overlap,
    })
}

/// Bytes of K and V that stay in an H100's L2 (50 MB, of which a multiprocessor is near one half) while
/// blocks of rows read them in turn. 8 and 32 MiB were as fast, within noise.
const L2_SHARE: u64 = 16 << 20;

/// With a causal mask a head's blocks differ in length by as much as there are blocks. Multiprocessors draw
/// them one by one, and end together if the last ones drawn are short: so the longest of several heads come
/// first, then the next longest. Head by head, the longest block of the last head would be drawn among the
/// last. A list schedule of 128 heads of 1024 keys on 132 multiprocessors ends 8 % above the mean then and
/// 3 % together, 7 and 1 % of 2048 keys, 2 and 0.1 % of 8192.
///
/// More heads than L2 holds would read K and V from memory once for each block. And at least two
/// multiprocessors read each head at a time: with one, 1024 keys took 84 us instead of 75. A last group of
/// fewer heads would end as head by head does: all have the same size.
fn heads_together(
    heads: u32,
    q_heads_per_kv_head: u32,
    bytes_of_kv_head: u64,
    machine: Machine,
) -> u32 {
    let held = (L2_SHARE / bytes_of_kv_head).max(1) * u64::from(q_heads_per_kv_head);
    let read_twice = (machine.multiprocessors / 2).max(1);
    let most = u32::try_from(held).map_or(read_twice, |held| held.min(read_twice));
    heads.div_ceil(heads.div_ceil(most))
}

/// Whether the mask is causal, and the last key that row 0 sees.
fn diagonal(problem: &Problem, missing: &mut Vec<String>) -> (bool, i64) {
    let shape = problem.shape();
    match problem.mask() {
        Mask::None => (false, 0),
        Mask::Causal(Align::TopLeft) => (true, 0),
        Mask::Causal(Align::BottomRight) => {
            let distance = shape.kv_len.cast_signed() - shape.q_len.cast_signed();
            (true, distance as i64)
        }
        mask => {
            missing.push(format!("mask {mask:?}"));
            (false, 0)
        }
    }
}

/// The head dimension that kernels have: zero channels cost time but change nothing.
pub(crate) fn width(head_dim: usize) -> u32 {
    let width = WIDTHS.into_iter().find(|&width| head_dim <= width as usize);
    // head_dim is at most the largest.
    width.unwrap_or(WIDTHS[WIDTHS.len() - 1])
}

/// Consumer warpgroups and stages of the attention kernel. A block has the multiprocessor's 64 Ki
/// registers and 227 KiB of shared memory to itself.
const fn tile(width: u32) -> (u32, u32) {
    match width {
        // Three warpgroups of 160 registers keep the tensor cores busy while two take exponentials; a
        // fourth would leave each too few for S, P and O. Stages of 16 KiB are soon read: six or more of them
        // cover the latency of memory. A power of two is counted with fewer instructions.
        64 => (3, 8),
        // 32 KiB a stage: beyond three, more make no difference.
        128 => (3, 4),
        // O alone takes 128 registers a thread: two warpgroups of 240. 64 KiB a stage: beside Q and V's
        // residuals there is no room for a third, and two are as fast.
        _ => (2, 2),
    }
}

/// A size of a problem: `Problem::new` keeps each, and each product of batch and heads, below 2^31.
fn small(size: usize) -> u32 {
    u32::try_from(size).unwrap_or(u32::MAX)
}

/// Every kernel that a plan can choose.
pub fn variants() -> Vec<Variant> {
    let mut variants = Vec::new();
    for (width, dtype, cut) in WIDTHS.into_iter().flat_map(|width| {
        let dtypes = DType::ALL.into_iter();
        dtypes.flat_map(move |dtype| [false, true].map(|cut| (width, dtype, cut)))
    }) {
        for (smooth, pv) in [false, true]
            .into_iter()
            .flat_map(|smooth| [PvCodes::E4m3, PvCodes::Int8].map(|pv| (smooth, pv)))
        {
            let prepare = Prepare {
                width,
                dtype,
                smooth,
                cut,
                pv,
            };
            variants.push(Variant::Encode(prepare));
            if pv == PvCodes::E4m3 {
                // Largest magnitudes of V are the same for both.
                variants.push(Variant::Statistics(prepare));
            }
            if !cut {
                variants.extend(once(&prepare).map(Variant::PrepareOnce));
            }
        }
        for (causal, lse) in [(false, false), (false, true), (true, false), (true, true)] {
            let (consumers, stages) = tile(width);
            let kinds = [
                (PvCodes::E4m3, true),
                (PvCodes::E4m3, false),
                (PvCodes::Int8, true),
            ];
            variants.extend(kinds.map(|(pv, running_max)| {
                Variant::Attend(Attend {
                    width,
                    dtype,
                    causal,
                    lse,
                    cut,
                    pv,
                    running_max,
                    consumers,
                    stages,
                })
            }));
        }
    }
    variants.extend(half::variants());
    variants
}

/// Offsets into the workspace, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ranges {
    pub(crate) k_sums: u64,
    pub(crate) v_maxima: u64,
    pub(crate) k_mean: u64,
    pub(crate) v_scales: u64,
    /// Where V becomes e4m3.
    pub(crate) v_residuals: u64,
    pub(crate) k_scales: u64,
    pub(crate) k_codes: u64,
    pub(crate) v_codes: u64,
    pub(crate) next_work: u64,
}

impl Choice {
    /// Lays out the workspace. The codes are whole tiles in the order in which the tensor cores read
    /// them, so they are named `k_tiles` and `v_tiles` rather than what they would be row by row.
    pub(crate) fn scratch(&self) -> (Scratch, Ranges) {
        let mut scratch = Scratch::default();
        let heads = u64::from(self.batch) * u64::from(self.kv_heads);
        let mut push = |name, kind, of_head: &[u32]| {
            let of_head = of_head.iter().copied().map(u64::from);
            let shape: Vec<u64> = std::iter::once(heads).chain(of_head).collect();
            scratch.push(name, kind, &shape).offset
        };
        let width = self.attend.width;
        let codes = [self.tiles, TILE_KEYS * width];
        let mut ranges = Ranges {
            k_mean: push("k_mean", ScratchType::F32, &[width]),
            k_scales: push("k_tile_scales", ScratchType::F32, &[self.tiles, K_GROUPS]),
            k_codes: push("k_tiles", ScratchType::Bytes, &codes),
            v_scales: push("v_scales", ScratchType::F32, &[width]),
            v_codes: push("v_tiles", ScratchType::Bytes, &codes),
            v_residuals: 0,
            k_sums: 0,
            v_maxima: 0,
            next_work: 0,
        };
        if self.attend.pv == PvCodes::E4m3 {
            let rows = [self.tiles, width];
            ranges.v_residuals = push("v_tile_residuals", ScratchType::F32, &rows);
        }
        if let Preparation::Twice(_) = self.prepare {
            let rows = [self.pieces, width];
            ranges.k_sums = push("k_sums", ScratchType::F32, &rows);
            ranges.v_maxima = push("v_maxima", ScratchType::F32, &rows);
        }
        ranges.next_work = scratch.push("next_work", ScratchType::Bytes, &[4]).offset;
        (scratch, ranges)
    }
}

#[cfg(test)]
mod tests;
