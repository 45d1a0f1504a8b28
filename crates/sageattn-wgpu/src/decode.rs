//! Decoding: a few queries against many keys, on the tensors' own numbers. Quantizing K and V costs more
//! than attending to them once, so nothing is prepared: each workgroup takes a range of the keys where
//! the caller has them, and a second dispatch merges the ranges.

use sageattn_core::scratch::Scratch;
use sageattn_core::{Error, Mask, Outputs, Problem, Shape};
use sageattn_shaders::abi::DecodeParams;
use sageattn_shaders::{
    DecodeTile, DecodeVariant, MergeVariant, PACK_ROWS, Variant, decode_columns, decode_shuffles,
};

use crate::attend::causal_shift;
use crate::device::Context;
use crate::memory::{Binder, Side, Slice, Workspace, index};
use crate::merge::{self, FEW_QUERIES, RangeResults};
use crate::pipeline::{Step, cut};
use crate::quantize::shader_dtype;
use crate::tier::{Facts, Forced};

/// Queries that the kernel takes. It reads the keys once per four query rows: beyond a few it is right
/// and slow, and beyond this its partial results outgrow the keys.
pub(crate) const MAX_QUERIES: usize = 128;

/// Whether a problem is one of decoding.
pub(crate) fn suits(problem: &Problem) -> bool {
    problem.shape().q_len <= FEW_QUERIES
}

/// The kernels of one problem.
#[derive(Clone, Debug)]
pub(crate) struct Decode {
    decode: DecodeVariant,
    merge: MergeVariant,
    results: RangeResults,
}

/// A tile that every device has room for.
const SMALLEST: DecodeTile = DecodeTile {
    invocations: 64,
    split: 128,
    subgroup: None,
};

/// The size of the subgroups that may add up a key's columns: all have it, and a workgroup holds whole ones.
fn shuffling(facts: &Facts, head_dim: u32) -> Option<u32> {
    let [least, most] = facts.subgroup;
    let there = facts.features.contains(wgpu::Features::SUBGROUP)
        && facts.lone_components
        && least == most
        && most.is_power_of_two()
        && most <= SMALLEST.invocations;
    (there && decode_shuffles(head_dim, most)).then_some(most)
}

