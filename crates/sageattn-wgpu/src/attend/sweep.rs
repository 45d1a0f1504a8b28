//! Tiles of the matrix tier against each other: each must agree with the oracle, and its speed is printed. Run by hand:
//!
//! ```text
//! cargo test --release -p sageattn-wgpu --lib -- --ignored sweep --nocapture
//! ```

use std::time::{Duration, Instant};

use sageattn_core::metrics::Metrics;
use sageattn_core::reference::faithful;
use sageattn_core::{
    Align, Backend, Buffer, DType, Error, HostTensor, Io, Layout, Mask, Outputs, Problem, Recipe,
    Shape, TensorView, attend_host,
};
use sageattn_shaders::{AttendKernel, MatrixTile};
use wgpu::Features;

use crate::Wgpu;
use crate::tier::Forced;

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

/// Relative L1 from the oracle, and the largest error of LSE, on a small call with tails.
fn error(gpu: &Wgpu, head_dim: usize, recipe: &Recipe, causal: bool) -> Result<(f64, f32), Error> {
    let shape = Shape {
        q_len: 170,
        kv_len: 205,
        ..Shape::mha(1, 1, 1, head_dim)
    };
    let mut problem = Problem::new(shape, DType::F16)?;
    if causal {
        problem = problem
            .with_mask(Mask::Causal(Align::BottomRight))
            .with_outputs(Outputs::OAndLse);
    }
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

/// Q, K, V and O of a large call.
struct Tensors {
    shape: Shape,
    buffers: [Box<dyn Buffer>; 4],
}

impl Tensors {
    fn new(gpu: &Wgpu, shape: Shape) -> Result<Self, Error> {
        let bytes = (shape.q_heads * shape.q_len * shape.head_dim * 2) as u64;
        let [q, k, v, out] = [(); 4].map(|()| gpu.alloc(bytes));
        let buffers = [q?, k?, v?, out?];
        // Each its own: a query that equals a key has one score far above all others.
        for (seed, buffer) in (7..).zip(&buffers[..3]) {
            let block: Vec<u8> = noise(seed, 1 << 18)
                .iter()
                .flat_map(|&x| half::f16::from_f32(x).to_le_bytes())
                .collect();
            for at in (0..bytes).step_by(block.len()) {
                let left = usize::try_from(bytes - at).unwrap_or(usize::MAX);
                gpu.upload(&**buffer, at, &block[..block.len().min(left)])?;
            }
        }
        Ok(Self { shape, buffers })
    }

    /// Least times of the attention stage and of all stages, in TOPS by the device's clock.
    fn time(&self, gpu: &Wgpu, recipe: &Recipe, causal: bool) -> Result<[f64; 2], Error> {
        self.time_of(self.shape, gpu, recipe, causal)
    }

    /// The same of another shape, no larger.
    fn time_of(
        &self,
        shape: Shape,
        gpu: &Wgpu,
        recipe: &Recipe,
        causal: bool,
    ) -> Result<[f64; 2], Error> {
        let mut problem = Problem::new(shape, DType::F16)?;
        if causal {
            problem = problem.with_mask(Mask::Causal(Align::BottomRight));
        }
        let plan = gpu.plan(&problem, recipe)?;
        let workspace = gpu.alloc(plan.workspace_bytes())?;
        let extents = [shape.q(), shape.kv(), shape.kv(), shape.q()];
        let [q, k, v, out] = [0, 1, 2, 3].map(|i: usize| TensorView {
            buffer: &*self.buffers[i],
            layout: Layout::hnd(extents[i]),
            dtype: DType::F16,
        });
        let io = Io::bind(&problem, q, k, v, out, None)?;
        let start = Instant::now();
        let mut times = Vec::new();
        while start.elapsed() < Duration::from_millis(100) || times.len() < 3 {
            let profile = plan.profile(&io, &*workspace)?;
            let stages = profile.stages.iter();
            let attend = stages.filter(|(stage, _)| *stage == "attend");
            times.push((attend.map(|(_, time)| *time).sum(), profile.total()));
        }
        times.sort();
        // The least: what else runs on the device only adds.
        let (attend, all): (Duration, Duration) = times[0];
        let ops = 4.0 * (shape.q_heads * shape.q_len * shape.kv_len * shape.head_dim) as f64;
        let ops = if causal { ops / 2.0 } else { ops };
        Ok([attend, all].map(|time| ops / time.as_secs_f64() / 1e12))
    }
}

/// A number from the environment.
fn setting(name: &str, otherwise: f64) -> f64 {
    let value = std::env::var(name).ok().and_then(|text| text.parse().ok());
    value.unwrap_or(otherwise)
}

/// Subgroups, matrices of rows, keys of a tile, chains of sums, two tiles of K and V.
type Candidate = (u32, u32, u32, u32, bool);

fn candidates(head_dim: usize) -> &'static [Candidate] {
    match head_dim {
        ..=64 => &[
            (4, 2, 16, 1, false),
            (4, 2, 32, 1, true),
            (8, 2, 16, 1, true),
        ],
        65..=128 => &[
            (8, 1, 16, 2, true),
            (8, 1, 16, 1, true),
            (4, 1, 16, 2, false),
        ],
        _ => &[(6, 1, 16, 1, true), (6, 1, 16, 2, true)],
    }
}

