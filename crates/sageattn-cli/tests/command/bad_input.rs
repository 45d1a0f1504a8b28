//! Bad input: one clear line on stderr, nothing on stdout, exit code 2, whatever the device.

use std::path::Path;

use safetensors::Dtype;

use crate::fixture::{Answer, Fixture, run, sageattn, write};

/// One line that holds every word of `says`, and none of any driver: no device was opened.
fn refused(answer: &Answer, says: &[&str]) {
    refused_by_device(answer, says);
    assert_eq!(answer.stderr.lines().count(), 1, "{answer:?}");
}

/// One line of ours.
fn refused_by_device(answer: &Answer, says: &[&str]) {
    assert_eq!(answer.code, Some(2), "{answer:?}");
    assert_eq!(answer.stdout, "");
    let complaints = answer.complaints();
    assert_eq!(complaints.len(), 1, "{answer:?}");
    let line = complaints[0];
    for word in says {
        assert!(line.contains(word), "{line} lacks {word}");
    }
}

fn file_refused(fixture: &Fixture, says: &[&str]) {
    let file = fixture.write();
    let name = file.path().to_str().unwrap();
    refused(&run(file.path(), &["--json"]), &[&[name], says].concat());
}

#[test]
fn tensors_that_are_missing_or_wrong() {
    let good = Fixture::good;
    file_refused(&good().without("k"), &["no tensor \"k\"", "\"q\", \"v\""]);
    file_refused(&good().shape("q", &[2, 9, 16]), &["q: rank 3"]);
    file_refused(&good().shape("v", &[]), &["v: rank 0"]);
    file_refused(&good().dtype("k", Dtype::F16), &["k: f16 where q is f32"]);
    file_refused(
        &good().every_dtype(Dtype::I64),
        &["q: element type I64", "BF16"],
    );
    file_refused(
        &good().dtype("v", Dtype::F8_E4M3),
        &["v: element type F8_E4M3"],
    );
    file_refused(
        &good().shape("k", &[1, 2, 9, 8]),
        &["k: head_dim 8 where q has 16"],
    );
    file_refused(
        &good().shape("v", &[1, 2, 9, 8]),
        &["v: head_dim 8 where q has 16"],
    );
    file_refused(
        &good().shape("k", &[2, 2, 9, 16]),
        &["k: batch 2 where q has 1"],
    );
    file_refused(
        &good().shape("v", &[1, 2, 8, 16]),
        &["v: shape", "where k has"],
    );
}

#[test]
fn problems_that_cannot_be() {
    let kv = |shape: &[usize]| Fixture::good().shape("k", shape).shape("v", shape);
    file_refused(&kv(&[1, 3, 9, 16]), &["q_heads", "not a multiple"]);
    file_refused(&kv(&[1, 2, 0, 16]), &["kv_len: is zero"]);
    file_refused(
        &Fixture::good().shape("q", &[1, 2, 0, 16]),
        &["q_len: is zero"],
    );
    let wide = [1, 2, 9, 257];
    file_refused(&kv(&wide).shape("q", &wide), &["head_dim: 257", "256"]);
}

#[test]
fn metadata_that_makes_no_sense() {
    let with = |key, value| Fixture::good().metadata(key, value);
    file_refused(&with("softmax_scale", "NaN"), &["softmax scale", "NaN"]);
    file_refused(&with("softmax_scale", "1e39"), &["softmax scale", "inf"]);
    file_refused(
        &with("softmax_scale", ""),
        &["softmax_scale", "not a number"],
    );
    file_refused(&with("causal", "perhaps"), &["causal", "\"perhaps\""]);
    file_refused(&with("layout", "NHD"), &["layout", "HND"]);
    file_refused(
        &with("causal", "true").shape("q", &[1, 2, 4, 16]),
        &[
            "4 queries and 9 keys",
            "causal-top-left",
            "causal-bottom-right",
        ],
    );
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let bytes = Fixture::good().bytes();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    let header = 8 + usize::try_from(header).unwrap();
    for len in [
        0,
        1,
        7,
        8,
        9,
        header - 1,
        header,
        header + 1,
        bytes.len() - 1,
    ] {
        let file = write(&bytes[..len]);
        let says = if len < 8 { "too few" } else { "truncated" };
        refused(&run(file.path(), &[]), &[says]);
    }
    let mut longer = bytes;
    longer.push(0);
    refused(&run(write(&longer).path(), &[]), &["damaged"]);
}

