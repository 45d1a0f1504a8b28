//! The attention kernel on WGSL's cooperative matrices.

use super::{AttendKernel, AttendVariant};
use crate::{
    ABI, ATTEND_MATRIX, ATTENTION, DType, HALF, Kernel, Native, Prelude, Pv, RowGroups, STORE,
};

/// How far, in log2 units, a row's scores may pass the maximum in use: P reaches 2^8, far below f16's
/// largest, and rows move so rarely that their round trip through workgroup memory does not count.
const STALE: u8 = 8;

/// Its tile: which matrices, how many of them a subgroup and a workgroup hold, and from where.
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
    /// Keys of a step, a multiple of `side` that divides 64.
    pub key_tile: u32,
    /// Matrices of keys whose scores a subgroup holds at a time: divides `key_tile / side`.
    pub key_step: u32,
    /// Keep Q in registers over the whole call.
    pub q_resident: bool,
    /// Tiles of K and V go through workgroup memory, for all subgroups; otherwise each loads its own
    /// matrices from the bindings.
    pub staged: bool,
    /// Staged tiles are read from memory one step before they are needed.
    pub ahead: bool,
    /// Arrays that matrices are loaded from are made of vectors, so that single invocations read and
    /// write 16 bytes at a time. Metal's matrices want arrays of numbers.
    pub vector_items: bool,
    /// Channels, padded to whole matrices.
    pub channels: u32,
}

impl MatrixTile {
    /// Queries of a workgroup.
    pub const fn rows(&self) -> u32 {
        self.subgroups * self.row_mats * self.side
    }

    /// Invocations of a workgroup.
    pub const fn invocations(&self) -> u32 {
        self.subgroups * self.lanes
    }

    /// Invocations that share a row.
    const fn split(&self) -> u32 {
        self.invocations().div_ceil(self.rows())
    }

    /// Numbers from one row of S to the next: 16 bytes more than a tile, so that neighbours fall into
    /// different banks.
    const fn s_stride(&self) -> u32 {
        self.key_tile + 4
    }

    /// The same for P, in f16.
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
        let row = 4 * self.s_stride() + 2 * self.p_stride() + 4 * self.split();
        let tiles = self.rows() * row;
        let staged = if self.staged {
            2 * self.key_tile * 2 * (self.channels + 8)
        } else {
            0
        };
        let key_scales = if k_uniform { 0 } else { 4 * self.key_tile };
        (tiles + staged + key_scales + 4).next_multiple_of(16)
    }

    /// Items of a tile of K or V.
    const fn stage_items(&self) -> u32 {
        let numbers = self.key_tile * self.channels;
        if self.vector_items {
            numbers / 4
        } else {
            numbers
        }
    }

    /// How far, in log2 units, a row's scores may pass the maximum in use.
    pub const fn stale(&self) -> u8 {
        STALE
    }

    /// The end of the variant's name.
    pub(super) fn name(&self) -> String {
        let q = if self.q_resident { "q" } else { "" };
        let staged = match (self.staged, self.ahead) {
            (false, _) => "",
            (true, false) => "s",
            (true, true) => "sa",
        };
        let items = if self.vector_items { "" } else { "_scalar" };
        format!(
            "_mat{}x{}w{}k{}n{}{q}{staged}_lanes{}{items}",
            self.side, self.row_mats, self.subgroups, self.key_tile, self.key_step, self.lanes
        )
    }

    pub(super) fn compose(&self, v: &AttendVariant, native: Native) -> Kernel {
        let extensions = ["f16", "wgpu_cooperative_matrix"];
        let name = v.name();
        let matrix = |ty, role| format!("coop_mat{0}x{0}<{ty}, {role}>", self.side);
        let (half, single) = match self.vector_items {
            true => ("vec4<f16>", "vec4<f32>"),
            false => ("f16", "f32"),
        };
        let prelude = v
            .constants(Prelude::enabling(&name, &extensions))
            .alias("Half", half)
            .alias("Single", single)
            .alias("Factor", &matrix("f16", "A"))
            .alias("Other", &matrix("f16", "B"))
            .alias("Sums", &matrix("f32", "C"))
            .number("SIDE", self.side)
            .number("LANES", self.lanes)
            .number("SUBGROUPS", self.subgroups)
            .flag("MANY_SUBGROUPS", self.subgroups > 1)
            .number("ROW_MATS", self.row_mats)
            .number("SPLIT", self.split())
            .number("LANE_ROWS", self.rows().div_ceil(self.invocations()))
            .number("PART_QUADS", self.key_tile / 4 / self.split())
            .flag("AHEAD", self.ahead)
            .flag("ROLLED", v.causal && self.channels > 64)
            .number("KEY_TILE", self.key_tile)
            .number("KEY_MATS", self.key_tile / self.side)
            .number("KEY_STEP", self.key_step)
            .number("KEY_GROUPS", self.key_tile / self.side / self.key_step)
            .number("TILE_QUADS", self.key_tile / 4)
            .number("CHANNELS", self.channels)
            .number("QK_MATS", self.channels / self.side)
            .flag("STAGED", self.staged)
            .number("STAGE", self.stage_items().div_ceil(self.invocations()))
            .flag(
                "STAGE_WHOLE",
                self.stage_items().is_multiple_of(self.invocations()),
            )
            .flag(
                "STAGE_EVEN",
                self.invocations()
                    .is_multiple_of(self.stage_items() / self.key_tile),
            )
            .number("CHUNKS", self.channels / self.chunk())
            .number("CHUNK_MATS", self.chunk() / self.side)
            .number("S_STRIDE", self.s_stride())
            .number("P_STRIDE", self.p_stride())
            .number("TWO", 2)
            .flag("VECTOR_ITEMS", self.vector_items)
            .flag("Q_RESIDENT", self.q_resident)
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
            key_tile: 64,
            key_step: 4,
            q_resident: true,
            staged: false,
            ahead: false,
            vector_items: true,
            channels,
        };
        let tiles = [
            big,
            Self {
                subgroups: 4,
                key_tile: 32,
                key_step: 1,
                q_resident: false,
                staged: true,
                ahead: true,
                ..big
            },
            Self {
                subgroups: 8,
                row_mats: 1,
                key_tile: 32,
                key_step: 2,
                staged: true,
                ..big
            },
            Self {
                side: 8,
                lanes: 8,
                key_tile: 16,
                key_step: 2,
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
