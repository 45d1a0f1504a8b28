//! The device against the oracles.

use half::f16;
use libtest_mimic::Failed;
use sageattn_core::scratch::{ScratchRange, ScratchType};
use sageattn_core::{
    Align, Backend, DType, Io, Layout, Mask, Outputs, Problem, Recipe, Shape, Smooth, TensorView,
    reference::quantize,
};
use sageattn_wgpu::Wgpu;

use crate::Test;
use crate::support::{Inputs, check};

pub(crate) const TESTS: &[Test] = &[
    ("the_first_slice_agrees_with_the_oracle", first_slice),
    (
        "every_recipe_dtype_and_mask_agrees_with_the_oracle",
        recipes,
    ),
    ("odd_sizes_agree_with_the_oracle", odd_sizes),
    ("head_dims_agree_with_the_oracle", head_dims),
    ("smoothing_off_and_sampled_agree_with_the_oracle", smoothing),
    ("scales_of_zero_and_below_agree_with_the_oracle", scales),
    ("large_values_stay_finite", large_values),
    ("zeros_stay_zero", zeros),
    (
        "rows_that_see_no_key_give_zero_and_minus_infinity",
        blind_rows,
    ),
    ("codes_are_the_oracles_given_mean_and_scale", codes),
];

const RECIPES: [Recipe; 3] = [Recipe::SAGE1_B, Recipe::SAGE1_T, Recipe::I8_I8_DYN];
const MASKS: [Mask; 3] = [
    Mask::None,
    Mask::Causal(Align::TopLeft),
    Mask::Causal(Align::BottomRight),
];

fn with_lse(shape: Shape, dtype: DType, mask: Mask) -> Result<Problem, Failed> {
    let problem = Problem::new(shape, dtype)?;
    Ok(problem.with_mask(mask).with_outputs(Outputs::OAndLse))
}

fn first_slice(gpu: &Wgpu) -> Result<(), Failed> {
    let problem = Problem::new(Shape::mha(1, 2, 130, 64), DType::F16)?;
    check(
        gpu,
        &problem,
        &Recipe::SAGE1_B,
        &Inputs::noise(problem.shape()),
    )
}

fn recipes(gpu: &Wgpu) -> Result<(), Failed> {
    let shape = Shape {
        batch: 2,
        q_heads: 4,
        kv_heads: 2,
        q_len: 150,
        kv_len: 201,
        head_dim: 48,
    };
    for recipe in RECIPES {
        for dtype in DType::ALL {
            for mask in MASKS {
                let problem = with_lse(shape, dtype, mask)?;
                check(gpu, &problem, &recipe, &Inputs::noise(&shape))?;
            }
        }
    }
    Ok(())
}

fn odd_sizes(gpu: &Wgpu) -> Result<(), Failed> {
    for (q_len, kv_len) in [
        (1, 1),
        (1, 300),
        (15, 63),
        (64, 65),
        (129, 127),
        (40, 1),
        (17, 600),
    ] {
        for (recipe, mask) in RECIPES.into_iter().zip(MASKS) {
            let shape = Shape {
                q_len,
                kv_len,
                ..Shape::mha(1, 2, 1, 32)
            };
            let problem = with_lse(shape, DType::F16, mask)?;
            check(gpu, &problem, &recipe, &Inputs::noise(&shape))?;
        }
    }
    Ok(())
}

fn head_dims(gpu: &Wgpu) -> Result<(), Failed> {
    for head_dim in [1, 3, 16, 65, 80, 96, 127, 128, 160, 200, 255, 256] {
        for (recipe, dtype) in RECIPES.into_iter().zip(DType::ALL) {
            let shape = Shape::mha(1, 1, 70, head_dim);
            let problem = with_lse(shape, dtype, Mask::None)?;
            check(gpu, &problem, &recipe, &Inputs::noise(&shape))?;
        }
    }
    Ok(())
}

fn smoothing(gpu: &Wgpu) -> Result<(), Failed> {
    let shape = Shape::mha(1, 2, 1100, 32);
    for sampled in [1, 7, 600, 5000] {
        let n = std::num::NonZeroU32::new(sampled).ok_or("zero")?;
        for smooth in [Smooth::Off, Smooth::Sampled(n)] {
            let problem = with_lse(Shape { q_len: 20, ..shape }, DType::BF16, Mask::None)?;
            let recipe = Recipe::SAGE1_B.with_smooth(smooth);
            check(gpu, &problem, &recipe, &Inputs::noise(problem.shape()))?;
        }
    }
    Ok(())
}

