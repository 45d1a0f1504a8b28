//! Random problems, the same ones on every machine: shapes, masks, element types and arrangements that
//! nobody thought of together.

use sageattn_core::{Align, Backend, DType, Mask, Recipe, Shape};

use crate::case::{Arrangement, Bound, BoundClass, Case, Check};
use crate::contract::Outcome;
use crate::inputs::{Input, mix};
use crate::runner::{self, Failure, Prepared};

/// How many problems. Each may compile kernels of its own.
const PROBLEMS: u64 = 40;

/// Runs them all; one that is wrong is reproduced by its number.
pub(crate) fn random_problems_agree(backend: &dyn Backend) -> Result<Outcome, String> {
    let mut ran = 0;
    for number in 0..PROBLEMS {
        let case = problem(number);
        let prepared = Prepared::new(&case, backend.device().kind).map_err(|e| e.to_string())?;
        match runner::run(backend, &prepared, &case.recipes[0]) {
            Ok(_) => ran += 1,
            Err(Failure::Unsupported(_)) => {}
            Err(failure) => return Err(format!("{number}: {failure}\n  {case:?}")),
        }
    }
    if ran == 0 {
        return Err("refused them all".to_owned());
    }
    Ok(Outcome::Held)
}

/// The problem of a number.
fn problem(number: u64) -> Case {
    let mut state = number;
    let mut below = |n: usize| {
        state = mix(state);
        // The remainder is below `n`.
        usize::try_from(state % n as u64).unwrap_or(0)
    };
    let kv_heads = 1 + below(3);
    let widest = [64, 64, 256][below(3)];
    let shape = Shape {
        batch: 1 + below(2),
        q_heads: kv_heads * (1 + below(3)),
        kv_heads,
        q_len: 1 + below(150),
        kv_len: 1 + below(200),
        head_dim: 1 + below(widest),
    };
    let masks = [
        Mask::None,
        Mask::Causal(Align::TopLeft),
        Mask::Causal(Align::BottomRight),
    ];
    let arrangements = [
        Arrangement::Hnd,
        Arrangement::Nhd,
        Arrangement::Strided,
        Arrangement::FusedQkv,
    ];
    let (_, recipe) = Recipe::NAMED[below(Recipe::NAMED.len())];
    Case {
        name: format!("fuzz/{number}"),
        why: "random".to_owned(),
        shape,
        software_shape: None,
        dtype: DType::ALL[below(3)],
        mask: masks[below(3)],
        scale: None,
        arrangement: arrangements[below(4)],
        lse: below(4) > 0,
        recipes: vec![recipe],
        input: match below(4) {
            0 => Input::KBias { sigmas: 5.0 },
            1 => Input::VMean { mean: 3.0 },
            _ => Input::Normal,
        },
        seed: number,
        check: Check::Call,
        // A handful of values does not average its errors.
        bound: Bound {
            class: BoundClass::Normal,
            factor: 3.0,
        },
    }
}
