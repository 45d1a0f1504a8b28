//! A measurement: tiles of the matrix tier against each other, for right and for speed. Run by hand:
//!
//! ```text
//! cargo test --release -p sageattn-wgpu --lib -- --ignored sweep --nocapture
//! ```

use std::time::{Duration, Instant};

use sageattn_core::metrics::Metrics;
use sageattn_core::reference::faithful;
use sageattn_core::{
    Align, Backend, DType, Error, HostTensor, Layout, LseView, Mask, Outputs, Problem, Recipe,
    Shape, TensorView, attend_host,
};
use sageattn_shaders::{AttendKernel, MatrixTile};

use crate::Wgpu;
use crate::tier::{Forced, Tier};

/// Roughly normal numbers.
fn noise(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut uniform = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    (0..count)
        .map(|_| (0..6).map(|_| uniform()).sum::<f32>() * 1.414 - 4.242)
        .collect()
}

/// Relative L1 from the oracle, and the largest error of LSE, on a small causal call with tails.
fn error(gpu: &Wgpu, head_dim: usize, recipe: &Recipe) -> Result<(f64, f32), Error> {
    let shape = Shape {
        q_len: 170,
        kv_len: 205,
        ..Shape::mha(1, 1, 1, head_dim)
    };
    let problem = Problem::new(shape, DType::F16)?
        .with_mask(Mask::Causal(Align::BottomRight))
        .with_outputs(Outputs::OAndLse);
    let tensor = |seed, len| {
        let layout = Layout::hnd_padded([1, 1, len, head_dim], DType::F16);
        // Scores that grow along the keys, so that maxima rise.
        let mut values = noise(seed, len * head_dim);
        for (row, values) in values.chunks_mut(head_dim).enumerate() {
            values
                .iter_mut()
                .for_each(|x| *x *= 0.5 + row as f32 / 40.0);
        }
        HostTensor::from_f32(layout, DType::F16, &values)
    };
    let [q, k, v] = [tensor(1, 170)?, tensor(2, 205)?, tensor(3, 205)?];
    let rounding = gpu.plan(&problem, recipe)?.describe().rounding;
    let output = attend_host(gpu, &problem, recipe, [&q, &k, &v])?;
    let [q, k, v] = [q.to_f32(), k.to_f32(), v.to_f32()];
    let expected = faithful::attend(&problem, recipe, &rounding, [&q, &k, &v]);
    let reference: Vec<f64> = expected.out.iter().map(|&x| f64::from(x)).collect();
    let lse = expected.lse.unwrap_or_default();
    let pairs = output.lse.iter().flatten().zip(&lse);
    let lse = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    Ok((Metrics::compare(&output.out, &reference).rel_l1, lse))
}

/// Medians of the attention stage and of all stages, by the device's clock.
fn time(
    gpu: &Wgpu,
    problem: &Problem,
    recipe: &Recipe,
    budget: Duration,
) -> Result<(Duration, Duration), Error> {
    let shape = problem.shape();
    let bytes = (shape.q_heads * shape.q_len * shape.head_dim * 2) as u64;
    let block: Vec<u8> = noise(7, 1 << 18)
        .iter()
        .flat_map(|&x| half::f16::from_f32(x).to_le_bytes())
        .collect();
    let buffers = [0u64, 1, 2, 3].map(|_| gpu.alloc(bytes));
    let [q, k, v, out] = buffers;
    let [q, k, v, out] = [q?, k?, v?, out?];
    for buffer in [&q, &k, &v] {
        let mut at = 0;
        while at < bytes {
            let piece = block.len().min((bytes - at) as usize);
            gpu.upload(&**buffer, at, &block[..piece])?;
            at += piece as u64;
        }
    }
    let plan = gpu.plan(problem, recipe)?;
    let workspace = gpu.alloc(plan.workspace_bytes())?;
    let layout = Layout::hnd(shape.q());
    let view = |buffer| TensorView {
        buffer,
        layout,
        dtype: DType::F16,
    };
    let lse: Option<LseView<'_>> = None;
    let io = sageattn_core::Io::bind(problem, view(&*q), view(&*k), view(&*v), view(&*out), lse)?;
    let start = Instant::now();
    let mut times = Vec::new();
    while start.elapsed() < budget || times.len() < 3 {
        let profile = plan.profile(&io, &*workspace)?;
        let stages = profile.stages.iter();
        let attend: Duration = stages
            .filter(|(stage, _)| *stage == "attend")
            .map(|(_, time)| *time)
            .sum();
        times.push((attend, profile.total()));
    }
    times.sort();
    Ok(times[times.len() / 2])
}

