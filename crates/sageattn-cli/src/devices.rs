//! `sageattn devices`: what this machine has.

use anyhow::Result;
use comfy_table::{Table, presets};
use sageattn::{Device, DeviceKind};
use serde::Serialize;

use crate::args::DevicesArgs;
use crate::terminal::{Progress, print, print_json};

#[derive(Debug, Serialize)]
struct Listing {
    devices: Vec<Found>,
    refused: Vec<Refused>,
}

#[derive(Debug, Serialize)]
struct Found {
    backend: &'static str,
    device: String,
    driver: String,
    kind: &'static str,
    /// Whether `--backend auto` may take it.
    auto: bool,
    /// The names that may follow the backend's behind a colon.
    tiers: Vec<&'static str>,
    notes: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Refused {
    backend: &'static str,
    reason: String,
}

pub(crate) fn devices(args: &DevicesArgs) -> Result<()> {
    let progress = Progress::start("looking for devices");
    let survey = Device::all();
    drop(progress);
    let listing = Listing {
        devices: survey.devices.iter().map(found).collect(),
        refused: survey
            .refusals
            .iter()
            .map(|refusal| Refused {
                backend: refusal.backend,
                reason: refusal.error.to_string(),
            })
            .collect(),
    };
    if args.json {
        return print_json(&listing);
    }
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["backend", "device", "driver", "kind", "auto", "tiers"]);
    for found in &listing.devices {
        let auto = if found.auto { "yes" } else { "no" };
        table.add_row([
            found.backend,
            &found.device,
            &found.driver,
            found.kind,
            auto,
            &found.tiers.join(", "),
        ]);
    }
    let mut text = table.trim_fmt();
    for found in &listing.devices {
        for note in &found.notes {
            text.push_str(&format!("\n{} on {}: {note}", found.backend, found.device));
        }
    }
    for refused in &listing.refused {
        text.push_str(&format!("\nno {}: {}", refused.backend, refused.reason));
    }
    print(&text)
}

fn found(device: &Device) -> Found {
    let info = device.device();
    Found {
        backend: device.name(),
        device: info.name,
        driver: info.driver,
        kind: match info.kind {
            DeviceKind::Cpu => "cpu",
            DeviceKind::SoftwareGpu => "software gpu",
            DeviceKind::Gpu => "gpu",
        },
        auto: device.is_candidate(),
        tiers: device.tiers(),
        notes: device.notes(),
    }
}
