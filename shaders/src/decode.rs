//! Decoding: a few queries against many keys, split over workgroups and merged.

use crate::{
    ABI, DECODE, DECODE_LIB, DECODE_SHUFFLED, DType, EIGHT, HALF, Kernel, MERGE, Native, Prelude,
    READ_VECTORS, READ_WORDS, STORE,
};

/// Query rows that one workgroup serves: the components of a vector.
pub const PACK_ROWS: u32 = 4;

/// Channels that one workgroup of the merging kernel takes.
pub const MERGE_CHANNELS: u32 = 32;

/// How the decoding kernel divides its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DecodeTile {
    /// Invocations of a workgroup: a power of two, at least 64.
    pub invocations: u32,
    /// Keys of a workgroup's range: a multiple of 128.
    pub split: u32,
    /// Invocations of a subgroup, where its shuffles add up what a key's columns have multiplied:
    /// [`decode_shuffles`]. Otherwise workgroup memory does.
    pub subgroup: Option<u32>,
}

/// Axes of the decoding kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DecodeVariant {
    /// The tensors' element type.
    pub dtype: DType,
    /// Channels.
    pub head_dim: u32,
    /// Mask keys behind a query's own position.
    pub causal: bool,
    /// Sum P before rounding as well.
    pub lse: bool,
    /// The tile.
    pub tile: DecodeTile,
}

/// Axes of the merging kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MergeVariant {
    /// The output's element type.
    pub dtype: DType,
    /// Channels.
    pub head_dim: u32,
    /// Write the log-sum-exp.
    pub lse: bool,
    /// Add the correction for the means subtracted from K.
    pub lse_bias: bool,
    /// Multiply each channel by V's factor.
    pub v_scaled: bool,
}

/// Invocations that share a key, each with eight of its channels.
pub const fn decode_columns(head_dim: u32) -> u32 {
    head_dim.div_ceil(8)
}

/// Whether a key's columns can be added up by shuffles within a subgroup of so many invocations.
pub const fn decode_shuffles(head_dim: u32, subgroup: u32) -> bool {
    let columns = decode_columns(head_dim);
    columns.is_power_of_two() && columns >= 8 && columns <= subgroup
}

impl DecodeVariant {
    /// Keys that are read side by side: a power of two, so that their sums halve.
    const fn slots(&self) -> u32 {
        let most = self.tile.invocations / decode_columns(self.head_dim);
        // A turn of eight keys per slot stays within the shortest range.
        let most = if most > 16 { 16 } else { most };
        1 << most.ilog2()
    }

    /// Vectors of workgroup memory for the products of one set's keys; the halves of O and of the sums pass
    /// through it as well.
    const fn products(&self) -> u32 {
        let columns = decode_columns(self.head_dim);
        let products = 4 * self.slots() * (columns | 1);
        let halves = 9 * (self.slots() / 2) * columns;
        let most = if products > halves { products } else { halves };
        if most > self.tile.invocations {
            most
        } else {
            self.tile.invocations
        }
    }

    /// Vectors of workgroup memory where subgroups shuffle: the scores, then each subgroup's O.
    const fn room(&self, subgroup: u32) -> u32 {
        let parts = self.tile.invocations / subgroup * 9 * decode_columns(self.head_dim);
        if parts > self.tile.split {
            parts
        } else {
            self.tile.split
        }
    }

    /// Bytes of workgroup memory that the kernel declares.
    pub const fn workgroup_bytes(&self) -> u32 {
        match self.tile.subgroup {
            Some(subgroup) => 16 * (self.room(subgroup) + self.tile.invocations / subgroup),
            None => 16 * (self.products() + self.tile.split),
        }
    }

    /// Whether every column has all of its eight channels, one or two vectors of 16 bytes.
    const fn whole_columns(&self) -> bool {
        self.head_dim.is_multiple_of(8)
    }

