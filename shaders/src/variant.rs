//! What can be composed: one row per stage, and the constants that tell its variants apart.

use crate::{
    ABI, ATTEND, CHANNELS, CHANNELS_FINISH, CODES, DOT, HALF, KEY_TILE, Kernel, LOAD, PV_F16,
    PV_I8, Prelude, QUANTIZE_ROWS, SELF_TEST, SPLIT_ROWS, STORE, VALUES_F16, VALUES_I8,
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

    const fn name(self) -> &'static str {
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

/// How the second product is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pv {
    /// f16 factors, f32 sums.
    F16,
    /// 8-bit factors, exact sums per tile.
    I8,
}

/// The attention kernel's tile: how many queries a workgroup takes and how much of a head it stages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tile {
    /// Queries of a workgroup: 16, 32 or 64; it has four invocations per query.
    pub rows: u32,
    /// Channels of Q and K staged at a time, a multiple of 16.
    pub qk_chunk: u32,
    /// How many times, so that `qk_chunk * qk_chunks` channels cover head_dim. With one, Q stays staged.
    pub qk_chunks: u32,
    /// Groups of 64 channels of V staged at a time: 1 or 2.
    pub pv_chunk_groups: u32,
    /// Groups of 64 channels of V that cover head_dim: 1 to 4, a multiple of `pv_chunk_groups`.
    pub pv_groups: u32,
}

impl Tile {
    /// A tile for `head_dim` that stages at most `qk_chunk` channels of Q and K and `pv_chunk_groups`
    /// groups of V at a time.
    pub const fn new(head_dim: u32, rows: u32, qk_chunk: u32, pv_chunk_groups: u32) -> Self {
        let qk_chunks = head_dim.div_ceil(qk_chunk);
        let groups = head_dim.div_ceil(64);
        let pv_chunk_groups = if groups == 1 { 1 } else { pv_chunk_groups };
        Self {
            rows,
            qk_chunk: head_dim.div_ceil(qk_chunks).next_multiple_of(16),
            qk_chunks,
            pv_chunk_groups,
            pv_groups: groups.next_multiple_of(pv_chunk_groups),
        }
    }

    /// Channels of a row of Q's and K's codes.
    pub const fn qk_dim(&self) -> u32 {
        self.qk_chunk * self.qk_chunks
    }

    /// Channels of V as laid out.
    pub const fn pv_dim(&self) -> u32 {
        64 * self.pv_groups
    }

    /// Invocations of a workgroup.
    pub const fn invocations(&self) -> u32 {
        4 * self.rows
    }

    /// Rows of codes in workgroup memory lie an odd number of 16-byte vectors apart: neighbours fall
    /// into different banks.
    const fn qk_stride(&self) -> u32 {
        (self.qk_chunk / 16) | 1
    }

    /// Where V is staged, in vectors: behind a Q that stays, else over everything.
    const fn v_at(&self) -> u32 {
        if self.qk_chunks == 1 {
            self.rows * self.qk_stride()
        } else {
            0
        }
    }

    const fn staged_vecs(&self, pv: Pv) -> u32 {
        let codes = (self.rows + KEY_TILE) * self.qk_stride();
        let words_per_channel = match pv {
            Pv::F16 => 32,
            Pv::I8 => 16,
        };
        let values = self.v_at() + words_per_channel * 16 * self.pv_chunk_groups;
        if codes > values { codes } else { values }
    }

    /// Bytes of workgroup memory that the kernel declares.
    pub const fn workgroup_bytes(&self, pv: Pv) -> u32 {
        let p_vecs = match pv {
            Pv::F16 => 8 + 1,
            Pv::I8 => 4 + 1,
        };
        16 * (self.staged_vecs(pv) + self.rows * p_vecs + self.rows * 4) + 4 * KEY_TILE
    }
}