/// How the keys are divided: the most invocations that have room for any range, and the longest ranges
/// that give enough workgroups. Longer ranges save partial results.
pub(crate) fn tile(
    limits: &wgpu::Limits,
    shape: &Shape,
    variant: DecodeVariant,
    subgroup: Option<u32>,
) -> DecodeTile {
    let fits = |tile: &DecodeTile| {
        let variant = DecodeVariant {
            tile: *tile,
            ..variant
        };
        variant.workgroup_bytes() <= limits.max_compute_workgroup_storage_size
            && tile.invocations <= limits.max_compute_invocations_per_workgroup
            && tile.invocations <= limits.max_compute_workgroup_size_x
    };
    // Two workgroups should share the 48 KiB that an H100 gives a multiprocessor: every subgroup's O takes
    // room in the end.
    let invocations: &[u32] = match subgroup {
        Some(_) if decode_columns(variant.head_dim) <= 16 => &[256, 128, 64],
        _ => &[128, 64],
    };
    let kinds = [subgroup, None];
    let kinds = kinds.iter().skip(usize::from(subgroup.is_none()));
    let mut tiles = kinds.flat_map(|&subgroup| {
        invocations.iter().map(move |&invocations| {
            [512, 256, 128].map(|split| DecodeTile {
                invocations,
                split,
                subgroup,
            })
        })
    });
    let packs = packs(shape) * shape.batch * shape.kv_heads;
    let keys = |tile: DecodeTile| tile.split as usize;
    let fitting = tiles.find_map(|tiles| {
        let fitting: Vec<_> = tiles.into_iter().filter(fits).collect();
        merge::longest(&fitting, keys, shape.kv_len, packs)
    });
    fitting.unwrap_or(SMALLEST)
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
        let smallest = DecodeVariant {
            dtype,
            head_dim,
            causal: problem.mask() != Mask::None,
            lse,
            tile: SMALLEST,
        };
        let decode = match context.forced {
            Some(Forced::Decode(variant)) => variant,
            _ => {
                let facts = &context.facts;
                let subgroup = shuffling(facts, head_dim).filter(|_| context.findings.shuffles());
                let tile = tile(&facts.limits, shape, smallest, subgroup);
                DecodeVariant { tile, ..smallest }
            }
        };
        let tile = decode.tile;
        let mut scratch = Scratch::default();
        let splits = shape.kv_len.div_ceil(tile.split as usize);
        let results = RangeResults::push(&mut scratch, shape, packs(shape), splits);
        let decode = Self {
            decode,
            merge: MergeVariant {
                dtype,
                head_dim,
                lse,
                lse_bias: false,
                v_scaled: false,
            },
            results,
        };
        (decode, Workspace::of_floats(scratch))
    }

    /// The first kernel, whose name stands for the call.
    pub(crate) fn variant(&self) -> Variant {
        Variant::Decode(self.decode)
    }

    /// The first kernel where it must be tried before it is trusted: WGSL does not say which invocations
    /// make up a subgroup.
    pub(crate) fn unproven(&self) -> Option<DecodeVariant> {
        self.decode.tile.subgroup.map(|_| self.decode)
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
        let pitch = binder.io.problem().shape().q_len;
        let merge = slices
            .iter()
            .map(|slice| self.results.merge(binder, slice, self.merge, pitch));
        decode.chain(merge).collect()
    }

    fn decode_step<'a>(&self, binder: &Binder<'a>, slice: &Slice) -> Result<Step<'a>, Error> {
        let problem = binder.io.problem();
        let shape = problem.shape();
        let (q, q_view) = binder.tensor("q", binder.io.q(), slice, Side::Q)?;
        let (k, k_view) = binder.tensor("k", binder.io.k(), slice, Side::Kv)?;
        let (v, v_view) = binder.tensor("v", binder.io.v(), slice, Side::Kv)?;
        let pairs = slice.pairs(Side::Kv).1;
        let (packs, splits) = (self.results.packs(), self.results.splits());
        let [partial_o, partial_stats] = self.results.starts(binder, slice);
        let params = DecodeParams {
            q: q_view,
            k: k_view,
            v: v_view,
            kv_heads: index(slice.heads(Side::Kv).1 as u64),
            heads_per_kv: index(shape.heads_per_kv() as u64),
            packs: index(packs),
            splits: index(splits),
            q_len: index(shape.q_len as u64),
            kv_len: index(shape.kv_len as u64),
            causal_shift: causal_shift(problem.mask(), shape.q_len, shape.kv_len),
            partial_o,
            partial_stats,
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
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tile_of(bytes: u32, shape: Shape, head_dim: u32, subgroup: Option<u32>) -> DecodeTile {
        let limits = wgpu::Limits {
            max_compute_workgroup_storage_size: bytes,
            ..wgpu::Limits::default()
        };
        tile(&limits, &shape, variant(head_dim, SMALLEST), subgroup)
    }

    fn variant(head_dim: u32, tile: DecodeTile) -> DecodeVariant {
        DecodeVariant {
            dtype: sageattn_shaders::DType::F32,
            head_dim,
            causal: true,
            lse: true,
            tile,
        }
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
        assert_eq!(tile_of(49152, shape(1, 16384), 128, None).split, 512);
        assert_eq!(tile_of(49152, shape(1, 1024), 128, None).split, 128);
        assert_eq!(tile_of(49152, shape(1, 1024), 128, None).invocations, 128);
        // Little memory: shorter ranges, then fewer invocations.
        let tile = tile_of(16384, shape(8, 16384), 128, None);
        assert_eq!((tile.invocations, tile.split), (128, 256));
        assert_eq!(tile_of(8192, shape(8, 16384), 128, None).invocations, 64);
    }

    #[test]
    fn the_smallest_device_has_a_tile_for_every_head() {
        for head_dim in 1..=256 {
            for subgroup in [None, Some(8), Some(32), Some(64)] {
                let subgroup = subgroup.filter(|&lanes| decode_shuffles(head_dim, lanes));
                let tile = tile_of(16384, Shape::mha(64, 1, 16, 64), head_dim, subgroup);
                let variant = variant(head_dim, tile);
                assert!(variant.workgroup_bytes() <= 16384, "{head_dim}: {tile:?}");
            }
        }
    }

    #[test]
    fn shuffles_take_whole_columns_and_subgroups_of_one_size() {
        let mut facts = crate::tier::tests::plain();
        assert_eq!(shuffling(&facts, 128), None, "the feature is missing");
        facts.features = wgpu::Features::SUBGROUP;
        assert_eq!(shuffling(&facts, 128), Some(32));
        assert_eq!(shuffling(&facts, 80), None, "ten columns");
        facts.subgroup = [8, 8];
        assert_eq!(shuffling(&facts, 64), Some(8));
        assert_eq!(shuffling(&facts, 128), None, "more columns than that");
        facts.subgroup = [32, 64];
        assert_eq!(shuffling(&facts, 128), None, "which of the two?");
        facts.subgroup = [32, 32];
        facts.lone_components = false;
        assert_eq!(
            shuffling(&facts, 128),
            None,
            "a store may rewrite its neighbours"
        );
        facts.lone_components = true;

        let shape = Shape {
            q_heads: 32,
            kv_heads: 8,
            ..Shape::mha(1, 1, 1, 128)
        };
        let shape = Shape {
            kv_len: 16384,
            ..shape
        };
        let tile = tile_of(49152, shape, 128, Some(32));
        assert_eq!((tile.invocations, tile.split), (256, 512));
        let tile = tile_of(49152, shape, 256, Some(32));
        assert_eq!((tile.invocations, tile.split), (128, 512));
        let tile = tile_of(16384, shape, 128, Some(32));
        assert_eq!((tile.invocations, tile.subgroup), (128, Some(32)));
    }
}
