//! Few queries against many keys: ranges of keys merged, heads packed into rows.

use libtest_mimic::Failed;
use sageattn_core::{
    Align, Backend, DType, Error, Mask, Outputs, Problem, Recipe, Shape, reference::exact,
};
use sageattn_wgpu::{Wgpu, wgpu};

use crate::Test;
use crate::interop::plain_device;
use crate::support::{Inputs, check, run};

pub(crate) const TESTS: &[Test] = &[
    ("decoding_agrees_with_the_oracle", agrees),
    ("decoding_takes_any_head_dim_and_element_type", head_dims),
    ("decoding_runs_under_default_limits", default_limits),
    ("decoding_without_native_packing_changes_no_bit", replaced),
    ("decoding_is_cut_where_bindings_are_small", small_bindings),
    ("decoding_in_small_dispatches_changes_no_bit", dispatches),
    ("decoding_quantized_agrees_with_the_oracle", quantized),
    ("few_queries_prefer_to_stay_unquantized", preferred),
];

const MASKS: [Mask; 3] = [
    Mask::None,
    Mask::Causal(Align::TopLeft),
    Mask::Causal(Align::BottomRight),
];

fn with_lse(shape: Shape, dtype: DType, mask: Mask) -> Result<Problem, Failed> {
    let problem = Problem::new(shape, dtype)?;
    Ok(problem.with_mask(mask).with_outputs(Outputs::OAndLse))
}

/// A call of `rows` query heads on each of two KV heads.
fn grouped(rows: usize, q_len: usize, kv_len: usize, head_dim: usize) -> Shape {
    Shape {
        batch: 2,
        q_heads: 2 * rows,
        kv_heads: 2,
        q_len,
        kv_len,
        head_dim,
    }
}

/// Packs that are full, too short and several; keys of one range, several, and one more than a range.
fn agrees(gpu: &Wgpu) -> Result<(), Failed> {
    for (rows, q_len, kv_len) in [
        (1, 1, 1),
        (4, 1, 700),
        (1, 3, 129),
        (3, 2, 257),
        (8, 1, 1025),
        (2, 16, 384),
        (1, 128, 130),
    ] {
        for mask in MASKS {
            let shape = grouped(rows, q_len, kv_len, 64);
            let problem = with_lse(shape, DType::F16, mask)?;
            check(gpu, &problem, &Recipe::HALF, &Inputs::noise(&shape))?;
        }
    }
    // Where the kernel without shuffles stands in for one that was found wrong, all of this passes as well.
    match gpu.notes().iter().find(|note| note.contains("shuffles")) {
        Some(note) => Err(note.as_str().into()),
        None => Ok(()),
    }
}

fn head_dims(gpu: &Wgpu) -> Result<(), Failed> {
    for head_dim in [1, 3, 8, 20, 65, 80, 128, 196, 255, 256] {
        for (dtype, mask) in DType::ALL.into_iter().zip(MASKS) {
            let shape = grouped(3, 2, 300, head_dim);
            let problem = with_lse(shape, dtype, mask)?;
            check(gpu, &problem, &Recipe::HALF, &Inputs::noise(&shape))?;
        }
    }
    Ok(())
}

fn default_limits(gpu: &Wgpu) -> Result<(), Failed> {
    let small = plain_device(gpu, wgpu::Limits::default())?;
    for (head_dim, dtype) in [(40, DType::F16), (128, DType::BF16), (256, DType::F32)] {
        let shape = grouped(4, 1, 900, head_dim);
        let problem = with_lse(shape, dtype, Mask::None)?;
        check(&small, &problem, &Recipe::HALF, &Inputs::noise(&shape))?;
    }
    Ok(())
}

fn same(gpu: &Wgpu, other: &Wgpu, problem: &Problem, what: &str) -> Result<(), Failed> {
    let inputs = Inputs::noise(problem.shape());
    let expected = run(gpu, problem, &Recipe::HALF, &inputs)?;
    let got = run(other, problem, &Recipe::HALF, &inputs)?;
    let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    if bits(&got.out) != bits(&expected.out) || got.lse != expected.lse {
        return Err(format!("{what} changes the result").into());
    }
    Ok(())
}

