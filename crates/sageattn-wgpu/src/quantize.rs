//! The stages before attention: K's mean, the codes of Q and K, V laid out.

use sageattn_core::{DType, Error, Smooth, TensorView};
use sageattn_shaders::abi::TensorParams;
use sageattn_shaders::{
    ChannelOp, ChannelsVariant, KEY_TILE, RowsVariant, SPLIT_ROWS, Values, ValuesVariant, Variant,
};

use crate::memory::{Binder, Side, Slice, index, padded};
use crate::pipeline::{Range, Step, cut};
use crate::plan::Kernels;

/// Sampled rows are found in 32 bits up to this many.
pub(crate) const MAX_SAMPLES: usize = 1 << 16;

/// Rows that K's offset is the mean of; `None` when K is not smoothed.
pub(crate) fn samples(smooth: Smooth, kv_len: usize) -> Option<usize> {
    match smooth {
        Smooth::Off => None,
        Smooth::Mean => Some(kv_len),
        Smooth::Sampled(n) => Some(kv_len.min(n.get() as usize)),
    }
}

/// Partial results per head of a reduction over `rows` rows.
pub(crate) fn splits(rows: usize) -> usize {
    rows.div_ceil(SPLIT_ROWS as usize)
}

pub(crate) fn shader_dtype(dtype: DType) -> sageattn_shaders::DType {
    match dtype {
        DType::F16 => sageattn_shaders::DType::F16,
        DType::BF16 => sageattn_shaders::DType::BF16,
        DType::F32 => sageattn_shaders::DType::F32,
    }
}

