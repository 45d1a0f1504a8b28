//! The tier of WGSL's cooperative matrices: what it needs of a device, and its tile.

use sageattn_shaders::{AttendKernel, MatrixTile, Pv};
use wgpu::{CooperativeScalarType as Scalar, Features};

use crate::tier::{Facts, Request};

/// What the kernels are written in.
const FEATURES: [(Features, &str); 2] = [
    (Features::SHADER_F16, "SHADER_F16"),
    (
        Features::EXPERIMENTAL_COOPERATIVE_MATRIX,
        "EXPERIMENTAL_COOPERATIVE_MATRIX",
    ),
];

/// What the device lacks, whatever the request.
pub(crate) fn lacks(facts: &Facts) -> Vec<String> {
    let missing = FEATURES
        .iter()
        .filter(|(feature, _)| !facts.features.contains(*feature));
    let mut lacks: Vec<_> = missing
        .map(|(_, name)| format!("the feature {name}"))
        .collect();
    if side(facts).is_none() {
        lacks.push("matrices of 16x16 or 8x8 f16 with f32 sums".to_owned());
    }
    let [least, most] = facts.subgroup;
    if least != most || !least.is_power_of_two() {
        lacks.push(format!(
            "subgroups of one size (it has {least} to {most} invocations)"
        ));
    }
    lacks
}

/// The kernel for a request, on a device that [`lacks`] nothing.
///
/// # Errors
/// What of the request is not for this tier.
pub(crate) fn kernel(facts: &Facts, request: &Request) -> Result<AttendKernel, Vec<String>> {
    if request.pv != Pv::F16 {
        return Err(vec!["P V in f16 (the recipe has INT8)".to_owned()]);
    }
    let Some(side) = side(facts) else {
        return Err(lacks(facts));
    };
    let limits = &facts.limits;
    let fits = |tile: &MatrixTile| {
        let groups = request.k_groups;
        let k_uniform = groups.slots == 1 && groups.block.is_multiple_of(tile.key_tile);
        tile.workgroup_bytes(k_uniform) <= limits.max_compute_workgroup_storage_size
            && tile.invocations() <= limits.max_compute_invocations_per_workgroup
            && tile.invocations() <= limits.max_compute_workgroup_size_x
    };
    let shapes = shapes(side, request.head_dim).iter();
    let mut tiles = shapes.map(|shape| tile(side, facts, request.head_dim, *shape));
    tiles.find(fits).map(AttendKernel::Matrix).ok_or_else(|| {
        let has = limits.max_compute_workgroup_storage_size;
        vec![format!("more workgroup memory than its {has} bytes")]
    })
}

/// Subgroups, matrices of queries of each, keys of a step, and whether two tiles of K and V: the fastest
/// first, as measured on an H100 (docs/kernels/attend_matrix_wgsl.md), then what takes less workgroup
/// memory.
type TileShape = (u32, u32, u32, bool);

fn shapes(side: u32, head_dim: u32) -> &'static [TileShape] {
    match (side, head_dim) {
        // 22.5 KiB: two workgroups share the 48 KiB that an H100 gives a multiprocessor.
        (16, ..=64) => &[(4, 2, 16, false), (1, 2, 16, false), (1, 1, 16, false)],
        (16, 65..=128) => &[(8, 1, 16, true), (4, 1, 16, false), (1, 1, 16, false)],
        (16, _) => &[(6, 1, 16, true), (4, 1, 16, false), (1, 1, 16, false)],
        _ => &[
            (4, 2, 16, false),
            (2, 2, 16, false),
            (1, 2, 16, false),
            (1, 2, 8, false),
        ],
    }
}

/// Rows of the largest square matrices of f16 with f32 sums.
fn side(facts: &Facts) -> Option<u32> {
    [16, 8].into_iter().find(|&side| {
        facts.matrices.iter().any(|shape| {
            [shape.m_size, shape.n_size, shape.k_size] == [side; 3]
                && (shape.ab_type, shape.cr_type) == (Scalar::F16, Scalar::F32)
        })
    })
}

