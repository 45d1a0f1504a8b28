//! Tests on a real adapter; a software one will do. Without any they are ignored with the reason, unless
//! `SAGEATTN_REQUIRE` names `wgpu`: then that is a failure.

mod accuracy;
mod decode;
mod interop;
mod support;
mod tiers;

use libtest_mimic::{Arguments, Completion, Failed, Trial};
use sageattn_wgpu::Wgpu;

type Test = (&'static str, fn(&Wgpu) -> Result<(), Failed>);

fn main() -> std::process::ExitCode {
    let required = std::env::var("SAGEATTN_REQUIRE").unwrap_or_default();
    let required = required.split(',').any(|name| name.trim() == "wgpu");
    let gpu = Wgpu::best().map_err(|error| error.to_string());
    let tests = accuracy::TESTS
        .iter()
        .chain(decode::TESTS)
        .chain(interop::TESTS)
        .chain(tiers::TESTS);
    let trials = tests
        .map(|&(name, test): &Test| {
            let gpu = gpu.clone();
            Trial::ignorable_test(name, move || match gpu {
                Ok(gpu) => test(&gpu).map(|()| Completion::Completed),
                Err(reason) if required => Err(format!("no wgpu device: {reason}").into()),
                Err(reason) => Ok(Completion::ignored_with(reason)),
            })
        })
        .collect();
    let mut arguments = Arguments::from_args();
    // One device: tests side by side would only wait for each other.
    arguments.test_threads.get_or_insert(1);
    libtest_mimic::run(&arguments, trials).exit_code()
}
