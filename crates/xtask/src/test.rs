//! `cargo xtask test`: everything that has to hold before a change is merged.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::command::{cargo, run};
use crate::{nvrtc, vulkan};

/// Sets up and runs the steps in order; stops at the first that fails, and names it.
pub(crate) fn test() -> Result<()> {
    let mut done = Vec::new();
    for (name, step) in STEPS {
        println!("\n== {name}");
        let start = Instant::now();
        let outcome = step();
        let time = start.elapsed();
        if let Err(error) = outcome {
            summarize(&done);
            println!("FAILED  {name} ({})", seconds(time));
            return Err(error).with_context(|| format!("step `{name}` failed"));
        }
        done.push((name, time));
    }
    summarize(&done);
    Ok(())
}

type Step = fn() -> Result<()>;

const STEPS: [(&str, Step); 9] = [
    ("format", || run(cargo().args(["fmt", "--all", "--check"]))),
    ("vulkan driver", || vulkan::set_up(requires("wgpu"))),
    ("cuda compiler", || nvrtc::set_up(requires("nvrtc"))),
    ("lints", || {
        run(cargo()
            .args(["clippy", "--workspace", "--all-targets"])
            .args(["--", "--deny", "warnings"]))
    }),
    // Each backend can be left out: the rest has to build without it.
    ("lints, no features", || {
        run(cargo()
            .args(["clippy", "--package", "sageattn", "--all-targets"])
            .args(["--no-default-features", "--", "--deny", "warnings"]))
    }),
    ("documentation", || {
        run(cargo()
            .args(["doc", "--workspace", "--no-deps"])
            .env("RUSTDOCFLAGS", "--deny warnings"))
    }),
    ("tests", || {
        let mut tests = cargo();
        if let Some(library) = nvrtc::for_tests() {
            tests.env(nvrtc::VARIABLE, library);
        }
        run(tests.args(["test", "--workspace", "--lib", "--bins", "--tests"]))
    }),
    ("documentation tests", || {
        run(cargo().args(["test", "--workspace", "--doc"]))
    }),
    ("examples", || {
        for example in EXAMPLES {
            run(cargo()
                .args(["run", "--package", "sageattn", "--example"])
                .arg(example))?;
        }
        Ok(())
    }),
];

const EXAMPLES: [&str; 3] = ["01-attend", "02-choose-a-backend", "03-reuse-a-plan"];

/// Whether `SAGEATTN_REQUIRE`, a list with commas, names the backend.
fn requires(backend: &str) -> bool {
    let required = std::env::var("SAGEATTN_REQUIRE").unwrap_or_default();
    required.split(',').any(|name| name.trim() == backend)
}

fn summarize(done: &[(&str, Duration)]) {
    println!("\n== summary");
    for (name, time) in done {
        println!("passed  {name} ({})", seconds(*time));
    }
    let total: Duration = done.iter().map(|(_, time)| *time).sum();
    println!("total   {}", seconds(total));
}

fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}