fn replaced(gpu: &Wgpu) -> Result<(), Failed> {
    let problem = with_lse(grouped(4, 1, 300, 64), DType::F16, Mask::None)?;
    let plain = gpu.without_native_instructions();
    same(gpu, &plain, &problem, "packing by hand")
}

fn small_bindings(gpu: &Wgpu) -> Result<(), Failed> {
    let shape = grouped(4, 2, 300, 64);
    let problem = with_lse(shape, DType::F16, Mask::Causal(Align::BottomRight))?;
    let whole = plain_device(gpu, wgpu::Limits::default())?;
    // A KV head of K takes 37.5 KiB: a batch's two fit 80, one fits 64; all partial results take 55 KiB.
    for bytes in [80 << 10, 64 << 10] {
        let limits = wgpu::Limits {
            max_storage_buffer_binding_size: bytes,
            ..wgpu::Limits::default()
        };
        let limited = plain_device(gpu, limits)?;
        same(&whole, &limited, &problem, "cutting into slices")?;
    }
    Ok(())
}

fn dispatches(gpu: &Wgpu) -> Result<(), Failed> {
    let problem = with_lse(grouped(5, 2, 700, 128), DType::BF16, Mask::None)?;
    same(
        gpu,
        &gpu.with_dispatch_ops(1),
        &problem,
        "one workgroup a dispatch",
    )
}

fn preferred(gpu: &Wgpu) -> Result<(), Failed> {
    let shape = |q_len| grouped(4, q_len, 2000, 128);
    for (q_len, few) in [(1, true), (16, true), (17, false)] {
        let got = gpu.preferred(&Problem::new(shape(q_len), DType::F16)?);
        if (got == Recipe::HALF) != few {
            return Err(format!("{q_len} queries: {got}").into());
        }
    }
    // What decoding returns is attention: far closer to f64 than any quantization.
    let problem = Problem::new(shape(1), DType::F16)?;
    let inputs = Inputs::noise(problem.shape()).rounded(DType::F16);
    let got = run(gpu, &problem, &Recipe::HALF, &inputs)?;
    let exact = exact::attend(&problem, [&inputs.q, &inputs.k, &inputs.v]);
    let error = sageattn_core::metrics::Metrics::compare(&got.out, &exact.out).rel_l1;
    if error > 5e-4 {
        return Err(format!("relative L1 {error:.2e} from exact attention").into());
    }
    // The kernel is made for few queries, and says so.
    let many = Problem::new(shape(129), DType::F16)?;
    match gpu.plan(&many, &Recipe::HALF) {
        Err(Error::Unsupported(refusal)) if refusal.to_string().contains("129 queries") => Ok(()),
        other => Err(format!("129 queries: {other:?}").into()),
    }
}

/// The quantized recipes share keys out as well: the same codes, in ranges.
fn quantized(gpu: &Wgpu) -> Result<(), Failed> {
    for recipe in [Recipe::SAGE1_B, Recipe::SAGE1_T, Recipe::I8_I8_DYN] {
        for (rows, q_len, kv_len, head_dim) in [
            (1, 1, 257, 64),
            (4, 1, 1100, 128),
            (3, 2, 700, 80),
            (2, 16, 520, 256),
            (1, 5, 300, 20),
        ] {
            for (mask, dtype) in MASKS.into_iter().zip(DType::ALL) {
                let shape = grouped(rows, q_len, kv_len, head_dim);
                let problem = with_lse(shape, dtype, mask)?;
                check(gpu, &problem, &recipe, &Inputs::noise(&shape))?;
            }
        }
        let variant = gpu.plan(&Problem::new(grouped(4, 1, 1100, 64), DType::F16)?, &recipe)?;
        let variant = variant.describe().variant;
        if !variant.contains("split") {
            return Err(format!("{variant} does not share keys out").into());
        }
    }
    Ok(())
}
