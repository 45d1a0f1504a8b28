//! The `sageattn` command.
//!
//! Exit codes: 0 it ran; 1 it ran, and O has NaN or infinity though Q, K and V have none; 2 it did not
//! run. One line on stderr says why.

mod args;
mod bench;
mod devices;
mod input;
mod output;
mod report;
mod run;
mod terminal;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

use crate::args::{Args, Command};

/// O is not finite on finite input.
const NOT_FINITE: u8 = 1;
/// Bad input, or a device that failed. The command line parser uses the same code.
const DID_NOT_RUN: u8 = 2;

fn main() -> ExitCode {
    let args = Args::parse();
    start_log();
    let result = match &args.command {
        Command::Devices(args) => devices::devices(args).map(|()| ExitCode::SUCCESS),
        Command::Bench(args) => bench::bench(args).map(|()| ExitCode::SUCCESS),
        Command::Run(args) => run::run(args).map(|finite| {
            if finite {
                ExitCode::SUCCESS
            } else {
                terminal::complain("O has NaN or infinity although Q, K and V are finite");
                ExitCode::from(NOT_FINITE)
            }
        }),
    };
    result.unwrap_or_else(|error| {
        terminal::complain(&in_one_line(&error));
        ExitCode::from(DID_NOT_RUN)
    })
}

/// An error and its causes, each told once: the library's own errors tell their cause themselves.
fn in_one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if line.is_empty() {
            line = cause;
        } else if !line.ends_with(&cause) {
            line = format!("{line}: {cause}");
        }
    }
    line
}

/// Logs to stderr as `RUST_LOG` says. Without it only this library's own errors are let through:
/// graphics drivers are chatty.
fn start_log() {
    let filter =
        EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("off,sageattn=error"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_told_once() {
        let device = sageattn::Error::device("no CUDA device", "libcuda.so.1 not found");
        let error = anyhow::Error::new(device);
        assert_eq!(
            in_one_line(&error),
            "no CUDA device: libcuda.so.1 not found"
        );
        let error = anyhow::anyhow!("truncated").context("a.safetensors");
        assert_eq!(in_one_line(&error), "a.safetensors: truncated");
    }
}
