//! One plan, many runs: what a model does, whose tensors stay on the device.
//!
//! `cargo run -p sageattn --example 03-reuse-a-plan`

#![allow(clippy::print_stdout, reason = "an example shows its result")]

use std::time::Instant;

use sageattn::{DType, Device, Error, Io, Layout, LseView, Outputs, Problem, Shape, TensorView};

const LAYERS: usize = 4;

fn main() -> Result<(), Error> {
    let shape = Shape::mha(1, 4, 150, 64);
    let problem = Problem::new(shape, DType::F32)?.with_outputs(Outputs::OAndLse);
    let device = Device::best();
    let recipe = device.preferred(&problem);

    // Kernels are chosen and compiled here, once. The plan is immutable: threads may share it.
    let plan = device.plan(&problem, &recipe)?;
    println!("{} on {device}", plan.describe());

    // All memory is the caller's. `[batch, len, heads, head_dim]` is how projections write it.
    let layout = Layout::nhd(shape.q());
    let elements: usize = shape.q().iter().product();
    let bytes = (elements * DType::F32.size()) as u64;
    let qkv = [
        device.alloc(bytes)?,
        device.alloc(bytes)?,
        device.alloc(bytes)?,
    ];
    let out = device.alloc(bytes)?;
    let lse = device.alloc(4 * (shape.q_heads * shape.q_len) as u64)?;
    let workspace = device.alloc(plan.workspace_bytes().max(4))?;

    // Layers run one after the other, so they can share the workspace.
    for layer in 0..LAYERS {
        for (index, buffer) in qkv.iter().enumerate() {
            let phase = (layer * 3 + index) as f32;
            let values = (0..elements).map(|i| (i as f32 * 0.37 + phase).sin());
            let data: Vec<u8> = values.flat_map(f32::to_le_bytes).collect();
            device.upload(buffer.as_ref(), 0, &data)?;
        }
        let [q, k, v] = &qkv;
        let view = |buffer| TensorView::new(buffer, layout, DType::F32);
        let io = Io::bind(
            &problem,
            view(q.as_ref()),
            view(k.as_ref()),
            view(v.as_ref()),
            view(out.as_ref()),
            Some(LseView {
                buffer: lse.as_ref(),
                offset: 0,
            }),
        )?;
        let start = Instant::now();
        plan.run(&io, workspace.as_ref())?;
        device.synchronize()?;
        let elapsed = start.elapsed();

        let mut first = [0; 4];
        device.download(lse.as_ref(), 0, &mut first)?;
        println!(
            "layer {layer}: {elapsed:?}, LSE of the first query {:.4}",
            f32::from_le_bytes(first)
        );
    }
    Ok(())
}
