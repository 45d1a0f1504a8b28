//! Decoding: a few queries against many keys, on the tensors' own numbers. Quantizing K and V costs more
//! than attending to them once, so nothing is prepared: each workgroup takes a range of the keys where
//! the caller has them, and a second dispatch merges the ranges.

use sageattn_core::scratch::{Scratch, ScratchRange, ScratchType};
use sageattn_core::{Error, Mask, Outputs, Problem, Shape};
use sageattn_shaders::abi::{DecodeParams, MergeParams};
use sageattn_shaders::{
    DecodeTile, DecodeVariant, MERGE_CHANNELS, MergeVariant, PACK_ROWS, Variant, decode_columns,
};

use crate::attend::causal_shift;
use crate::device::Context;
use crate::memory::{Binder, Side, Slice, Workspace, index};
use crate::pipeline::{Step, cut};
use crate::quantize::shader_dtype;

/// Queries that the kernel takes. It reads the keys once per four query rows: beyond a few it is right
/// and slow, and beyond this its partial results outgrow the keys.
pub(crate) const MAX_QUERIES: usize = 128;

/// Queries up to which decoding beats quantizing first.
const FEW_QUERIES: usize = 16;

/// Workgroups that keep the largest GPU busy. wgpu does not tell how many multiprocessors there are; the
/// largest have about 130, and two workgroups of each cover each other's waiting. A smaller GPU takes
/// them in turns: its ranges are shorter than need be, which costs a few partial results.
const WORKGROUPS: usize = 2 * 132;

/// Whether a problem is one of decoding.
pub(crate) fn suits(problem: &Problem) -> bool {
    problem.shape().q_len <= FEW_QUERIES
}

/// The kernels of one problem.
#[derive(Clone, Debug)]
pub(crate) struct Decode {
    decode: DecodeVariant,
    merge: MergeVariant,
    partial_o: ScratchRange,
    partial_stats: ScratchRange,
}

/// How the keys are divided: the longest ranges that give enough workgroups, within the device's
/// workgroup memory.
pub(crate) fn tile(limits: &wgpu::Limits, shape: &Shape, variant: DecodeVariant) -> DecodeTile {
    let packs = packs(shape) * shape.batch * shape.kv_heads;
    let fits = |tile: &DecodeTile| {
        let variant = DecodeVariant {
            tile: *tile,
            ..variant
        };
        variant.workgroup_bytes() <= limits.max_compute_workgroup_storage_size
    };
    let mut tiles = [(256, 512), (256, 256), (128, 256), (128, 128)]
        .map(|(invocations, split)| DecodeTile { invocations, split })
        .into_iter()
        .filter(fits);
    let smallest = DecodeTile {
        invocations: 128,
        split: 128,
    };
    let enough =
        |tile: &DecodeTile| packs * shape.kv_len.div_ceil(tile.split as usize) >= WORKGROUPS;
    tiles.find(enough).unwrap_or(smallest)
}

/// Packs of query rows per KV head.
fn packs(shape: &Shape) -> usize {
    (shape.q_len * shape.heads_per_kv()).div_ceil(PACK_ROWS as usize)
}

impl Decode {
    /// The kernels of a problem, and the workspace of their partial results.
    pub(crate) fn new(context: &Context, problem: &Problem) -> (Self, Workspace) {
        let shape = problem.shape();
        let dtype = shader_dtype(problem.dtype());
        // At most 256: `Problem` says so.
        let head_dim = index(shape.head_dim as u64);
        let lse = problem.outputs() == Outputs::OAndLse;
        let decode = DecodeVariant {
            dtype,
            head_dim,
            causal: problem.mask() != Mask::None,
            lse,
            tile: DecodeTile {
                invocations: 128,
                split: 128,
            },
        };
        let tile = tile(&context.facts.limits, shape, decode);
        let splits = shape.kv_len.div_ceil(tile.split as usize) as u64;
        let mut scratch = Scratch::default();
        let mut push = |name, vectors: u32| {
            let [batch, kv_heads] = [shape.batch, shape.kv_heads].map(|n| n as u64);
            let extents = [
                batch,
                kv_heads,
                packs(shape) as u64,
                splits,
                4 * u64::from(vectors),
            ];
            scratch.push(name, ScratchType::F32, &extents)
        };
        let partial_o = push("partial_o", 8 * decode_columns(head_dim));
        let partial_stats = push("partial_stats", 3);
        let decode = Self {
            decode: DecodeVariant { tile, ..decode },
            merge: MergeVariant {
                dtype,
                head_dim,
                lse,
            },
            partial_o,
            partial_stats,
        };
        (decode, Workspace::of_floats(scratch))
    }

    /// The first kernel, whose name stands for the call.
    pub(crate) fn variant(&self) -> Variant {
        Variant::Decode(self.decode)
    }

    /// Keys that share one maximum.
    pub(crate) fn split(&self) -> u32 {
        self.decode.tile.split
    }

