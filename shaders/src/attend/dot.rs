//! The attention kernel on packed dot products: plain WGSL, for every device.

use super::{AttendKernel, AttendVariant};
use crate::{
    ABI, ATTEND, ATTENTION, DOT, DType, HALF, KEY_TILE, Kernel, Native, PV_F16, PV_I8, Prelude, Pv,
    RowGroups, STORE, decode_columns,
};

/// Its tile: how many queries a workgroup takes and how much of a head it stages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DotTile {
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
    /// Keys of a workgroup's range, a multiple of [`KEY_TILE`], where few queries share the keys out
    /// among workgroups; zero where a workgroup takes them all.
    pub split: u32,
}

impl DotTile {
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
            split: 0,
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

    /// Vectors of a tile of K that an invocation reads into registers while the tile before is at work;
    /// zero where they are more than registers are to spare, or K comes in chunks.
    const fn held_keys(&self) -> u32 {
        let vectors = KEY_TILE * (self.qk_chunk / 16);
        match self.qk_chunks {
            1 => Self::held(vectors.div_ceil(self.invocations())),
            _ => 0,
        }
    }

    /// The same of the first chunk of V, read while the softmax is at work.
    const fn held_values(&self, pv: Pv) -> u32 {
        let rows = match pv {
            Pv::F16 => 32,
            Pv::I8 => 16,
        };
        let vectors = rows * 16 * self.pv_chunk_groups;
        Self::held(vectors.div_ceil(self.invocations()))
    }

    const fn held(vectors: u32) -> u32 {
        if vectors <= 4 { vectors } else { 0 }
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

impl DotTile {
    /// The end of the variant's name.
    pub(super) fn name(&self) -> String {
        let tile = format!(
            "_rows{}c{}v{}",
            self.rows, self.qk_chunk, self.pv_chunk_groups
        );
        match self.split {
            0 => tile,
            keys => format!("{tile}_split{keys}"),
        }
    }

    pub(super) fn compose(&self, v: &AttendVariant, prelude: Prelude, native: Native) -> Kernel {
        let prelude = v
            .constants(prelude)
            .number("ROWS", self.rows)
            .number("QK_DIM", self.qk_dim())
            .number("QK_VECS", self.qk_chunk / 16)
            .number("QK_CHUNKS", self.qk_chunks)
            .number("QK_STRIDE", self.qk_stride())
            .flag("Q_RESIDENT", self.qk_chunks == 1)
            .number("PV_DIM", self.pv_dim())
            .number("CHUNK_GROUPS", self.pv_chunk_groups)
            .number("V_AT", self.v_at())
            .number("STAGED_VECS", self.staged_vecs(v.pv))
            .flag("ONE_KEY_SCALE", v.k_columns_uniform())
            .number("HELD_KEYS", self.held_keys())
            .number("HELD_VALUES", self.held_values(v.pv))
            .flag("SPLIT", self.split > 0)
            .number("SPLIT_KEYS", self.split.max(KEY_TILE))
            .number("COLUMNS_OF_8", decode_columns(v.head_dim))
            .flag("NATIVE_DOT", native.dot)
            .flag("NATIVE_PACK", native.pack);
        let pv = match v.pv {
            Pv::F16 => PV_F16,
            Pv::I8 => PV_I8,
        };
        prelude.compose(v.name(), &[ABI, HALF, STORE, ATTENTION, DOT, pv, ATTEND])
    }

    /// Variants that visit every value of every axis.
    pub(super) fn samples(dtype: DType, head_dim: u32) -> impl Iterator<Item = AttendVariant> {
        let tiles = [
            Self::new(head_dim, 64, 128, 2),
            Self::new(head_dim, 32, 64, 1),
            Self {
                split: 256,
                ..Self::new(head_dim, 16, 32, 1)
            },
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
            move |((pv, q_groups, k_groups), (causal, lse, lse_bias), tile)| AttendVariant {
                dtype,
                head_dim,
                pv,
                q_groups,
                k_groups,
                causal,
                lse,
                lse_bias,
                kernel: AttendKernel::Dot(tile),
            },
        )
    }
}
