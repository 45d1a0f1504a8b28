//! Every backend the suite runs on: all that the face crate finds.

use std::collections::BTreeMap;

use sageattn::Device;

/// A backend with a device behind it.
#[derive(Clone, Debug)]
pub struct Found {
    /// Its name in test names: the backend's own, with a number from its second device on.
    pub label: String,
    /// The device.
    pub device: Device,
}

/// A backend without a device.
#[derive(Clone, Debug)]
pub struct Absent {
    /// The backend's name.
    pub name: &'static str,
    /// Why it is not there.
    pub reason: String,
}

/// What this machine has, in order of preference, and what it has not. Of devices that are alike the
/// first stands for all.
pub fn all() -> (Vec<Found>, Vec<Absent>) {
    let survey = Device::all();
    let mut infos = Vec::new();
    let mut per_backend: BTreeMap<&str, usize> = BTreeMap::new();
    let mut found = Vec::new();
    for device in survey.devices {
        let info = (device.name(), device.device());
        if infos.contains(&info) {
            continue;
        }
        infos.push(info);
        let count = per_backend.entry(device.name()).or_default();
        *count += 1;
        let label = match *count {
            1 => device.name().to_owned(),
            n => format!("{}{n}", device.name()),
        };
        found.push(Found { label, device });
    }
    let refused = survey.refusals.into_iter().map(|refusal| Absent {
        name: refusal.backend,
        reason: refusal.error.to_string(),
    });
    (found, refused.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_backend_is_found_or_absent_with_a_reason() {
        let (found, absent) = all();
        assert!(found.iter().any(|found| found.label == "cpu"));
        for name in Device::BACKENDS {
            let found = found.iter().any(|found| found.device.name() == *name);
            let absent = absent.iter().any(|absent| absent.name == *name);
            assert!(found != absent, "{name}");
        }
        assert!(absent.iter().all(|absent| !absent.reason.is_empty()));
    }
}
