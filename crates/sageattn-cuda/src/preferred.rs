//! Which recipe is the fastest for a problem.

use sageattn_core::{DType, Problem, Recipe};

/// The recipe that computes this problem fastest.
pub(crate) fn preferred(problem: &Problem) -> Recipe {
    match problem.dtype() {
        DType::F32 => Recipe::SAGE2_I8_F8,
        DType::F16 | DType::BF16 => Recipe::HALF,
    }
}
