//! What is to be computed: shapes, element type, mask, softmax scale, outputs.

use crate::{DType, Error};

/// The largest head dimension any backend takes.
pub const MAX_HEAD_DIM: usize = 256;

/// The longest sequence: lengths and row indices fit a signed 32-bit integer with room for padding.
pub const MAX_LEN: usize = 1 << 30;

/// The sizes of one attention call. Plain data; [`Problem::new`] checks it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Independent attention calls.
    pub batch: usize,
    /// Heads of Q and O.
    pub q_heads: usize,
    /// Heads of K and V; divides `q_heads` (GQA when smaller, MQA when one).
    pub kv_heads: usize,
    /// Rows of Q and O per head.
    pub q_len: usize,
    /// Rows of K and V per head.
    pub kv_len: usize,
    /// Channels per row, 1 to [`MAX_HEAD_DIM`].
    pub head_dim: usize,
}

impl Shape {
    /// Multi-head self-attention: as many KV heads as query heads, as many keys as queries.
    pub const fn mha(batch: usize, heads: usize, len: usize, head_dim: usize) -> Self {
        Self {
            batch,
            q_heads: heads,
            kv_heads: heads,
            q_len: len,
            kv_len: len,
            head_dim,
        }
    }

    /// The shape `[batch, heads, len, head_dim]` of Q and O.
    pub const fn q(&self) -> [usize; 4] {
        [self.batch, self.q_heads, self.q_len, self.head_dim]
    }

    /// The shape `[batch, heads, len, head_dim]` of K and V.
    pub const fn kv(&self) -> [usize; 4] {
        [self.batch, self.kv_heads, self.kv_len, self.head_dim]
    }

    /// Query heads that share one KV head.
    pub const fn heads_per_kv(&self) -> usize {
        self.q_heads / self.kv_heads
    }
}

/// Where the diagonal of a causal mask starts when Q and K differ in length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Align {
    /// Query `i` sees keys `0..=i`: Q and K start together.
    TopLeft,
    /// Query `i` sees keys `0..=i + kv_len - q_len`: Q and K end together, as in decoding with a KV
    /// cache. With `q_len > kv_len` the first rows see nothing.
    BottomRight,
}

/// Which keys a query may see. A row that sees none gives O = 0 and LSE = -inf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Mask {
    /// Every query sees every key.
    #[default]
    None,
    /// A query sees the keys up to its own position; the alignment is never guessed.
    Causal(Align),
}

impl Mask {
    /// How many of the keys, from the first, query `row` sees.
    ///
    /// ```
    /// use sageattn_core::{Align, Mask};
    /// assert_eq!(Mask::Causal(Align::TopLeft).visible_keys(0, 2, 5), 1);
    /// assert_eq!(Mask::Causal(Align::BottomRight).visible_keys(0, 2, 5), 4);
    /// assert_eq!(Mask::Causal(Align::BottomRight).visible_keys(0, 5, 2), 0);
    /// ```
    pub fn visible_keys(&self, row: usize, q_len: usize, kv_len: usize) -> usize {
        match self {
            Self::None => kv_len,
            Self::Causal(Align::TopLeft) => (row + 1).min(kv_len),
            Self::Causal(Align::BottomRight) => {
                (row + 1 + kv_len).saturating_sub(q_len).min(kv_len)
            }
        }
    }
}

/// What a call writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Outputs {
    /// The attention output O only.
    #[default]
    O,
    /// O, and the log-sum-exp of each row of scores: natural logarithm, f32, `[batch, q_heads, q_len]`.
    OAndLse,
}

/// One attention problem, checked: everything that the choice of a kernel may depend on.
///
/// ```
/// use sageattn_core::{Align, DType, Mask, Problem, Shape};
///
/// let problem = Problem::new(Shape::mha(1, 12, 512, 64), DType::F16)?
///     .with_mask(Mask::Causal(Align::BottomRight))
///     .with_softmax_scale(0.125)?;
/// assert_eq!(problem.flops(), 2 * 12 * 512 * 513 * 64);
/// # Ok::<(), sageattn_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Problem {
    shape: Shape,
    dtype: DType,
    mask: Mask,
    softmax_scale: f32,
    outputs: Outputs,
}

impl Problem {
    /// A problem without a mask, with softmax scale `head_dim^-0.5`, that writes O alone.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a size of zero, `q_heads` not a multiple of `kv_heads`, a head dimension
    /// above [`MAX_HEAD_DIM`], a length above [`MAX_LEN`], or more elements than 63 bits count.
    pub fn new(shape: Shape, dtype: DType) -> Result<Self, Error> {
        let sizes = [
            ("batch", shape.batch),
            ("q_heads", shape.q_heads),
            ("kv_heads", shape.kv_heads),
            ("q_len", shape.q_len),
            ("kv_len", shape.kv_len),
            ("head_dim", shape.head_dim),
        ];
        for (name, size) in sizes {
            if size == 0 {
                return Err(Error::invalid(name, "is zero"));
            }
        }
        if !shape.q_heads.is_multiple_of(shape.kv_heads) {
            let reason = format!(
                "{} is not a multiple of kv_heads {}",
                shape.q_heads, shape.kv_heads
            );
            return Err(Error::invalid("q_heads", reason));
        }
        if shape.head_dim > MAX_HEAD_DIM {
            let reason = format!("{} is above the limit of {MAX_HEAD_DIM}", shape.head_dim);
            return Err(Error::invalid("head_dim", reason));
        }
        for (name, len) in [("q_len", shape.q_len), ("kv_len", shape.kv_len)] {
            if len > MAX_LEN {
                let reason = format!("{len} is above the limit of {MAX_LEN}");
                return Err(Error::invalid(name, reason));
            }
        }
        for (name, heads) in [("q_heads", shape.q_heads), ("kv_heads", shape.kv_heads)] {
            // Kernels count (batch, head) pairs in 32 bits and bytes in 64.
            let pairs = shape.batch.checked_mul(heads).filter(|&n| n <= MAX_LEN);
            let rows = shape.q_len.max(shape.kv_len) as u128;
            let bytes = pairs.map(|n| n as u128 * rows * shape.head_dim as u128 * 4);
            if bytes.is_none_or(|n| n > i64::MAX as u128) {
                let reason = format!("batch {} x {heads} heads is too large", shape.batch);
                return Err(Error::invalid(name, reason));
            }
        }
        Ok(Self {
            shape,
            dtype,
            mask: Mask::None,
            softmax_scale: (shape.head_dim as f32).powf(-0.5),
            outputs: Outputs::O,
        })
    }

