//! Runs one case with one recipe on one backend and holds the result to both oracles.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use sageattn_core::metrics::Metrics;
use sageattn_core::reference::exact::{self, Reference};
use sageattn_core::reference::faithful::{self, KernelCodes};
use sageattn_core::{
    Backend, DeviceKind, Error, HostOutput, HostTensor, Problem, Recipe, Rounding, Shape,
    Unsupported, round_to,
};

use crate::bounds;
use crate::case::{Case, Check};
use crate::guarded::{GuardedCall, Poison, Snapshot};
use crate::inputs::{Input, Planted};
use crate::{scratch, split};

/// Multiplications above which the oracles compute some heads instead of all.
const REFERENCE_BUDGET: u64 = 4_000_000_000;

/// A case with its tensors and what the oracles make of them, each computed at most once and shared
/// by every backend and recipe.
#[derive(Debug)]
pub struct Prepared {
    /// The case.
    pub case: Case,
    /// Its problem.
    pub problem: Problem,
    /// Q, K and V, dense.
    pub tensors: [HostTensor; 3],
    /// The same as f32.
    pub dense: [Vec<f32>; 3],
    /// The (batch, query head) pairs that are compared.
    heads: Vec<usize>,
    exact: OnceLock<Reference>,
    faithful: Mutex<HashMap<FaithfulKey, Arc<OnceLock<Arc<HostOutput>>>>>,
}

/// The rounding as it prints: it holds floats.
type FaithfulKey = (Recipe, String);

/// How far a result was from each oracle.
#[derive(Clone, Debug)]
pub struct Report {
    /// The kernel variant.
    pub variant: String,
    /// Against the faithful oracle; of merged halves, against one call.
    pub tight: Metrics,
    /// Of the worst row, against the faithful oracle.
    pub worst_row: f64,
    /// Against f64 attention.
    pub exact: Metrics,
    /// The bound on the relative L1 from f64, where there is one.
    pub exact_bound: Option<f64>,
    /// The difference of LSE from the faithful oracle; zero where none was asked for.
    pub lse: LseError,
    /// Codes compared, and how many were one off at a tie.
    pub codes: scratch::Compared,
}

/// How far LSE is off.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LseError {
    /// In the worst row.
    pub worst: f64,
    /// In the mean.
    pub mean: f64,
}

/// Why a case did not pass.
#[derive(Debug)]
pub enum Failure {
    /// The backend refused it.
    Unsupported(Unsupported),
    /// It ran, or should have, and was wrong.
    Wrong(String),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::Unsupported(refusal) => Self::Unsupported(refusal),
            other => Self::Wrong(other.to_string()),
        }
    }
}

impl From<String> for Failure {
    fn from(text: String) -> Self {
        Self::Wrong(text)
    }
}

impl std::error::Error for Failure {}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unsupported(refusal) => refusal.fmt(f),
            Self::Wrong(text) => f.write_str(text),
        }
    }
}

impl Prepared {
    /// Generates the tensors of a case as it is on a kind of device.
    ///
    /// # Errors
    /// When the case itself is at fault.
    pub fn new(case: &Case, kind: DeviceKind) -> Result<Self, Error> {
        let problem = case.problem_on(kind)?;
        let tensors = case.tensors(problem.shape())?;
        Ok(Self {
            heads: compared_heads(case, &problem),
            case: case.clone(),
            dense: [0, 1, 2].map(|i: usize| tensors[i].to_f32()),
            problem,
            tensors,
            exact: OnceLock::new(),
            faithful: Mutex::default(),
        })
    }

    /// f64 attention on the compared heads.
    pub fn exact(&self) -> &Reference {
        self.exact.get_or_init(|| {
            if self.compares_all() {
                return exact::attend(&self.problem, self.slices());
            }
            let mut all = Reference {
                out: Vec::new(),
                lse: Vec::new(),
            };
            for &head in &self.heads {
                let (problem, [q, k, v]) = self.one_head(head);
                let one = exact::attend(&problem, [q, k, v]);
                all.out.extend(one.out);
                all.lse.extend(one.lse);
            }
            all
        })
    }

