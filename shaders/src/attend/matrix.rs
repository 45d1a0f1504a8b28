//! The attention kernel on WGSL's cooperative matrices.

use super::{AttendKernel, AttendVariant};
use crate::{
    ABI, ATTEND_MATRIX, ATTENTION, DType, HALF, Kernel, Native, Prelude, Pv, RowGroups, STORE,
};

/// How far, in log2 units, a row's scores may pass the maximum in use: P reaches 2^8, far below f16's
/// largest, and rows move so rarely that their round trip through workgroup memory does not count.
const STALE: u8 = 8;

/// Its tile: which matrices, and how many of them a subgroup and a workgroup hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MatrixTile {
    /// Rows and columns of a matrix: 8 or 16.
    pub side: u32,
    /// Invocations of a subgroup: every subgroup of the device has as many.
    pub lanes: u32,
    /// Subgroups of a workgroup.
    pub subgroups: u32,
    /// Matrices of queries of a subgroup.
    pub row_mats: u32,
    /// Keys of a step, a multiple of `side` that divides 64. Invocations that share a row need four
    /// keys each.
    pub key_tile: u32,
    /// Two tiles of K and of V in workgroup memory, for one barrier a step instead of two.
    pub double: bool,
    /// What a subgroup writes for itself is ordered by `subgroupBarrier`, not by the whole workgroup's.
    pub subgroup_order: bool,
    /// Arrays that matrices are loaded from are made of vectors, so that single invocations read and
    /// write 8 or 16 bytes at a time. Metal's matrices want arrays of numbers.
    pub vector_items: bool,
    /// Chains of sums of Q K^T: 1 or 2, which divides the matrices that the channels are.
    pub chains: u32,
    /// Channels, padded to whole matrices.
    pub channels: u32,
}

impl MatrixTile {
    /// Queries of a workgroup.
    pub const fn rows(&self) -> u32 {
        self.subgroups * self.own_rows()
    }

    /// Queries of a subgroup.
    pub const fn own_rows(&self) -> u32 {
        self.row_mats * self.side
    }

    /// Invocations of a workgroup.
    pub const fn invocations(&self) -> u32 {
        self.subgroups * self.lanes
    }

    /// Invocations that share a row.
    pub const fn split(&self) -> u32 {
        self.lanes.div_ceil(self.own_rows())
    }

    /// Numbers from one row of S to the next: 8 more than a tile, so that a subgroup's stores of S meet in
    /// no bank where banks are 32 words. The kernel uses four of them.
    const fn s_stride(&self) -> u32 {
        self.key_tile + 8
    }

    /// The same for P, in f16: 16 bytes more than a tile, so that neighbours fall into different banks.
    const fn p_stride(&self) -> u32 {
        self.key_tile + 8
    }

    /// Channels of O that the room of S holds at a time: whole matrices that divide all.
    const fn chunk(&self) -> u32 {
        let mut chunk = self.key_tile;
        while chunk > self.side && !self.channels.is_multiple_of(chunk) {
            chunk /= 2;
        }
        chunk
    }

    /// Bytes of workgroup memory that the kernel declares.
    pub const fn workgroup_bytes(&self, k_uniform: bool) -> u32 {
        let tiles = self.rows() * (4 * self.s_stride() + 2 * self.p_stride());
        let buffers = if self.double { 2 } else { 1 };
        let staged = buffers * 2 * self.key_tile * 2 * (self.channels + 8);
        let key_scales = if k_uniform { 0 } else { 2 * 4 * self.key_tile };
        tiles + staged + key_scales
    }

    /// Numbers of K and V that an invocation reads at a time.
    const fn read_width(&self) -> u32 {
        if self.vector_items { 8 } else { 1 }
    }

    /// How far, in log2 units, a row's scores may pass the maximum in use.
    pub const fn stale(&self) -> u8 {
        STALE
    }

    /// The end of the variant's name.
    pub(super) fn name(&self) -> String {
        let double = if self.double { "d" } else { "" };
        let order = if self.subgroup_order { "o" } else { "" };
        let items = if self.vector_items { "" } else { "_scalar" };
        format!(
            "_mat{}x{}w{}k{}c{}{double}{order}_lanes{}{items}",
            self.side, self.row_mats, self.subgroups, self.key_tile, self.chains, self.lanes
        )
    }