impl Kernels {
    /// All steps up to the attention kernel, stage by stage.
    pub(crate) fn prepare<'a>(
        &self,
        binder: &Binder<'a>,
        slices: &[Slice],
    ) -> Result<Vec<Step<'a>>, Error> {
        let mut steps = Vec::new();
        let shape = binder.io.problem().shape();
        if let Some(samples) = samples(self.recipe.smooth, shape.kv_len) {
            for slice in slices {
                let op = ChannelOp::Mean;
                steps.extend(self.channels(binder, slice, "k_mean", "k", op, samples)?);
            }
        }
        for slice in slices {
            steps.push(self.rows(binder, slice, Side::Q)?);
        }
        for slice in slices {
            steps.push(self.rows(binder, slice, Side::Kv)?);
        }
        if let Some(op) = self.v_scale {
            for slice in slices {
                let samples = shape.kv_len;
                steps.extend(self.channels(binder, slice, "quantize_v", "v", op, samples)?);
            }
        }
        for slice in slices {
            steps.push(self.values(binder, slice)?);
        }
        Ok(steps)
    }

    /// One number per channel of K or V.
    fn channels<'a>(
        &self,
        binder: &Binder<'a>,
        slice: &Slice,
        stage: &'static str,
        tensor: &'static str,
        op: ChannelOp,
        samples: usize,
    ) -> Result<[Step<'a>; 2], Error> {
        let (range, params) = self.tensor(binder, slice, tensor, Side::Kv)?;
        let w = binder.workspace;
        let result = match op {
            ChannelOp::Mean => &w.k_mean,
            ChannelOp::CodeScale | ChannelOp::RangeFactor => &w.v_scales,
        };
        let (pair, pairs) = slice.pairs(Side::Kv);
        let params = TensorParams {
            samples: index(samples as u64),
            splits: index(splits(samples) as u64),
            channels: w.float_index(result.as_ref(), pair),
            // Partial results live from one stage to the next: a slice's own lie at its pairs all the
            // same, so that slices do not wait for each other.
            partials: w.float_index(w.partials.as_ref(), pair),
            ..params
        };
        let split_ops = u64::from(SPLIT_ROWS) * u64::from(self.attend.head_dim) * OPS_PER_ELEMENT;
        let partial = Variant::Channels(ChannelsVariant {
            dtype: self.attend.dtype,
            head_dim: self.attend.head_dim,
            largest: op != ChannelOp::Mean,
        });
        let finish = Variant::ChannelsFinish {
            head_dim: self.attend.head_dim,
            op,
        };
        let step = |variant: &Variant, bindings, blocks, ops| -> Result<Step<'a>, Error> {
            let dispatches = cut(binder.context, blocks, pairs as u64, ops, |block, pair| {
                with_first(params, block, pair)
            });
            Ok(Step {
                stage,
                pipeline: binder.context.pipelines.get(binder.context, variant)?,
                bindings,
                dispatches,
            })
        };
        let floats = binder.floats();
        Ok([
            step(
                &partial,
                vec![range, floats],
                u64::from(params.splits),
                split_ops,
            )?,
            step(&finish, vec![floats], 1, split_ops)?,
        ])
    }

    /// The codes and scales of Q or K.
    fn rows<'a>(&self, binder: &Binder<'a>, slice: &Slice, side: Side) -> Result<Step<'a>, Error> {
        let w = binder.workspace;
        let (stage, tensor, groups, codes, scales) = match side {
            Side::Q => (
                "quantize_q",
                "q",
                self.attend.q_groups,
                &w.q_codes,
                &w.q_scales,
            ),
            Side::Kv => (
                "quantize_k",
                "k",
                self.attend.k_groups,
                &w.k_codes,
                &w.k_scales,
            ),
        };
        let (range, params) = self.tensor(binder, slice, tensor, side)?;
        let (pair, pairs) = slice.pairs(side);
        let (codes, start) = binder.scratch(codes, slice, side);
        let params = TensorParams {
            groups: index(scales.shape[2]),
            data: index(start / 4),
            scales: w.float_index(Some(scales), pair),
            channels: w.float_index(w.k_mean.as_ref(), slice.pairs(Side::Kv).0),
            lse_bias: w.float_index(w.lse_bias.as_ref(), pair),
            ..params
        };
        let variant = Variant::QuantizeRows(RowsVariant {
            dtype: self.attend.dtype,
            head_dim: self.attend.head_dim,
            qk_dim: self.attend.qk_dim(),
            codes: self.attend.codes(),
            groups,
            subtract_mean: side == Side::Kv && w.k_mean.is_some(),
            lse_bias: side == Side::Q && w.lse_bias.is_some(),
        });
        let ops = u64::from(groups.block) * u64::from(self.attend.head_dim) * OPS_PER_ELEMENT;
        let blocks = u64::from(params.padded_len / groups.block);
        Ok(Step {
            stage,
            pipeline: binder.context.pipelines.get(binder.context, &variant)?,
            bindings: vec![range, codes, binder.floats()],
            dispatches: cut(binder.context, blocks, pairs as u64, ops, |block, pair| {
                with_first(params, block, pair)
            }),
        })
    }

    /// V as the attention kernel reads it.
    fn values<'a>(&self, binder: &Binder<'a>, slice: &Slice) -> Result<Step<'a>, Error> {
        let w = binder.workspace;
        let (range, params) = self.tensor(binder, slice, "v", Side::Kv)?;
        let (pair, pairs) = slice.pairs(Side::Kv);
        let (values, start) = binder.scratch(&w.values, slice, Side::Kv);
        let params = TensorParams {
            data: index(start / 16),
            scales: w.float_index(w.v_scales.as_ref(), pair),
            ..params
        };
        let variant = ValuesVariant {
            dtype: self.attend.dtype,
            head_dim: self.attend.head_dim,
            pv_dim: self.attend.pv_dim(),
        };
        let variant = match self.attend.values() {
            Values::F16Pairs => Variant::ValuesF16(variant),
            Values::F16Rows => Variant::ValuesRows(variant),
            Values::I8 => Variant::ValuesI8(variant),
        };
        let ops = u64::from(KEY_TILE) * u64::from(self.attend.head_dim) * OPS_PER_ELEMENT;
        let tiles = u64::from(params.padded_len / KEY_TILE);
        Ok(Step {
            stage: "quantize_v",
            pipeline: binder.context.pipelines.get(binder.context, &variant)?,
            bindings: vec![range, values, binder.floats()],
            dispatches: cut(binder.context, tiles, pairs as u64, ops, |block, pair| {
                with_first(params, block, pair)
            }),
        })
    }

    /// Binds Q, K or V and fills in what its shape says.
    fn tensor<'a>(
        &self,
        binder: &Binder<'a>,
        slice: &Slice,
        name: &'static str,
        side: Side,
    ) -> Result<(Range<'a>, TensorParams), Error> {
        let problem = binder.io.problem();
        let view: &TensorView<'a> = match name {
            "q" => binder.io.q(),
            "k" => binder.io.k(),
            _ => binder.io.v(),
        };
        let (range, words) = binder.tensor(name, view, slice, side)?;
        let len = view.layout.shape()[2];
        let params = TensorParams {
            view: words,
            heads: index(slice.heads(side).1 as u64),
            len: index(len as u64),
            padded_len: index(padded(len) as u64),
            heads_per_kv: index(problem.shape().heads_per_kv() as u64),
            softmax_scale: problem.softmax_scale(),
            ..TensorParams::default()
        };
        Ok((range, params))
    }
}

/// These stages move bytes rather than multiply: an element counts as this many operations of the
/// matrix products when dispatches are cut.
const OPS_PER_ELEMENT: u64 = 64;

fn with_first(params: TensorParams, first_block: u32, first_pair: u32) -> Vec<u8> {
    let params = TensorParams {
        first_block,
        first_pair,
        ..params
    };
    bytemuck::bytes_of(&params).to_vec()
}
