//! Quantization as every tier defines it: symmetric, one f32 scale per group, codes rounded to
//! nearest even (`docs/numerics.md`). All functions take one (batch, head): dense rows of `head_dim`.

use half::f16;

use super::{e4m3, to_f32};
use crate::{DType, Groups, Smooth};

/// A group whose largest magnitude is below this counts as zero: scale 1, codes 0. Its reciprocal
/// scale would overflow or lose all precision.
pub const ZERO_AMAX: f32 = 1e-30;

/// V magnitudes above this are scaled down before they are rounded to f16, by a power of two.
pub const F16_V_MAX: f32 = 32768.0;

/// Integer codes and their scales.
#[derive(Clone, Debug, PartialEq)]
pub struct Codes {
    /// One code per element, in the rows' order.
    pub codes: Vec<i8>,
    /// One scale per group: `x` is about `code * scale`.
    pub scales: Vec<f32>,
}

/// The V operand of P V: values that the multiplication sees, and what to multiply each channel of
/// the result by.
#[derive(Clone, Debug, PartialEq)]
pub struct VOperand {
    /// Rounded values, exact in f32, in the rows' order.
    pub values: Vec<f32>,
    /// One factor per channel.
    pub scales: Vec<f32>,
    /// What rounding took away, in units of `scales`: row t holds for every channel the sum of
    /// `x / scale - value` over the keys of tiles 0 to t, of [`RESIDUAL_TILE`] keys each. Empty where the
    /// recipe does not correct O by it.
    pub residual_sums: Vec<f32>,
}

/// Keys of one row of [`VOperand::residual_sums`].
pub const RESIDUAL_TILE: usize = 128;

/// Rows of Q that share a correction: the tiles that the last of them sees.
pub const RESIDUAL_ROWS: usize = 64;

/// The vector subtracted from every key: zero, the mean, or a sampled mean. Summed in f64 and rounded
/// once; kernels sum in f32 and must come within 1e-5 of the largest |K|.
pub fn key_offset(smooth: Smooth, keys: &[f32], head_dim: usize) -> Vec<f32> {
    let len = keys.len() / head_dim;
    let samples = match smooth {
        Smooth::Off => return vec![0.0; head_dim],
        Smooth::Mean => len,
        Smooth::Sampled(n) => (n.get() as usize).min(len),
    };
    mean_of_rows(
        keys,
        head_dim,
        (0..samples).map(|i| sampled_row(i, samples, len)),
    )
}

/// The row of the `index`-th of `samples` evenly spaced rows out of `len`.
pub fn sampled_row(index: usize, samples: usize, len: usize) -> usize {
    index * len / samples
}

/// The f32 mean of some rows.
pub fn mean_of_rows(
    rows: &[f32],
    head_dim: usize,
    which: impl ExactSizeIterator<Item = usize>,
) -> Vec<f32> {
    let count = which.len() as f64;
    let mut sums = vec![0.0f64; head_dim];
    for row in which {
        for (sum, &x) in sums.iter_mut().zip(&rows[row * head_dim..]) {
            *sum += f64::from(x);
        }
    }
    sums.into_iter().map(|sum| to_f32(sum / count)).collect()
}

/// Every row less `offset`, in f32.
pub fn subtract(rows: &[f32], offset: &[f32]) -> Vec<f32> {
    rows.chunks_exact(offset.len())
        .flat_map(|row| row.iter().zip(offset).map(|(x, mean)| x - mean))
        .collect()
}

/// The scale of a group from its largest magnitude; `largest_code` is 127, 7 or 448.
pub fn scale_of(amax: f32, largest_code: f32) -> f32 {
    if amax < ZERO_AMAX {
        1.0
    } else {
        amax / largest_code
    }
}

/// The integer code of `x` in a group with this scale: `x * (1 / scale)` to nearest even, clamped.
pub fn code_of(x: f32, scale: f32, largest_code: f32) -> i8 {
    let code = (x * (1.0 / scale)).round_ties_even();
    #[expect(
        clippy::cast_possible_truncation,
        reason = "clamped; `as` maps NaN to zero"
    )]
    {
        code.clamp(-largest_code, largest_code) as i8
    }
}

