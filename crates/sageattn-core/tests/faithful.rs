//! Properties that hold for every recipe, whatever its rounding.
#![allow(clippy::unwrap_used, reason = "a helper of tests reports by panicking")]

use proptest::prelude::*;
use sageattn_core::metrics::Metrics;
use sageattn_core::reference::{exact, faithful};
use sageattn_core::{
    Align, DType, Divisor, HostOutput, KeyOrder, Mask, Outputs, Problem, Recipe, Reference,
    Rounding, Shape, Smooth,
};

/// A little generator of bell-shaped values: the sum of twelve uniform ones.
fn normal(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    (0..len)
        .map(|_| (0..12).map(|_| uniform()).sum::<f32>() - 6.0)
        .collect()
}

fn inputs(shape: &Shape) -> [Vec<f32>; 3] {
    let q_len: usize = shape.q().iter().product();
    let kv_len: usize = shape.kv().iter().product();
    [normal(1, q_len), normal(2, kv_len), normal(3, kv_len)]
}

fn run(problem: &Problem, recipe: &Recipe, [q, k, v]: &[Vec<f32>; 3]) -> HostOutput {
    faithful::attend(problem, recipe, &Rounding::of(recipe), [q, k, v])
}

fn problem(shape: Shape) -> Problem {
    let problem = Problem::new(shape, DType::F32).unwrap();
    problem.with_outputs(Outputs::OAndLse)
}

/// Relative L1 of each recipe on N(0,1), with a little room: 200 keys are few to average over.
fn bound(recipe: &Recipe) -> f64 {
    match recipe.name() {
        Some("sage1-t" | "sage1-b") => 0.018,
        Some("sage2-i4-f8") => 0.26,
        // f32 tensors, which it does not round.
        Some("half") => 5e-6,
        Some("exact") => 1e-6,
        _ => 0.045,
    }
}

#[test]
fn every_recipe_approximates_exact_attention_under_every_mask() {
    let shape = Shape {
        q_len: 70,
        kv_len: 200,
        q_heads: 4,
        kv_heads: 2,
        ..Shape::mha(2, 1, 1, 40)
    };
    let inputs = inputs(&shape);
    for mask in [
        Mask::None,
        Mask::Causal(Align::TopLeft),
        Mask::Causal(Align::BottomRight),
    ] {
        let problem = problem(shape).with_mask(mask);
        let reference = exact::attend(&problem, [&inputs[0], &inputs[1], &inputs[2]]);
        for (name, recipe) in Recipe::NAMED {
            let got = run(&problem, &recipe, &inputs);
            let error = Metrics::compare(&got.out, &reference.out);
            assert_eq!(error.not_finite, 0);
            assert!(error.rel_l1 < bound(&recipe), "{name} {mask:?}: {error:?}");
            let lse = Metrics::compare(&got.lse.unwrap(), &reference.lse);
            // A row of one key has that one score's error, and INT4's scores are coarse.
            let lse_bound = if recipe == Recipe::SAGE2_I4_F8 {
                0.6
            } else {
                0.15
            };
            assert!(lse.max_abs_error < lse_bound, "{name} {mask:?}: {lse:?}");
        }
    }
}

#[test]
fn tile_order_and_stale_maximum_change_rounding_only() {
    let shape = Shape::mha(1, 2, 150, 32);
    let problem = problem(shape);
    let inputs = inputs(&shape);
    for recipe in [
        Recipe::SAGE1_B,
        Recipe::SAGE1_VB,
        Recipe::I8_I8_DYN,
        Recipe::SAGE2_I8_F8,
    ] {
        let plain = run(&problem, &recipe, &inputs);
        for rounding in [
            Rounding {
                key_tile: 32,
                ..Rounding::of(&recipe)
            },
            Rounding {
                key_order: KeyOrder::Descending,
                ..Rounding::of(&recipe)
            },
            Rounding {
                reference: Reference::Maximum { stale: 0.7 },
                ..Rounding::of(&recipe)
            },
            Rounding {
                divisor: Divisor::UnroundedP,
                ..Rounding::of(&recipe)
            },
        ] {
            let [q, k, v] = &inputs;
            let other = faithful::attend(&problem, &recipe, &rounding, [q, k, v]);
            let plain_out: Vec<f64> = plain.out.iter().copied().map(f64::from).collect();
            let error = Metrics::compare(&other.out, &plain_out);
            assert!(
                error.rel_l1 < bound(&recipe),
                "{recipe} {rounding:?}: {error:?}"
            );
            assert_ne!(
                other.out, plain.out,
                "{recipe} {rounding:?} was not taken into account"
            );
        }
    }
}

