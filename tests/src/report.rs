//! Counting and telling: how many trials ran on each backend and how near their bounds they came.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Mutex, PoisonError};

use crate::case::{Case, Check};
use crate::runner::Report;

/// What became of a trial.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It ran and was right.
    Passed,
    /// It ran, or should have, and was not.
    Failed,
    /// It did not apply, or failed as it was known to.
    Ignored,
}

/// The tally of a whole run, shared by its trials.
#[derive(Debug, Default)]
pub struct Tally(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    counts: BTreeMap<String, Counts>,
    worst: BTreeMap<(String, String), Worst>,
    rows: Vec<String>,
}

/// Trials of one backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Ran and right.
    pub passed: usize,
    /// Wrong.
    pub failed: usize,
    /// Did not apply.
    pub ignored: usize,
}

#[derive(Debug, Default)]
struct Worst {
    tight: f64,
    row: f64,
    lse: f64,
    of_bound: f64,
    cosine: f64,
    near_ties: usize,
    codes: usize,
}

impl Tally {
    /// Counts one trial.
    pub fn count(&self, backend: &str, verdict: Verdict) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let counts = state.counts.entry(backend.to_owned()).or_default();
        match verdict {
            Verdict::Passed => counts.passed += 1,
            Verdict::Failed => counts.failed += 1,
            Verdict::Ignored => counts.ignored += 1,
        }
    }

    /// Remembers how near its bounds a trial came.
    pub fn measured(&self, backend: &str, case: &Case, recipe: &str, report: &Report) {
        let (tight, exact) = (&report.tight, &report.exact);
        let row = format!(
            "{backend}\t{}\t{recipe}\t{}\t{:.3e}\t{:.3e}\t{:.3e}\t{:.6}\t{:.3e}\t{:.3e}\t{:.3e}",
            case.name,
            report.variant,
            tight.rel_l1,
            report.worst_row,
            exact.rel_l1,
            exact.cosine,
            exact.rmse,
            exact.max_abs_error,
            report.lse.worst,
        );
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.rows.push(row);
        if case.check == Check::SplitKeys {
            return;
        }
        let key = (backend.to_owned(), recipe.to_owned());
        let worst = state.worst.entry(key).or_insert_with(|| Worst {
            cosine: 1.0,
            ..Worst::default()
        });
        worst.tight = worst.tight.max(tight.rel_l1);
        worst.row = worst.row.max(report.worst_row);
        worst.lse = worst.lse.max(report.lse.worst);
        if let Some(bound) = report.exact_bound {
            worst.of_bound = worst.of_bound.max(exact.rel_l1 / bound);
            worst.cosine = worst.cosine.min(exact.cosine);
        }
        worst.near_ties += report.codes.near_ties;
        worst.codes += report.codes.codes;
    }

    /// The counts of one backend.
    pub fn counts(&self, backend: &str) -> Counts {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.counts.get(backend).copied().unwrap_or_default()
    }

    /// The failures of all backends.
    pub fn failed(&self) -> u64 {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state
            .counts
            .values()
            .map(|counts| counts.failed as u64)
            .sum()
    }

    /// The worst figures per backend and recipe, as a table for people; merged halves left out.
    pub fn worst(&self) -> String {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut text = format!(
            "{:<8} {:<24} {:>10} {:>10} {:>9} {:>12} {:>10}  codes one off at a tie\n",
            "worst of", "recipe", "faithful", "its row", "LSE", "exact/bound", "cosine"
        );
        for ((backend, recipe), worst) in &state.worst {
            let _ = writeln!(
                text,
                "{backend:<8} {recipe:<24} {:>10.2e} {:>10.2e} {:>9.1e} {:>12.3} {:>10.5}  {} of {}",
                worst.tight,
                worst.row,
                worst.lse,
                worst.of_bound,
                worst.cosine,
                worst.near_ties,
                worst.codes
            );
        }
        text
    }

    /// Every measurement, tab-separated with a heading.
    pub fn table(&self) -> String {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut rows = state.rows.clone();
        rows.sort_unstable();
        rows.insert(
            0,
            "backend\tcase\trecipe\tvariant\tfaithful_rel_l1\tfaithful_worst_row\texact_rel_l1\texact_cosine\texact_rmse\texact_max_abs_error\tlse_error".to_owned(),
        );
        rows.join("\n") + "\n"
    }

    /// The last lines of a run: each backend's counts, then all.
    pub fn lines(&self) -> String {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut text = String::new();
        let mut all = Counts::default();
        for (backend, counts) in &state.counts {
            let Counts {
                passed,
                failed,
                ignored,
            } = *counts;
            let _ = writeln!(
                text,
                "{backend}: {passed} passed, {failed} failed, {ignored} ignored"
            );
            all.passed += passed;
            all.failed += failed;
        }
        let _ = writeln!(text, "{} passed, {} failed", all.passed, all.failed);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_line_counts_every_backend() {
        let tally = Tally::default();
        tally.count("cpu", Verdict::Passed);
        tally.count("wgpu", Verdict::Failed);
        tally.count("wgpu", Verdict::Passed);
        tally.count("cuda", Verdict::Ignored);
        let lines = tally.lines();
        assert!(
            lines.contains("wgpu: 1 passed, 1 failed, 0 ignored\n"),
            "{lines}"
        );
        assert!(lines.ends_with("\n2 passed, 1 failed\n"), "{lines}");
    }
}
