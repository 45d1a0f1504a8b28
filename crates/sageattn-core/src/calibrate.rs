//! SageAttention's adaptive choice: the fastest recipe that is accurate enough on a layer's own data
//! (arXiv 2410.02367, section 4.5).

use crate::metrics::Metrics;
use crate::reference::exact;
use crate::{Backend, Error, HostTensor, Problem, Recipe, attend_host};

/// The bound of the paper: the cosine similarity that the slower of its two candidates always shows.
pub const PAPER_MIN_COSINE: f64 = 0.998;

/// What calibration found for one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Calibration {
    /// The first candidate that reached the bound on every sample; `None` when none did.
    pub chosen: Option<Recipe>,
    /// Each candidate tried, with its lowest cosine similarity over the samples. Candidates after the
    /// chosen one are not tried.
    pub cosines: Vec<(Recipe, f64)>,
}

/// Tries `candidates` in order, fastest first, on sample inputs `[q, k, v]` of one layer, and takes
/// the first whose cosine similarity with exact attention, over the flattened O, is at least
/// `min_cosine` on every sample.
///
/// Run once per layer, offline; the choice costs nothing afterwards.
///
/// # Errors
/// [`Error::Invalid`] without samples, and whatever [`attend_host`] returns.
pub fn calibrate(
    backend: &dyn Backend,
    problem: &Problem,
    samples: &[[&HostTensor; 3]],
    candidates: &[Recipe],
    min_cosine: f64,
) -> Result<Calibration, Error> {
    if samples.is_empty() {
        return Err(Error::invalid("samples", "calibration needs at least one"));
    }
    let references: Vec<Vec<f64>> = samples
        .iter()
        .map(|[q, k, v]| exact::attend(problem, [&q.to_f32(), &k.to_f32(), &v.to_f32()]).out)
        .collect();
    let mut cosines = Vec::new();
    for recipe in candidates {
        let mut worst = f64::INFINITY;
        for (sample, reference) in samples.iter().zip(&references) {
            let got = attend_host(backend, problem, recipe, *sample)?;
            let metrics = Metrics::compare(&got.out, reference);
            // A result that is not finite is never accurate enough, whatever the rest looks like.
            let cosine = if metrics.not_finite == 0 {
                metrics.cosine
            } else {
                f64::NEG_INFINITY
            };
            worst = worst.min(cosine);
        }
        tracing::debug!(%recipe, cosine = worst, "calibrated");
        cosines.push((*recipe, worst));
        if worst >= min_cosine {
            return Ok(Calibration {
                chosen: Some(*recipe),
                cosines,
            });
        }
    }
    Ok(Calibration {
        chosen: None,
        cosines,
    })
}
