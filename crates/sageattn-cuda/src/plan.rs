//! Which kernels, with which tiles, over which scratch; and the plan that runs them.

use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::{CudaEvent, CudaStream, sys};
use sageattn_core::scratch::{Scratch, ScratchType};
use sageattn_core::{
    Align, Buffer, Clock, DType, Description, Error, Io, Mask, Outputs, Plan, Problem, Profile,
    Recipe, Smooth,
};
use sageattn_kernels::abi::{
    AttnParams, HalfParams, K_GROUPS, MAX_PIECES, PrepareParams, TILE_KEYS, WARPGROUP_ROWS,
};

use self::half::HalfChoice;
use crate::buffer::{Tensor, in_context};
use crate::launch::Kernel;
use crate::quantize;
use crate::variant::{Attend, Prepare, Variant, WIDTHS};
use crate::{attend_half, attend_sm90};

pub(crate) mod half;

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
    /// Row maxima may go stale: the caller has asked for speed before the last percents of accuracy.
    pub(crate) lazy_maximum: bool,
}

/// The kernels for one problem and the numbers that their launches follow from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Choice {
    pub(crate) prepare: Prepare,
    pub(crate) attend: Attend,
    pub(crate) batch: u32,
    pub(crate) q_heads: u32,
    pub(crate) kv_heads: u32,
    pub(crate) q_len: u32,
    pub(crate) kv_len: u32,
    pub(crate) head_dim: u32,
    /// Tiles of 128 keys in one head.
    pub(crate) tiles: u32,
    /// Blocks that share the statistics of one head, and tiles of each.
    pub(crate) pieces: u32,
    pub(crate) tiles_per_piece: u32,
    /// Keys that the mean is taken over.
    pub(crate) samples: u32,
    /// Blocks of query rows in one head, and in all.
    pub(crate) row_blocks: u32,
    pub(crate) works: u32,
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
    if recipe.with_smooth(Smooth::Mean) != Recipe::SAGE2_I8_F8 {
        missing.push(format!(
            "recipe {recipe}: this version has sage2-i8-f8 and half"
        ));
    }
    let (causal, diagonal) = diagonal(problem, &mut missing);

    let head_dim = small(shape.head_dim);
    let width = width(shape.head_dim);
    let cut = !head_dim.is_multiple_of(OCTET);
    let (consumers, stages) = tile(width);

    let (batch, kv_heads) = (small(shape.batch), small(shape.kv_heads));
    let (q_heads, kv_len) = (small(shape.q_heads), small(shape.kv_len));
    let tiles = kv_len.div_ceil(TILE_KEYS);
    let (pieces, tiles_per_piece) = pieces(batch * kv_heads, tiles, machine.multiprocessors);
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
        prepare: Prepare {
            width,
            dtype: problem.dtype(),
            smooth: recipe.smooth != Smooth::Off,
            cut,
        },
        attend: Attend {
            width,
            dtype: problem.dtype(),
            causal,
            lse: problem.outputs() == Outputs::OAndLse,
            cut,
            running_max: !machine.lazy_maximum,
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
        multiprocessors: machine.multiprocessors,
        softmax_scale: problem.softmax_scale(),
        diagonal,
        overlap: machine.overlap,
    })
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
        // Three warpgroups of 160 registers keep the tensor cores busy while the other two take
        // exponentials; a fourth would leave each 120, fewer than S, P and O need. Stages of 16 KiB
        // are soon read, so that six of them cover the latency of memory.
        64 => (3, 6),
        // As above; 32 KiB a stage: a sixth does not fit.
        128 => (3, 5),
        // O alone takes 128 registers a thread: two warpgroups of 240. 64 KiB a stage: a fourth does
        // not fit.
        _ => (2, 3),
    }
}

/// Into how many pieces the statistics cut each head, and tiles of each.
fn pieces(heads: u32, tiles: u32, multiprocessors: u32) -> (u32, u32) {
    // A multiprocessor holds eight blocks of 256 threads: enough pieces that the K blocks alone fill
    // the device. More would only lengthen the sums in the second launch.
    let wanted = (8 * multiprocessors).div_ceil(heads);
    let pieces = wanted.clamp(1, MAX_PIECES).min(tiles);
    let tiles_per_piece = tiles.div_ceil(pieces);
    (tiles.div_ceil(tiles_per_piece), tiles_per_piece)
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
        for smooth in [false, true] {
            let prepare = Prepare {
                width,
                dtype,
                smooth,
                cut,
            };
            variants.extend([Variant::Statistics(prepare), Variant::Encode(prepare)]);
        }
        let (consumers, stages) = tile(width);
        for (causal, lse) in [(false, false), (false, true), (true, false), (true, true)] {
            let attend = |running_max| Attend {
                width,
                dtype,
                causal,
                lse,
                cut,
                running_max,
                consumers,
                stages,
            };
            variants.extend([true, false].map(|maximum| Variant::Attend(attend(maximum))));
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
        let width = self.prepare.width;
        let codes = [self.tiles, TILE_KEYS * width];
        let mut ranges = Ranges {
            k_mean: push("k_mean", ScratchType::F32, &[width]),
            k_scales: push("k_tile_scales", ScratchType::F32, &[self.tiles, K_GROUPS]),
            k_codes: push("k_tiles", ScratchType::Bytes, &codes),
            v_scales: push("v_scales", ScratchType::F32, &[width]),
            v_codes: push("v_tiles", ScratchType::Bytes, &codes),
            k_sums: push("k_sums", ScratchType::F32, &[self.pieces, width]),
            v_maxima: push("v_maxima", ScratchType::F32, &[self.pieces, width]),
            next_work: 0,
        };
        ranges.next_work = scratch.push("next_work", ScratchType::Bytes, &[4]).offset;
        (scratch, ranges)
    }
}

