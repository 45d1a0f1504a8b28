//! Recipe `half`: tensors are read in place, by the copy engine.

use libtest_mimic::Failed;
use sageattn_core::{
    Align, Backend, DType, HostTensor, Io, Layout, Mask, Outputs, Problem, Recipe, Shape,
    TensorView,
};
use sageattn_cuda::Cuda;

use crate::support::{Call, OnDevice, Test, gqa};

pub(crate) const TESTS: &[Test] = &[
    ("half::head_dims_agree_with_the_oracles", head_dims),
    ("half::lengths_agree_with_the_oracles", lengths),
    ("half::masks_agree_with_the_oracles", masks),
    ("half::scales_agree_with_the_oracles", scales),
    ("half::huge_logits_agree_with_the_oracles", huge_logits),
    ("half::rising_scores_agree_with_the_oracles", rising_scores),
    ("half::gaps_between_rows_never_get_in", gaps),
    ("half::broadcast_keys_agree", broadcast),
    ("half::needs_no_workspace", no_workspace),
    ("half::refuses_f32", refuses_f32),
];

fn half(shape: Shape, dtype: DType) -> Call {
    Call::new(shape, dtype).by(Recipe::HALF)
}

fn head_dims(cuda: &Cuda) -> Result<(), Failed> {
    for dtype in [DType::F16, DType::BF16] {
        for head_dim in [1, 20, 60, 64, 72, 100, 128, 160, 250, 256] {
            half(gqa(150, 190, head_dim), dtype)
                .with(|problem| problem.with_outputs(Outputs::OAndLse))
                .check(cuda)?;
        }
    }
    Ok(())
}

fn lengths(cuda: &Cuda) -> Result<(), Failed> {
    for len in [1, 15, 63, 64, 65, 127, 128, 129, 192, 193, 257, 513] {
        half(gqa(len, 300, 64), DType::F16).check(cuda)?;
        half(gqa(70, len, 128), DType::F16).check(cuda)?;
    }
    // More works than multiprocessors: blocks walk several, across heads.
    half(Shape::mha(3, 70, 200, 64), DType::F16).check(cuda)?;
    half(Shape::mha(1, 60, 400, 128), DType::BF16).check(cuda)
}

fn masks(cuda: &Cuda) -> Result<(), Failed> {
    for (q_len, kv_len) in [(300, 300), (129, 400), (400, 129), (1, 257), (257, 1)] {
        for align in [Align::TopLeft, Align::BottomRight] {
            for head_dim in [64, 128, 256] {
                half(gqa(q_len, kv_len, head_dim), DType::F16)
                    .with(|problem| problem.with_mask(Mask::Causal(align)))
                    .with(|problem| problem.with_outputs(Outputs::OAndLse))
                    .check(cuda)?;
            }
        }
    }
    // Pairs of row blocks, and a middle one, on every multiprocessor.
    half(Shape::mha(2, 40, 600, 64), DType::F16)
        .with(|problem| problem.with_mask(Mask::Causal(Align::TopLeft)))
        .check(cuda)
}

fn scales(cuda: &Cuda) -> Result<(), Failed> {
    for scale in [0.0, -0.1, 0.3, 1e-6] {
        for mask in [Mask::None, Mask::Causal(Align::BottomRight)] {
            half(gqa(150, 190, 64), DType::F16)
                .with(|problem| problem.with_softmax_scale(scale).unwrap())
                .with(|problem| problem.with_mask(mask))
                .with(|problem| problem.with_outputs(Outputs::OAndLse))
                .check(cuda)?;
        }
    }
    Ok(())
}

/// Logits of 1e4 and more: one key takes all, and nothing overflows on the way.
fn huge_logits(cuda: &Cuda) -> Result<(), Failed> {
    for scale in [1e4, 1e20, -1e30] {
        half(gqa(150, 190, 64), DType::BF16)
            .with(|problem| problem.with_softmax_scale(scale).unwrap())
            .check(cuda)?;
    }
    Ok(())
}

/// Scores far above those of a row's first tile, in every size of tile: such tiles are computed once more.
fn rising_scores(cuda: &Cuda) -> Result<(), Failed> {
    for (head_dim, kv_len) in [(64, 450), (64, 1105), (128, 450), (256, 450)] {
        for (dtype, scale) in [(DType::F16, 1.0), (DType::BF16, -1.0)] {
            for mask in [Mask::None, Mask::Causal(Align::BottomRight)] {
                half(gqa(150, kv_len, head_dim), dtype)
                    .with(|problem| problem.with_softmax_scale(scale).unwrap())
                    .with(|problem| problem.with_mask(mask))
                    .with(|problem| problem.with_outputs(Outputs::OAndLse))
                    .check(cuda)?;
            }
        }
    }
    Ok(())
}

