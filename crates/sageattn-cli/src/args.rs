//! The command line: what is asked for, in the library's terms.
//!
//! Values are taken as text and parsed here rather than by clap, so that a wrong one is answered with
//! one line in the library's own words.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Parser, Subcommand};
use sageattn::{Align, Device, Error, Mask, Problem, Recipe};

/// Quantized attention (SageAttention) on any GPU, or none
#[derive(Debug, Parser)]
#[command(name = "sageattn", version)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List the devices, and why a backend has none
    Devices(DevicesArgs),
    /// Compute attention on the tensors q, k and v of a file, and compare with exact attention
    Run(RunArgs),
    /// Time a benchmark suite on one device
    Bench(BenchArgs),
}

#[derive(Debug, clap::Args)]
pub(crate) struct DevicesArgs {
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct RunArgs {
    /// A safetensors file with q, k and v: [batch, heads, length, head_dim], f16, bf16 or f32
    pub(crate) file: PathBuf,
    #[command(flatten)]
    pub(crate) choice: ChoiceArgs,
    /// none, causal-top-left or causal-bottom-right [default: as the file's metadata says]
    #[arg(long, value_name = "MASK")]
    pub(crate) mask: Option<String>,
    /// Write O to this safetensors file, as `out` in the input's element type
    #[arg(long, value_name = "OUT.safetensors")]
    pub(crate) output: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct BenchArgs {
    /// The suite's name; a wrong one lists them
    #[arg(long, value_name = "NAME", default_value = "quick")]
    pub(crate) suite: String,
    #[command(flatten)]
    pub(crate) choice: ChoiceArgs,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct ChoiceArgs {
    /// auto, wgpu or cpu; auto passes over GPU interfaces in software
    #[arg(long, default_value = AUTO)]
    backend: String,
    /// auto, or a recipe such as sage1-b, with +unsmoothed or +sampledN if wanted
    #[arg(long, value_name = "NAME", default_value = AUTO)]
    recipe: String,
}

const AUTO: &str = "auto";

/// Which device and recipe were asked for; `None` leaves it to the library.
#[derive(Clone, Debug)]
pub(crate) struct Choice {
    backend: Option<String>,
    recipe: Option<Recipe>,
}

impl ChoiceArgs {
    /// Parses the names. Opens no device.
    pub(crate) fn parse(&self) -> Result<Choice> {
        let backend = match self.backend.as_str() {
            AUTO => None,
            name => {
                Device::backend_name(name)?;
                Some(name.to_owned())
            }
        };
        let recipe = match self.recipe.as_str() {
            AUTO => None,
            name => Some(name.parse()?),
        };
        Ok(Choice { backend, recipe })
    }
}

impl Choice {
    /// Opens the device for a problem.
    pub(crate) fn open(&self, problem: &Problem) -> Result<(Device, Recipe), Error> {
        let Some(backend) = &self.backend else {
            return Device::best_for(problem, self.recipe);
        };
        let device = Device::open(backend)?;
        let recipe = self.recipe.unwrap_or_else(|| device.preferred(problem));
        Ok((device, recipe))
    }

    /// Opens the device for more than one problem.
    pub(crate) fn open_any(&self) -> Result<Device, Error> {
        match &self.backend {
            Some(backend) => Device::open(backend),
            None => Ok(Device::best()),
        }
    }

    /// The recipe that was asked for, if one was.
    pub(crate) fn recipe(&self) -> Option<Recipe> {
        self.recipe
    }
}

/// Parses `--mask`.
pub(crate) fn parse_mask(name: &str) -> Result<Mask> {
    for mask in MASKS {
        if mask_name(mask) == name {
            return Ok(mask);
        }
    }
    let known = MASKS.map(mask_name).join(", ");
    bail!("mask: unknown name {name:?}; the known ones are {known}")
}

const MASKS: [Mask; 3] = [
    Mask::None,
    Mask::Causal(Align::TopLeft),
    Mask::Causal(Align::BottomRight),
];

/// The name that `--mask` takes.
pub(crate) fn mask_name(mask: Mask) -> &'static str {
    match mask {
        Mask::Causal(Align::TopLeft) => "causal-top-left",
        Mask::Causal(Align::BottomRight) => "causal-bottom-right",
        // The library may learn masks that the command cannot ask for.
        _ => "none",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn every_mask_survives_a_round_trip() {
        for mask in MASKS {
            assert_eq!(parse_mask(mask_name(mask)).unwrap(), mask);
        }
        let error = parse_mask("causal").unwrap_err().to_string();
        assert!(error.contains("causal-bottom-right"), "{error}");
    }
}
