//! The committed SPIR-V against its sources and against what the host patches into it. No compiler and no
//! device is needed.

use std::path::Path;

use sageattn_shaders::spirv::{Spirv, fingerprint};

fn folder() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("spirv")
}

#[test]
fn sources_and_binaries_belong_together() {
    let manifest = std::fs::read_to_string(folder().join("manifest.txt")).unwrap();
    let lines: Vec<Vec<&str>> = manifest
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(lines.len(), Spirv::ALL.len(), "one line per module");
    for module in Spirv::ALL {
        let name = module.name;
        let source = std::fs::read(folder().join(format!("{name}.comp"))).unwrap();
        let expected = [
            name.to_owned(),
            format!("{:016x}", fingerprint(&source)),
            format!("{:016x}", module.fingerprint()),
        ];
        assert!(
            lines.iter().any(|line| *line == expected),
            "{name}: {expected:?} is not in the manifest: run `cargo xtask spirv`"
        );
    }
}

#[test]
fn every_source_is_embedded() {
    let names: Vec<_> = Spirv::ALL.iter().map(|module| module.name).collect();
    for entry in std::fs::read_dir(folder()).unwrap() {
        let path = entry.unwrap().path();
        if path
            .extension()
            .is_some_and(|extension| extension == "comp")
        {
            let stem = path.file_stem().unwrap().to_str().unwrap();
            assert!(names.contains(&stem), "{stem} is in no `Spirv`");
        }
    }
}

#[test]
fn specializing_changes_the_values_of_one_constant_and_nothing_else() {
    let module = sageattn_shaders::spirv::ATTEND_MATRIX_I8;
    let plain = module.specialize(&[]);
    assert_eq!(plain[0], 0x0723_0203, "SPIR-V's magic number");
    let constants = module.constants();
    for &number in &constants {
        let value = 0x5eed_0000 + number;
        let changed = module.specialize(&[(number, value)]);
        let differing = changed.iter().zip(&plain).filter(|(new, old)| new != old);
        let values: Vec<_> = differing.map(|(new, _)| *new).collect();
        // The workgroup's size is one number in two places: a constant, and what the driver reads.
        let places = constants.iter().filter(|&&other| other == number).count();
        assert_eq!(values, vec![value; places], "constant {number}");
    }
    assert_eq!(module.specialize(&[(4096, 1)]), plain, "no such constant");
}
