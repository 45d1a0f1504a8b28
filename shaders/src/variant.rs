//! What can be composed: one row per stage, and the constants that tell its variants apart.

use crate::spirv::MATRIX_LAYOUT;
use crate::{
    ABI, AttendVariant, CHANNELS, CHANNELS_FINISH, CODES, Codes, DecodeVariant, HALF, Kernel, LOAD,
    MergeVariant, Prelude, QUANTIZE_ROWS, RANGE, SELF_TEST, SPLIT_ROWS, Source, VALUES_F16,
    VALUES_I8, VALUES_ROWS,
};

/// Invocations of the workgroups of every stage but the attention kernel.
pub const STAGE_WORKGROUP: u32 = 256;

/// The element type of a tensor as kernels see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names say it")]
pub enum DType {
    F16,
    BF16,
    F32,
}

impl DType {
    /// Every element type.
    pub const ALL: [Self; 3] = [Self::F16, Self::BF16, Self::F32];

    /// As kernels number them.
    pub(crate) const fn number(self) -> u32 {
        match self {
            Self::F16 => 0,
            Self::BF16 => 1,
            Self::F32 => 2,
        }
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::F32 => "f32",
        }
    }
}

/// Which instructions of a device were tested and found right; the others are replaced by slower code
/// that gives the same results.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Native {
    /// `dot4I8Packed`.
    pub dot: bool,
    /// `pack2x16float` rounds to nearest even and keeps subnormals.
    pub pack: bool,
}

impl Native {
    /// A device that gets everything right.
    pub const ALL: Self = Self {
        dot: true,
        pack: true,
    };
}

/// Which rows share a scale, as the kernels count: row `r` is in group
/// `(r / block) * slots + (r % modulus) / divisor`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RowGroups {
    /// Rows of a block, which one workgroup quantizes; a multiple of 16 that divides 128.
    pub block: u32,
    /// Groups of a block.
    pub slots: u32,
    /// See the formula.
    pub modulus: u32,
    /// See the formula.
    pub divisor: u32,
    /// A short name: `block128`.
    pub name: &'static str,
}

impl RowGroups {
    /// One group per row.
    pub const TOKEN: Self = Self::new(16, 16, 16, 1, "token");
    /// One group per 64 rows.
    pub const BLOCK_64: Self = Self::new(64, 1, 1, 1, "block64");
    /// One group per 128 rows.
    pub const BLOCK_128: Self = Self::new(128, 1, 1, 1, "block128");
    /// Rows `r` and `r + 8` of each 16.
    pub const THREAD_Q16: Self = Self::new(16, 8, 8, 1, "thread16");
    /// Two neighbours out of every 8 rows of each 128.
    pub const THREAD_K128: Self = Self::new(128, 4, 8, 2, "thread128");

    const fn new(block: u32, slots: u32, modulus: u32, divisor: u32, name: &'static str) -> Self {
        Self {
            block,
            slots,
            modulus,
            divisor,
            name,
        }
    }

    /// The group of a row.
    pub const fn of(self, row: u32) -> u32 {
        (row / self.block) * self.slots + (row % self.modulus) / self.divisor
    }
}

/// What is made of the channels of K or V over all rows of a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ChannelOp {
    /// The mean.
    Mean,
    /// The scale of INT8 codes: the largest magnitude over 127.
    CodeScale,
    /// The power of two that brings the largest magnitude to at most 32768.
    RangeFactor,
}

impl ChannelOp {
    /// Every operation.
    pub const ALL: [Self; 3] = [Self::Mean, Self::CodeScale, Self::RangeFactor];

    const fn name(self) -> &'static str {
        match self {
            Self::Mean => "mean",
            Self::CodeScale => "scale",
            Self::RangeFactor => "range",
        }
    }
}

/// Axes of the first half of a channel reduction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ChannelsVariant {
    /// The tensor's element type.
    pub dtype: DType,
    /// Channels.
    pub head_dim: u32,
    /// Take the largest magnitude instead of the sum.
    pub largest: bool,
}

/// Axes of the row quantizer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RowsVariant {
    /// The tensor's element type.
    pub dtype: DType,
    /// Channels.
    pub head_dim: u32,
    /// Channels of a row of codes: padded with zeros, a multiple of 16.
    pub qk_dim: u32,
    /// How a code is stored.
    pub codes: Codes,
    /// Which rows share a scale.
    pub groups: RowGroups,
    /// Subtract the channel means first (K).
    pub subtract_mean: bool,
    /// Write the LSE correction (Q).
    pub lse_bias: bool,
}