fn tile(side: u32, facts: &Facts, head_dim: u32, shape: TileShape) -> MatrixTile {
    let (subgroups, row_mats, key_tile, double) = shape;
    let channels = head_dim.next_multiple_of(16);
    // One chain of sums waits for itself where a step has few of them. Beyond 128 channels two were slower.
    let two = (65..=128).contains(&head_dim) && (channels / side).is_multiple_of(2);
    MatrixTile {
        side,
        lanes: facts.subgroup[0],
        subgroups,
        row_mats,
        key_tile,
        double,
        subgroup_order: facts.features.contains(Features::SUBGROUP_BARRIER),
        vector_items: facts.vector_items,
        chains: if two { 2 } else { 1 },
        channels,
    }
}

#[cfg(test)]
mod tests {
    use sageattn_shaders::RowGroups;

    use super::*;
    use crate::tier::tests::{long, plain};
    use crate::tier::{Tier, choose};

    fn shape(side: u32, ab_type: Scalar, cr_type: Scalar) -> wgpu::CooperativeMatrixProperties {
        wgpu::CooperativeMatrixProperties {
            m_size: side,
            n_size: side,
            k_size: side,
            ab_type,
            cr_type,
            saturating_accumulation: false,
        }
    }

    /// A device with everything, as an H100 reports itself.
    pub(crate) fn hopper() -> Facts {
        Facts {
            limits: wgpu::Limits {
                max_compute_workgroup_storage_size: 49152,
                ..wgpu::Limits::default()
            },
            features: Features::SHADER_F16 | Features::EXPERIMENTAL_COOPERATIVE_MATRIX,
            matrices: vec![
                shape(16, Scalar::F16, Scalar::F16),
                shape(16, Scalar::F16, Scalar::F32),
            ],
            ..plain()
        }
    }

    #[test]
    fn every_missing_piece_is_named() {
        assert_eq!(lacks(&hopper()), [""; 0]);
        let mut facts = plain();
        facts.subgroup = [8, 32];
        let lacks = lacks(&facts).join("; ");
        for piece in ["SHADER_F16", "COOPERATIVE_MATRIX", "16x16", "8 to 32"] {
            assert!(lacks.contains(piece), "{lacks}");
        }
    }

    #[test]
    fn matrices_are_preferred_for_f16_values_and_never_taken_for_int8() {
        let facts = hopper();
        for head_dim in 1..=256 {
            let kernel = choose(&facts, &long(head_dim, Pv::F16), Tier::ALL).unwrap();
            let AttendKernel::Matrix(tile) = kernel else {
                panic!("{kernel:?}");
            };
            assert_eq!(tile.side, 16);
            assert!(tile.channels >= head_dim && tile.channels < head_dim + 16);
            assert!(tile.workgroup_bytes(true) <= 49152);
            // Scales of single keys take room as well: perhaps another tile's.
            let request = Request {
                k_groups: RowGroups::TOKEN,
                ..long(head_dim, Pv::F16)
            };
            let AttendKernel::Matrix(token) = choose(&facts, &request, Tier::ALL).unwrap() else {
                panic!("{request:?}");
            };
            assert!(token.workgroup_bytes(false) <= 49152);
            // A subgroup's rows end where the padding of Q does, and invocations share rows evenly.
            assert_eq!(
                crate::memory::ROW_PADDING % (tile.row_mats * tile.side) as usize,
                0
            );
            let (most, least) = (
                tile.rows().max(tile.invocations()),
                tile.rows().min(tile.invocations()),
            );
            assert!(most.is_multiple_of(least));
        }
        let kernel = choose(&facts, &long(128, Pv::I8), Tier::ALL).unwrap();
        assert!(matches!(kernel, AttendKernel::Dot(_)), "{kernel:?}");
    }

    #[test]
    fn small_matrices_serve_where_there_are_no_others() {
        let facts = Facts {
            matrices: vec![shape(8, Scalar::F16, Scalar::F32)],
            subgroup: [8, 8],
            ..hopper()
        };
        let kernel = choose(&facts, &long(64, Pv::F16), Tier::ALL).unwrap();
        let AttendKernel::Matrix(tile) = kernel else {
            panic!("{kernel:?}");
        };
        assert_eq!((tile.side, tile.rows(), tile.invocations()), (8, 64, 32));
    }
}
