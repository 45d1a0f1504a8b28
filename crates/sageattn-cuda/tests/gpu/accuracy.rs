//! The backend against the oracles.

use std::num::NonZeroU32;

use libtest_mimic::Failed;
use sageattn_core::{Align, DType, Mask, Outputs, Recipe, Shape, Smooth};
use sageattn_cuda::Cuda;

use crate::codes;
use crate::support::{Call, Test, gqa};

pub(crate) const TESTS: &[Test] = &[
    ("head_dims_agree_with_the_oracles", head_dims),
    ("lengths_agree_with_the_oracles", lengths),
    ("masks_agree_with_the_oracles", masks),
    ("uneven_works_agree_with_the_oracles", uneven_works),
    (
        "types_and_outputs_agree_with_the_oracles",
        types_and_outputs,
    ),
    (
        "scales_and_smoothing_agree_with_the_oracles",
        scales_and_smoothing,
    ),
    ("keys_and_values_are_coded_as_the_recipe_says", codes::codes),
];

fn head_dims(cuda: &Cuda) -> Result<(), Failed> {
    for head_dim in [1, 20, 64, 72, 100, 128, 160, 250, 256] {
        Call::new(gqa(130, 200, head_dim), DType::F16).check_quantized(cuda)?;
    }
    Ok(())
}

fn lengths(cuda: &Cuda) -> Result<(), Failed> {
    for len in [1, 15, 63, 64, 65, 127, 128, 129, 192, 193, 513] {
        Call::new(gqa(len, 300, 64), DType::F16).check_quantized(cuda)?;
        Call::new(gqa(70, len, 128), DType::F16).check_quantized(cuda)?;
    }
    Ok(())
}

fn masks(cuda: &Cuda) -> Result<(), Failed> {
    for (q_len, kv_len) in [(300, 300), (129, 400), (400, 129), (1, 257), (257, 1)] {
        for align in [Align::TopLeft, Align::BottomRight] {
            for head_dim in [64, 128, 256] {
                Call::new(gqa(q_len, kv_len, head_dim), DType::F16)
                    .with(|problem| problem.with_mask(Mask::Causal(align)))
                    .with(|problem| problem.with_outputs(Outputs::OAndLse))
                    .check_quantized(cuda)?;
            }
        }
    }
    Ok(())
}

fn uneven_works(cuda: &Cuda) -> Result<(), Failed> {
    // Warpgroups without rows pass by more tiles than there are stages.
    for head_dim in [64, 128] {
        let shape = Shape {
            q_len: 200,
            ..Shape::mha(1, 2, 2000, head_dim)
        };
        Call::new(shape, DType::F16).check_quantized(cuda)?;
    }
    // More works than multiprocessors, whole ones before partial ones: what a warpgroup finds in a stage
    // may be the next work's, of which its rows see nothing.
    let partial = Shape {
        q_len: 200,
        ..Shape::mha(1, 200, 700, 64)
    };
    Call::new(partial, DType::F16).check_quantized(cuda)?;
    // Heads in groups whose works are drawn the longest first, the last group smaller.
    let causal = Call::new(Shape::mha(1, 151, 450, 64), DType::F16)
        .with(|problem| problem.with_mask(Mask::Causal(Align::TopLeft)));
    causal.check_quantized(cuda)?;
    // Many works without keys before and between those that have some.
    for kv_len in [1, 129, 300] {
        let shape = Shape {
            kv_len,
            ..Shape::mha(1, 24, 4000, 64)
        };
        Call::new(shape, DType::F16)
            .with(|problem| problem.with_mask(Mask::Causal(Align::BottomRight)))
            .with(|problem| problem.with_outputs(Outputs::OAndLse))
            .check_quantized(cuda)?;
    }
    Ok(())
}

fn types_and_outputs(cuda: &Cuda) -> Result<(), Failed> {
    for dtype in DType::ALL {
        for head_dim in [60, 64, 128, 250, 256] {
            Call::new(gqa(150, 190, head_dim), dtype)
                .with(|problem| problem.with_outputs(Outputs::OAndLse))
                .check_quantized(cuda)?;
        }
    }
    Ok(())
}

fn scales_and_smoothing(cuda: &Cuda) -> Result<(), Failed> {
    for scale in [0.0, -0.1, 0.3] {
        Call::new(gqa(150, 190, 64), DType::F16)
            .with(|problem| problem.with_softmax_scale(scale).unwrap())
            .with(|problem| problem.with_outputs(Outputs::OAndLse))
            .check_quantized(cuda)?;
    }
    let sampled = NonZeroU32::new(50).map(Smooth::Sampled).unwrap();
    for smooth in [Smooth::Off, sampled] {
        let mut call = Call::new(gqa(150, 190, 64), DType::F16)
            .with(|problem| problem.with_outputs(Outputs::OAndLse));
        call.recipe = Recipe::SAGE2_I8_F8.with_smooth(smooth);
        call.check_quantized(cuda)?;
    }
    Ok(())
}
