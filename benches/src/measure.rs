//! Timing of one case.

use std::time::{Duration, Instant};

use sageattn_conformance::case::Case;
use sageattn_core::{
    Align, Backend, Clock, DeviceKind, Error, HostTensor, Mask, Profile, Shape, Staged,
};

use crate::{Options, Row, Stage};

/// Calls enqueued before one wait.
const QUEUED: u32 = 8;

/// Times one case on one backend: the stages by [`Staged::profile`], then whole calls.
///
/// # Errors
/// What the backend said.
pub fn measure(case: &Case, backend: &dyn Backend, options: &Options) -> Result<Row, Error> {
    let device = backend.device();
    let problem = case.problem_on(device.kind)?;
    let recipe = options
        .recipe
        .unwrap_or_else(|| backend.preferred(&problem));
    // Before gigabytes of tensors are made for nothing.
    backend.supports(&problem, &recipe)?;
    let tensors: [HostTensor; 3] = case.tensors(problem.shape())?;
    let [q, k, v] = &tensors;
    let staged = Staged::new(backend, &problem, &recipe, [q, k, v])?;

    // The first run compiles and touches every page. A GPU that waited for its tensors has lowered its
    // clocks, and takes some hundred milliseconds of work to raise them.
    staged.run()?;
    backend.synchronize()?;
    if device.kind == DeviceKind::Gpu {
        repeat(options, || time_queued(&staged, backend))?;
    }

    let profiles = repeat(options, || staged.profile())?;
    let calls = repeat(options, || {
        let start = Instant::now();
        staged.run()?;
        backend.synchronize()?;
        Ok(start.elapsed())
    })?;
    let queued = match device.kind {
        DeviceKind::Gpu => repeat(options, || time_queued(&staged, backend))?,
        // Software has no queue to keep full.
        DeviceKind::Cpu | DeviceKind::SoftwareGpu => calls.clone(),
    };

    let stages = stage_medians(&profiles);
    let ops = problem.flops() as f64;
    let queued_us = median_us(&queued);
    let attend = stages.iter().find(|stage| stage.name == "attend");
    Ok(Row {
        case: case.name.clone(),
        shape: shape_text(problem.shape()),
        scaled_down: case.shape_on(device.kind) != case.shape,
        mask: match problem.mask() {
            Mask::Causal(Align::TopLeft) => "causal-top-left",
            Mask::Causal(Align::BottomRight) => "causal-bottom-right",
            _ => "none",
        },
        dtype: problem.dtype().name(),
        backend: backend.name(),
        device: device.name,
        variant: staged.describe().variant,
        recipe: recipe.to_string(),
        clock: match profiles.first().map(|profile| profile.clock) {
            Some(Clock::Device) => "device",
            Some(Clock::Host) | None => "host",
        },
        call_us: median_us(&calls),
        queued_us,
        runs: calls.len(),
        tops: ops / queued_us / 1e6,
        attend_tops: attend.map(|stage| ops / stage.median_us / 1e6),
        stages,
    })
}

/// The time of a call among several that are enqueued before one wait.
fn time_queued(staged: &Staged<'_>, backend: &dyn Backend) -> Result<Duration, Error> {
    let start = Instant::now();
    for _ in 0..QUEUED {
        staged.run()?;
    }
    backend.synchronize()?;
    Ok(start.elapsed() / QUEUED)
}

/// Repeats until both the least number of runs and the time budget are reached.
fn repeat<T>(options: &Options, mut f: impl FnMut() -> Result<T, Error>) -> Result<Vec<T>, Error> {
    let start = Instant::now();
    let mut results = Vec::new();
    while results.len() < options.min_runs.max(1) || start.elapsed() < options.budget {
        results.push(f()?);
    }
    Ok(results)
}

/// The median of each stage over all profiles.
fn stage_medians(profiles: &[Profile]) -> Vec<Stage> {
    let Some(first) = profiles.first() else {
        return Vec::new();
    };
    let names = first.stages.iter().enumerate();
    names
        .map(|(index, &(name, _))| {
            let times: Vec<Duration> = profiles
                .iter()
                .filter_map(|profile| profile.stages.get(index).map(|&(_, time)| time))
                .collect();
            Stage {
                name,
                median_us: median_us(&times),
            }
        })
        .collect()
}

fn median_us(times: &[Duration]) -> f64 {
    let mut times: Vec<f64> = times.iter().map(|time| time.as_secs_f64() * 1e6).collect();
    times.sort_unstable_by(f64::total_cmp);
    let middle = times.len() / 2;
    match times.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => times[middle],
        _ => (times[middle - 1] + times[middle]) / 2.0,
    }
}

fn shape_text(shape: &Shape) -> String {
    let pair = |a: usize, b: usize| {
        if a == b {
            a.to_string()
        } else {
            format!("{a}/{b}")
        }
    };
    let heads = pair(shape.q_heads, shape.kv_heads);
    let len = pair(shape.q_len, shape.kv_len);
    format!("{} x {heads} x {len} x {}", shape.batch, shape.head_dim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        let us = |n| Duration::from_micros(n);
        assert_eq!(median_us(&[us(9), us(1), us(4)]), 4.0);
        assert_eq!(median_us(&[us(4), us(1), us(2), us(100)]), 3.0);
    }
}
