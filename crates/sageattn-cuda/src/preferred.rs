//! Which recipe is the fastest for a problem: one pure function over measured times.

use sageattn_core::{DType, Problem, Recipe};

use crate::plan::width;

/// What the two families take, each a straight line through measured times of whole calls.
struct Times {
    /// The head dimension that kernels have.
    width: u32,
    /// Of the two recipes that quantize the one with less error, unless it costs time: P V in integers has less
    /// than half of e4m3's. Its calls take as long at 128, within runs' noise, 0.97 of the time at 256 and up to 1.08 at 64
    /// (`docs/kernels/attn_i8_i8_sm90.md`, `docs/results/h100.md`).
    recipe: Recipe,
    /// Femtoseconds for one query of one head to attend to one key, in that recipe.
    quantized: u64,
    /// The same without quantization.
    half: u64,
    /// Femtoseconds to prepare one key and one value of one head.
    prepare: u64,
}

/// H100, 4 x 32 heads, both families in one run (`docs/results/h100.md`): the slopes of times between 1K and
/// 4K keys. At 256 attention at 16K, and preparation and `half` at 4K, in other runs.
const TIMES: [Times; 3] = [
    Times {
        width: 64,
        recipe: Recipe::SAGE2_I8_F8,
        quantized: 400,
        half: 570,
        prepare: 130_000,
    },
    Times {
        width: 128,
        recipe: Recipe::I8_I8_DYN,
        quantized: 545,
        half: 750,
        prepare: 285_000,
    },
    Times {
        width: 256,
        recipe: Recipe::I8_I8_DYN,
        quantized: 850,
        half: 1600,
        prepare: 550_000,
    },
];

/// Femtoseconds that quantizing takes beside its slopes: another launch, and works that start with Q to be
/// quantized. Fitted to where the two families cross in that run.
const QUANTIZING: u64 = 20_000_000_000;

/// The faster of `half` and, of the recipes that quantize, the one that suits the head dimension: quantizing
/// pays once enough queries share each key. Where a row maximum is `forced`, that is `sage2-i8-f8`, which has one.
pub(crate) fn preferred(problem: &Problem, forced: bool) -> Recipe {
    let shape = problem.shape();
    let width = width(shape.head_dim);
    let times = TIMES.iter().find(|times| times.width == width);
    let Some(times) = times else {
        return Recipe::SAGE2_I8_F8;
    };
    let quantized = match forced {
        true => Recipe::SAGE2_I8_F8,
        false => times.recipe,
    };
    if problem.dtype() == DType::F32 {
        // `half` takes 16 bits.
        return quantized;
    }
    let pairs = problem.visible_pairs();
    let keys = (shape.batch * shape.kv_heads) as u64 * shape.kv_len as u64;
    // Products of two 64-bit numbers.
    let cost = |each: u64, count: u64| u128::from(each) * u128::from(count);
    let preparing = u128::from(QUANTIZING) + cost(times.prepare, keys);
    match preparing + cost(times.quantized, pairs) < cost(times.half, pairs) {
        true => quantized,
        false => Recipe::HALF,
    }
}

#[cfg(test)]
mod tests {
    use sageattn_core::{Align, Mask, Shape};

    use super::*;

    fn of(shape: Shape, dtype: DType, mask: Mask) -> Recipe {
        let problem = Problem::new(shape, dtype).unwrap().with_mask(mask);
        let quantized = preferred(&problem, false) != Recipe::HALF;
        let forced = preferred(&problem, true);
        assert_eq!(forced == Recipe::SAGE2_I8_F8, quantized, "{forced}");
        preferred(&problem, false)
    }

    #[test]
    fn few_queries_a_key_are_not_worth_preparing() {
        for (shape, recipe) in [
            (Shape::mha(4, 32, 512, 128), Recipe::HALF),
            (Shape::mha(4, 32, 1024, 128), Recipe::HALF),
            (Shape::mha(4, 32, 2048, 128), Recipe::I8_I8_DYN),
            (Shape::mha(12, 64, 197, 64), Recipe::HALF),
            (Shape::mha(4, 24, 1105, 64), Recipe::HALF),
            (Shape::mha(4, 32, 1024, 64), Recipe::HALF),
            (Shape::mha(4, 32, 16384, 64), Recipe::SAGE2_I8_F8),
            (Shape::mha(4, 32, 4096, 256), Recipe::I8_I8_DYN),
        ] {
            assert_eq!(of(shape, DType::F16, Mask::None), recipe, "{shape:?}");
        }
    }

    #[test]
    fn a_causal_mask_halves_the_queries_of_a_key() {
        let causal = Mask::Causal(Align::TopLeft);
        for (len, recipe) in [
            (1024, Recipe::HALF),
            (1536, Recipe::HALF),
            (2048, Recipe::HALF),
            (4096, Recipe::I8_I8_DYN),
        ] {
            let shape = Shape::mha(4, 32, len, 128);
            assert_eq!(of(shape, DType::F16, causal), recipe, "{len}");
        }
    }

    #[test]
    fn decoding_reads_every_key_once() {
        let shape = Shape {
            q_heads: 32,
            kv_heads: 8,
            q_len: 1,
            ..Shape::mha(16, 32, 16384, 128)
        };
        let mask = Mask::Causal(Align::BottomRight);
        assert_eq!(of(shape, DType::BF16, mask), Recipe::HALF);
    }

    #[test]
    fn heads_that_share_keys_share_their_preparation() {
        let shape = Shape::mha(4, 32, 1100, 128);
        let shared = Shape {
            kv_heads: 4,
            ..shape
        };
        assert_eq!(of(shape, DType::F16, Mask::None), Recipe::HALF);
        assert_eq!(of(shared, DType::F16, Mask::None), Recipe::I8_I8_DYN);
    }

    #[test]
    fn f32_is_always_quantized() {
        let short = Shape::mha(1, 1, 1, 64);
        assert_eq!(of(short, DType::F32, Mask::None), Recipe::SAGE2_I8_F8);
    }

    #[test]
    fn the_largest_problem_does_not_overflow() {
        let long = Shape {
            batch: 1 << 10,
            ..Shape::mha(1, 1, 1 << 30, 256)
        };
        for mask in [Mask::None, Mask::Causal(Align::TopLeft)] {
            assert_eq!(of(long, DType::F16, mask), Recipe::I8_I8_DYN);
        }
    }
}
