//! `cargo xtask accuracy`: the table of every recipe on every file, through the command itself.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use sageattn_core::{Recipe, Smooth};
use serde::Deserialize;

use crate::command::{cargo, root, stdout};

const DATA: &str = "tests/data";
const PAGE: &str = "docs/results/accuracy.md";

const INTRODUCTION: &str = "\
# Accuracy on real activations

Each recipe on each file of `tests/data`, on the CPU backend, against attention in f64. The metrics are
those of SageAttention (arXiv 2410.02367, section 4.1), over all elements of O: cosine similarity, relative L1
(sum of absolute errors over the sum of absolute values), root mean square error, and the largest error. O is
rounded to the files' f16 in every row; `exact` shows how much that alone costs.

*Smoothed*: the mean of the keys is subtracted before quantization, and, in `sage2-i4-f8`, the mean of each
block of queries as well. *No* is the same recipe with `+unsmoothed`.

Made by:

```
cargo xtask accuracy
```

which runs, for each row:

```
cargo run --release -- run FILE --backend cpu --recipe RECIPE --json
```
";

/// What is used of `sageattn run --json`.
#[derive(Deserialize)]
struct Report {
    recipe: String,
    cosine: f64,
    rel_l1: f64,
    rmse: f64,
    max_abs_error: f64,
}

pub(crate) fn accuracy() -> Result<()> {
    let root = root();
    let mut files = Vec::new();
    for entry in fs::read_dir(root.join(DATA)).context(DATA)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.ends_with(".safetensors") {
            files.push(name);
        }
    }
    files.sort_unstable();
    ensure!(!files.is_empty(), "no files in {DATA}");

    let mut page = INTRODUCTION.to_owned();
    for file in &files {
        println!("{file}");
        write!(page, "\n## {file}\n\n")?;
        page.push_str("| recipe | smoothed | cosine | relative L1 | RMSE | max error |\n");
        page.push_str("|---|---|---|---|---|---|\n");
        for (name, recipe) in Recipe::NAMED {
            let smooths = recipe.smooth != Smooth::Off;
            page.push_str(&row(file, name, if smooths { "yes" } else { "-" }, recipe)?);
            if smooths {
                page.push_str(&row(file, name, "no", recipe.with_smooth(Smooth::Off))?);
            }
        }
    }
    let path = root.join(PAGE);
    fs::create_dir_all(path.parent().unwrap_or(Path::new(".")))?;
    fs::write(&path, page).with_context(|| PAGE.to_owned())?;
    println!("wrote {PAGE}");
    Ok(())
}

fn row(file: &str, name: &str, smoothed: &str, recipe: Recipe) -> Result<String> {
    let recipe = recipe.to_string();
    let mut command = cargo();
    command.args(["run", "--quiet", "--release", "--package", "sageattn-cli"]);
    command.args(["--", "run"]).arg(format!("{DATA}/{file}"));
    command.args(["--backend", "cpu", "--recipe", &recipe, "--json"]);
    let report = stdout(&mut command)?;
    let r: Report =
        serde_json::from_str(&report).with_context(|| format!("{file}, {recipe}: {report}"))?;
    ensure!(r.recipe == recipe, "asked for {recipe}, ran {}", r.recipe);
    Ok(format!(
        "| `{name}` | {smoothed} | {:.6} | {:.5} | {:.2e} | {:.2e} |\n",
        r.cosine, r.rel_l1, r.rmse, r.max_abs_error
    ))
}