#[test]
fn headers_that_lie_are_refused() {
    let with_header = |header: &str| {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        write(&bytes)
    };
    // A header of exabytes, and one of the largest size that the format allows.
    for len in [u64::MAX, 1 << 60, 100_000_001] {
        let file = write(&len.to_le_bytes());
        refused(
            &run(file.path(), &[]),
            &["not a safetensors file", "header"],
        );
    }
    refused(
        &run(write(&100_000_000u64.to_le_bytes()).path(), &[]),
        &["truncated"],
    );
    // Tensors of petabytes, offsets beyond the file, backwards, and past 64 bits.
    let q = |shape: &str, offsets: &str| {
        with_header(&format!(
            r#"{{"q":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}"#
        ))
    };
    for (shape, offsets) in [
        ("[1,1,1099511627776,256]", "[0,1125899906842624]"),
        ("[1,1,1,4]", "[0,16]"),
        ("[1,1,1,4]", "[16,0]"),
        ("[1,1,1,4]", "[8,24]"),
        ("[4294967296,4294967296,1,4]", "[0,16]"),
        ("[1,1,1,4]", "[0,18446744073709551615]"),
        ("[1,1,1,-4]", "[0,16]"),
        ("[1,1,1,1e3]", "[0,16]"),
    ] {
        refused(&run(q(shape, offsets).path(), &[]), &[]);
    }
    for garbage in ["", "{", "[]", "null", "{\"q\":1}", "\u{0}\n\r\u{7f}"] {
        refused(&run(with_header(garbage).path(), &[]), &[]);
    }
    // Deep nesting must not exhaust the stack.
    refused(&run(with_header(&"[".repeat(1 << 20)).path(), &[]), &[]);
}

#[test]
fn garbage_is_refused() {
    // A small generator of bytes without pattern; nothing here is a file by luck.
    let mut state = 1u64;
    for len in [8, 64, 4096, 1 << 20] {
        let bytes: Vec<u8> = (0..len)
            .map(|_| {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                state.to_be_bytes()[0]
            })
            .collect();
        refused(&run(write(&bytes).path(), &[]), &[]);
    }
    refused(&run(Path::new("Cargo.toml"), &[]), &["not a safetensors"]);
}

#[test]
fn paths_that_lead_nowhere() {
    refused(&run(Path::new("no/such/file"), &[]), &["no/such/file"]);
    refused(&run(Path::new("tests/data"), &[]), &["not a regular file"]);
    #[cfg(unix)]
    refused(&run(Path::new("/dev/zero"), &[]), &["not a regular file"]);
    let file = Fixture::good().write();
    let output = |path: &str| run(file.path(), &["--output", path]);
    refused(&output("no/such/folder/out"), &["no folder no/such/folder"]);
    refused(&output("tests"), &["is a folder"]);
    refused(&output(file.path().to_str().unwrap()), &["is the input"]);
}

#[test]
fn names_that_are_unknown() {
    // Refused before the file is looked at, let alone a device.
    let file = Path::new("no/such/file");
    refused(
        &run(file, &["--recipe", "sage9"]),
        &["recipe", "\"sage9\"", "sage1-b"],
    );
    refused(&run(file, &["--recipe", "exact+unsmoothed"]), &["recipe"]);
    refused(
        &run(file, &["--backend", "tpu"]),
        &["backend", "\"tpu\"", "cpu"],
    );
    refused(
        &run(file, &["--mask", "causal"]),
        &["mask", "causal-top-left", "causal-bottom-right"],
    );
    refused(
        &sageattn(&["bench", "--suite", "everything"]),
        &["suite", "\"everything\"", "quick"],
    );
    refused(&sageattn(&["bench", "--recipe", "sage9"]), &["\"sage9\""]);
    refused(&sageattn(&["bench", "--backend", "tpu"]), &["\"tpu\""]);
}

#[test]
fn a_tensor_above_what_a_device_binds_is_refused() {
    // Keys and values of a little more than 128 MiB each: what a GPU interface must bind at least, and a
    // software one binds at most. The file is sparse; nothing of it is on the disk.
    let keys = (128 << 20) / (64 * 2) + 1;
    let header = format!(
        r#"{{"q":{{"dtype":"F16","shape":[1,1,1,64],"data_offsets":[0,128]}},
            "k":{{"dtype":"F16","shape":[1,1,{keys},64],"data_offsets":[128,{}]}},
            "v":{{"dtype":"F16","shape":[1,1,{keys},64],"data_offsets":[{},{}]}}}}"#,
        128 + keys * 128,
        128 + keys * 128,
        128 + 2 * keys * 128
    );
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    let file = write(&bytes);
    let len = bytes.len() as u64 + 128 + 2 * keys * 128;
    file.as_file().set_len(len).unwrap();

    let listing = sageattn(&["devices", "--json"]).stdout;
    let answer = run(file.path(), &["--backend", "wgpu", "--json"]);
    if listing.contains("\"kind\": \"gpu\"") {
        // Hardware may bind more; it may not crash.
        assert!(matches!(answer.code, Some(0 | 2)), "{answer:?}");
    } else {
        refused_by_device(&answer, &["wgpu"]);
    }
}

#[test]
fn a_wrong_command_line_has_the_same_code() {
    for args in [
        &[][..],
        &["run"],
        &["run", "a", "b"],
        &["jump"],
        &["run", "a", "--fast"],
    ] {
        let answer = sageattn(args);
        assert_eq!(answer.code, Some(2), "{answer:?}");
        assert_eq!(answer.stdout, "");
    }
    let help = sageattn(&["--help"]);
    assert_eq!(help.code, Some(0));
    assert!(help.stdout.contains("devices"));
}
