//! The command as its users see it: exit codes, one line of reasons, the keys of its JSON.

#![allow(
    clippy::unwrap_used,
    reason = "a test fails by panicking, its helpers too"
)]

mod bad_input;
mod fixture;
mod main_job;
