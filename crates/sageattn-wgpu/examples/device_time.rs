//! The GPU's own time of a whole call: many calls recorded in one command buffer between two timestamps,
//! so that neither the host nor a submission is in it. The pauses between a call's dispatches are.
//!
//! ```sh
//! cargo run --release -p sageattn-wgpu --example device_time -- 1 32 8 1 16384 128
//! ```
//!
//! Arguments: batch, query heads, KV heads, queries, keys, head_dim, and if wanted a recipe (without one, what the
//! device prefers), a tier to force, and `full` for no mask. Tensors are f16 and roughly N(0, 1); the mask
//! is causal and aligned at the end.
#![expect(clippy::print_stdout, reason = "an example")]

use std::error::Error;
use std::time::{Duration, Instant};

use sageattn_core::{
    Align, Backend, DType, HostTensor, Io, Layout, Mask, Plan, Problem, Recipe, Shape, TensorView,
};
use sageattn_wgpu::{Wgpu, wgpu};

/// Calls per command buffer, how long command buffers follow each other before any counts, and how long
/// they do then. An idle device runs at a fraction of its clock, and takes half a second to raise it.
const CALLS: u32 = 20;
const WARM_UP: Duration = Duration::from_secs(1);
const MEASURED: Duration = Duration::from_millis(500);

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (sizes, choices) = arguments.split_at(arguments.len().min(6));
    let sizes: Vec<usize> = sizes
        .iter()
        .map(|size| size.parse())
        .collect::<Result<_, _>>()?;
    let [batch, q_heads, kv_heads, q_len, kv_len, head_dim] = sizes[..] else {
        let usage =
            "batch, query heads, KV heads, queries, keys, head_dim [, recipe [, tier [, full]]]";
        return Err(usage.into());
    };
    let shape = Shape {
        batch,
        q_heads,
        kv_heads,
        q_len,
        kv_len,
        head_dim,
    };
    let mut gpu = Wgpu::best()?;
    if let Some(tier) = choices.get(1) {
        gpu = gpu.with_tier(tier.parse()?)?;
    }
    let mask = match choices.get(2).map(String::as_str) {
        None => Mask::Causal(Align::BottomRight),
        Some("full") => Mask::None,
        Some(other) => return Err(format!("{other:?} is not a mask: there is `full`").into()),
    };
    let problem = Problem::new(shape, DType::F16)?.with_mask(mask);
    let recipe: Recipe = match choices.first() {
        Some(name) => name.parse()?,
        None => gpu.preferred(&problem),
    };
    let plan = gpu.plan_wgpu(&problem, &recipe)?;
    println!("{} on {}", plan.describe(), gpu.device().name);

    let upload = |seed, shape: [usize; 4]| -> Result<_, Box<dyn Error>> {
        let layout = Layout::hnd_padded(shape, DType::F16);
        let values = noise(seed, shape.iter().product());
        let tensor = HostTensor::from_f32(layout, DType::F16, &values)?;
        let buffer = gpu.alloc(tensor.bytes().len() as u64)?;
        gpu.upload(buffer.as_ref(), 0, tensor.bytes())?;
        Ok((buffer, layout))
    };
    let tensors = [
        upload(1, shape.q())?,
        upload(2, shape.kv())?,
        upload(3, shape.kv())?,
        upload(4, shape.q())?,
    ];
    let workspace = gpu.alloc(plan.workspace_bytes().max(4))?;
    let [q, k, v, out] = [0, 1, 2, 3].map(|i: usize| {
        let (buffer, layout) = &tensors[i];
        TensorView::new(buffer.as_ref(), *layout, DType::F16)
    });
    let io = Io::bind(&problem, q, k, v, out, None)?;

    let device = gpu.wgpu_device();
    let queries = device.create_query_set(&wgpu::QuerySetDescriptor {
        label: None,
        ty: wgpu::QueryType::Timestamp,
        count: 2,
    });
    let ticks = device.create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size: 16,
        usage: wgpu::BufferUsages::QUERY_RESOLVE
            | wgpu::BufferUsages::COPY_SRC
            | wgpu::BufferUsages::STORAGE,
        mapped_at_creation: false,
    });
    let readable = gpu.wrap(ticks.clone());
    let mut micros = Vec::new();
    let start = Instant::now();
    while start.elapsed() < WARM_UP + MEASURED {
        let mut encoder = device.create_command_encoder(&Default::default());
        timestamp(&mut encoder, &queries, 0);
        for _ in 0..CALLS {
            plan.encode(&mut encoder, &io, workspace.as_ref())?;
        }
        timestamp(&mut encoder, &queries, 1);
        encoder.resolve_query_set(&queries, 0..2, &ticks, 0);
        gpu.wgpu_queue().submit([encoder.finish()]);
        let mut bytes = [0; 16];
        gpu.download(&readable, 0, &mut bytes)?;
        let ([begin, end], _) = bytes.as_chunks::<8>() else {
            return Err("two timestamps".into());
        };
        if start.elapsed() < WARM_UP {
            continue;
        }
        let ticks = u64::from_le_bytes(*end).saturating_sub(u64::from_le_bytes(*begin));
        let nanos = ticks as f64 * f64::from(gpu.wgpu_queue().get_timestamp_period());
        micros.push(nanos / 1e3 / f64::from(CALLS));
    }
    if micros.is_empty() {
        return Err("a command buffer takes longer than the measurement".into());
    }
    micros.sort_by(f64::total_cmp);
    let median = micros[micros.len() / 2];
    let bytes = 2 * shape.kv().iter().product::<usize>() * DType::F16.size();
    println!(
        "{median:.1} us a call, {:.2} TOPS, {:.2} TB/s of K and V",
        problem.flops() as f64 / median / 1e6,
        bytes as f64 / median / 1e6
    );
    for (stage, time) in plan.profile(&io, workspace.as_ref())?.stages {
        println!("  {stage} {:.1} us by itself", time.as_secs_f64() * 1e6);
    }
    Ok(())
}

/// A timestamp between passes: an empty pass that writes one.
fn timestamp(encoder: &mut wgpu::CommandEncoder, queries: &wgpu::QuerySet, index: u32) {
    let writes = wgpu::ComputePassTimestampWrites {
        query_set: queries,
        beginning_of_pass_write_index: None,
        end_of_pass_write_index: Some(index),
    };
    encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
        label: None,
        timestamp_writes: Some(writes),
    });
}

/// Deterministic, roughly normal numbers.
fn noise(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut uniform = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    let mut normal = || (0..12).map(|_| uniform()).sum::<f32>() - 6.0;
    (0..count).map(|_| normal()).collect()
}