    /// The name by which caches, tests and logs know it.
    pub fn name(&self) -> String {
        let mut name = format!("decode_{}_d{}", self.dtype.name(), self.head_dim);
        if self.causal {
            name += "_causal";
        }
        if self.lse {
            name += "_lse";
        }
        let tile = &self.tile;
        name += &format!("_split{}w{}", tile.split, tile.invocations);
        if let Some(subgroup) = tile.subgroup {
            name += &format!("_lanes{subgroup}");
        }
        name
    }

    pub(crate) fn compose(&self, prelude: Prelude, native: Native) -> Kernel {
        let prelude = prelude
            .tensor(self.dtype, self.head_dim)
            .number("COLUMNS", decode_columns(self.head_dim))
            .number("THREADS", self.tile.invocations)
            .number("SPLIT", self.tile.split)
            .flag("CAUSAL", self.causal)
            .flag("LSE", self.lse)
            .flag("NATIVE_PACK", native.pack);
        let read = match self.whole_columns() {
            true => READ_VECTORS,
            false => READ_WORDS,
        };
        let (prelude, kernel) = match self.tile.subgroup {
            Some(subgroup) => (
                prelude
                    .number("LANES", subgroup)
                    .number("ROOM", self.room(subgroup)),
                DECODE_SHUFFLED,
            ),
            None => (
                prelude
                    .number("SLOTS", self.slots())
                    .number("PRODUCTS", self.products()),
                DECODE,
            ),
        };
        prelude.compose(self.name(), &[ABI, HALF, EIGHT, read, DECODE_LIB, kernel])
    }

    /// Variants that visit every value of every axis, for tests that need no device.
    pub(crate) fn samples(dtype: DType, head_dim: u32) -> impl Iterator<Item = Self> {
        let axes = [
            (false, false, 64, 256, None),
            (true, false, 128, 128, None),
            (true, true, 128, 512, None),
            (true, true, 256, 512, Some(32)),
            (false, false, 128, 128, Some(64)),
            (false, true, 64, 256, Some(8)),
        ];
        axes.into_iter()
            .filter(move |&(.., subgroup)| {
                subgroup.is_none_or(|subgroup| decode_shuffles(head_dim, subgroup))
            })
            .map(move |(causal, lse, invocations, split, subgroup)| Self {
                dtype,
                head_dim,
                causal,
                lse,
                tile: DecodeTile {
                    invocations,
                    split,
                    subgroup,
                },
            })
    }
}

impl MergeVariant {
    /// The name by which caches, tests and logs know it.
    pub fn name(&self) -> String {
        let lse = match (self.lse, self.lse_bias) {
            (false, _) => "",
            (true, false) => "_lse",
            (true, true) => "_lse_smooth",
        };
        let scaled = if self.v_scaled { "_scaled" } else { "" };
        format!(
            "merge_{}_d{}{scaled}{lse}",
            self.dtype.name(),
            self.head_dim
        )
    }

    pub(crate) fn compose(&self, prelude: Prelude, native: Native) -> Kernel {
        let prelude = prelude
            .tensor(self.dtype, self.head_dim)
            .number("COLUMNS", decode_columns(self.head_dim))
            .number("CHANNEL_GROUPS", self.head_dim.div_ceil(MERGE_CHANNELS))
            .flag("LSE", self.lse)
            .flag("LSE_BIAS", self.lse_bias)
            .flag("V_SCALED", self.v_scaled)
            .flag("NATIVE_PACK", native.pack);
        prelude.compose(self.name(), &[ABI, HALF, STORE, MERGE])
    }

    /// Variants that visit every value of every axis.
    pub(crate) fn samples(dtype: DType, head_dim: u32) -> impl Iterator<Item = Self> {
        let axes = [(false, false), (true, false), (true, true)];
        axes.into_iter()
            .zip([true, false, true])
            .map(move |((lse, lse_bias), v_scaled)| Self {
                dtype,
                head_dim,
                lse,
                lse_bias,
                v_scaled,
            })
    }
}
