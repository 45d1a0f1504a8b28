//! What Q, K and V hold. Every generator is a pure function of a seed and an element's position, so
//! that it runs in parallel and gives the same numbers on every machine.

use rayon::prelude::*;
use serde::Deserialize;

use sageattn_core::Shape;

/// Where the values of a case come from.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Input {
    /// Independent N(0, 1).
    Normal,
    /// N(0, 1), and on every channel of K a constant drawn from N(0, sigmas^2): what smoothing is for.
    KBias {
        /// The spread of the constants, in standard deviations of the keys.
        sigmas: f32,
    },
    /// N(0, 1) with one element of Q and one of K replaced: their groups lose all resolution.
    Outlier {
        /// The element's value.
        value: f32,
    },
    /// Every key is the same, so every score of a row is.
    EqualLogits,
    /// Rows 0..128 of Q and rows 0..64 of K are zero: whole groups without an amax.
    ZeroBlocks,
    /// Q, K and V are zero throughout.
    AllZero,
    /// Every third channel of V is zero: per-channel scales without an amax.
    ZeroChannels,
    /// N(0, 1) with a large common offset in V.
    VMean {
        /// The offset.
        mean: f32,
    },
    /// Elements of Q and K are this value with random signs.
    Huge {
        /// The magnitude.
        magnitude: f32,
    },
    /// N(0, 1) with V multiplied by this.
    VHuge {
        /// The factor.
        factor: f32,
    },
    /// N(0, 1) with keys and values multiplied down to where f16 is subnormal and scales are tiny.
    Tiny {
        /// The factor on K and V.
        factor: f32,
    },
    /// The first key attracts most of the attention and holds little value: an attention sink.
    Sink,
    /// N(0, 1) with one element of the last head not finite.
    Planted {
        /// `q`, `k` or `v`.
        tensor: Planted,
        /// NaN rather than infinity.
        nan: bool,
    },
    /// A file of `tests/data`.
    File {
        /// Its name without the extension.
        name: String,
    },
}

/// The tensor that a value is planted in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Planted {
    /// The queries.
    Q,
    /// The keys.
    K,
    /// The values.
    V,
}

/// The dense `[batch, heads, len, head_dim]` values of Q, K and V for a generator; files come from
/// [`crate::data`].
pub(crate) fn generate(input: &Input, shape: &Shape, seed: u64) -> [Vec<f32>; 3] {
    let mut q = normal(seed, 0, shape.q());
    let mut k = normal(seed, 1, shape.kv());
    let mut v = normal(seed, 2, shape.kv());
    let dim = shape.head_dim;
    match *input {
        Input::Normal | Input::File { .. } => {}
        Input::KBias { sigmas } => {
            let bias = normal(seed, 3, [1, 1, 1, dim]);
            rows(&mut k, dim, |_, row| {
                row.iter_mut()
                    .zip(&bias)
                    .for_each(|(x, b)| *x += sigmas * b);
            });
        }
        Input::Outlier { value } => {
            let (at_q, at_k) = (q.len() / 2, k.len() / 3);
            q[at_q] = value;
            k[at_k] = value;
        }
        Input::EqualLogits => {
            let first = k[..dim].to_vec();
            rows(&mut k, dim, |_, row| row.copy_from_slice(&first));
        }
        Input::ZeroBlocks => {
            rows(&mut q, dim, |at, row| {
                if at % shape.q_len < 128 {
                    row.fill(0.0);
                }
            });
            rows(&mut k, dim, |at, row| {
                if at % shape.kv_len < 64 {
                    row.fill(0.0);
                }
            });
        }
        Input::AllZero => [&mut q, &mut k, &mut v]
            .into_iter()
            .for_each(|x| x.fill(0.0)),
        Input::ZeroChannels => rows(&mut v, dim, |_, row| {
            row.iter_mut().step_by(3).for_each(|x| *x = 0.0);
        }),
        Input::VMean { mean } => v.iter_mut().for_each(|x| *x += mean),
        Input::Huge { magnitude } => {
            for x in q.iter_mut().chain(&mut k) {
                *x = magnitude.copysign(*x);
            }
        }
        Input::VHuge { factor } => v.iter_mut().for_each(|x| *x *= factor),
        Input::Tiny { factor } => k.iter_mut().chain(&mut v).for_each(|x| *x *= factor),
        Input::Sink => {
            // A direction that every query has a share of, and that only the first key points along.
            let direction: Vec<f32> = (0..dim).map(|c| sign(seed, c)).collect();
            rows(&mut q, dim, |_, row| {
                row.iter_mut().zip(&direction).for_each(|(x, d)| *x += d);
            });
            let along = 6.0 / (dim as f32).sqrt();
            rows(&mut k, dim, |at, row| {
                if at % shape.kv_len == 0 {
                    row.iter_mut()
                        .zip(&direction)
                        .for_each(|(x, d)| *x += along * d);
                }
            });
            rows(&mut v, dim, |at, row| {
                if at % shape.kv_len == 0 {
                    row.iter_mut().for_each(|x| *x *= 0.01);
                }
            });
        }
        Input::Planted { tensor, nan } => {
            let x = match tensor {
                Planted::Q => &mut q,
                Planted::K => &mut k,
                Planted::V => &mut v,
            };
            if let Some(last) = x.last_mut() {
                *last = if nan { f32::NAN } else { f32::INFINITY };
            }
        }
    }
    [q, k, v]
}

