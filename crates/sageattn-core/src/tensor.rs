//! Tensors as kernels see them: a buffer, an element type, a layout of strides.

use std::any::Any;
use std::fmt;

use half::{bf16, f16};

use crate::Error;

/// The alignment of rows and offsets, in bytes: one vector load of every backend.
pub const ROW_ALIGN: usize = 16;

/// The element type of Q, K, V and O.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE half precision.
    F16,
    /// bfloat16: the upper half of an `f32`.
    BF16,
    /// IEEE single precision.
    F32,
}

impl DType {
    /// Every element type.
    pub const ALL: [Self; 3] = [Self::F16, Self::BF16, Self::F32];

    /// Bytes per element.
    pub const fn size(self) -> usize {
        match self {
            Self::F16 | Self::BF16 => 2,
            Self::F32 => 4,
        }
    }

    /// `f16`, `bf16` or `f32`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::F32 => "f32",
        }
    }

    /// `x` as it comes back from memory of this type: rounded to nearest, ties to even.
    pub fn round(self, x: f32) -> f32 {
        match self {
            Self::F16 => f16::from_f32(x).to_f32(),
            Self::BF16 => bf16::from_f32(x).to_f32(),
            Self::F32 => x,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Where the elements of a `[batch, heads, len, head_dim]` tensor lie in its buffer.
///
/// Strides and offset count elements. `head_dim` always has stride 1; the other three strides and the
/// offset must be multiples of 16 bytes, which [`Io::bind`](crate::Io::bind) checks. HND and NHD are
/// only two ways to fill in the strides: kernels see strides.
///
/// ```
/// use sageattn_core::{DType, Layout};
/// let nhd = Layout::nhd([2, 8, 100, 64]);
/// assert_eq!(nhd.strides(), [100 * 8 * 64, 64, 8 * 64]);
/// // 20 f16 channels are 40 bytes: padded to 48, 24 elements.
/// assert_eq!(Layout::hnd_padded([1, 1, 3, 20], DType::F16).strides()[2], 24);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Layout {
    shape: [usize; 4],
    strides: [usize; 3],
    offset: usize,
}

impl Layout {
    /// Dense `[batch, heads, len, head_dim]` (HND), the shape given in that order.
    pub fn hnd(shape: [usize; 4]) -> Self {
        Self::hnd_with_row(shape, shape[3])
    }

    /// Dense `[batch, len, heads, head_dim]` (NHD); `shape` is still `[batch, heads, len, head_dim]`.
    pub fn nhd(shape: [usize; 4]) -> Self {
        Self::nhd_with_row(shape, shape[3])
    }

    /// HND with each row padded to a multiple of 16 bytes.
    pub fn hnd_padded(shape: [usize; 4], dtype: DType) -> Self {
        Self::hnd_with_row(shape, padded_row(shape[3], dtype))
    }

    /// NHD with each row padded to a multiple of 16 bytes.
    pub fn nhd_padded(shape: [usize; 4], dtype: DType) -> Self {
        Self::nhd_with_row(shape, padded_row(shape[3], dtype))
    }

    /// Any strides `[batch, head, row]` and offset, in elements.
    pub const fn strided(shape: [usize; 4], strides: [usize; 3], offset: usize) -> Self {
        Self {
            shape,
            strides,
            offset,
        }
    }

    fn hnd_with_row(shape: [usize; 4], row: usize) -> Self {
        let head = shape[2].saturating_mul(row);
        Self::strided(shape, [shape[1].saturating_mul(head), head, row], 0)
    }

    fn nhd_with_row(shape: [usize; 4], row: usize) -> Self {
        let token = shape[1].saturating_mul(row);
        Self::strided(shape, [shape[2].saturating_mul(token), row, token], 0)
    }

    /// `[batch, heads, len, head_dim]`.
    pub const fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// Strides of batch, head and row, in elements.
    pub const fn strides(&self) -> [usize; 3] {
        self.strides
    }

    /// The first element's index in the buffer.
    pub const fn offset(&self) -> usize {
        self.offset
    }

    /// The index of the first channel of a row.
    pub const fn row(&self, batch: usize, head: usize, row: usize) -> usize {
        self.offset + batch * self.strides[0] + head * self.strides[1] + row * self.strides[2]
    }

    /// One past the largest element index, or `None` when it does not fit 63 bits.
    pub fn end(&self) -> Option<usize> {
        let mut last = self.offset;
        for (size, stride) in self.shape[..3].iter().zip(self.strides) {
            last = last.checked_add(size.checked_sub(1)?.checked_mul(stride)?)?;
        }
        last.checked_add(self.shape[3])
            .filter(|&end| i64::try_from(end).is_ok())
    }

    /// Whether two different indices can name the same element: sorted by stride, each dimension must
    /// step over all that the smaller ones reach. Interleavings that this rule cannot prove distinct
    /// count as overlapping.
    pub fn overlaps_itself(&self) -> bool {
        let mut dims: Vec<(usize, usize)> = self.strides.into_iter().zip(self.shape).collect();
        dims.retain(|&(_, size)| size > 1);
        dims.sort_unstable();
        let mut reach = self.shape[3];
        for (stride, size) in dims {
            if stride < reach {
                return true;
            }
            reach = reach.saturating_add(stride.saturating_mul(size - 1));
        }
        false
    }

    /// Checks what every kernel relies on; `tensor` names it in the error.
    pub(crate) fn check(&self, tensor: &str, dtype: DType, bytes: u64) -> Result<(), Error> {
        let named = ["batch stride", "head stride", "row stride", "offset"];
        let values = self.strides.into_iter().chain([self.offset]);
        for (index, (name, value)) in named.into_iter().zip(values).enumerate() {
            let walked = index == 3 || self.shape[index] > 1;
            if walked && !value.is_multiple_of(ROW_ALIGN / dtype.size()) {
                let reason = format!(
                    "{name} of {value} {dtype} elements is not a multiple of {ROW_ALIGN} bytes"
                );
                return Err(Error::invalid(tensor, reason));
            }
        }
        let end = self
            .end()
            .and_then(|end| (end as u64).checked_mul(dtype.size() as u64));
        if end.is_none_or(|end| end > bytes) {
            let reason = format!(
                "shape {:?} with strides {:?} and offset {} reaches past the buffer's {bytes} bytes",
                self.shape, self.strides, self.offset
            );
            return Err(Error::invalid(tensor, reason));
        }
        Ok(())
    }
}

fn padded_row(head_dim: usize, dtype: DType) -> usize {
    head_dim.next_multiple_of(ROW_ALIGN / dtype.size())
}

/// Memory of one backend's device. Backends wrap the caller's native handle, so nothing is copied.
///
/// A buffer is shared by reference and written by the device; how access is ordered is the native
/// API's matter (a stream, a queue).
pub trait Buffer: Any + fmt::Debug + Send + Sync {
    /// The size in bytes.
    fn bytes(&self) -> u64;

    /// The concrete buffer, for the backend that made it.
    fn as_any(&self) -> &dyn Any;

    /// Where `other` starts relative to `self`, in bytes, when both lie in the same allocation;
    /// `None` when they cannot overlap.
    fn distance_to(&self, other: &dyn Buffer) -> Option<i64>;
}

/// A tensor: a buffer, its element type, and the layout within it.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    /// The memory.
    pub buffer: &'a dyn Buffer,
    /// Where the elements are.
    pub layout: Layout,
    /// What they are.
    pub dtype: DType,
}

