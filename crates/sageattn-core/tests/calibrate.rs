//! SageAttention's adaptive choice, on the activations of trained layers.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a helper of tests reports by panicking"
)]

use std::path::Path;

use safetensors::SafeTensors;
use sageattn_core::calibrate::{PAPER_MIN_COSINE, calibrate};
use sageattn_core::{Cpu, DType, Error, HostTensor, Layout, Problem, Recipe, Shape};

fn load(file: &str) -> (Problem, [HostTensor; 3]) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/data")
        .join(file);
    let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensors = ["q", "k", "v"].map(|name| {
        let tensor = file.tensor(name).unwrap();
        let shape: [usize; 4] = tensor.shape().try_into().unwrap();
        HostTensor::from_bytes(Layout::hnd(shape), DType::F16, tensor.data().to_vec()).unwrap()
    });
    let [batch, heads, len, head_dim] = tensors[0].layout().shape();
    let problem = Problem::new(Shape::mha(batch, heads, len, head_dim), DType::F16).unwrap();
    (problem, tensors)
}

/// Fastest first: INT8 throughout where the layer bears it, else P V in f16.
const CANDIDATES: [Recipe; 2] = [Recipe::SAGE1_VB, Recipe::SAGE1_B];

#[test]
fn the_choice_differs_by_layer() {
    let choose = |file: &str, bound: f64| {
        let (problem, [q, k, v]) = load(file);
        calibrate(&Cpu::new(), &problem, &[[&q, &k, &v]], &CANDIDATES, bound).unwrap()
    };
    // Layer 3 has the flattest rows, where a static scale wastes most of P's 8 bits.
    let strict = 0.999;
    let layer0 = choose("minilm_l6_layer0_n480.safetensors", strict);
    let layer3 = choose("minilm_l6_layer3_n480.safetensors", strict);
    let layer5 = choose("minilm_l6_layer5_n480.safetensors", strict);
    assert_eq!(layer0.chosen, Some(Recipe::SAGE1_VB), "{layer0:?}");
    assert_eq!(layer3.chosen, Some(Recipe::SAGE1_B), "{layer3:?}");
    assert_eq!(layer5.chosen, Some(Recipe::SAGE1_VB), "{layer5:?}");
    assert_eq!(layer3.cosines.len(), 2, "the refused candidate is reported");

    let paper = choose("minilm_l6_layer3_n480.safetensors", PAPER_MIN_COSINE);
    assert_eq!(paper.chosen, Some(Recipe::SAGE1_VB), "{paper:?}");
    let beyond_reach = choose("minilm_l6_layer3_n480.safetensors", 1.0);
    assert_eq!(beyond_reach.chosen, None);
}

#[test]
fn the_worst_sample_decides() {
    let (problem, [q, k, v]) = load("minilm_l6_layer3_n480.safetensors");
    let zeros = vec![0.0; v.to_f32().len()];
    let zero_v = HostTensor::from_f32(*v.layout(), DType::F16, &zeros).unwrap();
    let samples = [[&q, &k, &zero_v], [&q, &k, &v]];
    let got = calibrate(&Cpu::new(), &problem, &samples, &CANDIDATES, 0.999).unwrap();
    assert_eq!(
        got.chosen,
        Some(Recipe::SAGE1_B),
        "the first sample alone would take the fast one"
    );
}

#[test]
fn calibration_needs_a_sample() {
    let problem = Problem::new(Shape::mha(1, 1, 1, 8), DType::F16).unwrap();
    let error = calibrate(&Cpu::new(), &problem, &[], &CANDIDATES, 0.9).unwrap_err();
    assert!(matches!(error, Error::Invalid { .. }), "{error}");
}