#[test]
#[ignore = "a measurement, for a GPU with matrix cores"]
fn sweep() {
    let gpu = Wgpu::best().unwrap();
    let facts = &gpu.context.facts;
    println!("{:?}", gpu.context.info);
    println!("{:?}\n{:?}", facts.features, facts.matrices);
    println!(
        "subgroup {:?}, workgroup bytes {}, invocations {}",
        facts.subgroup,
        facts.limits.max_compute_workgroup_storage_size,
        facts.limits.max_compute_invocations_per_workgroup
    );
    let limit = std::env::var("SWEEP_SECONDS")
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or(50.0);
    let len: usize = std::env::var("SWEEP_LEN")
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or(8192);
    let budget = Duration::from_millis(120);
    let start = Instant::now();
    let lanes = facts.subgroup[0];
    let side = if facts
        .matrices
        .iter()
        .any(|m| m.m_size == 16 && m.k_size == 16)
    {
        16
    } else {
        8
    };
    let mut tiles = Vec::new();
    for (subgroups, row_mats, key_tile, key_step, q_resident, staged) in [
        (1, 2, 64, 4, false, false),
        (4, 2, 32, 2, false, true),
        (1, 2, 32, 2, true, false),
        (4, 2, 32, 2, true, true),
        (2, 2, 32, 2, false, true),
        (4, 2, 32, 2, false, false),
        (2, 2, 64, 4, false, false),
        (1, 2, 64, 4, true, false),
        (2, 2, 32, 2, true, true),
        (8, 2, 16, 1, false, true),
        (4, 2, 32, 1, true, true),
        (1, 2, 32, 1, true, false),
        (2, 2, 64, 4, false, true),
        (1, 4, 32, 1, false, false),
    ] {
        tiles.push(MatrixTile {
            side,
            lanes,
            subgroups,
            row_mats: row_mats * lanes.max(16) / (2 * side),
            key_tile: key_tile * side / 16,
            key_step,
            q_resident,
            staged,
            vector_items: facts.vector_items,
            channels: 0,
        });
    }
    for vector_items in [false] {
        let first = tiles[0];
        tiles.push(MatrixTile {
            vector_items,
            ..first
        });
    }
    let dims = std::env::var("SWEEP_DIMS").unwrap_or_else(|_| "128,64".to_owned());
    for head_dim in dims.split(',').filter_map(|d| d.parse::<usize>().ok()) {
        for tile in &tiles {
            if start.elapsed().as_secs_f64() > limit {
                println!("out of time");
                return;
            }
            let tile = MatrixTile {
                channels: (head_dim as u32).next_multiple_of(16),
                ..*tile
            };
            let forced = gpu
                .with(|context| context.forced = Some(Forced::Kernel(AttendKernel::Matrix(tile))));
            if tile.workgroup_bytes(false) > facts.limits.max_compute_workgroup_storage_size {
                continue;
            }
            let compiled = Instant::now();
            let right = error(&forced, head_dim, &Recipe::SAGE1_B);
            let token = error(&forced, head_dim, &Recipe::SAGE1_T).map(|e| e.0);
            let compiled = compiled.elapsed();
            let mut line = format!(
                "d{head_dim} w{} m{} k{} n{} q{} s{} vec{} bytes {}: ",
                tile.subgroups,
                tile.row_mats,
                tile.key_tile,
                tile.key_step,
                u8::from(tile.q_resident),
                u8::from(tile.staged),
                u8::from(tile.vector_items),
                tile.workgroup_bytes(true)
            );
            match (&right, &token) {
                (Ok((o, lse)), Ok(token)) => {
                    line += &format!(
                        "O {o:.1e} LSE {lse:.1e} token {token:.1e}, {:.1} s",
                        compiled.as_secs_f64()
                    )
                }
                (Err(error), _) | (_, Err(error)) => {
                    println!("{line}{error}");
                    continue;
                }
            }
            let shape = Shape::mha(1, 32, len, head_dim);
            for mask in [Mask::None, Mask::Causal(Align::BottomRight)] {
                let problem = Problem::new(shape, DType::F16).unwrap().with_mask(mask);
                let ops = 4.0 * 32.0 * (len * len * head_dim) as f64
                    / if mask == Mask::None { 1.0 } else { 2.0 };
                match time(&forced, &problem, &Recipe::SAGE1_B, budget) {
                    Ok((attend, all)) => {
                        line += &format!(
                            " | {:.1} TOPS ({:.1} whole)",
                            ops / attend.as_secs_f64() / 1e12,
                            ops / all.as_secs_f64() / 1e12
                        )
                    }
                    Err(error) => line += &format!(" | {error}"),
                }
            }
            println!("{line}");
        }
    }
    let dot = gpu.with_tier(Tier::Dot).unwrap();
    let problem = Problem::new(Shape::mha(1, 32, len.min(4096), 128), DType::F16).unwrap();
    println!("dot: {:?}", time(&dot, &problem, &Recipe::SAGE1_B, budget));
}
