//! The benchmark suites: named lists of [`Case`]s, timed on one backend with one recipe.
//!
//! Both `cargo bench` and the command `sageattn bench` call [`run`]. `benches/README.md` says what is
//! measured, and on which clock.
//!
//! ```
//! use sageattn_bench::{Options, run};
//! use sageattn_core::Cpu;
//!
//! let options = Options { min_runs: 1, budget: std::time::Duration::ZERO, ..Options::default() };
//! let rows = run("quick", &Cpu::new(), &options, &mut |event| {
//!     // A progress bar.
//!     let _ = event;
//! })?;
//! assert!(rows.iter().all(|row| row.call_us > 0.0));
//! # Ok::<(), sageattn_core::Error>(())
//! ```

mod measure;

use std::time::Duration;

use serde::Serialize;

use sageattn_conformance::case::{self, Case};
use sageattn_core::{Backend, Error, Recipe};

pub use measure::measure;

const SUITES: [(&str, &str); 5] = [
    ("quick", include_str!("../suites/quick.toml")),
    ("field", include_str!("../suites/field.toml")),
    ("decode", include_str!("../suites/decode.toml")),
    ("lengths", include_str!("../suites/lengths.toml")),
    ("portable", include_str!("../suites/portable.toml")),
];

/// How to measure.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// The recipe; `None` for the one that the backend prefers for each problem.
    pub recipe: Option<Recipe>,
    /// The least number of runs behind each median.
    pub min_runs: usize,
    /// Runs go on until they took this long together, for each of a case's two measurements.
    pub budget: Duration,
}

impl Default for Options {
    /// Five runs and half a second.
    fn default() -> Self {
        Self {
            recipe: None,
            min_runs: 5,
            budget: Duration::from_millis(500),
        }
    }
}

/// The result of one case.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// The case's name.
    pub case: String,
    /// `batch x q_heads[/kv_heads] x q_len[/kv_len] x head_dim`, as it was run.
    pub shape: String,
    /// Whether the shape was scaled down because the device is software.
    pub scaled_down: bool,
    /// The mask: `none`, `causal-top-left`, `causal-bottom-right`.
    pub mask: &'static str,
    /// The element type of the tensors.
    pub dtype: &'static str,
    /// The backend's name.
    pub backend: &'static str,
    /// The device's name.
    pub device: String,
    /// The kernel variant.
    pub variant: String,
    /// The recipe, smoothing included.
    pub recipe: String,
    /// Medians of the stages of one run, in order.
    pub stages: Vec<Stage>,
    /// What timed the stages: `device` or `host`.
    pub clock: &'static str,
    /// Median of one call: enqueue, compute, wait. Host clock.
    pub call_us: f64,
    /// Median time of a call when several are enqueued before one wait. Host clock.
    pub queued_us: f64,
    /// Runs behind the medians.
    pub runs: usize,
    /// Operations per second of the whole call, quantization included, from `queued_us`; 10^12.
    pub tops: f64,
    /// The same of the stage `attend` alone; `None` where there is no such stage.
    pub attend_tops: Option<f64>,
}

/// One stage of a run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Stage {
    /// Its name.
    pub name: &'static str,
    /// Its median.
    pub median_us: f64,
}

/// What happens while a suite runs.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// A case begins.
    Started {
        /// Its name.
        case: &'a str,
        /// How many came before it.
        index: usize,
        /// How many there are.
        count: usize,
    },
    /// The backend refused a case, or has no memory for it.
    Refused {
        /// Its name.
        case: &'a str,
        /// Why.
        reason: &'a Error,
    },
    /// A case is done.
    Measured(&'a Row),
}

/// The names of the suites.
pub fn suites() -> [&'static str; 5] {
    SUITES.map(|(name, _)| name)
}

/// The cases of a suite.
///
/// # Errors
/// [`Error::Invalid`] when there is no such suite.
pub fn cases(suite: &str) -> Result<Vec<Case>, Error> {
    let Some((name, text)) = SUITES.iter().find(|(name, _)| *name == suite) else {
        let known = suites().join(", ");
        let reason = format!("unknown name {suite:?}; the known ones are {known}");
        return Err(Error::invalid("suite", reason));
    };
    case::parse(name, text).map_err(|reason| Error::invalid("suite", reason))
}

/// Runs a suite on one backend. A case that the backend refuses or has no memory for is an event, not
/// an error.
///
/// # Errors
/// [`Error::Invalid`] when there is no such suite, or what the backend said.
pub fn run(
    suite: &str,
    backend: &dyn Backend,
    options: &Options,
    progress: &mut dyn FnMut(Event<'_>),
) -> Result<Vec<Row>, Error> {
    let cases = cases(suite)?;
    let mut rows = Vec::with_capacity(cases.len());
    for (index, case) in cases.iter().enumerate() {
        progress(Event::Started {
            case: &case.name,
            index,
            count: cases.len(),
        });
        match measure(case, backend, options) {
            Ok(row) => {
                progress(Event::Measured(&row));
                rows.push(row);
            }
            Err(reason @ (Error::Unsupported(_) | Error::OutOfMemory { .. })) => {
                progress(Event::Refused {
                    case: &case.name,
                    reason: &reason,
                });
            }
            Err(error) => return Err(error),
        }
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use sageattn_core::{Cpu, DeviceKind};

    #[test]
    fn every_suite_parses_and_is_small_on_software() {
        for suite in suites() {
            for case in cases(suite).unwrap() {
                let problem = case.problem_on(DeviceKind::Cpu).unwrap();
                assert!(problem.flops() < 2_000_000_000, "{}", case.name);
            }
        }
        assert!(cases("nothing").is_err());
    }

    #[test]
    fn a_row_says_what_was_run() {
        let case = &cases("quick").unwrap()[3];
        let options = Options {
            min_runs: 2,
            budget: Duration::ZERO,
            recipe: Some(Recipe::SAGE1_T),
        };
        let row = measure(case, &Cpu::new(), &options).unwrap();
        assert_eq!(row.shape, "1 x 4/1 x 1/1024 x 128");
        assert!(row.scaled_down && row.runs == 2 && row.clock == "host");
        assert_eq!(row.recipe, "sage1-t");
        let attend = row.attend_tops.unwrap();
        assert!(row.tops > 0.0 && attend > 0.0, "{row:?}");
        let json = serde_json::to_value(&row).unwrap();
        assert_eq!(json["stages"][0]["name"], "quantize");
    }
}