#[test]
#[ignore = "run by hand: prints how fast each candidate tile is, for a minute on a GPU with cooperative matrices that does nothing else"]
fn sweep() {
    let gpu = Wgpu::best().unwrap();
    let facts = &gpu.context.facts;
    println!("{:?}", gpu.context.info.name);
    let start = Instant::now();
    let late = || start.elapsed().as_secs_f64() > setting("SWEEP_SECONDS", 50.0);
    let lanes = facts.subgroup[0];
    let is_big = facts
        .matrices
        .iter()
        .any(|m| m.m_size == 16 && m.k_size == 16);
    let side = if is_big { 16 } else { 8 };
    let mut failures = Vec::new();
    let dims = std::env::var("SWEEP_DIMS").unwrap_or_else(|_| "128,64".to_owned());
    for head_dim in dims.split(',').filter_map(|dim| dim.parse().ok()) {
        let len = setting("SWEEP_LEN", 8192.0);
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "small"
        )]
        let tensors = Tensors::new(&gpu, Shape::mha(1, 32, len as usize, head_dim)).unwrap();
        // In rounds: other work on the device comes and goes.
        let mut rows = Vec::new();
        for candidate in candidates(head_dim) {
            let &(subgroups, row_mats, key_tile, chains, double) = candidate;
            let tile = MatrixTile {
                side,
                lanes,
                subgroups,
                row_mats: row_mats * lanes.max(16) / (2 * side),
                key_tile: key_tile * side / 16,
                double,
                subgroup_order: facts.features.contains(Features::SUBGROUP_BARRIER),
                chains,
                vector_items: facts.vector_items,
                channels: crate::memory::index(head_dim as u64).next_multiple_of(16),
            };
            let room = tile.workgroup_bytes(true);
            if room > facts.limits.max_compute_workgroup_storage_size {
                continue;
            }
            let kernel = AttendKernel::Matrix(tile);
            let forced = gpu.with(|context| context.forced = Some(Forced::Kernel(kernel)));
            let name = format!(
                "d{head_dim} w{subgroups} m{row_mats} k{key_tile} c{chains} d{} {room} bytes",
                u8::from(double),
            );
            let wrong = [false, true].map(|causal| {
                let error = error(&forced, head_dim, &Recipe::SAGE1_B, causal);
                let right = matches!(error, Ok((o, lse)) if o <= 1e-3 && lse <= 1e-4);
                let found = error.map_or_else(
                    |error| error.to_string(),
                    |(o, lse)| format!("{o:.6}/{lse:.6}"),
                );
                if !right {
                    failures.push(format!("{name}: {found}"));
                }
                found
            });
            rows.push((
                format!("{name}: {}", wrong.join(" ")),
                forced,
                [[0.0f64; 2]; 2],
            ));
        }
        for _ in 0..3 {
            if let Some((_, forced, _)) = rows.first() {
                // An idle device takes half a second to raise its clock.
                let warm = Instant::now();
                while warm.elapsed() < Duration::from_millis(600) && !late() {
                    let _ = tensors.time(forced, &Recipe::SAGE1_B, false);
                }
            }
            for (name, forced, best) in &mut rows {
                for causal in [false, true] {
                    if late() {
                        break;
                    }
                    match tensors.time(forced, &Recipe::SAGE1_B, causal) {
                        Ok(tops) => {
                            let best = &mut best[usize::from(causal)];
                            *best = [best[0].max(tops[0]), best[1].max(tops[1])];
                        }
                        Err(error) => *name += &format!(" {error}"),
                    }
                }
            }
        }
        // How many workgroups a multiprocessor of an H100 holds: one for each, and two for each.
        for (name, forced, _) in &mut rows {
            let Some(Forced::Kernel(AttendKernel::Matrix(tile))) = forced.context.forced else {
                continue;
            };
            let rate = |waves: usize| {
                let shape = Shape {
                    batch: 1,
                    q_heads: 132 * waves,
                    kv_heads: 4,
                    q_len: tile.rows() as usize,
                    kv_len: 8192,
                    head_dim,
                };
                let rate = tensors.time_of(shape, forced, &Recipe::SAGE1_B, false);
                rate.map_or(0.0, |[tops, _]| tops)
            };
            if !late() {
                *name += &format!(
                    " one wave {:.0}, two {:.0}, three {:.0}",
                    rate(1),
                    rate(2),
                    rate(3)
                );
            }
        }
        for (name, _, [full, causal]) in &rows {
            println!(
                "{name}: full {:.1} ({:.1}) causal {:.1} ({:.1})",
                full[0], full[1], causal[0], causal[1]
            );
        }
    }
    println!("{:.1} s", start.elapsed().as_secs_f64());
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
