//! Tests of the suite itself: it passes a backend that is right, and fails backends with one planted
//! bug each, the smallest of its kind.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking, its helpers too"
)]

mod sabotage;

use std::sync::OnceLock;

use sabotage::{Bug, Sabotaged};
use sageattn_conformance::case;
use sageattn_conformance::runner::{self, Failure, Prepared};
use sageattn_core::{DeviceKind, Recipe};

/// The cases that the planted bugs run: short ones, of every mask and grouping.
fn prepared() -> &'static [Prepared] {
    static PREPARED: OnceLock<Vec<Prepared>> = OnceLock::new();
    PREPARED.get_or_init(|| {
        let names = [
            "shapes/tail",
            "shapes/cache",
            "shapes/blind",
            "shapes/gqa",
            "memory/outputs",
            "memory/arrangement_d64_f16",
        ];
        case::embedded()
            .unwrap()
            .iter()
            .filter(|case| names.iter().any(|name| case.name.starts_with(name)))
            .map(|case| Prepared::new(case, DeviceKind::Cpu).unwrap())
            .collect()
    })
}

/// Every failure of the cases under a bug, and how many trials there were.
fn failures(bug: Bug, recipe: Recipe) -> (Vec<String>, usize) {
    let backend = Sabotaged::new(bug);
    let failures = prepared()
        .iter()
        .filter_map(|prepared| match runner::run(&backend, prepared, &recipe) {
            Ok(_) => None,
            Err(Failure::Wrong(text)) => Some(format!("{}: {text}", prepared.case.name)),
            Err(refusal) => panic!("{refusal}"),
        })
        .collect();
    (failures, prepared().len())
}

/// The suite fails the bug in at least one trial, and names it as `symptom`.
fn caught(bug: Bug, symptom: &str) {
    let (failures, trials) = failures(bug, Recipe::SAGE1_B);
    assert!(
        failures.iter().any(|text| text.contains(symptom)),
        "{bug:?}: {} of {trials} trials failed, none with {symptom:?}: {failures:#?}",
        failures.len()
    );
}

#[test]
fn the_honest_backend_passes() {
    for recipe in [
        Recipe::SAGE1_B,
        Recipe::SAGE1_T,
        Recipe::SAGE2_I8_F8,
        Recipe::SAGE2_I4_F8,
        Recipe::I8_I8_DYN,
        Recipe::HALF,
    ] {
        let (failures, trials) = failures(Bug::None, recipe);
        assert!(trials > 50, "{trials}");
        assert!(failures.is_empty(), "{recipe}: {failures:#?}");
    }
}

#[test]
fn one_missing_smoothing_correction_in_lse() {
    caught(Bug::LseUncorrected, "LSE");
}

#[test]
fn a_tail_mask_one_key_short_in_one_row() {
    caught(Bug::TailShort, "worst row's relative L1 from faithful");
}

#[test]
fn a_tail_mask_one_key_long_in_one_row() {
    caught(Bug::TailLong, "LSE");
}

#[test]
fn top_left_where_bottom_right_was_asked_in_one_row() {
    caught(Bug::TopLeft, "worst row's relative L1 from faithful");
}

#[test]
fn a_scale_taken_from_the_neighbouring_group() {
    caught(Bug::NeighbourScale, "from faithful");
}

#[test]
fn one_stale_scratch_word_that_is_used() {
    caught(Bug::StaleWord, "differ between two runs");
}

#[test]
fn one_dropped_row() {
    caught(Bug::DroppedRow, "differ between two runs");
}

#[test]
fn one_row_of_zeros() {
    caught(Bug::ZeroRow, "worst row's relative L1 from faithful");
}

#[test]
fn one_row_of_the_neighbouring_head() {
    caught(Bug::NeighbourHead, "worst row's relative L1 from faithful");
}

#[test]
fn one_guard_byte_behind_the_output() {
    caught(Bug::GuardByte, "out: byte");
}

#[test]
fn one_byte_between_two_rows_of_the_output() {
    caught(Bug::PaddingByte, "out: byte");
}

#[test]
fn one_guard_byte_behind_a_scratch_range() {
    caught(Bug::ScratchGuard, "guard byte");
}

#[test]
fn one_changed_input_byte() {
    caught(Bug::InputByte, "k: byte");
}

#[test]
fn one_bit_that_differs_from_run_to_run() {
    caught(Bug::Nondeterminism, "1 of");
}

#[test]
fn one_code_off_by_one() {
    caught(Bug::Code, "k_codes: head");
}

#[test]
fn one_code_of_q_off_by_one() {
    caught(Bug::QCode, "q_codes: head");
}

#[test]
fn one_scale_eight_ulps_off() {
    caught(Bug::Scale, "k_scales: head");
}

#[test]
fn one_channel_of_the_mean_off() {
    caught(Bug::Mean, "k_mean: head");
}

#[test]
fn infinity_where_a_blind_row_must_be_zero() {
    caught(Bug::BlindRow, "rows that see no key are not zero");
}
