//! The whole suite: every backend present x every case x its recipes, as trials of `libtest-mimic`.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use libtest_mimic::{Arguments, Completion, Failed, Trial};
use sageattn_core::{DeviceKind, Error, Recipe};

use crate::backends::{self, Absent, Found};
use crate::case::{self, Case};
use crate::contract;
use crate::expectations::Expectations;
use crate::report::{Tally, Verdict};
use crate::runner::{self, Failure, Prepared};

/// Comma-separated backends whose absence is a failure.
const REQUIRE: &str = "SAGEATTN_REQUIRE";

/// A file that receives every measurement of the run, tab-separated.
const REPORT: &str = "SAGEATTN_REPORT";

/// Runs the suite with the arguments of this process.
pub fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let (cases, expectations) = match (case::embedded(), Expectations::embedded()) {
        (Ok(cases), Ok(expectations)) => (cases, expectations),
        (Err(text), _) | (_, Err(text)) => return refuse(&text),
    };
    let (found, absent) = backends::all();
    let required: Vec<String> = std::env::var(REQUIRE)
        .unwrap_or_default()
        .split(',')
        .map(|name| name.trim().to_owned())
        // A compiler is no backend: the tests that compile kernels ask for it.
        .filter(|name| !name.is_empty() && name != "nvrtc")
        .collect();

    let suite = Suite {
        expectations: Arc::new(expectations),
        tally: Arc::new(Tally::default()),
        prepared: Arc::default(),
    };
    let mut trials: Vec<Trial> = found
        .iter()
        .flat_map(|found| suite.trials(found, &cases))
        .collect();
    trials.extend(suite.missing(&found, &absent, &required));
    if !arguments.list {
        tell(&heading(&found, &absent));
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    if arguments.list {
        return conclusion.exit_code();
    }
    let mut complaints = Vec::new();
    if conclusion.num_filtered_out == 0 {
        complaints.extend(suite.too_few(&found));
    }
    if conclusion.num_passed + conclusion.num_failed == 0 {
        complaints.push("no trial ran".to_owned());
    }
    if let Some(Err(error)) =
        std::env::var_os(REPORT).map(|path| std::fs::write(path, suite.tally.table()))
    {
        complaints.push(format!("{REPORT}: {error}"));
    }
    tell(&suite.tally.worst());
    for complaint in &complaints {
        tell(&format!("FAILED: {complaint}\n"));
        suite.tally.count("suite", Verdict::Failed);
    }
    // A trial that panics is counted by no one but the harness.
    for _ in suite.tally.failed()..conclusion.num_failed {
        suite.tally.count("panicked", Verdict::Failed);
    }
    tell(&suite.tally.lines());
    if complaints.is_empty() {
        conclusion.exit_code()
    } else {
        ExitCode::FAILURE
    }
}

struct Suite {
    expectations: Arc<Expectations>,
    tally: Arc<Tally>,
    prepared: Arc<Cache>,
}

/// Tensors and references by case and kind of device, each made when the first trial needs it.
#[derive(Default)]
struct Cache(Mutex<BTreeMap<(String, bool), Slot>>);

type Slot = Arc<OnceLock<Result<Prepared, Error>>>;

impl Cache {
    fn get(&self, case: &Case, kind: DeviceKind) -> Slot {
        let key = (case.name.clone(), kind == DeviceKind::Gpu);
        let cell = {
            let mut cells = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(cells.entry(key).or_default())
        };
        cell.get_or_init(|| Prepared::new(case, kind));
        cell
    }
}

impl Suite {
    /// Every trial of one backend.
    fn trials(&self, found: &Found, cases: &[Case]) -> Vec<Trial> {
        let mut trials = Vec::new();
        for case in cases {
            for recipe in &case.recipes {
                trials.push(self.trial(found, case.clone(), *recipe));
            }
        }
        for (name, check) in contract::ALL {
            let device = found.device.clone();
            let (tally, label) = (Arc::clone(&self.tally), found.label.clone());
            trials.push(Trial::ignorable_test(
                format!("[{label}] contract/{name}"),
                move || match check(&*device) {
                    Ok(contract::Outcome::Held) => passed(&tally, &label),
                    Ok(contract::Outcome::NotHere(reason)) => Ok(ignored(&tally, &label, &reason)),
                    Err(text) => Err(failed(&tally, &label, &text)),
                },
            ));
        }
        trials
    }