/// Quantizes rows to integers of at most `largest_code`, one scale per group. Only these rows count in
/// a group's maximum: there is no padding here.
pub fn integer_codes(rows: &[f32], head_dim: usize, groups: Groups, largest_code: f32) -> Codes {
    let len = rows.len() / head_dim;
    let mut amax = vec![0.0f32; groups.count(len)];
    for (row, values) in rows.chunks_exact(head_dim).enumerate() {
        let group = &mut amax[groups.of(row)];
        *group = values.iter().fold(*group, |max, x| max.max(x.abs()));
    }
    let scales: Vec<f32> = amax
        .iter()
        .map(|&amax| scale_of(amax, largest_code))
        .collect();
    let codes = rows
        .chunks_exact(head_dim)
        .enumerate()
        .flat_map(|(row, values)| {
            let group = groups.of(row);
            let (scale, zero) = (scales[group], amax[group] < ZERO_AMAX);
            let code = move |&x: &f32| {
                if zero {
                    0
                } else {
                    code_of(x, scale, largest_code)
                }
            };
            values.iter().map(code)
        })
        .collect();
    Codes { codes, scales }
}

/// V in INT8, one scale per channel.
pub fn v_int8(values: &[f32], head_dim: usize) -> VOperand {
    per_channel(values, head_dim, 127.0, |x, scale| {
        f32::from(code_of(x, scale, 127.0))
    })
}

/// V in e4m3, one scale per channel, and what that rounding took away.
///
/// The weights of a row sum to one, so the mean rounding error of V passes into O whatever the weights
/// are; only the rest is averaged out by them. A kernel adds the mean back: `docs/numerics.md`.
pub fn v_e4m3(values: &[f32], head_dim: usize) -> VOperand {
    let mut operand = per_channel(values, head_dim, e4m3::MAX, |x, scale| {
        e4m3::round(x * (1.0 / scale))
    });
    let zero: Vec<bool> = channel_amax(values, head_dim)
        .into_iter()
        .map(|amax| amax < ZERO_AMAX)
        .collect();
    let mut sums = vec![0.0f32; head_dim];
    let tiles = values.chunks(RESIDUAL_TILE * head_dim);
    for (tile, codes) in tiles.zip(operand.values.chunks(RESIDUAL_TILE * head_dim)) {
        for (row, codes) in tile.chunks(head_dim).zip(codes.chunks(head_dim)) {
            for (channel, sum) in sums.iter_mut().enumerate().filter(|(c, _)| !zero[*c]) {
                *sum += row[channel] * (1.0 / operand.scales[channel]) - codes[channel];
            }
        }
        operand.residual_sums.extend_from_slice(&sums);
    }
    operand
}

/// V in f16. bf16 and f32 reach further than f16: a channel above [`F16_V_MAX`] is divided by the
/// smallest power of two that brings it back.
pub fn v_f16(values: &[f32], head_dim: usize, dtype: DType) -> VOperand {
    let scales = match dtype {
        DType::F16 => vec![1.0; head_dim],
        DType::BF16 | DType::F32 => channel_amax(values, head_dim)
            .into_iter()
            .map(power_of_two_to_f16)
            .collect(),
    };
    let rounded = values.chunks_exact(head_dim).flat_map(|row| {
        let scaled = row.iter().zip(&scales).map(|(x, scale)| x * (1.0 / scale));
        scaled.map(|x| f16::from_f32(x).to_f32())
    });
    VOperand {
        values: rounded.collect(),
        scales: scales.clone(),
        residual_sums: Vec::new(),
    }
}

fn power_of_two_to_f16(amax: f32) -> f32 {
    let mut scale = 1.0;
    while amax.is_finite() && amax / scale > F16_V_MAX {
        scale *= 2.0;
    }
    scale
}

fn per_channel(
    values: &[f32],
    head_dim: usize,
    largest: f32,
    round: impl Fn(f32, f32) -> f32,
) -> VOperand {
    let amax = channel_amax(values, head_dim);
    let scales: Vec<f32> = amax.iter().map(|&amax| scale_of(amax, largest)).collect();
    let rounded = values.chunks_exact(head_dim).flat_map(|row| {
        row.iter()
            .zip(&amax)
            .zip(&scales)
            .map(|((&x, &amax), &scale)| {
                if amax < ZERO_AMAX {
                    0.0
                } else {
                    round(x, scale)
                }
            })
    });
    VOperand {
        values: rounded.collect(),
        scales: scales.clone(),
        residual_sums: Vec::new(),
    }
}

