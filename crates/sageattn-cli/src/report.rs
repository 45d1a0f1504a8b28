//! What `sageattn run` found, for people and for programs.

use std::time::Duration;

use comfy_table::{Table, presets};
use sageattn::metrics::Metrics;
use sageattn::{Description, Device, Problem};
use serde::Serialize;

use crate::args::mask_name;

/// The keys of `--json`, in this order. Numbers that are not finite become `null`.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    backend: &'static str,
    device: String,
    variant: String,
    recipe: String,
    shape: ShapeReport,
    /// The whole call, quantization included, without copies from and to the host.
    median_us: f64,
    /// 4 * head_dim operations per visible query-key pair, over the median.
    tops: f64,
    cosine: f64,
    rel_l1: f64,
    rmse: f64,
    max_abs_error: f64,
}

#[derive(Debug, Serialize)]
struct ShapeReport {
    batch: usize,
    q_heads: usize,
    kv_heads: usize,
    q_len: usize,
    kv_len: usize,
    head_dim: usize,
    dtype: &'static str,
    mask: &'static str,
    softmax_scale: f32,
}

impl Report {
    pub(crate) fn new(
        device: &Device,
        plan: &Description,
        problem: &Problem,
        median: Duration,
        metrics: &Metrics,
    ) -> Self {
        let shape = problem.shape();
        let seconds = median.as_secs_f64();
        Self {
            backend: device.name(),
            device: device.device().name,
            variant: plan.variant.clone(),
            recipe: plan.recipe.to_string(),
            shape: ShapeReport {
                batch: shape.batch,
                q_heads: shape.q_heads,
                kv_heads: shape.kv_heads,
                q_len: shape.q_len,
                kv_len: shape.kv_len,
                head_dim: shape.head_dim,
                dtype: problem.dtype().name(),
                mask: mask_name(problem.mask()),
                softmax_scale: problem.softmax_scale(),
            },
            median_us: seconds * 1e6,
            tops: problem.flops() as f64 / seconds / 1e12,
            cosine: metrics.cosine,
            rel_l1: metrics.rel_l1,
            rmse: metrics.rmse,
            max_abs_error: metrics.max_abs_error,
        }
    }

    /// The same as a table of two columns.
    pub(crate) fn table(&self) -> String {
        let s = &self.shape;
        let shape = format!(
            "batch {}, heads {}/{}, length {}/{}, head_dim {}, {}",
            s.batch, s.q_heads, s.kv_heads, s.q_len, s.kv_len, s.head_dim, s.dtype
        );
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        table.add_rows([
            ["backend", self.backend],
            ["device", &self.device],
            ["variant", &self.variant],
            ["recipe", &self.recipe],
            ["shape (q/kv)", &shape],
            ["mask", s.mask],
            ["softmax scale", &s.softmax_scale.to_string()],
            ["median time", &time(self.median_us)],
            ["TOPS", &format!("{:.4}", self.tops)],
            ["cosine", &format!("{:.6}", self.cosine)],
            ["relative L1", &format!("{:.5}", self.rel_l1)],
            ["RMSE", &format!("{:.3e}", self.rmse)],
            ["max error", &format!("{:.3e}", self.max_abs_error)],
        ]);
        table.trim_fmt()
    }
}

/// A time in the unit that suits it.
pub(crate) fn time(us: f64) -> String {
    match us {
        us if us < 1e3 => format!("{us:.1} us"),
        us if us < 1e6 => format!("{:.2} ms", us / 1e3),
        us => format!("{:.2} s", us / 1e6),
    }
}
