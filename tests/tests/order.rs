//! The order of SageAttention's own tables on the embedded activations: what the recipes are for.

#![expect(
    clippy::unwrap_used,
    reason = "a test fails by panicking, its helpers too"
)]

use sageattn_conformance::{case, data};
use sageattn_core::metrics::Metrics;
use sageattn_core::reference::exact;
use sageattn_core::{Cpu, DeviceKind, HostTensor, Problem, Recipe, Smooth, attend_host};

/// One input with its reference.
struct Sample {
    name: &'static str,
    problem: Problem,
    tensors: [HostTensor; 3],
    exact: Vec<f64>,
}

impl Sample {
    fn new(name: &'static str, problem: Problem, tensors: [HostTensor; 3]) -> Self {
        let [q, k, v] = [0, 1, 2].map(|i: usize| tensors[i].to_f32());
        let exact = exact::attend(&problem, [&q, &k, &v]).out;
        Self {
            name,
            problem,
            tensors,
            exact,
        }
    }

    /// Relative L1 of a recipe on the CPU.
    fn error(&self, recipe: Recipe) -> f64 {
        let [q, k, v] = &self.tensors;
        let output = attend_host(&Cpu::new(), &self.problem, &recipe, [q, k, v]).unwrap();
        Metrics::compare(&output.out, &self.exact).rel_l1
    }
}

fn files() -> Vec<Sample> {
    let files = data::names().map(|name| {
        let file = data::load(name).unwrap();
        Sample::new(name, file.problem, file.tensors)
    });
    files.collect()
}

/// SageAttention (arXiv 2410.02367), table 2: without smoothing, quantized keys lose most accuracy.
#[test]
fn smoothing_gains_on_biased_keys() {
    let smoothed = Recipe::SAGE1_B;
    let plain = smoothed.with_smooth(Smooth::Off);
    let kokoro = data::load("kokoro_albert_step1_n512").unwrap();
    let kokoro = Sample::new("kokoro", kokoro.problem, kokoro.tensors);
    let gain = kokoro.error(plain) / kokoro.error(smoothed);
    assert!(gain >= 1.5, "smoothing gains {gain:.2} on {}", kokoro.name);

    let text = r#"
        [[case]]
        name = "bias"
        why = "ten sigma"
        len = 1024
        head_dim = 128
        q_heads = 1
        input = { kind = "k-bias", sigmas = 10.0 }
    "#;
    let case = &case::parse("order", text).unwrap()[0];
    let problem = case.problem_on(DeviceKind::Cpu).unwrap();
    let bias = Sample::new("10 sigma", problem, case.tensors(problem.shape()).unwrap());
    let gain = bias.error(plain) / bias.error(smoothed);
    assert!(gain >= 5.0, "smoothing gains {gain:.2} on {}", bias.name);
}

/// Tables 3 and 6 of the same: finer groups are at least as accurate, and P V in INT8 at a static scale
/// costs far more than in f16.
#[test]
fn finer_is_better_and_static_int8_of_p_is_worse() {
    for sample in files() {
        let [t, b, vt, vb] = [
            Recipe::SAGE1_T,
            Recipe::SAGE1_B,
            Recipe::SAGE1_VT,
            Recipe::SAGE1_VB,
        ]
        .map(|recipe| sample.error(recipe));
        let name = sample.name;
        assert!(t <= b, "{name}: per token {t:.4}, per block {b:.4}");
        assert!(vt >= 1.8 * t, "{name}: static INT8 {vt:.4}, f16 {t:.4}");
        assert!(vb >= 1.8 * b, "{name}: static INT8 {vb:.4}, f16 {b:.4}");
    }
}

/// What is not quantized errs by the rounding of P and O alone, far below any recipe that quantizes.
#[test]
fn half_is_far_more_accurate_than_any_quantization() {
    for sample in files() {
        let [half, token] = [Recipe::HALF, Recipe::SAGE1_T].map(|recipe| sample.error(recipe));
        let name = sample.name;
        assert!(
            half <= token / 5.0,
            "{name}: half {half:.5}, per token {token:.5}"
        );
    }
}

/// The dynamic scale of P is what makes INT8 P V usable; INT4 is the coarsest of all.
#[test]
fn a_dynamic_scale_of_p_beats_a_static_one_and_int4_is_coarsest() {
    for sample in files() {
        let dynamic = sample.error(Recipe::I8_I8_DYN);
        let fixed = sample.error(Recipe::SAGE1_VT);
        let eight = sample.error(Recipe::SAGE2_I8_F8);
        let four = sample.error(Recipe::SAGE2_I4_F8);
        let name = sample.name;
        assert!(
            dynamic < fixed,
            "{name}: dynamic {dynamic:.4}, static {fixed:.4}"
        );
        assert!(
            four > 2.0 * eight,
            "{name}: INT4 {four:.4}, INT8 {eight:.4}"
        );
    }
}
