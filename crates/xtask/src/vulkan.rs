//! A Vulkan driver for the tests: the machine's own, or one in software.

use std::fs;

use anyhow::{Context, Result};

use crate::command::{cargo, program, run, stdout};

const PACKAGES: [&str; 2] = ["libvulkan1", "mesa-vulkan-drivers"];

/// Makes sure that the portable backend finds a device, where that takes no more than a package. Does
/// nothing when it finds one already. Failing to is an error only when `required`.
pub(crate) fn set_up(required: bool) -> Result<()> {
    if has_device()? {
        return Ok(());
    }
    println!("no GPU interface on this machine, not even in software");
    match install() {
        Ok(()) if has_device()? => Ok(()),
        outcome => {
            let error = outcome.err().unwrap_or_else(|| {
                anyhow::anyhow!("{} are installed, and still no device", PACKAGES.join(", "))
            });
            if required {
                return Err(error.context("SAGEATTN_REQUIRE asks for wgpu"));
            }
            println!("{error:#}");
            println!("going on without: the tests of the portable backend will be ignored");
            Ok(())
        }
    }
}

/// Asks the command itself: what it finds is what the tests will find.
fn has_device() -> Result<bool> {
    #[derive(serde::Deserialize)]
    struct Listing {
        devices: Vec<Found>,
    }
    #[derive(serde::Deserialize)]
    struct Found {
        backend: String,
        device: String,
        driver: String,
    }

    let mut command = cargo();
    command.args(["run", "--quiet", "--package", "sageattn-cli", "--"]);
    let listing = stdout(command.args(["devices", "--json"]))?;
    let listing: Listing =
        serde_json::from_str(&listing).context("`sageattn devices --json` printed no listing")?;
    for found in &listing.devices {
        println!("{}: {} ({})", found.backend, found.device, found.driver);
    }
    Ok(listing.devices.iter().any(|found| found.backend == "wgpu"))
}

fn install() -> Result<()> {
    let by_hand = format!(
        "install a Vulkan driver; on Debian and Ubuntu: apt-get install {}",
        PACKAGES.join(" ")
    );
    let system = fs::read_to_string("/etc/os-release").unwrap_or_default();
    anyhow::ensure!(is_debian_like(&system), "not Debian or Ubuntu: {by_hand}");
    let user = stdout(program("id").arg("-u"))?;
    anyhow::ensure!(user.trim() == "0", "not root: {by_hand}");
    println!("installing {}", PACKAGES.join(", "));
    // One broken source of many fails the update; what is needed may be found all the same.
    if let Err(error) = run(apt().arg("update")) {
        println!("{error:#}");
    }
    run(apt()
        .args(["install", "--yes", "--no-install-recommends"])
        .args(PACKAGES))
    .context(by_hand)
}

/// Whether `/etc/os-release` is that of Debian, Ubuntu, or a system made from one of them.
fn is_debian_like(os_release: &str) -> bool {
    os_release.lines().any(|line| {
        let (key, value) = line.split_once('=').unwrap_or((line, ""));
        let mut ids = value.trim_matches('"').split_whitespace();
        matches!(key, "ID" | "ID_LIKE") && ids.any(|id| matches!(id, "debian" | "ubuntu"))
    })
}

fn apt() -> std::process::Command {
    let mut command = program("apt-get");
    command
        .env("DEBIAN_FRONTEND", "noninteractive")
        .arg("--quiet");
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn systems_made_from_debian_are_recognised() {
        for like in [
            "ID=debian\n",
            "NAME=x\nID=mint\nID_LIKE=\"ubuntu debian\"\n",
        ] {
            assert!(is_debian_like(like), "{like}");
        }
        for other in ["", "ID=fedora\nVARIANT=debian\n", "ID=arch\nID_LIKE=\"\"\n"] {
            assert!(!is_debian_like(other), "{other}");
        }
    }
}
