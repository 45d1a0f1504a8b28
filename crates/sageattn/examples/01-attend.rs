//! Attention on tensors in host memory, start to end, and how far it is from the exact result.
//!
//! `cargo run -p sageattn --example 01-attend`

#![allow(clippy::print_stdout, reason = "an example shows its result")]

use sageattn::metrics::Metrics;
use sageattn::{
    Align, DType, Device, Error, HostTensor, Layout, Mask, Problem, Shape, attend_host, reference,
};

fn main() -> Result<(), Error> {
    // Eight query heads share two KV heads; each query sees the keys up to its own position.
    let shape = Shape {
        batch: 1,
        q_heads: 8,
        kv_heads: 2,
        q_len: 200,
        kv_len: 200,
        head_dim: 64,
    };
    let problem = Problem::new(shape, DType::F16)?.with_mask(Mask::Causal(Align::TopLeft));

    let q = tensor(shape.q(), 1)?;
    let k = tensor(shape.kv(), 2)?;
    let v = tensor(shape.kv(), 3)?;

    let device = Device::best();
    let recipe = device.preferred(&problem);
    let output = attend_host(&*device, &problem, &recipe, [&q, &k, &v])?;

    let (q, k, v) = (q.to_f32(), k.to_f32(), v.to_f32());
    let exact = reference::exact::attend(&problem, [&q, &k, &v]);
    let metrics = Metrics::compare(&output.out, &exact.out);
    println!("{device}");
    println!("recipe      {recipe}");
    println!("cosine      {:.6}", metrics.cosine);
    println!("relative L1 {:.4}", metrics.rel_l1);
    Ok(())
}

/// Values without pattern, from a small linear congruential generator.
fn tensor(shape: [usize; 4], seed: u32) -> Result<HostTensor, Error> {
    let mut state = seed;
    let values: Vec<f32> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    })
    .take(shape.iter().product())
    .collect();
    HostTensor::from_f32(Layout::hnd(shape), DType::F16, &values)
}
