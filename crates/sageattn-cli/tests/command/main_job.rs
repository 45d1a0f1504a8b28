//! What the command is for.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Stdio;

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use crate::fixture::{Answer, Fill, Fixture, command, run, sageattn};

const KOKORO: &str = "tests/data/kokoro_albert_step1_n512.safetensors";

fn json(answer: &Answer) -> Value {
    assert_eq!(answer.code, Some(0), "{answer:?}");
    assert!(answer.complaints().is_empty(), "{answer:?}");
    serde_json::from_str(&answer.stdout).unwrap()
}

#[test]
fn run_on_a_real_file_reports_every_key() {
    let report = json(&sageattn(&[
        "run",
        KOKORO,
        "--backend",
        "cpu",
        "--recipe",
        "sage1-b",
        "--json",
    ]));
    let keys: Vec<&str> = report
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    let mut expected = vec![
        "backend",
        "device",
        "variant",
        "recipe",
        "shape",
        "median_us",
        "tops",
        "cosine",
        "rel_l1",
        "rmse",
        "max_abs_error",
    ];
    // The parser sorts.
    expected.sort_unstable();
    assert_eq!(keys, expected);
    assert_eq!(report["backend"], "cpu");
    assert_eq!(report["recipe"], "sage1-b");
    let shape = &report["shape"];
    assert_eq!(
        (&shape["q_heads"], &shape["q_len"]),
        (&12.into(), &512.into())
    );
    assert_eq!(shape["softmax_scale"], 0.125);
    // The recipe's bound on this file, as in the conformance suite.
    let rel_l1 = report["rel_l1"].as_f64().unwrap();
    assert!(rel_l1 > 0.001 && rel_l1 < 0.010, "{rel_l1}");
    let (us, tops) = (&report["median_us"], &report["tops"]);
    let flops = 4.0 * 12.0 * 512.0 * 512.0 * 64.0;
    let product = us.as_f64().unwrap() * tops.as_f64().unwrap() * 1e6;
    assert!((product / flops - 1.0).abs() < 1e-6, "{us} {tops}");
}

#[test]
fn the_table_says_the_same_to_people() {
    let file = Fixture::good().write();
    let answer = run(file.path(), &["--backend", "cpu", "--recipe", "sage1-t"]);
    assert_eq!(answer.code, Some(0), "{answer:?}");
    for row in ["sage1-t", "TOPS", "cosine", "relative L1", "heads 2/2"] {
        assert!(answer.stdout.contains(row), "{row}: {}", answer.stdout);
    }
    assert!(!answer.stdout.contains('\u{1b}'), "colours in a pipe");
}

#[test]
fn every_dtype_is_read_and_written() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.safetensors");
    for dtype in [Dtype::F16, Dtype::BF16, Dtype::F32] {
        let input = Fixture::good()
            .every_dtype(dtype)
            .shape("q", &[1, 4, 5, 16])
            .metadata("softmax_scale", "0.5")
            .metadata("causal", "True")
            .metadata("model", "a wave")
            .write();
        let answer = run(
            input.path(),
            &[
                "--backend",
                "cpu",
                "--recipe",
                "sage1-b",
                "--mask",
                "causal-bottom-right",
                "--json",
                "--output",
                out.to_str().unwrap(),
            ],
        );
        let report = json(&answer);
        assert_eq!(report["shape"]["mask"], "causal-bottom-right");
        assert_eq!(report["shape"]["kv_heads"], 2);
        assert_eq!(report["shape"]["softmax_scale"], 0.5);

        let bytes = std::fs::read(&out).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let tensor = tensors.tensor("out").unwrap();
        assert_eq!(tensors.len(), 1);
        assert_eq!(tensor.dtype(), dtype);
        assert_eq!(tensor.shape(), [1, 4, 5, 16]);
        assert!(tensor.data().iter().any(|&byte| byte != 0));
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let metadata = header.metadata().clone().unwrap();
        for (key, value) in [
            ("mask", "causal-bottom-right"),
            ("softmax_scale", "0.5"),
            ("sageattn_recipe", "sage1-b"),
            ("sageattn_backend", "cpu"),
            ("model", "a wave"),
        ] {
            assert_eq!(metadata.get(key).map(String::as_str), Some(value), "{key}");
        }
        assert_eq!(metadata.get("causal"), None);
    }
}