    /// Every range of keys, then the merge.
    pub(crate) fn steps<'a>(
        &self,
        binder: &Binder<'a>,
        slices: &[Slice],
    ) -> Result<Vec<Step<'a>>, Error> {
        let decode = slices.iter().map(|slice| self.decode_step(binder, slice));
        let merge = slices.iter().map(|slice| self.merge_step(binder, slice));
        decode.chain(merge).collect()
    }

    fn decode_step<'a>(&self, binder: &Binder<'a>, slice: &Slice) -> Result<Step<'a>, Error> {
        let problem = binder.io.problem();
        let shape = problem.shape();
        let (q, q_view) = binder.tensor("q", binder.io.q(), slice, Side::Q)?;
        let (k, k_view) = binder.tensor("k", binder.io.k(), slice, Side::Kv)?;
        let (v, v_view) = binder.tensor("v", binder.io.v(), slice, Side::Kv)?;
        let (pair, pairs) = slice.pairs(Side::Kv);
        let w = binder.workspace;
        let (packs, splits) = (self.partial_o.shape[2], self.partial_o.shape[3]);
        let params = DecodeParams {
            q: q_view,
            k: k_view,
            v: v_view,
            heads: index(slice.heads(Side::Q).1 as u64),
            heads_per_kv: index(shape.heads_per_kv() as u64),
            packs: index(packs),
            splits: index(splits),
            q_len: index(shape.q_len as u64),
            kv_len: index(shape.kv_len as u64),
            causal_shift: causal_shift(problem.mask(), shape.q_len, shape.kv_len),
            partial_o: w.float_index(Some(&self.partial_o), pair) / 4,
            partial_stats: w.float_index(Some(&self.partial_stats), pair) / 4,
            score_scale: problem.softmax_scale() * std::f32::consts::LOG2_E,
            ..DecodeParams::default()
        };
        let rows = u64::from(PACK_ROWS);
        let ops = 4 * rows * u64::from(self.split()) * shape.head_dim as u64;
        let context = binder.context;
        Ok(Step {
            stage: "attend",
            pipeline: context.pipelines.get(context, &self.variant())?,
            bindings: vec![q, k, v, binder.floats()],
            dispatches: cut(
                context,
                packs * splits,
                pairs as u64,
                ops,
                |first_block, first_pair| {
                    let params = DecodeParams {
                        first_block,
                        first_pair,
                        ..params
                    };
                    bytemuck::bytes_of(&params).to_vec()
                },
            ),
        })
    }

    fn merge_step<'a>(&self, binder: &Binder<'a>, slice: &Slice) -> Result<Step<'a>, Error> {
        let shape = binder.io.problem().shape();
        let (out, out_view) = binder.tensor("out", binder.io.out(), slice, Side::Q)?;
        let (lse, lse_start) = binder.lse(slice)?;
        let (pair, pairs) = slice.pairs(Side::Kv);
        let w = binder.workspace;
        let (packs, splits) = (self.partial_o.shape[2], self.partial_o.shape[3]);
        let params = MergeParams {
            out: out_view,
            heads: index(slice.heads(Side::Q).1 as u64),
            heads_per_kv: index(shape.heads_per_kv() as u64),
            packs: index(packs),
            splits: index(splits),
            q_len: index(shape.q_len as u64),
            partial_o: w.float_index(Some(&self.partial_o), pair) / 4,
            partial_stats: w.float_index(Some(&self.partial_stats), pair) / 4,
            lse: index(lse_start / 4),
            ..MergeParams::default()
        };
        let groups = shape.head_dim.div_ceil(MERGE_CHANNELS as usize) as u64;
        let ops = 4 * splits * u64::from(PACK_ROWS * MERGE_CHANNELS);
        let context = binder.context;
        Ok(Step {
            stage: "merge",
            pipeline: (context.pipelines).get(context, &Variant::Merge(self.merge))?,
            bindings: vec![binder.floats(), out, lse],
            dispatches: cut(
                context,
                packs * groups,
                pairs as u64,
                ops,
                |first_block, first_pair| {
                    let params = MergeParams {
                        first_block,
                        first_pair,
                        ..params
                    };
                    bytemuck::bytes_of(&params).to_vec()
                },
            ),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tile_of(bytes: u32, shape: Shape, head_dim: u32) -> DecodeTile {
        let limits = wgpu::Limits {
            max_compute_workgroup_storage_size: bytes,
            ..wgpu::Limits::default()
        };
        let variant = DecodeVariant {
            dtype: sageattn_shaders::DType::F16,
            head_dim,
            causal: false,
            lse: false,
            tile: DecodeTile {
                invocations: 128,
                split: 128,
            },
        };
        tile(&limits, &shape, variant)
    }

    #[test]
    fn ranges_are_long_where_there_are_many_heads_and_short_where_there_are_few() {
        let shape = |batch, kv_len| Shape {
            batch,
            q_heads: 32,
            kv_heads: 8,
            kv_len,
            ..Shape::mha(1, 1, 1, 128)
        };
        assert_eq!(tile_of(49152, shape(8, 16384), 128).split, 512);
        assert_eq!(tile_of(49152, shape(1, 1024), 128).split, 128);
        // Little memory: fewer invocations.
        assert_eq!(tile_of(16384, shape(8, 16384), 128).invocations, 128);
    }

    #[test]
    fn the_smallest_device_has_a_tile_for_every_head() {
        for head_dim in 1..=256 {
            let tile = tile_of(16384, Shape::mha(64, 1, 16, 64), head_dim);
            let variant = DecodeVariant {
                dtype: sageattn_shaders::DType::F32,
                head_dim,
                causal: true,
                lse: true,
                tile,
            };
            assert!(variant.workgroup_bytes() <= 16384, "{head_dim}: {tile:?}");
        }
    }
}