    /// The same problem under another mask.
    #[must_use]
    pub fn with_mask(self, mask: Mask) -> Self {
        Self { mask, ..self }
    }

    /// The same problem with another softmax scale. Zero and negative scales are allowed.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the scale is NaN or infinite.
    pub fn with_softmax_scale(self, softmax_scale: f32) -> Result<Self, Error> {
        if !softmax_scale.is_finite() {
            let reason = format!("{softmax_scale} is not a finite number");
            return Err(Error::invalid("softmax scale", reason));
        }
        Ok(Self {
            softmax_scale,
            ..self
        })
    }

    /// The same problem with other outputs.
    #[must_use]
    pub fn with_outputs(self, outputs: Outputs) -> Self {
        Self { outputs, ..self }
    }

    /// The sizes.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The element type of Q, K, V and O.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The mask.
    pub fn mask(&self) -> Mask {
        self.mask
    }

    /// The factor on every score before the softmax.
    pub fn softmax_scale(&self) -> f32 {
        self.softmax_scale
    }

    /// What the call writes.
    pub fn outputs(&self) -> Outputs {
        self.outputs
    }

    /// How many keys, from the first, query `row` sees.
    pub fn visible_keys(&self, row: usize) -> usize {
        self.mask
            .visible_keys(row, self.shape.q_len, self.shape.kv_len)
    }

    /// Query-key pairs that the mask leaves, over all batches and heads; `u64::MAX` where they are more.
    pub fn visible_pairs(&self) -> u64 {
        let (q, k) = (self.shape.q_len as u64, self.shape.kv_len as u64);
        let per_head = match self.mask {
            Mask::None => q * k,
            Mask::Causal(align) => {
                // Rows see 1, 2, 3 .. keys from the first row with any, then all of them.
                let blind = match align {
                    Align::TopLeft => 0,
                    Align::BottomRight => q.saturating_sub(k),
                };
                let first = match align {
                    Align::TopLeft => 1,
                    Align::BottomRight => (k + 1).saturating_sub(q).max(1),
                };
                let rows = q - blind;
                let growing = rows.min(k - first + 1);
                growing * (2 * first + growing - 1) / 2 + (rows - growing) * k
            }
        };
        per_head.saturating_mul((self.shape.batch * self.shape.q_heads) as u64)
    }

    /// Floating-point (or integer) operations of the two matrix products: `4 * head_dim` per visible
    /// query-key pair, the convention of the attention literature; `u64::MAX` where it is more.
    pub fn flops(&self) -> u64 {
        (4 * self.shape.head_dim as u64).saturating_mul(self.visible_pairs())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn visible_pairs_agrees_with_counting_rows() {
        for mask in [
            Mask::None,
            Mask::Causal(Align::TopLeft),
            Mask::Causal(Align::BottomRight),
        ] {
            for (q_len, kv_len) in [(1, 1), (1, 7), (7, 1), (5, 5), (3, 8), (8, 3)] {
                let shape = Shape {
                    q_len,
                    kv_len,
                    ..Shape::mha(2, 3, 1, 8)
                };
                let problem = Problem::new(shape, DType::F32).unwrap().with_mask(mask);
                let counted: usize = (0..q_len).map(|row| problem.visible_keys(row)).sum();
                assert_eq!(problem.visible_pairs(), 6 * counted as u64, "{problem:?}");
            }
        }
    }

    #[test]
    fn each_bad_shape_is_refused_by_name() {
        let good = Shape::mha(1, 4, 8, 64);
        let cases = [
            (Shape { kv_len: 0, ..good }, "kv_len"),
            (
                Shape {
                    kv_heads: 3,
                    ..good
                },
                "q_heads",
            ),
            (
                Shape {
                    head_dim: 257,
                    ..good
                },
                "head_dim",
            ),
            (
                Shape {
                    q_len: MAX_LEN + 1,
                    ..good
                },
                "q_len",
            ),
            (
                Shape {
                    batch: usize::MAX,
                    ..good
                },
                "q_heads",
            ),
        ];
        for (shape, name) in cases {
            let error = Problem::new(shape, DType::F16).unwrap_err();
            assert!(
                matches!(&error, Error::Invalid { argument, .. } if argument == name),
                "{shape:?} gave {error}"
            );
        }
    }

    #[test]
    fn a_scale_that_is_not_finite_is_refused() {
        let problem = Problem::new(Shape::mha(1, 1, 1, 1), DType::F32).unwrap();
        assert!(problem.with_softmax_scale(f32::NAN).is_err());
        assert!(problem.with_softmax_scale(f32::INFINITY).is_err());
        assert!(problem.with_softmax_scale(-0.5).is_ok());
        assert!(problem.with_softmax_scale(0.0).is_ok());
    }
}