#[test]
fn a_key_offset_vanishes_under_smoothing_and_lse_moves_by_it() {
    let shape = Shape::mha(1, 1, 90, 16);
    let problem = problem(shape);
    let [q, k, v] = inputs(&shape);
    let offset: Vec<f32> = (0..16).map(|c| 16.0 * (c % 5) as f32 - 32.0).collect();
    let shifted: Vec<f32> = k
        .iter()
        .enumerate()
        .map(|(i, x)| x + offset[i % 16])
        .collect();
    for recipe in [Recipe::SAGE1_B, Recipe::I8_I8_DYN, Recipe::SAGE2_I8_F8] {
        let reference = exact::attend(&problem, [&q, &shifted, &v]);
        let smooth = run(&problem, &recipe, &[q.clone(), shifted.clone(), v.clone()]);
        let error = Metrics::compare(&smooth.out, &reference.out);
        assert!(error.rel_l1 < bound(&recipe), "{recipe}: {error:?}");
        let lse = Metrics::compare(&smooth.lse.unwrap(), &reference.lse);
        assert!(lse.max_abs_error < 0.1, "{recipe}: {lse:?}");

        let unsmoothed = recipe.with_smooth(Smooth::Off);
        let plain = run(
            &problem,
            &unsmoothed,
            &[q.clone(), shifted.clone(), v.clone()],
        );
        let unsmoothed_error = Metrics::compare(&plain.out, &reference.out);
        let gain = unsmoothed_error.rel_l1 / error.rel_l1;
        assert!(gain > 1.5, "{recipe}: {gain}");
    }
}

#[test]
fn a_constant_v_comes_out_as_itself() {
    let shape = Shape::mha(1, 1, 65, 8);
    let problem = problem(shape);
    let [q, k, v] = inputs(&shape);
    let constant = vec![3.0; v.len()];
    for (name, recipe) in Recipe::NAMED {
        let got = run(&problem, &recipe, &[q.clone(), k.clone(), constant.clone()]);
        for x in got.out {
            assert!((x - 3.0).abs() < 1e-5, "{name}: {x}");
        }
    }
}

/// The only rounding of `half`: P's, to the tensors' own type.
#[test]
fn half_rounds_p_to_the_element_type_alone() {
    let shape = Shape::mha(1, 2, 200, 64);
    let inputs = inputs(&shape);
    let errors = DType::ALL.map(|dtype| {
        let problem = Problem::new(shape, dtype).unwrap();
        let inputs = inputs.each_ref().map(|tensor| {
            let round = |&x: &f32| dtype.round(x);
            tensor.iter().map(round).collect::<Vec<f32>>()
        });
        let reference = exact::attend(&problem, [&inputs[0], &inputs[1], &inputs[2]]);
        let got = run(&problem, &Recipe::HALF, &inputs);
        Metrics::compare(&got.out, &reference.out).rel_l1
    });
    // Half an ulp at most, 2^-12 and 2^-9 of each P, averaged over independent ones.
    let [f16, bf16, f32] = errors;
    assert!((2e-5..2.5e-4).contains(&f16), "f16: {f16}");
    assert!((2e-4..2e-3).contains(&bf16), "bf16: {bf16}");
    assert!(f32 < 5e-6, "f32: {f32}");
}