#[test]
fn causal_metadata_is_followed_unless_the_mask_is_given() {
    let file = Fixture::good().metadata("causal", "true").write();
    let mask = |more: &[&str]| {
        let args = [&["--backend", "cpu", "--json"], more].concat();
        json(&run(file.path(), &args))["shape"]["mask"].clone()
    };
    assert_eq!(mask(&[]), "causal-top-left");
    assert_eq!(mask(&["--mask", "none"]), "none");
}

#[test]
fn one_query_and_a_head_dim_that_fits_no_vector_run() {
    let file = Fixture::good()
        .every_dtype(Dtype::F16)
        .shape("q", &[1, 2, 1, 5])
        .shape("k", &[1, 2, 7, 5])
        .shape("v", &[1, 2, 7, 5])
        .write();
    json(&run(file.path(), &["--backend", "cpu", "--json"]));
}

#[test]
fn nan_in_the_input_is_no_failure_of_ours() {
    let file = Fixture::good().fill("q", Fill::Value(f32::NAN)).write();
    let report = json(&run(file.path(), &["--backend", "cpu", "--json"]));
    assert!(report["rel_l1"].is_null() || report["rel_l1"].is_number());
}

#[test]
fn nan_from_finite_input_has_its_own_code() {
    // Scores beyond f32: outside of what the numerics promise, and still to be told.
    let huge = Fill::Wave(1e25);
    let file = Fixture::good().fill("q", huge).fill("k", huge).write();
    let args = ["--backend", "cpu", "--recipe", "sage2-i8-f8", "--json"];
    let answer = run(file.path(), &args);
    assert_eq!(answer.code, Some(1), "{answer:?}");
    let complaints = answer.complaints();
    assert_eq!(complaints.len(), 1, "{answer:?}");
    assert!(complaints[0].contains("NaN or infinity"), "{answer:?}");
    // What was measured is still reported.
    assert!(answer.stdout.contains("\"backend\": \"cpu\""), "{answer:?}");
}

#[test]
fn devices_lists_the_cpu() {
    let listing = json(&sageattn(&["devices", "--json"]));
    let devices = listing["devices"].as_array().unwrap();
    let cpu = devices.iter().find(|device| device["backend"] == "cpu");
    assert_eq!(cpu.unwrap()["auto"], true);
    assert!(listing["refused"].is_array());
    let table = sageattn(&["devices"]);
    assert_eq!(table.code, Some(0));
    assert!(table.stdout.contains("cpu"));
}

#[test]
fn bench_reports_every_case_of_its_suite() {
    let args = ["bench", "--suite", "quick", "--backend", "cpu"];
    let report = json(&sageattn(
        &[&args[..], &["--recipe", "sage1-t", "--json"]].concat(),
    ));
    assert_eq!(report["suite"], "quick");
    assert!(report["refused"].as_array().unwrap().is_empty(), "{report}");
    let rows = report["rows"].as_array().unwrap();
    assert!(!rows.is_empty());
    for row in rows {
        assert_eq!(row["backend"], "cpu");
        assert_eq!(row["recipe"], "sage1-t");
        assert!(row["call_us"].as_f64().unwrap() > 0.0, "{row}");
        assert!(row["tops"].as_f64().unwrap() > 0.0, "{row}");
    }
}

#[test]
fn every_backend_that_is_listed_does_the_main_job() {
    let listing = json(&sageattn(&["devices", "--json"]));
    for device in listing["devices"].as_array().unwrap() {
        let backend = device["backend"].as_str().unwrap();
        let report = json(&sageattn(&["run", KOKORO, "--backend", backend, "--json"]));
        assert_eq!(report["backend"], *backend);
        let cosine = report["cosine"].as_f64().unwrap();
        // SageAttention's bound for "no visible loss", as the adaptive choice uses it.
        assert!(cosine > 0.998, "{report}");
    }
}

#[test]
fn a_reader_that_stops_early_is_no_failure() {
    for args in [
        &["devices"][..],
        &["run", KOKORO, "--backend", "cpu", "--json"],
    ] {
        let mut child = command(args)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let lines: Vec<String> = stderr.lines().map_while(Result::ok).collect();
        assert_eq!(child.wait().unwrap().code(), Some(0), "{lines:?}");
        assert!(
            !lines.iter().any(|line| line.contains("panicked")),
            "{lines:?}"
        );
    }
}

#[test]
fn the_data_is_where_the_readme_says() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let readme = std::fs::read_to_string(root.join("README.md")).unwrap();
    assert!(readme.contains(&format!("cargo run --release -- run {KOKORO}")));
    assert!(readme.contains("cargo xtask test"));
    assert!(root.join(KOKORO).is_file());
}
