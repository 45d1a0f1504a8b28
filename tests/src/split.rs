//! Two halves of the keys, each attended to alone, merged by their LSE: what ring attention and
//! split-KV decoding do. Each half subtracts its own mean of the keys and has its own scales.

use sageattn_core::metrics::Metrics;
use sageattn_core::{
    Backend, Error, HostTensor, Layout, Outputs, Problem, Recipe, Shape, round_to,
};

use crate::bounds;
use crate::guarded::{GuardedCall, Poison, Snapshot};
use crate::runner::{Failure, Prepared, Report, lse_error};
use crate::scratch::Compared;

/// Runs the halves and the whole, and compares the merged result with the whole and with f64.
pub(crate) fn run(
    backend: &dyn Backend,
    prepared: &Prepared,
    recipe: &Recipe,
) -> Result<Report, Failure> {
    let problem = &prepared.problem;
    let kv_len = problem.shape().kv_len;
    let half = kv_len / 2;
    let (variant, whole) = part(backend, prepared, recipe, 0, kv_len)?;
    let (_, first) = part(backend, prepared, recipe, 0, half)?;
    let (_, second) = part(backend, prepared, recipe, half, kv_len)?;
    let (out, lse) = merge(problem, &first, &second)?;

    let bound = bounds::exact(prepared.case.bound, recipe, problem.dtype());
    let bound = bound.ok_or_else(|| "a split case needs a bound".to_owned())?;
    let one_call: Vec<f64> = whole.out.iter().map(|&x| f64::from(x)).collect();
    let head_dim = problem.shape().head_dim;
    let report = Report {
        variant,
        tight: Metrics::compare(&out, &one_call),
        worst_row: Metrics::worst_row(&out, &one_call, head_dim, bounds::ROW_FLOOR),
        exact: Metrics::compare(&out, &prepared.exact().out),
        exact_bound: Some(bound),
        lse: lse_error(&lse, whole.lse.as_deref().unwrap_or_default()),
        codes: Compared::default(),
    };
    let tolerance = bounds::split_lse(recipe);
    let checks = [
        // Halves and whole are each within the bound of f64, so they are within twice of each other.
        (
            "merged from one call, relative L1",
            report.tight.rel_l1,
            2.0 * bound,
        ),
        ("merged from exact, relative L1", report.exact.rel_l1, bound),
        ("merged LSE from one call", report.lse.worst, tolerance),
    ];
    for (what, value, bound) in checks {
        if !bounds::within(value, bound) {
            return Err(Failure::Wrong(format!(
                "{what} is {value:.3e}, above {bound:.3e}"
            )));
        }
    }
    match report.tight.not_finite + report.exact.not_finite {
        0 => Ok(report),
        n => Err(Failure::Wrong(format!("{n} elements are not finite"))),
    }
}

/// One call on the keys `from..to`.
fn part(
    backend: &dyn Backend,
    prepared: &Prepared,
    recipe: &Recipe,
    from: usize,
    to: usize,
) -> Result<(String, Snapshot), Failure> {
    let whole = &prepared.problem;
    let shape = Shape {
        kv_len: to - from,
        ..*whole.shape()
    };
    let problem = Problem::new(shape, whole.dtype())?
        .with_softmax_scale(whole.softmax_scale())?
        .with_outputs(Outputs::OAndLse);
    let [q, k, v] = &prepared.tensors;
    let (k, v) = (keys(k, from, to)?, keys(v, from, to)?);
    let call = GuardedCall::new(backend, &prepared.case, &problem, recipe, [q, &k, &v])?;
    Ok((call.describe().variant, call.run(Poison::Ones)?))
}

/// The rows `from..to` of every head.
fn keys(tensor: &HostTensor, from: usize, to: usize) -> Result<HostTensor, Error> {
    let [batch, heads, len, dim] = tensor.layout().shape();
    let values: Vec<f32> = tensor
        .to_f32()
        .chunks_exact(len * dim)
        .flat_map(|head| &head[from * dim..to * dim])
        .copied()
        .collect();
    let layout = Layout::hnd([batch, heads, to - from, dim]);
    HostTensor::from_f32(layout, tensor.dtype(), &values)
}

/// Weighs each half's rows by `exp(lse)`.
fn merge(
    problem: &Problem,
    first: &Snapshot,
    second: &Snapshot,
) -> Result<(Vec<f32>, Vec<f32>), String> {
    let dim = problem.shape().head_dim;
    let (Some(a), Some(b)) = (&first.lse, &second.lse) else {
        return Err("a split case needs LSE".to_owned());
    };
    let mut out = Vec::with_capacity(first.out.len());
    let mut lse = Vec::with_capacity(a.len());
    for (row, (&a, &b)) in a.iter().zip(b).enumerate() {
        let max = a.max(b);
        let (wa, wb) = ((a - max).exp(), (b - max).exp());
        lse.push(max + (wa + wb).ln());
        let rows = first.out[row * dim..][..dim]
            .iter()
            .zip(&second.out[row * dim..]);
        out.extend(rows.map(|(x, y)| (wa * x + wb * y) / (wa + wb)));
    }
    round_to(problem.dtype(), &mut out);
    Ok((out, lse))
}