    fn trial(&self, found: &Found, case: Case, recipe: Recipe) -> Trial {
        let Found {
            label,
            name: backend,
            device,
        } = found.clone();
        let (tally, cache) = (Arc::clone(&self.tally), Arc::clone(&self.prepared));
        let expectations = Arc::clone(&self.expectations);
        let name = format!("[{label}] {} {recipe}", case.name);
        Trial::ignorable_test(name, move || {
            let info = device.device();
            let recipe_name = recipe.to_string();
            let known = expectations.known_failure(&backend, &info.name, &case.name, &recipe_name);
            let cell = cache.get(&case, info.kind);
            let result = match cell.get() {
                Some(Ok(prepared)) => runner::run(&*device, prepared, &recipe),
                Some(Err(error)) => Err(Failure::Wrong(format!("the case itself: {error}"))),
                None => Err(Failure::Wrong("the case was not prepared".to_owned())),
            };
            let gap = expectations.refusal(&backend, &recipe, case.dtype);
            match (result, known) {
                (Ok(_), None) if let Some(gap) = gap => {
                    let text =
                        format!("runs, but expectations.toml has it refused: {}", gap.reason);
                    Err(failed(&tally, &label, &text))
                }
                (Ok(report), None) => {
                    tally.measured(&label, &case, &recipe_name, &report);
                    passed(&tally, &label)
                }
                (Ok(_), Some(known)) => {
                    let text = format!("passes, but expectations.toml says: {}", known.reason);
                    Err(failed(&tally, &label, &text))
                }
                (Err(_), Some(known)) => {
                    let reason = format!("known failure: {}", known.reason);
                    Ok(ignored(&tally, &label, &reason))
                }
                (Err(Failure::Unsupported(refusal)), None)
                    if gap.is_some() || !expectations.claims(&backend).recipe(&recipe) =>
                {
                    Ok(ignored(&tally, &label, &refusal.missing.join("; ")))
                }
                (Err(failure), None) => {
                    let text = format!("{failure}\n  case: {}", case.why);
                    Err(failed(&tally, &label, &text))
                }
            }
        })
    }

    /// One trial per backend that is not there: ignored, or failed where it is required.
    fn missing(&self, found: &[Found], absent: &[Absent], required: &[String]) -> Vec<Trial> {
        let mut missing: Vec<(String, String)> = absent
            .iter()
            .map(|absent| (absent.name.to_owned(), absent.reason.clone()))
            .collect();
        for name in required {
            let known = found.iter().any(|found| found.device.name() == name)
                || absent.iter().any(|absent| absent.name == name);
            if !known {
                missing.push((name.clone(), "there is no such backend".to_owned()));
            }
        }
        let trials = missing.into_iter().map(|(name, reason)| {
            let tally = Arc::clone(&self.tally);
            let required = required.contains(&name);
            Trial::ignorable_test(format!("[{name}]"), move || {
                if required {
                    let text = format!("{REQUIRE} asks for {name}: {reason}");
                    Err(failed(&tally, &name, &text))
                } else {
                    Ok(ignored(&tally, &name, &reason))
                }
            })
        });
        trials.collect()
    }

    /// Backends on which fewer trials ran than the committed number.
    fn too_few(&self, found: &[Found]) -> Vec<String> {
        let short = found.iter().filter_map(|found| {
            let at_least = self.expectations.claims(&found.name).at_least;
            let counts = self.tally.counts(&found.label);
            let ran = counts.passed + counts.failed;
            (ran < at_least).then(|| {
                format!(
                    "{}: {ran} trials ran, expectations.toml says at least {at_least}",
                    found.label
                )
            })
        });
        let mut complaints: Vec<String> = short.collect();
        if found.is_empty() {
            complaints.push("no backend at all".to_owned());
        }
        complaints
    }
}

fn passed(tally: &Tally, backend: &str) -> Result<Completion, Failed> {
    tally.count(backend, Verdict::Passed);
    Ok(Completion::Completed)
}

fn ignored(tally: &Tally, backend: &str, reason: &str) -> Completion {
    tally.count(backend, Verdict::Ignored);
    Completion::ignored_with(reason)
}

fn failed(tally: &Tally, backend: &str, text: &str) -> Failed {
    tally.count(backend, Verdict::Failed);
    Failed::from(text)
}

fn heading(found: &[Found], absent: &[Absent]) -> String {
    let mut text = String::new();
    for found in found {
        let info = found.device.device();
        text += &format!("{}: {} ({})\n", found.label, info.name, info.driver);
    }
    for absent in absent {
        text += &format!("{}: absent, {}\n", absent.name, absent.reason);
    }
    text
}

#[expect(
    clippy::print_stdout,
    reason = "the report of a test binary belongs on its standard output"
)]
fn tell(text: &str) {
    print!("{text}");
}

fn refuse(text: &str) -> ExitCode {
    tell(&format!("FAILED: {text}\n0 passed, 1 failed\n"));
    ExitCode::FAILURE
}
