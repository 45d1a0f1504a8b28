//! Every backend the suite runs on: all that the face crate finds.

use std::collections::BTreeMap;

use sageattn::Device;

/// A backend with a device behind it.
#[derive(Clone, Debug)]
pub struct Found {
    /// Its name in test names: the backend's own, with a number from its second device on.
    pub label: String,
    /// Its name in `expectations.toml`: the backend's, with `:tier` where one is forced.
    pub name: String,
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
/// first stands for all. A device with several tiers is there once as it is and once for each of them,
/// as `wgpu:dot`.
pub fn all() -> (Vec<Found>, Vec<Absent>) {
    let survey = Device::all();
    let mut infos = Vec::new();
    let mut per_backend: BTreeMap<&str, usize> = BTreeMap::new();
    let (mut found, mut forced, mut refused) = (Vec::new(), Vec::new(), Vec::new());
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
        let name = device.name().to_owned();
        let tiers = device.tiers();
        for tier in tiers.iter().filter(|_| tiers.len() > 1) {
            match device.with_tier(tier) {
                Ok(device) => forced.push(Found {
                    label: format!("{label}:{tier}"),
                    name: format!("{name}:{tier}"),
                    device,
                }),
                Err(error) => refused.push(Absent {
                    name: device.name(),
                    reason: format!("tier {tier}: {error}"),
                }),
            }
        }
        found.push(Found {
            label,
            name,
            device,
        });
    }
    found.append(&mut forced);
    refused.extend(survey.refusals.into_iter().map(|refusal| Absent {
        name: refusal.backend,
        reason: refusal.error.to_string(),
    }));
    (found, refused)
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