    /// What the recipe makes of the compared heads under a rounding, O rounded to the output type.
    pub fn faithful(&self, recipe: &Recipe, rounding: &Rounding) -> Arc<HostOutput> {
        let key = (*recipe, format!("{rounding:?}"));
        let cell = {
            let mut cells = self.faithful.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(cells.entry(key).or_default())
        };
        // Computed outside the lock: other recipes of the case need not wait.
        let own = || Arc::new(self.attend(recipe, rounding, &KernelCodes::default()));
        Arc::clone(cell.get_or_init(own))
    }

    /// The same from the codes that a kernel left in its scratch.
    fn faithful_given(
        &self,
        recipe: &Recipe,
        rounding: &Rounding,
        kernel: &KernelCodes,
    ) -> Arc<HostOutput> {
        if *kernel == KernelCodes::default() {
            return self.faithful(recipe, rounding);
        }
        Arc::new(self.attend(recipe, rounding, kernel))
    }

    fn attend(&self, recipe: &Recipe, rounding: &Rounding, kernel: &KernelCodes) -> HostOutput {
        let attend = |problem: &Problem, tensors, kernel| {
            let mut prepared = faithful::Prepared::new(problem, recipe, tensors);
            prepared.adopt(kernel);
            prepared.attend(rounding)
        };
        let mut output = if self.compares_all() {
            attend(&self.problem, self.slices(), kernel.clone())
        } else {
            let mut all = HostOutput {
                out: Vec::new(),
                lse: self.case.lse.then(Vec::new),
            };
            for &head in &self.heads {
                let (problem, tensors) = self.one_head(head);
                let kv_head = head / self.problem.shape().heads_per_kv();
                let kernel = KernelCodes {
                    q: kernel.q.as_ref().map(|q| vec![q[head].clone()]),
                    k: kernel.k.as_ref().map(|k| vec![k[kv_head].clone()]),
                    k_means: (kernel.k_means.as_ref()).map(|means| vec![means[kv_head].clone()]),
                };
                let one = attend(&problem, tensors, kernel);
                all.out.extend(one.out);
                if let (Some(all), Some(one)) = (&mut all.lse, one.lse) {
                    all.extend(one);
                }
            }
            all
        };
        round_to(self.problem.dtype(), &mut output.out);
        output
    }

    /// The rows of the compared heads, `width` values each, out of those of all heads.
    pub fn compared(&self, values: &[f32], width: usize) -> Vec<f32> {
        let size = self.problem.shape().q_len * width;
        let heads = self.heads.iter();
        heads
            .flat_map(|head| &values[head * size..(head + 1) * size])
            .copied()
            .collect()
    }

    fn slices(&self) -> [&[f32]; 3] {
        let [q, k, v] = &self.dense;
        [q, k, v]
    }

    fn compares_all(&self) -> bool {
        let shape = self.problem.shape();
        self.heads.len() == shape.batch * shape.q_heads
    }

    /// The problem of one (batch, query head) pair alone, and its tensors.
    fn one_head(&self, head: usize) -> (Problem, [&[f32]; 3]) {
        let shape = self.problem.shape();
        let (q, kv) = (shape.q_len * shape.head_dim, shape.kv_len * shape.head_dim);
        let kv_head = head / shape.heads_per_kv();
        let [all_q, all_k, all_v] = self.slices();
        let alone = Shape {
            batch: 1,
            q_heads: 1,
            kv_heads: 1,
            ..*shape
        };
        let problem = Problem::new(alone, self.problem.dtype())
            .and_then(|p| p.with_softmax_scale(self.problem.softmax_scale()))
            .map(|p| {
                p.with_mask(self.problem.mask())
                    .with_outputs(self.problem.outputs())
            });
        (
            // One head of a valid problem is a valid problem.
            problem.unwrap_or(self.problem),
            [
                &all_q[head * q..][..q],
                &all_k[kv_head * kv..][..kv],
                &all_v[kv_head * kv..][..kv],
            ],
        )
    }
}

/// Runs a case with one recipe on one backend.
///
/// # Errors
/// [`Failure`], with everything that was out of bounds.
pub fn run(backend: &dyn Backend, prepared: &Prepared, recipe: &Recipe) -> Result<Report, Failure> {
    match prepared.case.check {
        Check::Call => call(backend, prepared, recipe),
        Check::SplitKeys => split::run(backend, prepared, recipe),
    }
}

