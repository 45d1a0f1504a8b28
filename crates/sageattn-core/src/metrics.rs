//! How far a result is from a reference.

/// The comparison of one result with a reference, over all elements flattened (arXiv 2410.02367,
/// section 4.1: cosine similarity, relative L1, RMSE).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Metrics {
    /// `sum(a b) / sqrt(sum(a^2) sum(b^2))`; 1 when both are zero everywhere.
    pub cosine: f64,
    /// `sum|a - b| / sum|b|`, `b` the reference; 0 when both are zero everywhere.
    pub rel_l1: f64,
    /// `sqrt(mean((a - b)^2))`.
    pub rmse: f64,
    /// `max|a - b|`.
    pub max_abs_error: f64,
    /// Elements that are NaN or infinite in the result but finite in the reference, or the reverse.
    pub not_finite: usize,
}

impl Metrics {
    /// Compares a result with its reference. Elements that are not finite on either side are counted
    /// apart and enter no sum.
    ///
    /// # Panics
    /// Never; a missing tail of the shorter side counts as not finite.
    pub fn compare(result: &[f32], reference: &[f64]) -> Self {
        let (mut dot, mut aa, mut bb) = (0.0, 0.0, 0.0);
        let (mut l1, mut reference_l1, mut squares, mut max) = (0.0, 0.0, 0.0, 0.0f64);
        let mut not_finite = result.len().abs_diff(reference.len());
        let mut counted = 0usize;
        for (&a, &b) in result.iter().zip(reference) {
            let a = f64::from(a);
            if !(a.is_finite() && b.is_finite()) {
                not_finite += usize::from(a != b && !(a.is_nan() && b.is_nan()));
                continue;
            }
            counted += 1;
            dot += a * b;
            aa += a * a;
            bb += b * b;
            let error = (a - b).abs();
            l1 += error;
            reference_l1 += b.abs();
            squares += error * error;
            max = max.max(error);
        }
        let norms = (aa * bb).sqrt();
        Self {
            cosine: if norms > 0.0 {
                dot / norms
            } else {
                f64::from(u8::from(aa == bb))
            },
            rel_l1: if l1 == 0.0 { 0.0 } else { l1 / reference_l1 },
            rmse: (squares / counted.max(1) as f64).sqrt(),
            max_abs_error: max,
            not_finite,
        }
    }

    /// The largest relative L1 of any row of `width` elements, each against the larger of its own
    /// reference and `floor` times the mean row: a row of near-zero values is not held to its own size.
    pub fn worst_row(result: &[f32], reference: &[f64], width: usize, floor: f64) -> f64 {
        let width = width.max(1);
        let sums = |row: &[f64]| row.iter().map(|x| x.abs()).sum::<f64>();
        let rows = reference.len().div_ceil(width).max(1);
        let mean = sums(reference) / rows as f64;
        result
            .chunks(width)
            .zip(reference.chunks(width))
            .map(|(a, b)| {
                let error: f64 = a
                    .iter()
                    .zip(b)
                    .map(|(&a, &b)| (f64::from(a) - b).abs())
                    .sum();
                let size = sums(b).max(floor * mean);
                if error == 0.0 { 0.0 } else { error / size }
            })
            .fold(
                0.0,
                |worst, x| if x.is_nan() { f64::NAN } else { worst.max(x) },
            )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_is_perfect_and_zero_is_not_nan() {
        let m = Metrics::compare(&[1.0, -2.0], &[1.0, -2.0]);
        assert!((m.cosine - 1.0).abs() < 1e-12);
        assert_eq!(
            (m.rel_l1, m.rmse, m.max_abs_error, m.not_finite),
            (0.0, 0.0, 0.0, 0)
        );
        let zero = Metrics::compare(&[0.0], &[0.0]);
        assert_eq!((zero.cosine, zero.rel_l1), (1.0, 0.0));
    }

    #[test]
    fn values_that_are_not_finite_are_counted_unless_they_agree() {
        let inf = f64::INFINITY;
        let m = Metrics::compare(
            &[f32::NAN, f32::INFINITY, f32::INFINITY, 1.0],
            &[0.0, inf, -inf, 1.0],
        );
        assert_eq!(m.not_finite, 2);
    }

    #[test]
    fn one_wrong_row_shows_where_the_mean_hides_it() {
        let reference = vec![1.0; 1000];
        let mut result = vec![1.0f32; 1000];
        result[500..510].fill(0.9);
        assert!(Metrics::compare(&result, &reference).rel_l1 < 2e-3);
        assert!((Metrics::worst_row(&result, &reference, 10, 0.1) - 0.1).abs() < 1e-6);
    }
}
