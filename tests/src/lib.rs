//! The conformance suite: what every backend of `sageattn` must get right.
//!
//! A [`Case`](case::Case) is data (`cases/*.toml`). [`runner::run`] runs it with one recipe on one
//! backend and holds the result to two oracles: tightly to `faithful`, which rounds where the recipe
//! does and so finds bugs, and to f64 attention within the recipe's own bound, which finds bad recipes.
//! Outputs and scratch lie between guard bytes and are poisoned before each run ([`guarded`]), the
//! codes that a plan leaves in its workspace are recomputed ([`scratch`]), every case runs twice, and
//! misuse must be refused ([`contract`]).
//!
//! ```
//! use sageattn_conformance::{case, runner};
//! use sageattn_core::{Cpu, DeviceKind, Recipe};
//!
//! let cases = case::parse("doc", r#"
//!     [[case]]
//!     name = "tail"
//!     why = "one key behind the last tile"
//!     len = 65
//! "#)?;
//! let prepared = runner::Prepared::new(&cases[0], DeviceKind::Cpu)?;
//! let report = runner::run(&Cpu::new(), &prepared, &Recipe::SAGE1_B)?;
//! assert!(report.exact.rel_l1 < 0.015);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! The binary `conformance` (`cargo test -p sageattn-conformance --test conformance`) does so for every
//! backend present. It embeds cases and data, and can be copied to another machine.

pub mod backends;
pub mod bounds;
pub mod case;
pub mod contract;
pub mod data;
pub mod expectations;
mod far;
mod fuzz;
pub mod guarded;
pub mod inputs;
pub mod report;
pub mod runner;
pub mod scratch;
mod split;
pub mod suite;
