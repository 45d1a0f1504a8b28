//! `sageattn run`: attention on a file, timed and compared with exact attention.

use std::time::{Duration, Instant};

use anyhow::Result;
use sageattn::metrics::Metrics;
use sageattn::{Error, Staged, reference};

use crate::args::{RunArgs, parse_mask};
use crate::input::Input;
use crate::output::Target;
use crate::report::Report;
use crate::terminal::{Progress, print, print_json};

/// Runs the command; `Ok(false)` when O is not finite though the input is.
pub(crate) fn run(args: &RunArgs) -> Result<bool> {
    // Everything that can be wrong without a device is found before one is opened.
    let choice = args.choice.parse()?;
    let mask = args.mask.as_deref().map(parse_mask).transpose()?;
    let target = args
        .output
        .as_deref()
        .map(|path| Target::new(path, &args.file));
    let target = target.transpose()?;
    let progress = Progress::start("reading the file");
    let input = Input::read(&args.file, mask)?;
    let problem = &input.problem;

    progress.say("opening a device");
    let (device, recipe) = choice.open(problem)?;
    let [q, k, v] = &input.tensors;
    let staged = Staged::new(&*device, problem, &recipe, [q, k, v])?;
    let plan = staged.describe();

    let median = time(&progress, || {
        staged.run()?;
        device.synchronize()
    })?;
    let out = staged.output()?.out;

    progress.say("computing exact attention on the CPU");
    let dense = input.tensors.each_ref().map(|tensor| tensor.to_f32());
    let exact = reference::exact::attend(problem, dense.each_ref().map(Vec::as_slice));
    let metrics = Metrics::compare(&out, &exact.out);
    if let Some(target) = target {
        target.write(problem, &out, input.metadata.clone(), &device, &plan)?;
    }
    drop(progress);

    let report = Report::new(&device, &plan, problem, median, &metrics);
    if args.json {
        print_json(&report)?;
    } else {
        print(&report.table())?;
    }
    Ok(out.iter().all(|x| x.is_finite()) || !input.is_finite())
}

/// The median wall-clock time of a call: the first, slower on most devices, does not count.
fn time(progress: &Progress, mut call: impl FnMut() -> Result<(), Error>) -> Result<Duration> {
    const ENOUGH: usize = 101;
    const FEW: usize = 4;
    const BUDGET: Duration = Duration::from_secs(1);
    // Where one call takes many seconds it has to do alone.
    const PATIENCE: Duration = Duration::from_secs(10);

    let mut times = Vec::with_capacity(ENOUGH);
    let start = Instant::now();
    loop {
        let count = times.len();
        let elapsed = start.elapsed();
        if count == ENOUGH || (count >= FEW && elapsed > BUDGET) || elapsed > PATIENCE {
            break;
        }
        progress.say(format!("running: {count} timed"));
        let start = Instant::now();
        call()?;
        times.push(start.elapsed());
    }
    let timed = if times.len() > 1 {
        &mut times[1..]
    } else {
        &mut times
    };
    timed.sort_unstable();
    Ok(timed[timed.len() / 2])
}