/// Independent N(0, 1) values, generated in parallel.
pub fn normal(seed: u64, stream: u64, shape: [usize; 4]) -> Vec<f32> {
    let key = mix(seed.wrapping_mul(31).wrapping_add(stream).wrapping_add(1));
    let mut values = vec![0.0; shape.iter().product()];
    values
        .par_chunks_mut(2048)
        .enumerate()
        .for_each(|(chunk, values)| {
            for (pair, values) in values.chunks_mut(2).enumerate() {
                let bits = mix(key ^ (chunk as u64 * 1024 + pair as u64));
                // Box and Muller: two uniforms of 32 bits, the first never zero.
                let radius = ((bits >> 32) as f32 + 1.0) / (1u64 << 32) as f32;
                let turn = (bits & 0xffff_ffff) as f32 / (1u64 << 32) as f32;
                let radius = (-2.0 * radius.min(1.0).ln()).sqrt();
                let (sin, cos) = (std::f32::consts::TAU * turn).sin_cos();
                values[0] = radius * cos;
                if let Some(second) = values.get_mut(1) {
                    *second = radius * sin;
                }
            }
        });
    values
}

fn rows(values: &mut [f32], dim: usize, f: impl Fn(usize, &mut [f32])) {
    for (at, row) in values.chunks_mut(dim).enumerate() {
        f(at, row);
    }
}

fn sign(seed: u64, channel: usize) -> f32 {
    if mix(seed ^ (channel as u64) << 32) & 1 == 0 {
        1.0
    } else {
        -1.0
    }
}

/// The finalizer of splitmix64: every bit of the result depends on every bit of the argument.
pub(crate) fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normal_has_the_moments_it_claims() {
        let values = normal(7, 0, [2, 3, 500, 64]);
        let n = values.len() as f64;
        let moment = |p: i32| values.iter().map(|&x| f64::from(x).powi(p)).sum::<f64>() / n;
        assert!(moment(1).abs() < 0.01, "mean {}", moment(1));
        assert!((moment(2) - 1.0).abs() < 0.02, "variance {}", moment(2));
        assert!((moment(4) - 3.0).abs() < 0.1, "fourth moment {}", moment(4));
        assert_ne!(values[..64], normal(8, 0, [1, 1, 1, 64])[..]);
        assert_ne!(values[..64], normal(7, 1, [1, 1, 1, 64])[..]);
    }

    #[test]
    fn a_bias_is_constant_per_channel() {
        let shape = Shape::mha(1, 1, 64, 16);
        let [_, plain, _] = generate(&Input::Normal, &shape, 3);
        let [_, biased, _] = generate(&Input::KBias { sigmas: 10.0 }, &shape, 3);
        let bias = |at: usize| biased[at] - plain[at];
        assert!((0..plain.len()).all(|at| (bias(at) - bias(at % 16)).abs() < 1e-4));
        assert!((0..16).any(|channel| bias(channel).abs() > 10.0));
    }
}