fn call(backend: &dyn Backend, prepared: &Prepared, recipe: &Recipe) -> Result<Report, Failure> {
    let [q, k, v] = &prepared.tensors;
    let staged = GuardedCall::new(
        backend,
        &prepared.case,
        &prepared.problem,
        recipe,
        [q, k, v],
    )?;
    let description = staged.describe();
    if description.recipe != *recipe {
        return Err(Failure::Wrong(format!(
            "planned {description} for {recipe}"
        )));
    }
    let first = staged.run(Poison::Ones)?;
    let second = staged.run(Poison::Quiet)?;
    same_bits(&first, &second)?;

    let planted = matches!(prepared.case.input, Input::Planted { .. });
    let (codes, kernel) = if planted {
        Default::default()
    } else {
        scratch::check(
            &description,
            &prepared.problem,
            prepared.slices(),
            &first.scratch,
        )?
    };
    judge(
        prepared,
        recipe,
        &description.rounding,
        &description.variant,
        codes,
        &kernel,
        &first,
    )
}

/// Holds a result to both oracles.
fn judge(
    prepared: &Prepared,
    recipe: &Recipe,
    rounding: &Rounding,
    variant: &str,
    codes: scratch::Compared,
    kernel: &KernelCodes,
    got: &Snapshot,
) -> Result<Report, Failure> {
    let problem = &prepared.problem;
    let head_dim = problem.shape().head_dim;
    let out = prepared.compared(&got.out, head_dim);
    let lse = got.lse.as_ref().map(|lse| prepared.compared(lse, 1));
    // In the mean the oracle's own codes will do. A single row shows one code at a tie, so rows are
    // held to what attention makes of the kernel's codes, which `scratch` has checked.
    let own: Vec<f64> = widen(&prepared.faithful(recipe, rounding).out);
    let given = prepared.faithful_given(recipe, rounding, kernel);
    let expected = widen(&given.out);

    let mut wrong = Vec::new();
    blind_rows(problem, &out, lse.as_deref(), &mut wrong);
    let exact = prepared.exact();
    let report = Report {
        variant: variant.to_owned(),
        tight: Metrics::compare(&out, &own),
        worst_row: Metrics::worst_row(&out, &expected, head_dim, bounds::ROW_FLOOR),
        exact: Metrics::compare(&out, &exact.out),
        exact_bound: bounds::exact(prepared.case.bound, recipe, problem.dtype()),
        lse: match (&lse, &given.lse) {
            (Some(got), Some(expected)) => lse_error(got, expected),
            _ => LseError::default(),
        },
        codes,
    };
    let mut require = |what: &str, value: f64, bound: f64| {
        if !bounds::within(value, bound) {
            wrong.push(format!("{what} is {value:.3e}, above {bound:.3e}"));
        }
    };
    let dtype = problem.dtype();
    require(
        "relative L1 from faithful",
        report.tight.rel_l1,
        bounds::tight(dtype, recipe),
    );
    require(
        "worst row's relative L1 from faithful",
        report.worst_row,
        bounds::worst_row(recipe),
    );
    // Codes that the kernel keeps to itself may differ from the oracle's at ties.
    let same_codes = kernel.q.is_some() && kernel.k.is_some();
    let row = if same_codes {
        bounds::LSE
    } else {
        bounds::LSE_AT_TIES
    };
    require("LSE's mean error", report.lse.mean, bounds::LSE);
    require("LSE's error in one row", report.lse.worst, row);
    if let Some(bound) = report.exact_bound {
        require("relative L1 from exact", report.exact.rel_l1, bound);
    }
    if report.tight.not_finite + report.exact.not_finite > 0 {
        wrong.push(format!(
            "{} elements of O are not finite where faithful is, {} where exact is",
            report.tight.not_finite, report.exact.not_finite
        ));
    }
    if wrong.is_empty() {
        return Ok(report);
    }
    let worst = worst_row(&out, &expected, head_dim, problem.shape().q_len);
    Err(Failure::Wrong(format!(
        "{variant}: {}; {worst}",
        wrong.join("; ")
    )))
}

fn widen(values: &[f32]) -> Vec<f64> {
    values.iter().copied().map(f64::from).collect()
}

