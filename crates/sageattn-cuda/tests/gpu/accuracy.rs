//! The backend against the oracles.

use std::num::NonZeroU32;

use libtest_mimic::Failed;
use sageattn_core::{Align, DType, Mask, Outputs, Recipe, Smooth};
use sageattn_cuda::Cuda;

use crate::support::{Call, OnDevice, Test, gqa};

pub(crate) const TESTS: &[Test] = &[
    ("head_dims_agree_with_the_oracles", head_dims),
    ("lengths_agree_with_the_oracles", lengths),
    ("masks_agree_with_the_oracles", masks),
    (
        "types_and_outputs_agree_with_the_oracles",
        types_and_outputs,
    ),
    (
        "scales_and_smoothing_agree_with_the_oracles",
        scales_and_smoothing,
    ),
    ("keys_are_coded_as_the_recipe_says", keys_are_coded),
];

fn head_dims(cuda: &Cuda) -> Result<(), Failed> {
    for head_dim in [1, 20, 64, 72, 100, 128, 160, 250, 256] {
        Call::new(gqa(130, 200, head_dim), DType::F16).check(cuda)?;
    }
    Ok(())
}

fn lengths(cuda: &Cuda) -> Result<(), Failed> {
    for len in [1, 15, 63, 64, 65, 127, 128, 129, 192, 193, 513] {
        Call::new(gqa(len, 300, 64), DType::F16).check(cuda)?;
        Call::new(gqa(70, len, 128), DType::F16).check(cuda)?;
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
                    .check(cuda)?;
            }
        }
    }
    Ok(())
}

fn types_and_outputs(cuda: &Cuda) -> Result<(), Failed> {
    for dtype in DType::ALL {
        for head_dim in [60, 64, 128, 250, 256] {
            Call::new(gqa(150, 190, head_dim), dtype)
                .with(|problem| problem.with_outputs(Outputs::OAndLse))
                .check(cuda)?;
        }
    }
    Ok(())
}

fn scales_and_smoothing(cuda: &Cuda) -> Result<(), Failed> {
    for scale in [0.0, -0.1, 0.3] {
        Call::new(gqa(150, 190, 64), DType::F16)
            .with(|problem| problem.with_softmax_scale(scale).unwrap())
            .with(|problem| problem.with_outputs(Outputs::OAndLse))
            .check(cuda)?;
    }
    let sampled = NonZeroU32::new(50).map(Smooth::Sampled).unwrap();
    for smooth in [Smooth::Off, sampled] {
        let mut call = Call::new(gqa(150, 190, 64), DType::F16)
            .with(|problem| problem.with_outputs(Outputs::OAndLse));
        call.recipe = Recipe::SAGE2_I8_F8.with_smooth(smooth);
        call.check(cuda)?;
    }
    Ok(())
}

/// Reads the scratch of the plan: the mean, and K's codes out of their tiles.
fn keys_are_coded(cuda: &Cuda) -> Result<(), Failed> {
    for head_dim in [64, 128, 256] {
        let shape = gqa(8, 300, head_dim);
        let call = Call::new(shape, DType::F16);
        let device = OnDevice::new(cuda, &call);
        device.plan.run(&device.io(&call), &device.workspace)?;
        let bytes = device.read(&device.workspace);
        let description = device.plan.describe();
        let range = |name: &str| {
            let found = description.scratch.iter().find(|range| range.name == name);
            let range = found.unwrap();
            let start = usize::try_from(range.offset).unwrap();
            &bytes[start..][..usize::try_from(range.bytes).unwrap()]
        };
        let floats = |name| -> Vec<f32> {
            let words = range(name).as_chunks().0.iter();
            words.map(|&word| f32::from_le_bytes(word)).collect()
        };
        let (means, scales) = (floats("k_mean"), floats("k_tile_scales"));
        let tiles = range("k_tiles");

        let keys = call.tensors[1].to_f32();
        for (head, keys) in keys.chunks_exact(300 * head_dim).enumerate() {
            let mean = &means[head * head_dim..][..head_dim];
            for (channel, mean) in mean.iter().enumerate() {
                let sum: f64 = (0..300)
                    .map(|key| f64::from(keys[key * head_dim + channel]))
                    .sum();
                assert!(
                    (f64::from(*mean) - sum / 300.0).abs() < 1e-5 * 6.0,
                    "mean of {channel}"
                );
            }
            for key in 0..300 {
                let tile = head * 3 + key / 128;
                let scale = scales[tile * 4 + key % 8 / 2];
                for channel in 0..head_dim {
                    let at = tile * 128 * head_dim + swizzled(key % 128, channel, head_dim);
                    let code = f32::from(tiles[at].cast_signed());
                    let x = (keys[key * head_dim + channel] - mean[channel]) / scale;
                    assert!(
                        (x - code).abs() < 0.501,
                        "key {key}, channel {channel}: {x}, {code}"
                    );
                }
            }
        }
    }
    Ok(())
}

/// Where tile/swizzle.cuh puts a byte of a tile of 128 rows.
fn swizzled(row: usize, column: usize, width: usize) -> usize {
    let panel = width.min(128);
    let mixed = (column % panel / 16) ^ if panel == 128 { row % 8 } else { row / 2 % 4 };
    column / panel * 128 * panel + row * panel + mixed * 16 + column % 16
}
