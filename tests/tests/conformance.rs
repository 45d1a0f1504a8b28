//! The suite over every backend present.

use std::process::ExitCode;

fn main() -> ExitCode {
    sageattn_conformance::suite::main()
}
