//! The attention kernels: what they have in common, and which ways there are to compute it.
//!
//! Each way is one file here with its tile and its composition, and one variant of [`AttendKernel`].

mod dot;
mod matrix;
mod matrix_i8;

pub use dot::DotTile;
pub use matrix::MatrixTile;
pub use matrix_i8::MatrixI8Tile;

use crate::{DType, KEY_TILE, Kernel, Native, Prelude, RowGroups};

/// How the second product is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pv {
    /// f16 factors, f32 sums.
    F16,
    /// 8-bit factors, exact sums per tile.
    I8,
}

/// How an attention kernel wants the codes of Q and K stored. Rows are `qk_dim` codes long either way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Codes {
    /// One signed byte per code.
    I8,
    /// One f16 per code: every code is exact there, and so is a product's sum in f32.
    F16,
}

impl Codes {
    /// Bytes per code.
    pub const fn bytes(self) -> u32 {
        match self {
            Self::I8 => 1,
            Self::F16 => 2,
        }
    }
}

/// How an attention kernel wants V laid out, per tile of [`KEY_TILE`] keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Values {
    /// f16, two keys in a word: `values_f16.wgsl`.
    F16Pairs,
    /// f16, rows of `pv_dim` channels: `values_rows.wgsl`.
    F16Rows,
    /// 8-bit codes and their sums: `values_i8.wgsl`.
    I8,
}

impl Values {
    /// Bytes per channel of one tile of [`KEY_TILE`] keys.
    pub const fn tile_bytes(self) -> u32 {
        match self {
            Self::F16Pairs | Self::F16Rows => 2 * KEY_TILE,
            // The codes, and a word with their sum.
            Self::I8 => KEY_TILE + 4,
        }
    }
}

/// One way to compute attention, with its tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AttendKernel {
    /// Packed dot products.
    Dot(DotTile),
    /// Cooperative matrices of f16.
    Matrix(MatrixTile),
    /// Matrices of 8-bit integers, in SPIR-V.
    MatrixI8(MatrixI8Tile),
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
    /// How.
    pub kernel: AttendKernel,
}

impl AttendVariant {
    /// Queries of a workgroup.
    pub const fn rows(&self) -> u32 {
        match self.kernel {
            AttendKernel::Dot(tile) => tile.rows,
            AttendKernel::Matrix(tile) => tile.rows(),
            AttendKernel::MatrixI8(tile) => tile.rows(),
        }
    }

    /// Invocations of a workgroup.
    pub const fn invocations(&self) -> u32 {
        match self.kernel {
            AttendKernel::Dot(tile) => tile.invocations(),
            AttendKernel::Matrix(tile) => tile.invocations(),
            AttendKernel::MatrixI8(tile) => tile.invocations(),
        }
    }

    /// Bytes of workgroup memory that the kernel declares.
    pub const fn workgroup_bytes(&self) -> u32 {
        match self.kernel {
            AttendKernel::Dot(tile) => tile.workgroup_bytes(self.pv),
            AttendKernel::Matrix(tile) => tile.workgroup_bytes(self.k_uniform(tile.key_tile)),
            AttendKernel::MatrixI8(tile) => tile.workgroup_bytes(),
        }
    }

    /// Channels of a row of Q's and K's codes.
    pub const fn qk_dim(&self) -> u32 {
        match self.kernel {
            AttendKernel::Dot(tile) => tile.qk_dim(),
            AttendKernel::Matrix(tile) => tile.channels,
            AttendKernel::MatrixI8(tile) => tile.qk_dim,
        }
    }

    /// Channels of V as laid out.
    pub const fn pv_dim(&self) -> u32 {
        match self.kernel {
            AttendKernel::Dot(tile) => tile.pv_dim(),
            AttendKernel::Matrix(tile) => tile.channels,
            AttendKernel::MatrixI8(tile) => tile.pv_dim,
        }
    }

    /// How the codes of Q and K are stored.
    pub const fn codes(&self) -> Codes {
        match self.kernel {
            AttendKernel::Dot(_) | AttendKernel::MatrixI8(_) => Codes::I8,
            AttendKernel::Matrix(_) => Codes::F16,
        }
    }

    /// How V is laid out.
    pub const fn values(&self) -> Values {
        match (self.kernel, self.pv) {
            (AttendKernel::Dot(_), Pv::F16) => Values::F16Pairs,
            (AttendKernel::Dot(_), Pv::I8) => Values::I8,
            (AttendKernel::Matrix(_) | AttendKernel::MatrixI8(_), _) => Values::F16Rows,
        }
    }