fn scales(gpu: &Wgpu) -> Result<(), Failed> {
    for scale in [0.0, -0.125, 3.0] {
        for recipe in RECIPES {
            let problem = with_lse(Shape::mha(1, 1, 90, 64), DType::F32, Mask::None)?;
            let problem = problem.with_softmax_scale(scale)?;
            check(gpu, &problem, &recipe, &Inputs::noise(problem.shape()))?;
        }
    }
    Ok(())
}

fn large_values(gpu: &Wgpu) -> Result<(), Failed> {
    for recipe in RECIPES {
        for (qk, values) in [(1e15, 1.0), (1e4, 1e30), (1.0, 70000.0)] {
            let problem = with_lse(Shape::mha(1, 2, 100, 64), DType::F32, Mask::None)?;
            let mut inputs = Inputs::noise(problem.shape());
            for (tensor, factor) in [
                (&mut inputs.q, qk),
                (&mut inputs.k, qk),
                (&mut inputs.v, values),
            ] {
                let largest = tensor.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                tensor.iter_mut().for_each(|x| *x *= factor / largest);
            }
            let got = crate::support::run(gpu, &problem, &recipe, &inputs)?;
            let bad = got
                .out
                .iter()
                .chain(got.lse.iter().flatten())
                .filter(|x| !x.is_finite());
            if bad.count() > 0 {
                return Err(format!("{recipe} at {qk:e}, {values:e} is not finite").into());
            }
            // LSE is the difference of numbers of the size of the scores: no test of its digits here.
            if qk < 1e15 {
                let problem = problem.with_outputs(Outputs::O);
                check(gpu, &problem, &recipe, &inputs)?;
            }
        }
    }
    Ok(())
}

fn zeros(gpu: &Wgpu) -> Result<(), Failed> {
    for recipe in RECIPES {
        let problem = with_lse(Shape::mha(1, 1, 70, 32), DType::F16, Mask::None)?;
        let mut inputs = Inputs::noise(problem.shape());
        inputs.q[..40 * 32].fill(0.0);
        inputs.k.fill(0.0);
        inputs.v.iter_mut().step_by(32).for_each(|x| *x = 0.0);
        check(gpu, &problem, &recipe, &inputs)?;
        let got = crate::support::run(gpu, &problem, &recipe, &inputs)?;
        if got.out.iter().step_by(32).any(|&x| x != 0.0) {
            return Err(format!("{recipe}: a channel of zeros is not zero").into());
        }
    }
    Ok(())
}

fn blind_rows(gpu: &Wgpu) -> Result<(), Failed> {
    let shape = Shape {
        q_len: 100,
        kv_len: 30,
        ..Shape::mha(1, 2, 1, 40)
    };
    for recipe in RECIPES {
        let problem = with_lse(shape, DType::F16, Mask::Causal(Align::BottomRight))?;
        let got = crate::support::run(gpu, &problem, &recipe, &Inputs::noise(&shape))?;
        let lse = got.lse.ok_or("no LSE")?;
        for (row, lse) in lse.iter().enumerate() {
            let blind = row % 100 < 70;
            if (*lse == f32::NEG_INFINITY) != blind {
                return Err(format!("{recipe}: LSE of row {row} is {lse}").into());
            }
            let out = &got.out[row * 40..(row + 1) * 40];
            if out.iter().all(|&x| x == 0.0) != blind {
                return Err(format!("{recipe}: row {row} is {out:?}").into());
            }
        }
    }
    Ok(())
}

