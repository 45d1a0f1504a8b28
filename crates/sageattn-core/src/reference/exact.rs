//! Attention in f64, without quantization: `softmax(scale * Q K^T + mask) V`.

use super::{for_all_rows, kv_head};
use crate::Problem;

/// O and LSE in f64.
#[derive(Clone, Debug, PartialEq)]
pub struct Reference {
    /// `[batch, q_heads, q_len, head_dim]`.
    pub out: Vec<f64>,
    /// `[batch, q_heads, q_len]`, natural logarithm.
    pub lse: Vec<f64>,
}

/// Computes attention row by row: scores, their maximum, then the weighted mean of V.
///
/// `q`, `k` and `v` are dense `[batch, heads, len, head_dim]` and hold as many values as the problem
/// says.
pub fn attend(problem: &Problem, [q, k, v]: [&[f32]; 3]) -> Reference {
    let shape = problem.shape();
    let head_dim = shape.head_dim;
    let scale = f64::from(problem.softmax_scale());
    let (out, lse) = for_all_rows(problem, |head, row, out: &mut [f64]| {
        let kv_start = kv_head(problem, head) * shape.kv_len * head_dim;
        let visible = problem.visible_keys(row) * head_dim;
        let keys = k[kv_start..kv_start + visible].chunks_exact(head_dim);
        let values = v[kv_start..kv_start + visible].chunks_exact(head_dim);
        let query = &q[(head * shape.q_len + row) * head_dim..][..head_dim];

        let scores: Vec<f64> = keys.map(|key| scale * dot(query, key)).collect();
        let max = scores.iter().fold(f64::NEG_INFINITY, |m, &s| m.max(s));
        let mut sum = 0.0;
        for (score, value) in scores.iter().zip(values) {
            let weight = (score - max).exp();
            sum += weight;
            for (out, &value) in out.iter_mut().zip(value) {
                *out += weight * f64::from(value);
            }
        }
        if !scores.is_empty() {
            out.iter_mut().for_each(|out| *out /= sum);
        }
        max + sum.ln()
    });
    Reference { out, lse }
}

/// A dot product in f64, summed in eight lanes so that the compiler can use vector registers.
pub(super) fn dot(a: &[f32], b: &[f32]) -> f64 {
    const LANES: usize = 8;
    let (a_lanes, a_rest) = a.as_chunks::<LANES>();
    let (b_lanes, b_rest) = b.as_chunks::<LANES>();
    let mut sums = [0.0; LANES];
    for (a, b) in a_lanes.iter().zip(b_lanes) {
        for lane in 0..LANES {
            sums[lane] += f64::from(a[lane]) * f64::from(b[lane]);
        }
    }
    let rest = a_rest.iter().zip(b_rest);
    sums.iter().sum::<f64>()
        + rest
            .map(|(&a, &b)| f64::from(a) * f64::from(b))
            .sum::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Align, DType, Mask, Shape};

    #[test]
    fn two_keys_by_hand() {
        let problem = Problem::new(
            Shape {
                kv_len: 2,
                ..Shape::mha(1, 1, 1, 1)
            },
            DType::F32,
        )
        .unwrap()
        .with_softmax_scale(2.0)
        .unwrap();
        // Scores 2 * 1 * ln 2 and 0: weights 4/5 and 1/5.
        let got = attend(&problem, [&[1.0], &[2.0f32.ln(), 0.0], &[10.0, 0.0]]);
        assert!((got.out[0] - 8.0).abs() < 1e-6);
        assert!((got.lse[0] - 5.0f64.ln()).abs() < 1e-6);
    }

    #[test]
    fn a_row_that_sees_nothing_is_zero() {
        let shape = Shape {
            q_len: 3,
            kv_len: 1,
            ..Shape::mha(1, 1, 1, 2)
        };
        let problem = Problem::new(shape, DType::F32)
            .unwrap()
            .with_mask(Mask::Causal(Align::BottomRight));
        let got = attend(&problem, [&[1.0; 6], &[1.0; 2], &[3.0, 4.0]]);
        assert_eq!(got.out, [0.0, 0.0, 0.0, 0.0, 3.0, 4.0]);
        assert_eq!(got.lse[1], f64::NEG_INFINITY);
    }

    #[test]
    fn query_heads_read_their_own_kv_head() {
        let shape = Shape {
            q_heads: 4,
            kv_heads: 2,
            ..Shape::mha(2, 1, 1, 1)
        };
        let problem = Problem::new(shape, DType::F32).unwrap();
        let got = attend(&problem, [&[1.0; 8], &[1.0; 4], &[1.0, 2.0, 3.0, 4.0]]);
        assert_eq!(got.out, [1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0]);
    }
}
