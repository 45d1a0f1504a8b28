//! The attention kernels: what their dispatches bind. Which kernel it is, and its tile, is chosen in
//! [`tier`](crate::tier) by the file of its tier here.

pub(crate) mod dot;
pub(crate) mod matrix;
pub(crate) mod matrix_i8;
#[cfg(test)]
mod sweep;

use sageattn_core::{Align, Error, Mask};
use sageattn_shaders::abi::AttendParams;
use sageattn_shaders::{MergeVariant, Variant};

use crate::memory::{Binder, Side, Slice, index, padded};
use crate::merge::RangeResults;
use crate::pipeline::{Step, cut};
use crate::plan::Kernels;

impl Kernels {
    /// The attention kernel on one slice.
    pub(crate) fn attend<'a>(&self, binder: &Binder<'a>, slice: &Slice) -> Result<Step<'a>, Error> {
        let problem = binder.io.problem();
        let shape = problem.shape();
        let w = binder.workspace;
        let (q_pair, q_pairs) = slice.pairs(Side::Q);
        let kv_pair = slice.pairs(Side::Kv).0;
        let (q_codes, q_start) = binder.scratch(&w.q_codes, slice, Side::Q);
        let (k_codes, k_start) = binder.scratch(&w.k_codes, slice, Side::Kv);
        let (values, v_start) = binder.scratch(&w.values, slice, Side::Kv);
        let (out, out_view) = binder.tensor("out", binder.io.out(), slice, Side::Q)?;
        let (lse, lse_start) = binder.lse(slice)?;
        let kv_pairs = slice.pairs(Side::Kv).1;
        let pitch = shape.q_len.next_multiple_of(4);
        // Where keys are split, query heads are packed by KV head, and each tile is there per range.
        let (rows, pairs) = match &w.results {
            None => (shape.q_len, q_pairs),
            Some(_) => (shape.heads_per_kv() * pitch, kv_pairs),
        };
        let tiles = rows.div_ceil(self.attend.rows() as usize) as u64;
        let splits = w.results.as_ref().map_or(1, RangeResults::splits);
        let starts = w.results.as_ref().map(|r| r.starts(binder, slice));
        let [partial_o, partial_stats] = starts.unwrap_or_default();
        let params = AttendParams {
            out: out_view,
            heads: index(slice.heads(Side::Q).1 as u64),
            heads_per_kv: index(shape.heads_per_kv() as u64),
            tiles: index(tiles),
            q_len: index(shape.q_len as u64),
            kv_len: index(shape.kv_len as u64),
            q_padded: index(padded(shape.q_len) as u64),
            kv_padded: index(padded(shape.kv_len) as u64),
            q_groups: index(w.q_scales.shape[2]),
            k_groups: index(w.k_scales.shape[2]),
            causal_shift: causal_shift(problem.mask(), shape.q_len, shape.kv_len),
            q_codes: index(q_start / 16),
            k_codes: index(k_start / 16),
            values: index(v_start / 16),
            q_scales: w.float_index(Some(&w.q_scales), q_pair),
            k_scales: w.float_index(Some(&w.k_scales), kv_pair),
            v_scales: w.float_index(w.v_scales.as_ref(), kv_pair),
            lse_bias: w.float_index(w.lse_bias.as_ref(), q_pair),
            lse: index(lse_start / 4),
            score_scale: problem.softmax_scale() * std::f32::consts::LOG2_E,
            splits: index(splits),
            partial_o,
            partial_stats,
            ..AttendParams::default()
        };
        let rows = u64::from(self.attend.rows());
        let keys = self.attend.split().map_or(shape.kv_len as u64, u64::from);
        let ops = 4 * rows * keys * u64::from(self.attend.head_dim);
        let context = binder.context;
        Ok(Step {
            stage: "attend",
            pipeline: context
                .pipelines
                .get(context, &Variant::Attend(self.attend))?,
            bindings: vec![q_codes, k_codes, values, binder.floats(), out, lse],
            dispatches: cut(
                context,
                tiles * splits,
                pairs as u64,
                ops,
                |first_tile, first_pair| {
                    let params = AttendParams {
                        first_tile,
                        first_pair,
                        ..params
                    };
                    bytemuck::bytes_of(&params).to_vec()
                },
            ),
        })
    }
}

impl Kernels {
    /// The merge of the ranges' results on one slice, where keys are split.
    pub(crate) fn merge<'a>(
        &self,
        binder: &Binder<'a>,
        slice: &Slice,
    ) -> Option<Result<Step<'a>, Error>> {
        let variant = MergeVariant {
            dtype: self.attend.dtype,
            head_dim: self.attend.head_dim,
            lse: self.attend.lse,
            lse_bias: self.attend.lse_bias,
            v_scaled: self.attend.v_scaled(),
        };
        let pitch = binder.io.problem().shape().q_len.next_multiple_of(4);
        let results = binder.workspace.results.as_ref()?;
        Some(results.merge(binder, slice, variant, pitch))
    }
}

/// How many keys query 0 sees beyond one.
pub(crate) fn causal_shift(mask: Mask, q_len: usize, kv_len: usize) -> i32 {
    match mask {
        Mask::Causal(Align::BottomRight) => {
            // Lengths are at most 2^30, so the difference fits.
            let shift = kv_len as i64 - q_len as i64;
            i32::try_from(shift).unwrap_or(0)
        }
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bottom_right_shifts_by_the_difference_of_the_lengths() {
        assert_eq!(causal_shift(Mask::Causal(Align::BottomRight), 3, 10), 7);
        assert_eq!(causal_shift(Mask::Causal(Align::BottomRight), 10, 3), -7);
        assert_eq!(causal_shift(Mask::Causal(Align::TopLeft), 3, 10), 0);
    }
}
