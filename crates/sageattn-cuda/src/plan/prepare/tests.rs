use sageattn_kernels::abi::TILE_KEYS;

use super::*;
use crate::variant::PvCodes;

const H100: Machine = Machine {
    multiprocessors: 132,
    overlap: true,
    largest_cluster: 16,
    row_maximum: None,
};

/// Blocks of a cluster, tiles of each, and blocks on a multiprocessor, where K and V are read once.
fn cluster(
    dtype: DType,
    heads: u32,
    keys: u32,
    width: u32,
    machine: Machine,
) -> Option<(u32, u32, u32)> {
    let prepare = Prepare {
        width,
        dtype,
        smooth: true,
        cut: false,
        pv: PvCodes::E4m3,
    };
    let tiles = keys.div_ceil(TILE_KEYS);
    let (preparation, pieces, each) = preparation(prepare, heads, tiles, machine);
    assert!(pieces * each >= tiles, "every tile has a block");
    match preparation {
        Preparation::Once { variant, .. } => Some((pieces, each, variant.blocks)),
        Preparation::Twice(_) => None,
    }
}

#[test]
fn clusters_grow_with_the_keys() {
    for (dtype, width, keys, want) in [
        (DType::F16, 64, 197, Some((2, 1, 3))),
        (DType::F16, 64, 512, Some((2, 2, 3))),
        (DType::F16, 64, 1024, Some((2, 4, 3))),
        (DType::F16, 64, 8192, Some((16, 4, 3))),
        (DType::F16, 64, 8193, Some((16, 5, 2))),
        (DType::F16, 64, 65536, Some((16, 32, 2))),
        (DType::F16, 64, 65537, None),
        (DType::F16, 128, 128, Some((1, 1, 2))),
        (DType::F16, 128, 512, Some((2, 2, 2))),
        (DType::F16, 128, 1536, Some((4, 3, 2))),
        (DType::F16, 128, 4096, Some((16, 2, 2))),
        (DType::F16, 128, 6144, Some((16, 3, 2))),
        (DType::F16, 128, 6145, Some((16, 4, 1))),
        (DType::F16, 128, 65536, Some((16, 32, 1))),
        (DType::F16, 128, 65537, None),
        (DType::BF16, 256, 256, Some((1, 2, 1))),
        (DType::F16, 256, 4096, Some((16, 2, 1))),
        (DType::F16, 256, 32768, Some((16, 16, 1))),
        (DType::F16, 256, 32769, None),
        (DType::F32, 64, 1024, Some((2, 4, 1))),
        (DType::F32, 128, 1024, Some((4, 2, 1))),
        (DType::F32, 256, 128, None),
    ] {
        let got = cluster(dtype, 128, keys, width, H100);
        assert_eq!(got, want, "{keys} x {width} {dtype}");
    }
}

#[test]
fn two_launches_where_clusters_would_not_do() {
    let of = |heads, keys, machine| cluster(DType::F16, heads, keys, 128, machine);
    assert_eq!(of(8, 300, H100), None, "64 blocks on 132 multiprocessors");
    assert_eq!(of(9, 300, H100), Some((4, 1, 2)), "72 blocks");
    assert_eq!(of(2, 8192, H100), None);
    assert_eq!(of(3, 8192, H100), Some((16, 4, 1)));
    // A part of a GPU.
    let smaller = |largest_cluster| Machine {
        largest_cluster,
        ..H100
    };
    assert_eq!(of(128, 1024, smaller(4)), Some((4, 2, 2)));
    assert_eq!(of(128, 2048, smaller(4)), Some((4, 4, 1)));
    assert_eq!(of(128, 16384, smaller(4)), Some((4, 32, 1)));
    assert_eq!(of(128, 16385, smaller(4)), None);
    assert_eq!(of(128, 512, smaller(1)), Some((1, 4, 1)));
    assert_eq!(of(128, 512, smaller(0)), None);
}

#[test]
fn pieces_cover_every_tile_once() {
    for heads in [1, 3, 8, 32, 128, 5000] {
        for tiles in (1..70).chain([512, 1000, 8192]) {
            let (count, each) = pieces(heads, tiles, 132);
            assert!((1..=MAX_PIECES).contains(&count));
            assert!(count * each >= tiles && (count - 1) * each < tiles);
        }
    }
    assert_eq!(
        pieces(1, 512, 132),
        (32, 16),
        "one head is cut as fine as it may be"
    );
    assert_eq!(pieces(128, 32, 132), (8, 4), "many heads are not");
}
