//! `sageattn bench`: the benchmark suites on one device.

use anyhow::{Result, bail};
use comfy_table::{CellAlignment, Table, presets};
use sageattn::Device;
use sageattn_bench::{Event, Options, Row};
use serde::Serialize;

use crate::args::BenchArgs;
use crate::report::time;
use crate::terminal::{Progress, print, print_json};

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report<'a> {
    suite: &'a str,
    rows: Vec<Row>,
    refused: Vec<Refused>,
}

#[derive(Debug, Serialize)]
struct Refused {
    case: String,
    reason: String,
}

pub(crate) fn bench(args: &BenchArgs) -> Result<()> {
    let choice = args.choice.parse()?;
    // Says which suites there are, before a device is opened.
    sageattn_bench::cases(&args.suite)?;
    let progress = Progress::start("opening a device");
    let device = choice.open_any()?;
    let options = Options {
        recipe: choice.recipe(),
        ..Options::default()
    };
    let mut refused = Vec::new();
    let rows = sageattn_bench::run(&args.suite, &*device, &options, &mut |event| match event {
        Event::Started { case, index, count } => {
            progress.say(format!("{case}, {} of {count}", index + 1));
        }
        Event::Refused { case, reason } => refused.push(Refused {
            case: case.to_owned(),
            reason: reason.to_string(),
        }),
        Event::Measured(_) => {}
    })?;
    drop(progress);
    if let (true, Some(first)) = (rows.is_empty(), refused.first()) {
        bail!(
            "no case of suite {} ran; {}: {}",
            args.suite,
            first.case,
            first.reason
        );
    }
    let report = Report {
        suite: &args.suite,
        rows,
        refused,
    };
    if args.json {
        print_json(&report)
    } else {
        print(&report.text(&device))
    }
}

impl Report<'_> {
    fn text(&self, device: &Device) -> String {
        let mut table = Table::new();
        table.load_style(presets::NOTHING).set_header([
            "case",
            "shape (q/kv)",
            "mask",
            "dtype",
            "variant",
            "recipe",
            "call",
            "queued",
            "TOPS",
            "attend TOPS",
        ]);
        for row in &self.rows {
            let scaled = if row.scaled_down { " (small)" } else { "" };
            table.add_row([
                row.case.clone(),
                format!("{}{scaled}", row.shape),
                row.mask.to_owned(),
                row.dtype.to_owned(),
                row.variant.clone(),
                row.recipe.clone(),
                time(row.call_us),
                time(row.queued_us),
                format!("{:.4}", row.tops),
                row.attend_tops
                    .map_or_else(|| "-".to_owned(), |tops| format!("{tops:.4}")),
            ]);
        }
        for column in table.column_iter_mut().skip(6) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        let mut text = format!("suite {} on {device}\n\n{}", self.suite, table.trim_fmt());
        for refused in &self.refused {
            text.push_str(&format!("\nrefused {}: {}", refused.case, refused.reason));
        }
        text
    }
}