impl<'a> TensorView<'a> {
    /// A view of `buffer`.
    pub fn new(buffer: &'a dyn Buffer, layout: Layout, dtype: DType) -> Self {
        Self {
            buffer,
            layout,
            dtype,
        }
    }

    /// The bytes `[start, end)` between the first and the last element, relative to the buffer.
    pub(crate) fn byte_range(&self) -> (u64, u64) {
        let size = self.dtype.size() as u64;
        let end = self.layout.end().unwrap_or(usize::MAX) as u64;
        (self.layout.offset as u64 * size, end.saturating_mul(size))
    }
}

/// Where the log-sum-exp goes: dense f32 `[batch, q_heads, q_len]`.
#[derive(Clone, Copy, Debug)]
pub struct LseView<'a> {
    /// The memory.
    pub buffer: &'a dyn Buffer,
    /// The first element's index, in f32 elements; a multiple of four.
    pub offset: usize,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_index_is_in_bounds_and_distinct(
            shape in (1usize..4, 1usize..4, 1usize..6, 1usize..20),
            nhd in any::<bool>(),
            padded in any::<bool>(),
        ) {
            let shape = [shape.0, shape.1, shape.2, shape.3];
            let layout = match (nhd, padded) {
                (false, false) => Layout::hnd(shape),
                (false, true) => Layout::hnd_padded(shape, DType::F16),
                (true, false) => Layout::nhd(shape),
                (true, true) => Layout::nhd_padded(shape, DType::F16),
            };
            prop_assert!(!layout.overlaps_itself());
            let end = layout.end().unwrap();
            let mut seen = std::collections::HashSet::new();
            for b in 0..shape[0] {
                for h in 0..shape[1] {
                    for r in 0..shape[2] {
                        for c in 0..shape[3] {
                            let index = layout.row(b, h, r) + c;
                            prop_assert!(index < end);
                            prop_assert!(seen.insert(index));
                        }
                    }
                }
            }
            prop_assert_eq!(seen.iter().max().map(|m| m + 1), Some(end));
            if padded {
                layout.check("t", DType::F16, 2 * end as u64).unwrap();
            }
        }

        /// `overlaps_itself` may refuse a layout that is sound, never accept one that is not.
        #[test]
        fn an_overlap_is_never_missed(
            shape in (1usize..4, 1usize..4, 1usize..4, 1usize..6),
            strides in (0usize..30, 0usize..30, 0usize..30),
        ) {
            let shape = [shape.0, shape.1, shape.2, shape.3];
            let layout = Layout::strided(shape, [strides.0, strides.1, strides.2], 0);
            let mut seen = std::collections::HashSet::new();
            let mut collides = false;
            for b in 0..shape[0] {
                for h in 0..shape[1] {
                    for r in 0..shape[2] {
                        for c in 0..shape[3] {
                            collides |= !seen.insert(layout.row(b, h, r) + c);
                        }
                    }
                }
            }
            prop_assert!(!collides || layout.overlaps_itself());
        }
    }

    #[test]
    fn huge_strides_do_not_wrap() {
        let layout = Layout::strided([2, 1, 1, 8], [usize::MAX, 8, 8], 0);
        assert_eq!(layout.end(), None);
        assert!(layout.check("q", DType::F16, 16).is_err());
    }
}