fn channel_amax(values: &[f32], head_dim: usize) -> Vec<f32> {
    let mut amax = vec![0.0f32; head_dim];
    for row in values.chunks_exact(head_dim) {
        for (max, x) in amax.iter_mut().zip(row) {
            *max = max.max(x.abs());
        }
    }
    amax
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Grouping;
    use proptest::prelude::*;
    use std::num::NonZeroU32;

    #[test]
    fn codes_round_ties_to_even_and_clamp() {
        // amax 127 gives scale 1: the codes are the rounded values themselves.
        let rows = [127.0, 0.5, 1.5, 2.5, -0.5, -127.0];
        let got = integer_codes(&rows, 6, Grouping::PerToken.q(), 127.0);
        assert_eq!(got.codes, [127, 0, 2, 2, 0, -127]);
        assert_eq!(got.scales, [1.0]);
    }

    #[test]
    fn a_zero_group_has_scale_one_and_leaves_its_neighbours_alone() {
        let rows = [0.0, 0.0, 9e-31, -9e-31, 2.0, -2.0];
        let got = integer_codes(&rows, 2, Grouping::PerToken.k(), 7.0);
        assert_eq!(got.codes, [0, 0, 0, 0, 7, -7]);
        assert_eq!(got.scales[..2], [1.0, 1.0]);
    }

    #[test]
    fn offsets_are_means_over_the_keys_asked_for() {
        let keys = [1.0, 2.0, 3.0, 4.0, 5.0, 60.0];
        assert_eq!(key_offset(Smooth::Off, &keys, 1), [0.0]);
        assert_eq!(key_offset(Smooth::Mean, &keys, 2), [3.0, 22.0]);
        let three = NonZeroU32::new(3).map(Smooth::Sampled).unwrap();
        assert_eq!(key_offset(three, &keys, 1), [3.0], "keys 0, 2 and 4");
        let many = NonZeroU32::new(99).map(Smooth::Sampled).unwrap();
        assert_eq!(
            key_offset(many, &keys, 1),
            key_offset(Smooth::Mean, &keys, 1)
        );
    }

    #[test]
    fn large_v_is_scaled_by_a_power_of_two_only_where_f16_cannot_hold_it() {
        let got = v_f16(&[1_048_576.0, 3.0, -2e5, 1.0], 2, DType::F32);
        assert_eq!(got.scales, [32.0, 1.0]);
        assert_eq!(got.values[0], 32768.0);
        assert_eq!(v_f16(&[65504.0], 1, DType::F16).scales, [1.0]);
    }

    /// 17 lies midway between the e4m3 numbers 16 and 18, and 448 is the largest one.
    #[test]
    fn residuals_are_summed_over_tiles() {
        let mut v = [[0.0, 1.0]; RESIDUAL_TILE + 1];
        v[0][0] = 17.0;
        v[1][0] = 448.0;
        v[RESIDUAL_TILE][0] = 18.75;
        v[0][1] = 448.0;
        let got = v_e4m3(v.as_flattened(), 2);
        assert_eq!(got.scales, [1.0, 1.0]);
        assert_eq!(got.residual_sums, [1.0, 0.0, 1.75, 0.0]);
        assert!(v_int8(v.as_flattened(), 2).residual_sums.is_empty());
        assert_eq!(v_e4m3(&[9e-31, -8e-31], 1).residual_sums, [0.0]);
    }

    #[test]
    fn an_all_zero_channel_of_v_stays_zero() {
        for got in [v_int8(&[0.0, 1.0], 2), v_e4m3(&[0.0, 1.0], 2)] {
            assert_eq!(got.values[0] * got.scales[0], 0.0);
            assert!((got.values[1] * got.scales[1] - 1.0).abs() < 1e-6);
        }
    }

    proptest! {
        /// Half a step is the most a code can be off, and the largest element keeps its size.
        #[test]
        fn codes_come_back_within_half_a_step(
            rows in proptest::collection::vec(-1e4f32..1e4, 1..400),
            four_bits in any::<bool>(),
        ) {
            let largest = if four_bits { 7.0 } else { 127.0 };
            let head_dim = if rows.len() % 2 == 0 { 2 } else { 1 };
            let groups = Grouping::PerThread { q: 16, k: 128 }.k();
            let got = integer_codes(&rows, head_dim, groups, largest);
            for (index, &x) in rows.iter().enumerate() {
                let scale = got.scales[groups.of(index / head_dim)];
                let error = (f32::from(got.codes[index]) * scale - x).abs();
                prop_assert!(error <= 0.5001 * scale + f32::EPSILON * x.abs());
            }
        }
    }
}
