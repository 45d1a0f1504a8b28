//! The backend on a GPU: against the oracles, and what only a device can show. The conformance suite
//! has the many cases; here are few, and the ways into the crate that the suite does not use.
//!
//! Without a device the tests are ignored, or fail when `SAGEATTN_REQUIRE` names `cuda`. The binary
//! needs no file of the repository.
#![allow(clippy::unwrap_used, reason = "a test reports by panicking")]

mod accuracy;
mod codes;
mod half;
mod interop;
mod support;

use std::env;
use std::process::ExitCode;
use std::sync::Arc;

use libtest_mimic::{Arguments, Completion, Trial};
use sageattn_cuda::Cuda;

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // They share a stream, and one of them captures it.
    arguments.test_threads = Some(1);
    let cuda = Cuda::all().map(|mut all| Arc::new(all.swap_remove(0)));
    let cuda = cuda.map_err(|error| error.to_string());
    let required =
        env::var("SAGEATTN_REQUIRE").is_ok_and(|list| list.split(',').any(|x| x == "cuda"));
    let tests = [accuracy::TESTS, half::TESTS, interop::TESTS].concat();
    let trials = tests
        .into_iter()
        .map(|(name, test)| {
            let cuda = cuda.clone();
            Trial::ignorable_test(name, move || match cuda {
                Ok(cuda) => test(&cuda).map(|()| Completion::Completed),
                Err(reason) if required => Err(reason.into()),
                Err(reason) => Ok(Completion::ignored_with(reason)),
            })
        })
        .collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}