    /// Keys per step of the online softmax.
    pub const fn key_tile(&self) -> u32 {
        match self.kernel {
            AttendKernel::Dot(_) => KEY_TILE,
            AttendKernel::Matrix(tile) => tile.key_tile,
            AttendKernel::MatrixI8(tile) => tile.key_tile,
        }
    }

    /// How far, in log2 units, a row's scores may rise above the maximum in use before it is raised.
    pub const fn stale(&self) -> u8 {
        match self.kernel {
            AttendKernel::Dot(_) => 0,
            AttendKernel::Matrix(tile) => tile.stale(),
            AttendKernel::MatrixI8(_) => MatrixI8Tile::STALE,
        }
    }

    /// What O is divided by: the sum of P before it was rounded, or after.
    pub const fn divides_by_unrounded(&self) -> bool {
        match self.kernel {
            AttendKernel::Dot(_) => false,
            AttendKernel::Matrix(_) | AttendKernel::MatrixI8(_) => true,
        }
    }

    /// Whether the kernel needs f16 and cooperative matrices in WGSL.
    pub const fn needs_matrices(&self) -> bool {
        matches!(self.kernel, AttendKernel::Matrix(_))
    }

    /// Whether keys 16 apart share one scale within a tile.
    const fn k_columns_uniform(&self) -> bool {
        self.k_groups.block.is_multiple_of(KEY_TILE) && 16 % self.k_groups.modulus == 0
    }

    /// Whether all keys of a tile share one scale.
    const fn k_uniform(&self, key_tile: u32) -> bool {
        self.k_groups.slots == 1 && self.k_groups.block.is_multiple_of(key_tile)
    }

    /// Keys of a workgroup's range where keys are split over workgroups; `None` where they are not.
    pub const fn split(&self) -> Option<u32> {
        match self.kernel {
            AttendKernel::Dot(DotTile { split: 0, .. }) => None,
            AttendKernel::Dot(tile) => Some(tile.split),
            AttendKernel::Matrix(_) | AttendKernel::MatrixI8(_) => None,
        }
    }

    /// Whether V has a factor per channel.
    pub const fn v_scaled(&self) -> bool {
        match self.pv {
            Pv::F16 => !matches!(self.dtype, DType::F16),
            Pv::I8 => true,
        }
    }

    /// The name by which caches, tests and logs know it: the way first, its tile last.
    pub fn name(&self) -> String {
        let (way, tile) = match self.kernel {
            AttendKernel::Dot(tile) => ("dot", tile.name()),
            AttendKernel::Matrix(tile) => ("matrix", tile.name()),
            AttendKernel::MatrixI8(tile) => ("matrix_i8", tile.name()),
        };
        let pv = match self.pv {
            Pv::F16 => "f16",
            Pv::I8 => "i8",
        };
        let mut name = format!(
            "attend_{way}_i8_{pv}_{}_d{}",
            self.dtype.name(),
            self.head_dim
        );
        name += &format!("_{}_{}", self.q_groups.name, self.k_groups.name);
        if self.causal {
            name += "_causal";
        }
        if self.lse {
            name += if self.lse_bias { "_lse_smooth" } else { "_lse" };
        }
        name + &tile
    }

    pub(crate) fn compose(&self, prelude: Prelude, native: Native) -> Kernel {
        match &self.kernel {
            AttendKernel::Dot(tile) => tile.compose(self, prelude, native),
            AttendKernel::Matrix(tile) => tile.compose(self, native),
            AttendKernel::MatrixI8(tile) => tile.compose(self),
        }
    }

    /// The constants that every way has.
    fn constants(&self, prelude: Prelude) -> Prelude {
        prelude
            .tensor(self.dtype, self.head_dim)
            .groups("Q_", self.q_groups)
            .groups("K_", self.k_groups)
            .flag("CAUSAL", self.causal)
            .flag("LSE", self.lse)
            .flag("LSE_BIAS", self.lse_bias)
            .flag("V_SCALED", self.v_scaled())
    }

    /// Variants that visit every value of every axis, for tests that need no device.
    pub(crate) fn samples(dtype: DType, head_dim: u32) -> impl Iterator<Item = Self> {
        DotTile::samples(dtype, head_dim)
            .chain(MatrixTile::samples(dtype, head_dim))
            .chain(MatrixI8Tile::samples(dtype, head_dim))
    }
}