/// Rows that see no key: O = 0 and LSE = -inf, exactly.
fn blind_rows(problem: &Problem, out: &[f32], lse: Option<&[f32]>, wrong: &mut Vec<String>) {
    let shape = problem.shape();
    let seen = |row: usize| problem.visible_keys(row % shape.q_len) > 0;
    let rows = out.chunks_exact(shape.head_dim).enumerate();
    let dirty = rows
        .filter(|(row, values)| !seen(*row) && values.iter().any(|&x| x != 0.0))
        .count();
    if dirty > 0 {
        wrong.push(format!("{dirty} rows that see no key are not zero"));
    }
    let rows = lse.unwrap_or_default().iter().enumerate();
    let dirty = rows
        .filter(|&(row, &lse)| seen(row) == (lse == f32::NEG_INFINITY))
        .count();
    if dirty > 0 {
        wrong.push(format!(
            "LSE of {dirty} rows is -inf where it sees keys, or is not where it sees none"
        ));
    }
}

/// The error of LSE, in absolute terms up to [`LSE_LARGE`] and relative to it beyond: an f32 that sums
/// f32 products has no more digits.
pub(crate) fn lse_error(got: &[f32], expected: &[f32]) -> LseError {
    let mut total = 0.0;
    let mut worst: f64 = if got.len() == expected.len() {
        0.0
    } else {
        f64::INFINITY
    };
    for (&a, &b) in got.iter().zip(expected) {
        if a == b {
            continue;
        }
        let (a, b) = (f64::from(a), f64::from(b));
        let error = (a - b).abs() / (b.abs() / LSE_LARGE).max(1.0);
        total += error;
        worst = worst.max(if error.is_nan() { f64::INFINITY } else { error });
    }
    LseError {
        worst,
        mean: total / expected.len().max(1) as f64,
    }
}

/// Above this LSE's error is relative.
const LSE_LARGE: f64 = 10.0;

fn same_bits(first: &Snapshot, second: &Snapshot) -> Result<(), String> {
    let bits = |snapshot: &Snapshot| -> Vec<u32> {
        let lse = snapshot.lse.iter().flatten();
        snapshot
            .out
            .iter()
            .chain(lse)
            .map(|x| x.to_bits())
            .collect()
    };
    let (first, second) = (bits(first), bits(second));
    let differ = first.iter().zip(&second).filter(|(a, b)| a != b).count();
    if differ == 0 && first.len() == second.len() {
        return Ok(());
    }
    Err(format!(
        "{differ} of {} values differ between two runs, before which outputs and scratch held different bytes",
        first.len()
    ))
}

/// Where to look: the row with the largest error.
fn worst_row(out: &[f32], expected: &[f64], head_dim: usize, q_len: usize) -> String {
    let errors = out
        .chunks(head_dim)
        .zip(expected.chunks(head_dim))
        .map(|(a, b)| {
            a.iter()
                .zip(b)
                .map(|(&a, &b)| (f64::from(a) - b).abs())
                .sum::<f64>()
        });
    let worst = errors
        .enumerate()
        .max_by(|a, b| a.1.total_cmp(&b.1))
        .unwrap_or_default();
    let (head, row) = (worst.0 / q_len, worst.0 % q_len);
    format!(
        "the worst row is {row} of compared head {head}, off by {:.3e} in sum",
        worst.1
    )
}

/// The heads that are compared: all, unless the oracles would take too long or a planted value spoils
/// some.
fn compared_heads(case: &Case, problem: &Problem) -> Vec<usize> {
    let shape = problem.shape();
    let all = shape.batch * shape.q_heads;
    if let Input::Planted { tensor, .. } = case.input {
        let spoiled = match tensor {
            Planted::Q => 1,
            Planted::K | Planted::V => shape.heads_per_kv(),
        };
        return (0..all - spoiled).collect();
    }
    let per_head = problem.flops() / all as u64;
    let affordable = usize::try_from(REFERENCE_BUDGET / per_head.max(1)).unwrap_or(all);
    if affordable >= all {
        return (0..all).collect();
    }
    // The first and the last, and others evenly between.
    let count = affordable.max(2).min(all);
    (0..count)
        .map(|i| i * (all - 1) / (count - 1).max(1))
        .collect()
}
