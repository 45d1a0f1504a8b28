//! The tier of packed dot products: its tile for a device and a problem.

use sageattn_shaders::{AttendKernel, DotTile, Pv};

use crate::merge::{FEW_QUERIES, longest};
use crate::tier::{Facts, Request};

/// The kernel for a request.
///
/// # Errors
/// What the device lacks.
pub(crate) fn kernel(facts: &Facts, request: &Request) -> Result<AttendKernel, Vec<String>> {
    let (limits, head_dim, pv) = (&facts.limits, request.head_dim, request.pv);
    let tile = match request.q_len <= FEW_QUERIES {
        true => tile(limits, request.packed_rows(), head_dim, pv).map(|tile| DotTile {
            split: split(request, &tile),
            ..tile
        }),
        false => None,
    };
    let whole = || self::tile(limits, request.q_len, head_dim, pv);
    let tile = tile.filter(|tile| tile.split > 0).or_else(whole);
    tile.map(AttendKernel::Dot).ok_or_else(|| {
        let has = facts.limits.max_compute_workgroup_storage_size;
        vec![format!("more workgroup memory than its {has} bytes")]
    })
}

/// The largest tile that a device's limits hold, or `None` when none does.
///
/// In order of weight:
/// - 64 rows: K and V are read once per 64 queries, and 256 invocations hide latency. Fewer rows where
///   there are fewer queries, or too little workgroup memory (16 KiB holds 32).
/// - All channels of Q and K staged at once up to 128: then Q stays in workgroup memory.
/// - Two groups of V's channels at once: they share the reads of P.
fn tile(limits: &wgpu::Limits, q_len: usize, head_dim: u32, pv: Pv) -> Option<DotTile> {
    const ROWS: [u32; 3] = [64, 32, 16];
    const STAGED: [&[(u32, u32)]; 2] = [&[(128, 2), (128, 1), (64, 1)], &[(32, 1)]];
    let fits = |tile: &DotTile| {
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
                .map(move |&(chunk, groups)| DotTile::new(head_dim, rows, chunk, groups))
        })
        .find(fits)
    })
}

/// Keys of a range, where few queries leave most of a device idle unless the keys are shared out; zero
/// where one range would take them all.
fn split(request: &Request, tile: &DotTile) -> u32 {
    let tiles = request.packed_rows().div_ceil(tile.rows as usize);
    let per_range = request.pairs / request.heads_per_kv * tiles;
    let longest = longest(
        &[1024, 512, 256],
        |keys: u32| keys as usize,
        request.kv_len,
        per_range,
    );
    longest
        .filter(|&keys| (keys as usize) < request.kv_len)
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use sageattn_shaders::RowGroups;

    #[test]
    fn keys_are_shared_out_where_queries_are_few_and_keys_many() {
        let split = |q_len, kv_len, kv_heads: usize| {
            let request = Request {
                q_len,
                kv_len,
                heads_per_kv: 4,
                pairs: 4 * kv_heads,
                q_groups: RowGroups::BLOCK_128,
                k_groups: RowGroups::BLOCK_64,
                head_dim: 128,
                pv: Pv::F16,
            };
            let kernel = kernel(&crate::tier::tests::plain(), &request).unwrap();
            let AttendKernel::Dot(tile) = kernel else {
                panic!("{kernel:?}")
            };
            (tile.rows, tile.split)
        };
        assert_eq!(split(1, 16384, 8), (16, 512));
        assert_eq!(split(1, 15000, 8), (16, 256));
        assert_eq!(split(1, 16384, 64), (16, 1024));
        assert_eq!(split(16, 16384, 8), (32, 1024), "two tiles of packed heads");
        assert_eq!(split(1, 256, 8), (16, 0));
        assert_eq!(split(17, 16384, 8).1, 0);
    }

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
}
