//! Tiers against each other: one recipe is one result, whatever computes it.

use libtest_mimic::Failed;
use sageattn_core::metrics::Metrics;
use sageattn_core::{
    Align, Backend, DType, Error, HostOutput, Mask, Outputs, Plan, Problem, Recipe, Shape,
};
use sageattn_wgpu::{Tier, Wgpu};

use crate::Test;
use crate::support::{Inputs, run};

pub(crate) const TESTS: &[Test] = &[
    ("tiers_agree_on_the_same_recipe", agree),
    ("a_fixed_tier_is_the_tier_of_every_plan", fixed),
];

const RECIPES: [Recipe; 3] = [Recipe::SAGE1_B, Recipe::SAGE1_T, Recipe::I8_I8_DYN];

/// Every way to compute there is on the device. Packed dot products with the instructions struck out are
/// one more, so that there are two on any device.
fn ways(gpu: &Wgpu) -> Result<Vec<(String, Wgpu)>, Error> {
    let plain = gpu.without_native_instructions().with_tier(Tier::Dot)?;
    let mut ways = vec![("dot without native instructions".to_owned(), plain)];
    for tier in gpu.tiers() {
        ways.push((tier.to_string(), gpu.with_tier(tier)?));
    }
    Ok(ways)
}

/// How far two results of a recipe are apart, if too far: by the conformance suite's tight bounds.
fn apart(problem: &Problem, a: &HostOutput, b: &HostOutput) -> Option<String> {
    let reference: Vec<f64> = a.out.iter().copied().map(f64::from).collect();
    let metrics = Metrics::compare(&b.out, &reference);
    let worst = Metrics::worst_row(&b.out, &reference, problem.shape().head_dim, 1e-6);
    let pairs = a.lse.iter().flatten().zip(b.lse.iter().flatten());
    let far = pairs.filter(|(a, b)| {
        a != b && ((*a - *b).abs() > 1e-4 * a.abs().max(1.0) || a.is_nan() || b.is_nan())
    });
    let far = far.count();
    let right = metrics.not_finite == 0 && metrics.rel_l1 <= 1e-3 && worst <= 0.05 && far == 0;
    (!right).then(|| format!("{metrics:?}, worst row {worst:.2e}, {far} of LSE"))
}

fn agree(gpu: &Wgpu) -> Result<(), Failed> {
    let ways = ways(gpu)?;
    for recipe in RECIPES {
        let causal = Mask::Causal(Align::BottomRight);
        for (head_dim, mask) in [(64, Mask::None), (128, causal)] {
            let shape = Shape {
                q_heads: 4,
                kv_heads: 2,
                q_len: 150,
                kv_len: 201,
                ..Shape::mha(1, 4, 1, head_dim)
            };
            let problem = Problem::new(shape, DType::F16)?
                .with_mask(mask)
                .with_outputs(Outputs::OAndLse);
            let inputs = Inputs::noise(&shape);
            let mut results = Vec::new();
            for (name, way) in &ways {
                match run(way, &problem, &recipe, &inputs) {
                    Ok(result) => results.push((name, result)),
                    // Not every tier takes every recipe.
                    Err(_) if way.supports(&problem, &recipe).is_err() => {}
                    Err(error) => return Err(error),
                }
            }
            if results.len() < 2 {
                return Err(format!("{recipe}: nothing to compare").into());
            }
            for (i, (name, result)) in results.iter().enumerate() {
                for (other, against) in &results[..i] {
                    if let Some(how) = apart(&problem, against, result) {
                        let title = format!("{recipe}, head_dim {head_dim}, {mask:?}");
                        return Err(format!("{title}: {other} and {name}: {how}").into());
                    }
                }
            }
        }
    }
    Ok(())
}

/// What the caller fixes is not measured and not ranked: the same kernel each time, bit for bit.
fn fixed(gpu: &Wgpu) -> Result<(), Failed> {
    let problem =
        Problem::new(Shape::mha(1, 2, 200, 64), DType::F16)?.with_outputs(Outputs::OAndLse);
    let inputs = Inputs::noise(problem.shape());
    for tier in gpu.tiers() {
        let [first, second] = [gpu.with_tier(tier)?, gpu.with_tier(tier)?];
        let variant = |way: &Wgpu| -> Result<String, Error> {
            let plan = way.plan_wgpu(&problem, &Recipe::SAGE1_B)?;
            Ok(plan.describe().variant)
        };
        let (name, again) = (variant(&first)?, variant(&second)?);
        if name != again || !name.starts_with(&format!("attend_{tier}_")) {
            return Err(format!("tier {tier} planned {name}, then {again}").into());
        }
        let a = run(&first, &problem, &Recipe::SAGE1_B, &inputs)?;
        let b = run(&second, &problem, &Recipe::SAGE1_B, &inputs)?;
        let same = a.out.iter().map(|x| x.to_bits());
        if !same.eq(b.out.iter().map(|x| x.to_bits())) || a.lse != b.lse {
            return Err(format!("tier {tier}: two plans differ").into());
        }
    }
    Ok(())
}
