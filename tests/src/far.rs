//! Views that reach past 2^31 elements: 32-bit offsets wrap there (the official kernels did, from
//! some 100,000 tokens on). Strides do it, so that the host holds and compares only a few rows.

use sageattn_core::metrics::Metrics;
use sageattn_core::reference::faithful;
use sageattn_core::{
    Backend, Buffer, DType, Error, HostTensor, Io, Layout, Problem, Shape, TensorView, round_to,
};

use crate::bounds;
use crate::contract::{Outcome, is_hardware};
use crate::inputs;

const SHAPE: Shape = Shape {
    batch: 1,
    q_heads: 3,
    kv_heads: 3,
    q_len: 66,
    kv_len: 66,
    head_dim: 64,
};

/// Elements from one head to the next: the third begins past 2^31.
const HEAD_STRIDE: usize = (1 << 30) + 1024;

/// Three heads, 2^30 elements apart.
pub(crate) fn offsets_are_64_bit(backend: &dyn Backend) -> Result<Outcome, String> {
    if !is_hardware(backend) {
        let reason = "a software device has no 9 GiB to spare for it";
        return Ok(Outcome::NotHere(reason.to_owned()));
    }
    match attempt(backend) {
        Ok(error) if error <= bounds::tight(DType::F16, &backend_recipe(backend)?) => {
            Ok(Outcome::Held)
        }
        Ok(error) => Err(format!("relative L1 from faithful is {error:.3e}")),
        // A device that cannot hold or bind such a tensor must say so, and nothing is wrong.
        Err(refusal @ (Error::OutOfMemory { .. } | Error::Unsupported(_))) => {
            Ok(Outcome::NotHere(refusal.to_string()))
        }
        Err(error) => Err(error.to_string()),
    }
}

fn backend_recipe(backend: &dyn Backend) -> Result<sageattn_core::Recipe, String> {
    let problem = Problem::new(SHAPE, DType::F16).map_err(|e| e.to_string())?;
    Ok(backend.preferred(&problem))
}

fn attempt(backend: &dyn Backend) -> Result<f64, Error> {
    let problem = Problem::new(SHAPE, DType::F16)?;
    let recipe = backend.preferred(&problem);
    let plan = backend.plan(&problem, &recipe)?;
    // Rows of Q, K, V and O interleave in two buffers, so that two large ones are enough.
    let row = 4 * SHAPE.head_dim;
    let layout = |slot: usize| {
        let strides = [3 * HEAD_STRIDE, HEAD_STRIDE, row];
        Layout::strided(SHAPE.q(), strides, slot * SHAPE.head_dim)
    };
    let bytes = 2 * (layout(3).end().unwrap_or(usize::MAX) as u64).next_multiple_of(128);
    let (inputs_buffer, out_buffer) = (backend.alloc(bytes)?, backend.alloc(bytes)?);
    let workspace = backend.alloc(plan.workspace_bytes().max(4))?;

    let mut dense = Vec::new();
    for slot in 0..3 {
        let values = inputs::normal(9, slot as u64, SHAPE.q());
        let tensor = HostTensor::from_f32(Layout::hnd(SHAPE.q()), DType::F16, &values)?;
        for (start, row) in rows(layout(slot)).zip(tensor.bytes().chunks_exact(2 * SHAPE.head_dim))
        {
            backend.upload(inputs_buffer.as_ref(), start, row)?;
        }
        dense.push(tensor.to_f32());
    }
    let view = |buffer, slot| TensorView::new(buffer, layout(slot), DType::F16);
    let from = inputs_buffer.as_ref() as &dyn Buffer;
    let io = Io::bind(
        &problem,
        view(from, 0),
        view(from, 1),
        view(from, 2),
        view(out_buffer.as_ref(), 3),
        None,
    )?;
    plan.run(&io, workspace.as_ref())?;
    backend.synchronize()?;

    let mut out = Vec::new();
    for start in rows(layout(3)) {
        let mut row = vec![0; 2 * SHAPE.head_dim];
        backend.download(out_buffer.as_ref(), start, &mut row)?;
        out.extend(row);
    }
    let out = HostTensor::from_bytes(Layout::hnd(SHAPE.q()), DType::F16, out)?.to_f32();
    let rounding = plan.describe().rounding;
    let tensors = [&dense[0][..], &dense[1][..], &dense[2][..]];
    let mut expected = faithful::attend(&problem, &recipe, &rounding, tensors).out;
    round_to(DType::F16, &mut expected);
    let expected: Vec<f64> = expected.into_iter().map(f64::from).collect();
    Ok(Metrics::compare(&out, &expected).rel_l1)
}

/// The first byte of every row, in dense order.
fn rows(layout: Layout) -> impl Iterator<Item = u64> {
    let [_, heads, len, _] = layout.shape();
    (0..heads).flat_map(move |head| (0..len).map(move |row| 2 * layout.row(0, head, row) as u64))
}
