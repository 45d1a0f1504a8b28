//! Named ranges inside the one workspace buffer of a plan.

/// The alignment of every range, in bytes: what a storage-buffer binding may need at most.
pub const SCRATCH_ALIGN: u64 = 256;

/// What a range of the workspace holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ScratchType {
    /// 32-bit floats.
    F32,
    /// 8-bit codes, one per byte.
    I8,
    /// 16-bit floats; as codes, whole numbers.
    F16,
    /// Anything else; only its extent is of interest.
    Bytes,
}

/// One named range: where it lies, and how to read it. The conformance suite compares the ranges it
/// knows (`k_mean`, `q_codes`, `q_scales`, `k_codes`, `k_scales`) with the oracle's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScratchRange {
    /// The range's name.
    pub name: &'static str,
    /// The element type.
    pub kind: ScratchType,
    /// The extent per dimension, in elements, outermost first; padding included.
    pub shape: Vec<u64>,
    /// First byte, relative to the workspace.
    pub offset: u64,
    /// Bytes in use.
    pub bytes: u64,
}

/// Lays ranges out one after the other, each aligned to [`SCRATCH_ALIGN`].
///
/// ```
/// use sageattn_core::scratch::{Scratch, ScratchType};
/// let mut scratch = Scratch::default();
/// let mean = scratch.push("k_mean", ScratchType::F32, &[2, 64]);
/// assert_eq!((mean.offset, mean.bytes), (0, 512));
/// assert_eq!(scratch.push("k_codes", ScratchType::I8, &[3]).offset, 512);
/// assert_eq!(scratch.bytes(), 768);
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scratch {
    ranges: Vec<ScratchRange>,
    bytes: u64,
}

impl Scratch {
    /// Appends a range and returns it. Saturates instead of wrapping: a plan whose scratch passes 64
    /// bits cannot be allocated anyway.
    pub fn push(&mut self, name: &'static str, kind: ScratchType, shape: &[u64]) -> ScratchRange {
        let size = match kind {
            ScratchType::F32 => 4,
            ScratchType::F16 => 2,
            ScratchType::I8 | ScratchType::Bytes => 1,
        };
        let bytes = shape.iter().fold(size, |n: u64, &d| n.saturating_mul(d));
        let range = ScratchRange {
            name,
            kind,
            shape: shape.to_vec(),
            offset: self.bytes,
            bytes,
        };
        let end = self.bytes.saturating_add(bytes);
        self.bytes = end
            .checked_next_multiple_of(SCRATCH_ALIGN)
            .unwrap_or(u64::MAX);
        self.ranges.push(range.clone());
        range
    }

    /// The ranges, in order.
    pub fn ranges(&self) -> &[ScratchRange] {
        &self.ranges
    }

    /// The size of the whole, a multiple of [`SCRATCH_ALIGN`].
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}