/// Rows with NaN behind their head_dim elements, laid out token by token.
fn gaps(cuda: &Cuda) -> Result<(), Failed> {
    for head_dim in [20, 64, 100, 250] {
        let call = half(gqa(140, 200, head_dim), DType::F16);
        let want = call.run(cuda)?.out;
        let with_gaps = |tensor: &HostTensor| {
            let shape = tensor.layout().shape();
            let [_, heads, len, _] = shape;
            let row = head_dim.next_multiple_of(8) + 8;
            let layout = Layout::strided(shape, [len * heads * row, row, heads * row], 8);
            let mut bytes = tensor.repack(layout).unwrap().bytes().to_vec();
            // No byte of this element is zero, and every byte of a gap is.
            let element = 1.0 + f32::powi(2.0, -10);
            let elements = vec![element; shape.iter().product()];
            let marked = HostTensor::from_f32(layout, DType::F16, &elements).unwrap();
            for (byte, &mark) in bytes.iter_mut().zip(marked.bytes()) {
                if mark == 0 {
                    *byte = 0xff;
                }
            }
            HostTensor::from_bytes(layout, DType::F16, bytes).unwrap()
        };
        let gapped = Call {
            tensors: call.tensors.each_ref().map(with_gaps),
            ..call
        };
        assert_eq!(gapped.run(cuda)?.out, want, "head_dim {head_dim}");
    }
    Ok(())
}

/// Keys and values with strides of zero: one head, or one row, for all.
fn broadcast(cuda: &Cuda) -> Result<(), Failed> {
    let shape = gqa(100, 90, 64);
    for walked in [
        [false, true, true],
        [true, false, true],
        [false, false, true],
        [true, true, false],
    ] {
        let call = half(shape, DType::F16);
        let [batch, heads, len, head_dim] = shape.kv();
        let dense = [heads * len * head_dim, len * head_dim, head_dim];
        let mut strides = dense;
        for (stride, walked) in strides.iter_mut().zip(walked) {
            *stride *= usize::from(walked);
        }
        let layout = Layout::strided(shape.kv(), strides, 0);
        let device = OnDevice::new(cuda, &call);
        let io = device.io(&call);
        let view = |like: &TensorView<'_>, buffer| TensorView::new(buffer, layout, like.dtype);
        let (k, v) = (view(io.k(), &device.k), view(io.v(), &device.v));
        let io = Io::bind(&call.problem, *io.q(), k, v, *io.out(), None)?;
        device.plan.run(&io, &device.workspace)?;

        let repeated = |tensor: &HostTensor| {
            let values = tensor.to_f32();
            let rows = (0..batch * heads * len).flat_map(|index| {
                let index = [index / len / heads, index / len % heads, index % len];
                let parts = index.into_iter().zip(strides);
                let at: usize = parts.map(|(index, stride)| index * stride).sum();
                values[at..at + head_dim].to_vec()
            });
            let values: Vec<f32> = rows.collect();
            HostTensor::from_f32(Layout::hnd(shape.kv()), DType::F16, &values).unwrap()
        };
        let [q, k, v] = call.tensors();
        let dense = Call {
            tensors: [q.clone(), repeated(k), repeated(v)],
            ..half(shape, DType::F16)
        };
        assert_eq!(device.output(&call), dense.run(cuda)?.out, "{strides:?}");
    }
    Ok(())
}

fn no_workspace(cuda: &Cuda) -> Result<(), Failed> {
    let call = half(gqa(100, 100, 64), DType::F16);
    let plan = cuda.plan(&call.problem, &call.recipe)?;
    assert_eq!(plan.workspace_bytes(), 0);
    assert!(plan.describe().scratch.is_empty());
    Ok(())
}

fn refuses_f32(cuda: &Cuda) -> Result<(), Failed> {
    let problem = Problem::new(gqa(100, 100, 64), DType::F32)?;
    let refusal = cuda.supports(&problem, &Recipe::HALF).unwrap_err();
    assert!(refusal.to_string().contains("f32"), "{refusal}");
    Ok(())
}