    pub(super) fn compose(&self, v: &AttendVariant, native: Native) -> Kernel {
        let extensions = ["f16", "wgpu_cooperative_matrix"];
        let name = v.name();
        let matrix = |ty, role| format!("coop_mat{0}x{0}<{ty}, {role}>", self.side);
        let (half, single, read) = match self.vector_items {
            true => ("vec4<f16>", "vec4<f32>", "vec4<u32>"),
            false => ("f16", "f32", "f16"),
        };
        let reads = self.key_tile * self.channels / self.read_width();
        let threads = self.invocations();
        // When K and V are read and what is loaded before Q K^T, as measured: docs/kernels/attend_matrix_wgsl.md.
        // Beyond 128 channels nothing else has been with two tiles, and nothing with one; V takes registers that only few channels leave.
        let read_behind = self.double && v.lse && self.channels <= 128;
        let prelude = v
            .constants(Prelude::enabling(&name, &extensions))
            .alias("Half", half)
            .alias("Single", single)
            .alias("Read", read)
            .alias("Factor", &matrix("f16", "A"))
            .alias("Other", &matrix("f16", "B"))
            .alias("Sums", &matrix("f32", "C"))
            .number("SIDE", self.side)
            .number("LANES", self.lanes)
            .number("SUBGROUPS", self.subgroups)
            .flag("MANY_SUBGROUPS", self.subgroups > 1)
            .number("ROW_MATS", self.row_mats)
            .number("SPLIT", self.split())
            .flag("ROW_IS_SHARED", self.split() > 1)
            .number("LANE_ROWS", self.own_rows().div_ceil(self.lanes))
            .number("PART_QUADS", self.key_tile / 4 / self.split())
            .number("KEY_TILE", self.key_tile)
            .number("KEY_MATS", self.key_tile / self.side)
            .number("TILE_QUADS", self.key_tile / 4)
            .number("CHANNELS", self.channels)
            .number("CHAINS", self.chains)
            .flag("TWO_CHAINS", self.chains == 2)
            .number("CHAIN_MATS", self.channels / self.side / self.chains)
            .number("READ_WIDTH", self.read_width())
            .number("STAGE", reads.div_ceil(threads))
            .flag("STAGE_WHOLE", reads.is_multiple_of(threads))
            .flag("STAGE_EVEN", threads.is_multiple_of(reads / self.key_tile))
            .number("CHUNKS", self.channels / self.chunk())
            .number("CHUNK_MATS", self.chunk() / self.side)
            .number("S_STRIDE", self.s_stride())
            .number("P_STRIDE", self.p_stride())
            .flag("VECTOR_ITEMS", self.vector_items)
            .flag("DOUBLE", self.double)
            .flag("READ_FIRST", !self.double)
            .flag("READ_BEHIND", read_behind)
            .flag("READ_AHEAD", self.double && !read_behind)
            .flag("P_FIRST", self.channels <= 128)
            .flag("V_FIRST", !self.double && self.channels <= 64)
            .flag("SUBGROUP_ORDER", self.subgroup_order)
            .flag("K_UNIFORM", v.k_uniform(self.key_tile))
            .float("STALE", f32::from(STALE))
            .flag("NATIVE_PACK", native.pack);
        prelude.compose(name, &[ABI, HALF, STORE, ATTENTION, ATTEND_MATRIX])
    }

    /// Variants that visit every value of every axis.
    pub(super) fn samples(dtype: DType, head_dim: u32) -> impl Iterator<Item = AttendVariant> {
        let channels = head_dim.next_multiple_of(16);
        let big = Self {
            side: 16,
            lanes: 32,
            subgroups: 1,
            row_mats: 2,
            key_tile: 32,
            double: true,
            subgroup_order: true,
            vector_items: true,
            chains: 1,
            channels,
        };
        let tiles = [
            big,
            Self {
                subgroups: 4,
                key_tile: 16,
                double: false,
                subgroup_order: false,
                ..big
            },
            Self {
                subgroups: 8,
                row_mats: 1,
                ..big
            },
            Self {
                side: 8,
                lanes: 8,
                key_tile: 16,
                chains: if (channels / 8).is_multiple_of(2) {
                    2
                } else {
                    1
                },
                vector_items: false,
                ..big
            },
        ];
        let masks = [
            (false, false, false),
            (true, true, false),
            (false, true, true),
            (true, false, false),
        ];
        let recipes = [
            (RowGroups::BLOCK_128, RowGroups::BLOCK_64),
            (RowGroups::TOKEN, RowGroups::TOKEN),
        ];
        let pairs = recipes
            .into_iter()
            .flat_map(move |groups| masks.into_iter().zip(tiles).map(move |m| (groups, m)));
        pairs.map(
            move |((q_groups, k_groups), ((causal, lse, lse_bias), tile))| AttendVariant {
                dtype,
                head_dim,
                pv: Pv::F16,
                q_groups,
                k_groups,
                causal,
                lse,
                lse_bias,
                kernel: AttendKernel::Matrix(tile),
            },
        )
    }
}