/// Axes of the stages that lay out V.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ValuesVariant {
    /// The tensor's element type. f16 needs no range factors.
    pub dtype: DType,
    /// Channels.
    pub head_dim: u32,
    /// Channels as laid out, a multiple of 64.
    pub pv_dim: u32,
}

/// One kernel of the portable tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Variant {
    /// Per-channel sums or largest magnitudes of each split of a head.
    Channels(ChannelsVariant),
    /// Their end: one number per channel.
    ChannelsFinish {
        /// Channels.
        head_dim: u32,
        /// What is made of them.
        op: ChannelOp,
    },
    /// INT8 codes of Q or K.
    QuantizeRows(RowsVariant),
    /// V for the f16 product, two keys in a word.
    ValuesF16(ValuesVariant),
    /// V for the f16 product, row by row.
    ValuesRows(ValuesVariant),
    /// V for the INT8 product.
    ValuesI8(ValuesVariant),
    /// The attention kernel.
    Attend(AttendVariant),
    /// Decoding: a few queries against ranges of keys.
    Decode(DecodeVariant),
    /// The ranges' results put together.
    Merge(MergeVariant),
    /// The device self-test.
    SelfTest,
    /// Which elements of matrices invocations hold.
    MatrixLayout,
}

impl Variant {
    /// The name by which caches, tests and logs know it.
    pub fn name(&self) -> String {
        match self {
            Self::Channels(v) => {
                let op = if v.largest { "amax" } else { "sum" };
                format!("channels_{op}_{}_d{}", v.dtype.name(), v.head_dim)
            }
            Self::ChannelsFinish { head_dim, op } => {
                format!("channels_finish_{}_d{head_dim}", op.name())
            }
            Self::QuantizeRows(v) => {
                let smooth = if v.subtract_mean { "_smooth" } else { "" };
                let bias = if v.lse_bias { "_lse" } else { "" };
                let codes = match v.codes {
                    Codes::I8 => "i8",
                    Codes::F16 => "f16",
                };
                format!(
                    "quantize_{codes}_{}_{}_d{}p{}{smooth}{bias}",
                    v.groups.name,
                    v.dtype.name(),
                    v.head_dim,
                    v.qk_dim
                )
            }
            Self::ValuesF16(v) => format!("values_f16_{}", v.name()),
            Self::ValuesRows(v) => format!("values_rows_{}p{}", v.name(), v.pv_dim),
            Self::ValuesI8(v) => format!("values_i8_{}", v.name()),
            Self::Attend(v) => v.name(),
            Self::Decode(v) => v.name(),
            Self::Merge(v) => v.name(),
            Self::SelfTest => "self_test".to_owned(),
            Self::MatrixLayout => MATRIX_LAYOUT.name.to_owned(),
        }
    }

    /// The module for a device with these instructions.
    pub fn compose(&self, native: Native) -> Kernel {
        let name = self.name();
        let prelude = Prelude::new(&name);
        match self {
            Self::Channels(v) => {
                let prelude = prelude
                    .tensor(v.dtype, v.head_dim)
                    .number("SPLIT_ROWS", SPLIT_ROWS)
                    .flag("LARGEST", v.largest);
                prelude.compose(name, &[ABI, LOAD, CHANNELS])
            }
            Self::ChannelsFinish { head_dim, op } => {
                let prelude = prelude
                    .number("HEAD_DIM", *head_dim)
                    .number("QUADS", head_dim.div_ceil(4))
                    .flag("LARGEST", *op != ChannelOp::Mean)
                    .number("FINISH_MEAN", 0)
                    .number("FINISH_CODE_SCALE", 1)
                    .number("FINISH_RANGE", 2)
                    .number(
                        "FINISH",
                        match op {
                            ChannelOp::Mean => 0,
                            ChannelOp::CodeScale => 1,
                            ChannelOp::RangeFactor => 2,
                        },
                    );
                prelude.compose(name, &[ABI, CODES, CHANNELS_FINISH])
            }
            Self::QuantizeRows(v) => {
                let prelude = prelude
                    .tensor(v.dtype, v.head_dim)
                    .number("QK_DIM", v.qk_dim)
                    .flag("CODES_F16", v.codes == Codes::F16)
                    .groups("", v.groups)
                    .flag("SUBTRACT_MEAN", v.subtract_mean)
                    .flag("LSE_BIAS", v.lse_bias)
                    .flag("NATIVE_PACK", native.pack);
                prelude.compose(name, &[ABI, LOAD, HALF, CODES, QUANTIZE_ROWS])
            }
            Self::ValuesF16(v) | Self::ValuesRows(v) => {
                let prelude = prelude
                    .tensor(v.dtype, v.head_dim)
                    .number("PV_DIM", v.pv_dim)
                    .flag("RANGED", v.dtype != DType::F16)
                    .flag("NATIVE_PACK", native.pack);
                let stage = match self {
                    Self::ValuesF16(_) => VALUES_F16,
                    _ => VALUES_ROWS,
                };
                prelude.compose(name, &[ABI, LOAD, HALF, RANGE, stage])
            }
            Self::ValuesI8(v) => {
                let prelude = prelude
                    .tensor(v.dtype, v.head_dim)
                    .number("PV_DIM", v.pv_dim);
                prelude.compose(name, &[ABI, LOAD, CODES, VALUES_I8])
            }
            Self::Attend(v) => v.compose(prelude, native),
            Self::Decode(v) => v.compose(prelude, native),
            Self::Merge(v) => v.compose(prelude, native),
            Self::SelfTest => prelude.compose(name, &[SELF_TEST]),
            Self::MatrixLayout => Kernel {
                name,
                source: Source::Spirv(MATRIX_LAYOUT.specialize(&[])),
            },
        }
    }

