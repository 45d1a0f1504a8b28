//! The attention kernel: its tile for a device and a problem, and its dispatches.

use sageattn_core::{Align, Error, Mask};
use sageattn_shaders::abi::AttendParams;
use sageattn_shaders::{AttendVariant, Pv, Tile, Variant};

use crate::memory::{Binder, Side, Slice, index, padded};
use crate::pipeline::{Step, cut};
use crate::plan::Kernels;

/// The largest tile that a device's limits hold, or `None` when none does.
///
/// In order of weight:
/// - 64 rows: K and V are read once per 64 queries, and 256 invocations hide latency. Fewer rows where
///   there are fewer queries, or too little workgroup memory (16 KiB holds 32).
/// - All channels of Q and K staged at once up to 128: then Q stays in workgroup memory.
/// - Two groups of V's channels at once: they share the reads of P.
pub(crate) fn tile(limits: &wgpu::Limits, q_len: usize, head_dim: u32, pv: Pv) -> Option<Tile> {
    const ROWS: [u32; 3] = [64, 32, 16];
    const STAGED: [&[(u32, u32)]; 2] = [&[(128, 2), (128, 1), (64, 1)], &[(32, 1)]];
    let fits = |tile: &Tile| {
        tile.workgroup_bytes(pv) <= limits.max_compute_workgroup_storage_size
            && tile.invocations() <= limits.max_compute_invocations_per_workgroup
            && tile.invocations() <= limits.max_compute_workgroup_size_x
    };
    let most_rows = q_len.next_multiple_of(16) as u64;
    STAGED.iter().find_map(|staged| {
        let rows = ROWS
            .into_iter()
            .filter(|&rows| rows == 16 || u64::from(rows) < most_rows + 16);
        rows.flat_map(|rows| {
            staged
                .iter()
                .map(move |&(chunk, groups)| Tile::new(head_dim, rows, chunk, groups))
        })
        .find(fits)
    })
}

impl Kernels {
    /// The attention kernel's variant.
    pub(crate) fn attend_variant(&self) -> Variant {
        Variant::Attend(AttendVariant {
            dtype: self.dtype,
            head_dim: self.head_dim,
            pv: self.pv,
            q_groups: self.q_groups,
            k_groups: self.k_groups,
            causal: self.causal,
            lse: self.lse,
            lse_bias: self.lse_bias,
            tile: self.tile,
        })
    }

    /// The attention kernel on one slice.
    pub(crate) fn attend<'a>(&self, binder: &Binder<'a>, slice: &Slice) -> Result<Step<'a>, Error> {
        let problem = binder.io.problem();
        let shape = problem.shape();
        let w = binder.workspace;
        let (q_pair, q_pairs) = slice.pairs(Side::Q);
        let kv_pair = slice.pairs(Side::Kv).0;
        let (q_codes, q_start) = binder.scratch(&w.q_codes, slice, Side::Q);
        let (k_codes, k_start) = binder.scratch(&w.k_codes, slice, Side::Kv);
        let (values, v_start) = binder.scratch(&w.values, slice, Side::Kv);
        let (out, out_view) = binder.tensor("out", binder.io.out(), slice, Side::Q)?;
        let (lse, lse_start) = binder.lse(slice)?;
        let tiles = shape.q_len.div_ceil(self.tile.rows as usize) as u64;
        let params = AttendParams {
            out: out_view,
            heads: index(slice.heads(Side::Q).1 as u64),
            heads_per_kv: index(shape.heads_per_kv() as u64),
            tiles: index(tiles),
            q_len: index(shape.q_len as u64),
            kv_len: index(shape.kv_len as u64),
            q_padded: index(padded(shape.q_len) as u64),
            kv_padded: index(padded(shape.kv_len) as u64),
            q_groups: index(w.q_scales.shape[2]),
            k_groups: index(w.k_scales.shape[2]),
            causal_shift: causal_shift(problem.mask(), shape.q_len, shape.kv_len),
            q_codes: index(q_start / 16),
            k_codes: index(k_start / 16),
            values: index(v_start / 16),
            q_scales: w.float_index(Some(&w.q_scales), q_pair),
            k_scales: w.float_index(Some(&w.k_scales), kv_pair),
            v_scales: w.float_index(w.v_scales.as_ref(), kv_pair),
            lse_bias: w.float_index(w.lse_bias.as_ref(), q_pair),
            lse: index(lse_start / 4),
            score_scale: problem.softmax_scale() * std::f32::consts::LOG2_E,
            ..AttendParams::default()
        };
        let rows = u64::from(self.tile.rows);
        let ops = 4 * rows * shape.kv_len as u64 * u64::from(self.head_dim);
        let context = binder.context;
        Ok(Step {
            stage: "attend",
            pipeline: context.pipelines.get(context, &self.attend_variant())?,
            bindings: vec![q_codes, k_codes, values, binder.floats(), out, lse],
            dispatches: cut(
                context,
                tiles,
                q_pairs as u64,
                ops,
                |first_tile, first_pair| {
                    let params = AttendParams {
                        first_tile,
                        first_pair,
                        ..params
                    };
                    bytemuck::bytes_of(&params).to_vec()
                },
            ),
        })
    }
}

/// How many keys query 0 sees beyond one.
fn causal_shift(mask: Mask, q_len: usize, kv_len: usize) -> i32 {
    match mask {
        Mask::Causal(Align::BottomRight) => {
            // Lengths are at most 2^30, so the difference fits.
            let shift = kv_len as i64 - q_len as i64;
            i32::try_from(shift).unwrap_or(0)
        }
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(bytes: u32) -> wgpu::Limits {
        wgpu::Limits {
            max_compute_workgroup_storage_size: bytes,
            ..wgpu::Limits::default()
        }
    }

    #[test]
    fn the_smallest_device_has_a_tile_for_every_problem() {
        for head_dim in 1..=256 {
            for q_len in [1, 16, 17, 33, 5000] {
                for pv in [Pv::F16, Pv::I8] {
                    let tile = tile(&limits(16384), q_len, head_dim, pv).unwrap();
                    assert!(tile.workgroup_bytes(pv) <= 16384);
                    assert!(tile.qk_dim() >= head_dim && tile.pv_dim() >= head_dim);
                    assert!(tile.qk_dim() < head_dim + 64 && tile.pv_dim() < head_dim + 128);
                    assert!(tile.pv_groups.is_multiple_of(tile.pv_chunk_groups));
                }
            }
        }
    }

    #[test]
    fn tiles_grow_with_workgroup_memory_and_shrink_with_q_len() {
        let rows = |bytes, q_len| tile(&limits(bytes), q_len, 128, Pv::F16).map(|t| t.rows);
        assert_eq!(rows(16384, 4096), Some(32));
        assert_eq!(rows(32768, 4096), Some(64));
        assert_eq!(rows(49152, 1), Some(16));
        assert_eq!(rows(49152, 20), Some(32));
        assert_eq!(rows(2048, 4096), None);
        let wide = tile(&limits(49152), 4096, 128, Pv::F16).unwrap();
        assert_eq!((wide.qk_chunks, wide.pv_chunk_groups), (1, 2));
    }

    #[test]
    fn bottom_right_shifts_by_the_difference_of_the_lengths() {
        assert_eq!(causal_shift(Mask::Causal(Align::BottomRight), 3, 10), 7);
        assert_eq!(causal_shift(Mask::Causal(Align::BottomRight), 10, 3), -7);
        assert_eq!(causal_shift(Mask::Causal(Align::TopLeft), 3, 10), 0);
    }
}