/// Axes of the attention kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AttendVariant {
    /// The output's element type.
    pub dtype: DType,
    /// Channels.
    pub head_dim: u32,
    /// The second product.
    pub pv: Pv,
    /// Which rows of Q share a scale.
    pub q_groups: RowGroups,
    /// Which rows of K share a scale.
    pub k_groups: RowGroups,
    /// Mask keys behind a query's own position.
    pub causal: bool,
    /// Write the log-sum-exp.
    pub lse: bool,
    /// Add the correction for the means subtracted from K.
    pub lse_bias: bool,
    /// The tile.
    pub tile: Tile,
}

impl AttendVariant {
    /// Whether V has a factor per channel.
    const fn v_scaled(&self) -> bool {
        match self.pv {
            Pv::F16 => !matches!(self.dtype, DType::F16),
            Pv::I8 => true,
        }
    }
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
    /// V for the f16 product.
    ValuesF16(ValuesVariant),
    /// V for the INT8 product.
    ValuesI8(ValuesVariant),
    /// The attention kernel.
    Attend(AttendVariant),
    /// The device self-test.
    SelfTest,
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
                format!(
                    "quantize_{}_{}_d{}p{}{smooth}{bias}",
                    v.groups.name,
                    v.dtype.name(),
                    v.head_dim,
                    v.qk_dim
                )
            }
            Self::ValuesF16(v) => format!("values_f16_{}", v.name()),
            Self::ValuesI8(v) => format!("values_i8_{}", v.name()),
            Self::Attend(v) => v.name(),
            Self::SelfTest => "self_test".to_owned(),
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
                    .groups("", v.groups)
                    .flag("SUBTRACT_MEAN", v.subtract_mean)
                    .flag("LSE_BIAS", v.lse_bias);
                prelude.compose(name, &[ABI, LOAD, CODES, QUANTIZE_ROWS])
            }
            Self::ValuesF16(v) => {
                let prelude = prelude
                    .tensor(v.dtype, v.head_dim)
                    .number("PV_DIM", v.pv_dim)
                    .flag("RANGED", v.dtype != DType::F16)
                    .flag("NATIVE_PACK", native.pack);
                prelude.compose(name, &[ABI, LOAD, HALF, VALUES_F16])
            }
            Self::ValuesI8(v) => {
                let prelude = prelude
                    .tensor(v.dtype, v.head_dim)
                    .number("PV_DIM", v.pv_dim);
                prelude.compose(name, &[ABI, LOAD, CODES, VALUES_I8])
            }
            Self::Attend(v) => v.compose(prelude, name, native),
            Self::SelfTest => prelude.compose(name, &[SELF_TEST]),
        }
    }

    /// A list that visits every value of every axis of every stage, for tests that need no device.
    pub fn all() -> Vec<Self> {
        let mut all = vec![Self::SelfTest];
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
                all.extend([Self::ValuesF16(values), Self::ValuesI8(values)]);
                for (groups, subtract_mean, lse_bias) in [
                    (RowGroups::TOKEN, true, false),
                    (RowGroups::TOKEN, false, true),
                    (RowGroups::BLOCK_64, true, false),
                    (RowGroups::BLOCK_128, false, true),
                    (RowGroups::THREAD_Q16, false, false),
                    (RowGroups::THREAD_K128, true, false),
                ] {
                    all.push(Self::QuantizeRows(RowsVariant {
                        dtype,
                        head_dim,
                        qk_dim: head_dim.next_multiple_of(16),
                        groups,
                        subtract_mean,
                        lse_bias,
                    }));
                }
                all.extend(AttendVariant::samples(dtype, head_dim).map(Self::Attend));
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

impl AttendVariant {
    fn name(&self) -> String {
        let pv = match self.pv {
            Pv::F16 => "f16",
            Pv::I8 => "i8",
        };
        let mut name = format!("attend_i8_{pv}_{}_d{}", self.dtype.name(), self.head_dim);
        name += &format!("_{}_{}", self.q_groups.name, self.k_groups.name);
        if self.causal {
            name += "_causal";
        }
        if self.lse {
            name += if self.lse_bias { "_lse_smooth" } else { "_lse" };
        }
        let tile = &self.tile;
        name += &format!(
            "_rows{}c{}v{}",
            tile.rows, tile.qk_chunk, tile.pv_chunk_groups
        );
        name
    }

    fn compose(&self, prelude: Prelude, name: String, native: Native) -> Kernel {
        let tile = &self.tile;
        let prelude = prelude
            .tensor(self.dtype, self.head_dim)
            .number("ROWS", tile.rows)
            .number("QK_DIM", tile.qk_dim())
            .number("QK_VECS", tile.qk_chunk / 16)
            .number("QK_CHUNKS", tile.qk_chunks)
            .number("QK_STRIDE", tile.qk_stride())
            .flag("Q_RESIDENT", tile.qk_chunks == 1)
            .number("PV_DIM", tile.pv_dim())
            .number("CHUNK_GROUPS", tile.pv_chunk_groups)
            .number("V_AT", tile.v_at())
            .number("STAGED_VECS", tile.staged_vecs(self.pv))
            .groups("Q_", self.q_groups)
            .groups("K_", self.k_groups)
            .flag("CAUSAL", self.causal)
            .flag("LSE", self.lse)
            .flag("LSE_BIAS", self.lse_bias)
            .flag("V_SCALED", self.v_scaled())
            .flag("NATIVE_DOT", native.dot)
            .flag("NATIVE_PACK", native.pack);
        let pv = match self.pv {
            Pv::F16 => PV_F16,
            Pv::I8 => PV_I8,
        };
        prelude.compose(name, &[ABI, HALF, STORE, DOT, pv, ATTEND])
    }

    fn samples(dtype: DType, head_dim: u32) -> impl Iterator<Item = Self> {
        let tiles = [
            Tile::new(head_dim, 64, 128, 2),
            Tile::new(head_dim, 32, 64, 1),
            Tile::new(head_dim, 16, 32, 1),
        ];
        let masks = [
            (false, false, false),
            (true, true, false),
            (false, true, true),
        ];
        let recipes = [
            (Pv::F16, RowGroups::BLOCK_128, RowGroups::BLOCK_64),
            (Pv::F16, RowGroups::TOKEN, RowGroups::TOKEN),
            (Pv::I8, RowGroups::THREAD_Q16, RowGroups::THREAD_K128),
        ];
        let pairs = recipes.into_iter().flat_map(move |recipe| {
            let numbered = masks.into_iter().zip(tiles);
            numbered.map(move |(mask, tile)| (recipe, mask, tile))
        });
        pairs.map(
            move |((pv, q_groups, k_groups), (causal, lse, lse_bias), tile)| Self {
                dtype,
                head_dim,
                pv,
                q_groups,
                k_groups,
                causal,
                lse,
                lse_bias,
                tile,
            },
        )
    }
}

impl Prelude {
    fn tensor(self, dtype: DType, head_dim: u32) -> Self {
        self.number("DTYPE_F16", 0)
            .number("DTYPE_BF16", 1)
            .number("DTYPE_F32", 2)
            .number(
                "DTYPE",
                match dtype {
                    DType::F16 => 0,
                    DType::BF16 => 1,
                    DType::F32 => 2,
                },
            )
            .number("HEAD_DIM", head_dim)
            .number("QUADS", head_dim.div_ceil(4))
    }

    fn groups(self, prefix: &str, groups: RowGroups) -> Self {
        self.number(&format!("{prefix}BLOCK"), groups.block)
            .number(&format!("{prefix}SLOTS"), groups.slots)
            .number(&format!("{prefix}SLOT_MOD"), groups.modulus)
            .number(&format!("{prefix}SLOT_DIV"), groups.divisor)
    }
}