/// Loaded kernels for one problem, on one stream.
#[derive(Debug)]
pub(crate) struct CudaPlan {
    pub(crate) stream: Arc<CudaStream>,
    pub(crate) problem: Problem,
    pub(crate) recipe: Recipe,
    pub(crate) scratch: Scratch,
    pub(crate) stages: Stages,
}

/// What a plan launches.
#[derive(Debug)]
pub(crate) enum Stages {
    /// K and V to codes, then attention over them.
    Quantized {
        choice: Choice,
        ranges: Ranges,
        statistics: Arc<Kernel<PrepareParams>>,
        encode: Arc<Kernel<PrepareParams>>,
        attend: Arc<Kernel<AttnParams>>,
    },
    /// Attention on the tensors as they are.
    Half {
        choice: HalfChoice,
        attend: Arc<Kernel<HalfParams>>,
    },
}

impl CudaPlan {
    /// The stages in order; `after` is called after each.
    fn enqueue(
        &self,
        io: &Io<'_>,
        workspace: &dyn Buffer,
        mut after: impl FnMut(&'static str) -> Result<(), Error>,
    ) -> Result<(), Error> {
        io.check_run(&self.problem, workspace, self.workspace_bytes())?;
        let context = self.stream.context();
        let q = Tensor::resolve(context, "q", io.q())?;
        let k = Tensor::resolve(context, "k", io.k())?;
        let v = Tensor::resolve(context, "v", io.v())?;
        let o = Tensor::resolve(context, "out", io.out())?;
        let scratch = in_context(context, "workspace", workspace)?.address();
        let lse = match io.lse() {
            None => None,
            Some(lse) => {
                Some(in_context(context, "lse", lse.buffer)?.address() + 4 * lse.offset as u64)
            }
        };
        context
            .bind_to_thread()
            .map_err(|error| Error::device("making the context current", error))?;

        match &self.stages {
            Stages::Quantized {
                choice,
                ranges,
                statistics,
                encode,
                attend,
            } => {
                let prepare = quantize::params(choice, ranges, scratch, k, v);
                statistics.enqueue(&self.stream, &quantize::statistics(choice, prepare))?;
                after("statistics")?;
                encode.enqueue(&self.stream, &quantize::encode(choice, prepare))?;
                after("encode")?;
                let launch = attend_sm90::attend(choice, ranges, scratch, q, o, lse);
                attend.enqueue(&self.stream, &launch)?;
            }
            Stages::Half { choice, attend } => {
                let launch = attend_half::attend(choice, [q, k, v], o, lse)?;
                attend.enqueue(&self.stream, &launch)?;
            }
        }
        after("attend")
    }

    fn record(&self) -> Result<CudaEvent, Error> {
        let timed = sys::CUevent_flags::CU_EVENT_DEFAULT;
        self.stream
            .record_event(Some(timed))
            .map_err(|error| Error::device("recording an event", error))
    }
}

impl Plan for CudaPlan {
    fn describe(&self) -> Description {
        let (variant, rounding) = match &self.stages {
            Stages::Quantized { choice, .. } => (
                Variant::Attend(choice.attend),
                attend_sm90::rounding(&choice.attend),
            ),
            Stages::Half { choice, .. } => (
                Variant::Half(choice.variant),
                attend_half::rounding(&choice.variant),
            ),
        };
        Description {
            variant: variant.name(),
            recipe: self.recipe,
            rounding,
            scratch: self.scratch.ranges().to_vec(),
        }
    }

    fn workspace_bytes(&self) -> u64 {
        self.scratch.bytes()
    }

    fn run(&self, io: &Io<'_>, workspace: &dyn Buffer) -> Result<(), Error> {
        self.enqueue(io, workspace, |_| Ok(()))
    }

    fn profile(&self, io: &Io<'_>, workspace: &dyn Buffer) -> Result<Profile, Error> {
        let mut marks = vec![("start", self.record()?)];
        self.enqueue(io, workspace, |stage| {
            marks.push((stage, self.record()?));
            Ok(())
        })?;
        let failed = |error| Error::device("timing a run", error);
        self.stream.synchronize().map_err(failed)?;
        let mut stages = Vec::new();
        for pair in marks.windows(2) {
            let [(_, start), (stage, end)] = pair else {
                continue;
            };
            let time = start.elapsed_ms(end).map_err(failed)?;
            stages.push((*stage, Duration::from_secs_f32(time.max(0.0) / 1e3)));
        }
        Ok(Profile {
            stages,
            clock: Clock::Device,
        })
    }
}

#[cfg(test)]
mod tests;