#[test]
fn rows_that_see_nothing_are_zero() {
    let shape = Shape {
        q_len: 5,
        kv_len: 2,
        ..Shape::mha(1, 1, 1, 8)
    };
    let problem = problem(shape).with_mask(Mask::Causal(Align::BottomRight));
    let inputs = inputs(&shape);
    for (name, recipe) in Recipe::NAMED {
        let got = run(&problem, &recipe, &inputs);
        assert!(got.out[..3 * 8].iter().all(|&x| x == 0.0), "{name}");
        let lse = got.lse.unwrap();
        assert_eq!(lse[..3], [f32::NEG_INFINITY; 3], "{name}");
        assert!(lse[3..].iter().all(|x| x.is_finite()), "{name}");
    }
}

#[test]
fn a_negative_scale_is_a_negated_query_and_zero_is_the_mean_of_v() {
    let shape = Shape::mha(1, 1, 50, 8);
    let [q, k, v] = inputs(&shape);
    let negated: Vec<f32> = q.iter().map(|x| -x).collect();
    let negative = problem(shape).with_softmax_scale(-0.3).unwrap();
    let positive = problem(shape).with_softmax_scale(0.3).unwrap();
    let zero = problem(shape).with_softmax_scale(0.0).unwrap();
    let mean: Vec<f64> = (0..8)
        .map(|c| {
            v.iter()
                .skip(c)
                .step_by(8)
                .map(|&x| f64::from(x))
                .sum::<f64>()
                / 50.0
        })
        .collect();
    for (name, recipe) in Recipe::NAMED {
        let a = run(&negative, &recipe, &[q.clone(), k.clone(), v.clone()]);
        let b = run(&positive, &recipe, &[negated.clone(), k.clone(), v.clone()]);
        assert_eq!(a.out, b.out, "{name}");
        let flat = run(&zero, &recipe, &[q.clone(), k.clone(), v.clone()]);
        for (x, mean) in flat.out[..8].iter().zip(&mean) {
            assert!((f64::from(*x) - mean).abs() < 0.02, "{name}: {x} {mean}");
        }
    }
}

#[test]
fn not_a_number_stays_in_its_head() {
    let shape = Shape {
        q_heads: 4,
        kv_heads: 2,
        ..Shape::mha(1, 1, 20, 8)
    };
    let problem = problem(shape);
    let clean = inputs(&shape);
    let mut planted = clean.clone();
    planted[1][3] = f32::NAN; // K of KV head 0, which query heads 0 and 1 read
    planted[2][5] = f32::INFINITY;
    for (name, recipe) in Recipe::NAMED {
        let (a, b) = (
            run(&problem, &recipe, &clean),
            run(&problem, &recipe, &planted),
        );
        let others = 2 * 20 * 8..;
        assert_eq!(a.out[others.clone()], b.out[others], "{name}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Any shape and magnitude up to 1e15: finite in, finite out.
    #[test]
    fn finite_stays_finite(
        q_len in 1usize..40,
        kv_len in 1usize..140,
        head_dim in 1usize..40,
        magnitude in prop_oneof![Just(0.0f32), Just(1e-38), Just(1e-20), Just(1.0), Just(1e15)],
        recipe in 0usize..Recipe::NAMED.len(),
        align in prop_oneof![Just(Align::TopLeft), Just(Align::BottomRight)],
    ) {
        let shape = Shape { q_len, kv_len, ..Shape::mha(1, 1, 1, head_dim) };
        let problem = problem(shape).with_mask(Mask::Causal(align));
        let [mut q, mut k, v] = inputs(&shape);
        let bounded = |x: &mut f32| *x = (*x / 6.0).clamp(-1.0, 1.0) * magnitude;
        q.iter_mut().for_each(bounded);
        k.iter_mut().for_each(bounded);
        let got = run(&problem, &Recipe::NAMED[recipe].1, &[q, k, v]);
        prop_assert!(got.out.iter().all(|x| x.is_finite()));
        prop_assert!(got.lse.unwrap().iter().all(|x| !x.is_nan() && *x < f32::INFINITY));
    }
}
