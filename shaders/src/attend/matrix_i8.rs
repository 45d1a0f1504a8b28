//! The attention kernel on 8-bit integer matrices: SPIR-V, for devices of Vulkan whose matrices lie as the
//! kernel expects them.

use super::{AttendKernel, AttendVariant};
use crate::spirv::ATTEND_MATRIX_I8;
use crate::{DType, Kernel, Pv, RowGroups, Source};

/// Its tile: what a subgroup of 32 invocations holds, and how much a workgroup stages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MatrixI8Tile {
    /// Subgroups of a workgroup.
    pub subgroups: u32,
    /// Blocks of 16 queries that each of them holds, a power of two.
    pub blocks: u32,
    /// Keys staged at a time: 16, 32 or 64.
    pub key_tile: u32,
    /// Key tiles in workgroup memory: with two, the next is stored while the last is still read.
    pub stages: u32,
    /// Channels of a row of Q's and K's codes, a multiple of 32.
    pub qk_dim: u32,
    /// Channels of V as laid out, a multiple of 16.
    pub pv_dim: u32,
}

impl MatrixI8Tile {
    /// Invocations of a subgroup, the only size that the kernel is written for.
    pub const SUBGROUP: u32 = 32;

    /// How far, in log2 units, scores may rise above the maximum in use. P stays within 2^8, far from the
    /// end of f16.
    pub(super) const STALE: u8 = 8;

    /// A tile for `head_dim`.
    pub const fn new(
        head_dim: u32,
        subgroups: u32,
        blocks: u32,
        key_tile: u32,
        stages: u32,
    ) -> Self {
        Self {
            subgroups,
            blocks,
            key_tile,
            stages,
            qk_dim: head_dim.next_multiple_of(32),
            pv_dim: head_dim.next_multiple_of(16),
        }
    }

    /// Queries of a workgroup.
    pub const fn rows(&self) -> u32 {
        self.subgroups * self.blocks * 16
    }

    /// Invocations of a workgroup.
    pub const fn invocations(&self) -> u32 {
        self.subgroups * Self::SUBGROUP
    }

    /// Bytes of workgroup memory that the kernel declares: rows of codes and of values an odd number of
    /// 16-byte vectors apart.
    pub const fn workgroup_bytes(&self) -> u32 {
        let vectors = ((self.qk_dim / 16) | 1) + ((self.pv_dim / 8) | 1);
        16 * self.stages * self.key_tile * vectors
    }

    /// The end of the variant's name.
    pub(super) fn name(&self) -> String {
        let Self {
            subgroups,
            blocks,
            key_tile,
            stages,
            ..
        } = self;
        format!("_s{subgroups}b{blocks}k{key_tile}x{stages}")
    }

    /// The kernel's specialization constants.
    fn constants(&self, v: &AttendVariant) -> [(u32, u32); 12] {
        let values = [
            self.invocations(),
            self.blocks,
            self.key_tile,
            self.stages,
            self.qk_dim,
            self.pv_dim,
            v.head_dim,
            v.dtype.number(),
            u32::from(v.causal),
            u32::from(v.lse),
            u32::from(v.lse_bias),
            u32::from(v.v_scaled()),
        ];
        let mut numbers = 0..;
        values.map(|value| (numbers.next().unwrap_or_default(), value))
    }

    pub(super) fn compose(&self, v: &AttendVariant) -> Kernel {
        Kernel {
            name: v.name(),
            source: Source::Spirv(ATTEND_MATRIX_I8.specialize(&self.constants(v))),
        }
    }

    /// Variants that visit every value of every axis.
    pub(super) fn samples(dtype: DType, head_dim: u32) -> impl Iterator<Item = AttendVariant> {
        let shapes = [
            (Self::new(head_dim, 4, 1, 64, 1), (false, false, false)),
            (Self::new(head_dim, 8, 2, 32, 2), (true, true, false)),
            (Self::new(head_dim, 4, 2, 16, 1), (false, true, true)),
        ];
        let variant = move |(tile, (causal, lse, lse_bias))| AttendVariant {
            dtype,
            head_dim,
            pv: Pv::F16,
            q_groups: RowGroups::BLOCK_128,
            k_groups: RowGroups::BLOCK_64,
            causal,
            lse,
            lse_bias,
            kernel: AttendKernel::MatrixI8(tile),
        };
        shapes.into_iter().map(variant)
    }
}
