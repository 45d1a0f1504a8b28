//! NVIDIA's run-time compiler, so that the CUDA kernels are compiled in the tests without a GPU.

use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::command::{program, root, run};

/// The compiler and, for a look at the machine code, the disassembler.
const PACKAGES: [&str; 2] = [
    "nvidia-cuda-nvrtc==13.0.88",
    "nvidia-cuda-nvdisasm==13.2.78",
];

/// The variable by which tests find the library.
pub(crate) const VARIABLE: &str = "SAGEATTN_NVRTC";

/// Makes sure that the tests find NVRTC: the one that the environment names, or one from PyPI in a
/// folder of the build. Failing to is an error only when `required`.
pub(crate) fn set_up(required: bool) -> Result<()> {
    if let Some(named) = std::env::var_os(VARIABLE) {
        println!("{VARIABLE} names {}", named.display());
        return Ok(());
    }
    if library().is_file() {
        println!("{} is there", library().display());
        return Ok(());
    }
    match install() {
        Ok(()) => Ok(()),
        Err(error) if required => Err(error.context("SAGEATTN_REQUIRE asks for nvrtc")),
        Err(error) => {
            println!("{error:#}");
            println!("going on without: the tests that compile CUDA kernels will be ignored");
            Ok(())
        }
    }
}

/// What to set [`VARIABLE`] to for the tests; `None` when the environment or the loader decides.
pub(crate) fn for_tests() -> Option<PathBuf> {
    let library = library();
    let decided = std::env::var_os(VARIABLE).is_some();
    (!decided && library.is_file()).then_some(library)
}

fn install() -> Result<()> {
    run(program("python3")
        .args(["-m", "pip", "install", "--quiet", "--no-deps", "--target"])
        .arg(folder())
        .args(PACKAGES))
    .context("NVRTC comes from PyPI: it takes python3 with pip")?;
    anyhow::ensure!(library().is_file(), "no {}", library().display());
    Ok(())
}

fn folder() -> PathBuf {
    root().join("target/nvrtc")
}

fn library() -> PathBuf {
    folder().join("nvidia/cu13/lib/libnvrtc.so.13")
}
