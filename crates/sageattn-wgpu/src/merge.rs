//! Keys split over workgroups: the results of the ranges, and the dispatch that merges them.

use sageattn_core::scratch::{Scratch, ScratchRange, ScratchType};
use sageattn_core::{Error, Shape};
use sageattn_shaders::abi::MergeParams;
use sageattn_shaders::{MERGE_CHANNELS, MergeVariant, PACK_ROWS, Variant, decode_columns};

use crate::memory::{Binder, Side, Slice, index};
use crate::pipeline::{Step, cut};

/// Queries up to which keys are split: more of them fill a device by themselves.
pub(crate) const FEW_QUERIES: usize = 16;

/// Workgroups that keep the largest GPU busy. wgpu does not tell how many multiprocessors there are; the
/// largest have about 130, and two workgroups of each cover each other's waiting. A smaller GPU takes
/// them in turns: its ranges are shorter than need be, which costs a few partial results.
pub(crate) const WORKGROUPS: usize = 256;

/// The longest of some ranges, given longest first, of which there are enough workgroups when each KV
/// head takes `per_range` of them for every range; else the shortest.
pub(crate) fn longest<T: Copy>(
    ranges: &[T],
    keys: impl Fn(T) -> usize,
    kv_len: usize,
    per_range: usize,
) -> Option<T> {
    let enough = |&range: &T| per_range * kv_len.div_ceil(keys(range)) >= WORKGROUPS;
    let found = ranges.iter().copied().find(enough);
    found.or(ranges.last().copied())
}

/// Where the results of ranges lie, as `decode.wgsl` describes them: O not yet divided, and the maximum
/// and the sums of P, for packs of four query rows.
#[derive(Clone, Debug)]
pub(crate) struct RangeResults {
    o: ScratchRange,
    stats: ScratchRange,
}

impl RangeResults {
    /// Appends the results of `splits` ranges for `packs` packs of every KV head.
    pub(crate) fn push(scratch: &mut Scratch, shape: &Shape, packs: usize, splits: usize) -> Self {
        let mut push = |name, vectors: usize| {
            let extents = [shape.batch, shape.kv_heads, packs, splits, 4 * vectors];
            scratch.push(name, ScratchType::F32, &extents.map(|n| n as u64))
        };
        // At most 256: `Problem` says so.
        let columns = decode_columns(index(shape.head_dim as u64)) as usize;
        Self {
            o: push("range_o", 8 * columns),
            stats: push("range_stats", 3),
        }
    }

    /// Packs per KV head.
    pub(crate) fn packs(&self) -> u64 {
        self.o.shape[2]
    }

    /// Ranges of keys.
    pub(crate) fn splits(&self) -> u64 {
        self.o.shape[3]
    }

    /// Where the results of a slice begin in the range of all f32 numbers, in vectors.
    pub(crate) fn starts(&self, binder: &Binder<'_>, slice: &Slice) -> [u32; 2] {
        let pair = slice.pairs(Side::Kv).0;
        let start = |range| binder.workspace.float_index(Some(range), pair) / 4;
        [start(&self.o), start(&self.stats)]
    }

    /// The merge of one slice. Each query head has `pitch` rows in its KV head's packs.
    pub(crate) fn merge<'a>(
        &self,
        binder: &Binder<'a>,
        slice: &Slice,
        variant: MergeVariant,
        pitch: usize,
    ) -> Result<Step<'a>, Error> {
        let shape = binder.io.problem().shape();
        let w = binder.workspace;
        let (out, out_view) = binder.tensor("out", binder.io.out(), slice, Side::Q)?;
        let (lse, lse_start) = binder.lse(slice)?;
        let (pair, pairs) = slice.pairs(Side::Kv);
        let [partial_o, partial_stats] = self.starts(binder, slice);
        let params = MergeParams {
            out: out_view,
            heads: index(slice.heads(Side::Q).1 as u64),
            heads_per_kv: index(shape.heads_per_kv() as u64),
            packs: index(self.packs()),
            splits: index(self.splits()),
            q_len: index(shape.q_len as u64),
            pitch: index(pitch as u64),
            partial_o,
            partial_stats,
            v_scales: w.float_index(w.v_scales.as_ref(), pair),
            lse_bias: w.float_index(w.lse_bias.as_ref(), slice.pairs(Side::Q).0),
            lse: index(lse_start / 4),
            ..MergeParams::default()
        };
        let groups = shape.head_dim.div_ceil(MERGE_CHANNELS as usize) as u64;
        let blocks = self.packs() * groups;
        let ops = 4 * self.splits() * u64::from(PACK_ROWS * MERGE_CHANNELS);
        let context = binder.context;
        Ok(Step {
            stage: "merge",
            pipeline: context.pipelines.get(context, &Variant::Merge(variant))?,
            bindings: vec![binder.floats(), out, lse],
            dispatches: cut(
                context,
                blocks,
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

    #[test]
    fn the_longest_range_with_enough_workgroups_is_taken() {
        let range = |kv_len, per_range| longest(&[512, 256, 128], |n| n, kv_len, per_range);
        assert_eq!(range(16384, 64), Some(512));
        assert_eq!(range(16384, 8), Some(512));
        assert_eq!(range(15000, 8), Some(256), "240 workgroups are too few");
        assert_eq!(range(100, 1), Some(128), "too few whatever the range");
    }
}