/// Codes, scales and mean in the workspace, against the definition.
fn codes(gpu: &Wgpu) -> Result<(), Failed> {
    let shape = Shape {
        q_len: 140,
        ..Shape::mha(2, 2, 333, 40)
    };
    for recipe in RECIPES {
        let problem = Problem::new(shape, DType::F16)?;
        let inputs = Inputs::noise(&shape).rounded(DType::F16);
        let plan = gpu.plan(&problem, &recipe)?;
        let workspace = gpu.alloc(plan.workspace_bytes())?;
        let tensors = inputs.tensors(&problem);
        let mut buffers = Vec::new();
        for tensor in &tensors {
            let buffer = gpu.alloc(tensor.bytes().len() as u64)?;
            gpu.upload(buffer.as_ref(), 0, tensor.bytes())?;
            buffers.push((buffer, *tensor.layout()));
        }
        let out = Layout::hnd_padded(shape.q(), DType::F16);
        buffers.push((gpu.alloc(2 * out.end().ok_or("too large")? as u64)?, out));
        let view = |i: usize| TensorView::new(buffers[i].0.as_ref(), buffers[i].1, DType::F16);
        let io = Io::bind(&problem, view(0), view(1), view(2), view(3), None)?;
        plan.run(&io, workspace.as_ref())?;

        let mut bytes = vec![0; usize::try_from(plan.workspace_bytes())?];
        gpu.download(workspace.as_ref(), 0, &mut bytes)?;
        let ranges = plan.describe().scratch;
        let range = |name: &str| -> Result<(&ScratchRange, &[u8]), Failed> {
            let range = ranges.iter().find(|range| range.name == name);
            let range = range.ok_or_else(|| format!("no range {name}"))?;
            let start = usize::try_from(range.offset)?;
            Ok((range, &bytes[start..start + usize::try_from(range.bytes)?]))
        };
        let sageattn_core::QkQuant::Int8(grouping) = recipe.qk else {
            return Err("not INT8".into());
        };
        let mean = floats(range("k_mean")?.1);
        for (name, values, len, groups) in [
            ("q", &inputs.q, shape.q_len, grouping.q()),
            ("k", &inputs.k, shape.kv_len, grouping.k()),
        ] {
            let (codes_range, codes) = range(&format!("{name}_codes"))?;
            let codes = numbers(codes_range.kind, codes)?;
            let scales = floats(range(&format!("{name}_scales"))?.1);
            let dim = usize::try_from(codes_range.shape[3])?;
            let rows = usize::try_from(codes_range.shape[2])?;
            let count = groups.count(len);
            for (head, values) in values.chunks(len * 40).enumerate() {
                let offset = match name {
                    "k" => &mean[head * 40..(head + 1) * 40],
                    _ => &[0.0; 40],
                };
                if name == "k" {
                    let exact = quantize::key_offset(Smooth::Mean, values, 40);
                    let close = exact
                        .iter()
                        .zip(offset)
                        .all(|(a, b)| (a - b).abs() < 1e-5 * 6.0);
                    if !close {
                        return Err(format!("mean {offset:?} is not {exact:?}").into());
                    }
                }
                let smoothed = quantize::subtract(values, offset);
                let expected = quantize::integer_codes(&smoothed, 40, groups, 127.0);
                let scales = &scales[head * count..(head + 1) * count];
                for (got, expected) in scales.iter().zip(&expected.scales) {
                    let ulps = got.to_bits().abs_diff(expected.to_bits());
                    if ulps > 4 {
                        return Err(
                            format!("{recipe}: {name} scale {got} is not {expected}").into()
                        );
                    }
                }
                for row in 0..rows {
                    for channel in 0..dim {
                        let got = codes[(head * rows + row) * dim + channel];
                        if row >= len || channel >= 40 {
                            if got != 0.0 {
                                return Err(format!("{recipe}: padding of {name} is {got}").into());
                            }
                            continue;
                        }
                        let x = smoothed[row * 40 + channel] / scales[groups.of(row)];
                        let tie = (x.fract().abs() - 0.5).abs() < 1e-3;
                        let expected = x.round_ties_even().clamp(-127.0, 127.0);
                        let off = (got - expected).abs();
                        if off > 0.0 && !(tie && off <= 1.0) {
                            return Err(format!("{recipe}: {name} code {got} is not {x}").into());
                        }
                    }
                }
            }
        }
    }
    Ok(())
}

/// Codes as the tier keeps them: bytes, or halves where a matrix unit multiplies those.
fn numbers(kind: ScratchType, bytes: &[u8]) -> Result<Vec<f32>, Failed> {
    match kind {
        ScratchType::I8 => Ok(bytes
            .iter()
            .map(|&byte| byte.cast_signed().into())
            .collect()),
        ScratchType::F16 => {
            let words = bytes.as_chunks().0.iter();
            Ok(words.map(|&word| f16::from_le_bytes(word).into()).collect())
        }
        kind => Err(format!("codes of {kind:?}").into()),
    }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    let words = bytes.as_chunks().0.iter();
    words.map(|&word| f32::from_le_bytes(word)).collect()
}
