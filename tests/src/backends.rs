//! Every backend the suite knows, one line each.

use std::sync::Arc;

use sageattn_core::{Backend, Cpu};

/// A backend with a device behind it.
#[derive(Clone, Debug)]
pub struct Found {
    /// Its name in test names; the backend's own, and a number where it has several devices.
    pub label: String,
    /// The backend.
    pub backend: Arc<dyn Backend>,
}

/// A backend without a device.
#[derive(Clone, Debug)]
pub struct Absent {
    /// The backend's name.
    pub name: &'static str,
    /// Why it is not there.
    pub reason: String,
}

/// What this machine has, in order of preference, and what it has not.
pub fn all() -> (Vec<Found>, Vec<Absent>) {
    let found = vec![Found {
        label: "cpu".to_owned(),
        backend: Arc::new(Cpu::new()),
    }];
    let absent = vec![Absent {
        name: "cuda",
        reason: "no CUDA device: not in this version".to_owned(),
    }];
    (found, absent)
}