    /// A list that visits every value of every axis of every stage, for tests that need no device.
    pub fn all() -> Vec<Self> {
        let mut all = vec![Self::SelfTest, Self::MatrixLayout];
        for head_dim in [1, 13, 64, 80, 128, 192, 256] {
            all.extend(ChannelOp::ALL.map(|op| Self::ChannelsFinish { head_dim, op }));
            for dtype in DType::ALL {
                all.extend([false, true].map(|largest| {
                    Self::Channels(ChannelsVariant {
                        dtype,
                        head_dim,
                        largest,
                    })
                }));
                let values = ValuesVariant {
                    dtype,
                    head_dim,
                    pv_dim: head_dim.next_multiple_of(64),
                };
                all.extend([
                    Self::ValuesF16(values),
                    Self::ValuesRows(values),
                    Self::ValuesI8(values),
                ]);
                for (groups, codes, subtract_mean, lse_bias) in [
                    (RowGroups::TOKEN, Codes::I8, true, false),
                    (RowGroups::TOKEN, Codes::F16, false, true),
                    (RowGroups::BLOCK_64, Codes::F16, true, false),
                    (RowGroups::BLOCK_128, Codes::I8, false, true),
                    (RowGroups::THREAD_Q16, Codes::I8, false, false),
                    (RowGroups::THREAD_K128, Codes::I8, true, false),
                ] {
                    all.push(Self::QuantizeRows(RowsVariant {
                        dtype,
                        head_dim,
                        qk_dim: head_dim.next_multiple_of(16),
                        codes,
                        groups,
                        subtract_mean,
                        lse_bias,
                    }));
                }
                all.extend(AttendVariant::samples(dtype, head_dim).map(Self::Attend));
                all.extend(DecodeVariant::samples(dtype, head_dim).map(Self::Decode));
                all.extend(MergeVariant::samples(dtype, head_dim).map(Self::Merge));
            }
        }
        all
    }
}

impl ValuesVariant {
    fn name(&self) -> String {
        format!("{}_d{}", self.dtype.name(), self.head_dim)
    }
}

impl Prelude {
    pub(crate) fn tensor(self, dtype: DType, head_dim: u32) -> Self {
        self.number("DTYPE_F16", 0)
            .number("DTYPE_BF16", 1)
            .number("DTYPE_F32", 2)
            .number("DTYPE", dtype.number())
            .number("HEAD_DIM", head_dim)
            .number("QUADS", head_dim.div_ceil(4))
            .flag("WHOLE_QUADS", head_dim.is_multiple_of(4))
    }

    pub(crate) fn groups(self, prefix: &str, groups: RowGroups) -> Self {
        self.number(&format!("{prefix}BLOCK"), groups.block)
            .number(&format!("{prefix}SLOTS"), groups.slots)
            .number(&format!("{prefix}SLOT_MOD"), groups.modulus)
            .number(&format!("{prefix}SLOT_DIV"), groups.divisor)
    }
}
