//! Which devices this machine has, and which one takes which recipe.
//!
//! `cargo run -p sageattn --example 02-choose-a-backend`

#![allow(clippy::print_stdout, reason = "an example shows its result")]

use sageattn::{Backend, DType, Device, Error, Problem, Recipe, Shape, choose};

fn main() -> Result<(), Error> {
    let survey = Device::all();
    for device in &survey.devices {
        println!("found    {device}");
    }
    for refusal in &survey.refusals {
        println!("not here {refusal}");
    }

    // The library's own order of preference, device by device as needed.
    let problem = Problem::new(Shape::mha(2, 16, 4096, 128), DType::BF16)?;
    for (name, recipe) in Recipe::NAMED {
        let (device, _) = Device::best_for(&problem, Some(recipe))?;
        println!("{name:12} on {device}");
    }

    // One's own order: a list of backends, first match wins. Here whatever was found, backwards.
    let backends: Vec<&dyn Backend> = survey
        .devices
        .iter()
        .rev()
        .map(|device| &**device)
        .collect();
    let backend = choose(&backends, &problem, &Recipe::SAGE1_B)?;
    println!("backwards: {}", backend.name());

    // A refusal lists everything that is missing, per backend.
    if let Err(refusal) = choose(&[], &problem, &Recipe::SAGE1_B) {
        println!("{refusal}");
    }
    Ok(())
}
