//! Chores of the workspace: `cargo xtask help`.

#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a chore tells what it does while it does it"
)]

mod accuracy;
mod command;
mod nvrtc;
mod spirv;
mod test;
mod vulkan;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Chores of the workspace
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Args {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Debug, Subcommand)]
enum Chore {
    /// Set up what the tests need, then check and test everything
    Test,
    /// Measure every recipe on every file of tests/data and write docs/results/accuracy.md
    Accuracy,
    /// Compile the GLSL in shaders/spirv to the SPIR-V beside it
    Spirv,
}

fn main() -> ExitCode {
    let outcome = match Args::parse().chore {
        Chore::Test => test::test(),
        Chore::Accuracy => accuracy::accuracy(),
        Chore::Spirv => spirv::spirv(),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
