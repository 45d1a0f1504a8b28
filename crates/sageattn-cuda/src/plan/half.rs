//! Which tiles, for the one kernel of recipe `half`.

use sageattn_core::{DType, Outputs, Problem};

use super::{MAX_GRID, OCTET, diagonal, small, width};
use crate::attend_half;
use crate::variant::{Half, HalfTile, Variant, WIDTHS};

/// The kernel for one problem and the numbers that its launch follows from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct HalfChoice {
    pub(crate) variant: Half,
    pub(crate) batch: u32,
    pub(crate) q_heads: u32,
    pub(crate) kv_heads: u32,
    pub(crate) q_len: u32,
    pub(crate) kv_len: u32,
    pub(crate) head_dim: u32,
    /// Blocks of query rows in one head.
    pub(crate) row_blocks: u32,
    /// What blocks of threads take in turn: a block of rows, or with a causal mask two of them.
    pub(crate) items: u32,
    pub(crate) multiprocessors: u32,
    pub(crate) softmax_scale: f32,
    /// Row r sees key n when n <= r + diagonal.
    pub(crate) diagonal: i64,
}

/// Chooses the tiles, or says what is missing. Pure: tests run it without a GPU.
pub(crate) fn choose(problem: &Problem, multiprocessors: u32) -> Result<HalfChoice, Vec<String>> {
    let shape = problem.shape();
    let mut missing = Vec::new();
    if problem.dtype() == DType::F32 {
        missing.push("f32 tensors without quantization: the tensor cores take 16 bits".to_owned());
    }
    let (causal, diagonal) = diagonal(problem, &mut missing);
    let width = width(shape.head_dim);
    let variant = Half {
        width,
        dtype: problem.dtype(),
        causal,
        lse: problem.outputs() == Outputs::OAndLse,
        cut: !small(shape.head_dim).is_multiple_of(OCTET),
        tile: tile(width, causal, small(shape.kv_len)),
    };
    let row_blocks = small(shape.q_len).div_ceil(attend_half::rows(&variant));
    let heads = small(shape.batch * shape.q_heads);
    let blocks = u64::from(heads) * u64::from(row_blocks);
    if blocks > MAX_GRID {
        missing.push(format!(
            "{blocks} blocks of queries: the kernel counts to {MAX_GRID}"
        ));
    }
    if !missing.is_empty() {
        return Err(missing);
    }
    Ok(HalfChoice {
        variant,
        batch: small(shape.batch),
        q_heads: small(shape.q_heads),
        kv_heads: small(shape.kv_heads),
        q_len: small(shape.q_len),
        kv_len: small(shape.kv_len),
        head_dim: small(shape.head_dim),
        row_blocks,
        items: heads
            * match causal {
                // Two blocks of rows that see a whole row's keys together.
                true => row_blocks.div_ceil(2),
                false => row_blocks,
            },
        multiprocessors,
        softmax_scale: problem.softmax_scale(),
        diagonal,
    })
}

/// How a block is cut. It has the multiprocessor's 64 Ki registers and 227 KiB of shared memory to
/// itself. Two warpgroups of 240 registers hold S, P and O, and below 256 channels Q as well, so that one
/// slot suffices for Q to come ahead; stages take what is left.
fn tile(width: u32, causal: bool, kv_len: u32) -> HalfTile {
    match width {
        64 if !causal && fits_wide_tiles(kv_len) => WIDE_TILE,
        64 => HalfTile {
            consumers: 2,
            keys: 128,
            q_slots: 1,
            k_stages: 5,
            v_stages: 5,
            turns: false,
        },
        128 => HalfTile {
            consumers: 2,
            keys: 128,
            q_slots: 1,
            k_stages: 3,
            v_stages: 3,
            // 6 % of a call under a causal mask; within 4 % either way without.
            turns: causal,
        },
        // O alone takes 128 registers a thread, Q 64 KiB. 80 keys are what the registers still hold, and
        // two stages of each what shared memory does.
        _ => HalfTile {
            consumers: 2,
            keys: 80,
            q_slots: 1,
            k_stages: 2,
            v_stages: 2,
            turns: false,
        },
    }
}

/// 64 channels leave registers for scores of 192 keys: a third of the waits less.
const WIDE_TILE: HalfTile = HalfTile {
    consumers: 2,
    keys: 192,
    q_slots: 1,
    k_stages: 4,
    v_stages: 4,
    turns: false,
};

/// Whether tiles of 192 keys do not add more than a sixteenth of empty keys to those of 128. Under a causal
/// mask a row's last tile is wide as well, and they lose.
fn fits_wide_tiles(kv_len: u32) -> bool {
    let padded = |keys| u64::from(kv_len.div_ceil(keys)) * u64::from(keys);
    16 * padded(WIDE_TILE.keys) <= 17 * padded(128)
}

/// Every kernel that a plan of recipe `half` can choose.
pub(crate) fn variants() -> impl Iterator<Item = Variant> {
    let flags = |n: u32| [n & 1 == 1, n & 2 == 2, n & 4 == 4];
    WIDTHS.into_iter().flat_map(move |width| {
        let dtypes = [DType::F16, DType::BF16].into_iter();
        dtypes.flat_map(move |dtype| {
            (0..8).flat_map(move |n| {
                let [causal, lse, cut] = flags(n);
                // One key and 192: every tile that a number of keys leads to.
                let tiles = [tile(width, causal, 1), tile(width, causal, WIDE_TILE.keys)];
                let distinct = if tiles[0] == tiles[1] { 1 } else { 2 };
                tiles.into_iter().take(distinct).map(move |tile| {
                    Variant::Half(Half {
                        width,
                        dtype,
                        causal,
                        lse,
                        cut,
                        tile,
                    })
                })
            })
        })
    })
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use sageattn_core::{Align, Mask, Shape};

    use super::*;

    fn shape(q_len: usize, head_dim: usize) -> Shape {
        Shape {
            batch: 2,
            q_heads: 8,
            kv_heads: 2,
            q_len,
            kv_len: 500,
            head_dim,
        }
    }

    #[test]
    fn sizes_follow_from_the_problem() {
        let problem = Problem::new(shape(1000, 100), DType::BF16).unwrap();
        let choice = choose(&problem, 132).unwrap();
        assert_eq!((choice.variant.width, choice.head_dim), (128, 100));
        assert!(choice.variant.cut, "100 is 12.5 octets");
        // 1000 rows in blocks of 128, for 16 heads.
        assert_eq!((choice.row_blocks, choice.items), (8, 128));
        let name = Variant::Half(choice.variant).name();
        assert_eq!(name, "attn_half_sm90_d128_bf16_cut_c2n128s133");
    }

    #[test]
    fn causal_items_are_pairs_of_blocks() {
        let causal = Mask::Causal(Align::BottomRight);
        for (q_len, row_blocks, items) in [(1, 1, 16), (256, 2, 16), (257, 3, 32), (1000, 8, 64)] {
            let problem = Problem::new(shape(q_len, 64), DType::F16).unwrap();
            let choice = choose(&problem.with_mask(causal), 132).unwrap();
            assert_eq!((choice.row_blocks, choice.items), (row_blocks, items));
            assert_eq!(choice.diagonal, 500 - q_len as i64);
        }
    }

    #[test]
    fn wide_tiles_where_they_fit_the_keys() {
        let keys = |kv_len, head_dim, mask| {
            let shape = Shape {
                kv_len,
                ..shape(1000, head_dim)
            };
            let problem = Problem::new(shape, DType::F16).unwrap().with_mask(mask);
            choose(&problem, 132).unwrap().variant.tile.keys
        };
        let of = |kv_len| keys(kv_len, 64, Mask::None);
        assert_eq!(
            [197, 512, 1024, 1105, 2048, 4096].map(of),
            [128, 128, 128, 192, 192, 192]
        );
        assert_eq!(of(1 << 28), 192, "no product overflows");
        assert_eq!(keys(1105, 64, Mask::Causal(Align::TopLeft)), 128);
        assert_eq!(keys(1105, 128, Mask::None), 128);
    }

    #[test]
    fn a_refusal_lists_everything() {
        let long = Shape {
            q_len: 1 << 30,
            batch: 1 << 20,
            ..Shape::mha(1, 1, 1, 64)
        };
        let missing = choose(&Problem::new(long, DType::F32).unwrap(), 132).unwrap_err();
        assert_eq!(missing.len(), 2, "{missing:?}");
        assert!(missing[0].contains("f32"), "{missing:?}");
        assert!(missing[1].contains("queries"), "{missing:?}");
    }

    #[test]
    fn every_choice_is_among_the_variants_that_tests_compile() {
        let known: HashSet<Variant> = variants().collect();
        assert_eq!(known.len(), variants().count());
        let mut met = HashSet::new();
        for head_dim in [1, 8, 63, 64, 65, 72, 128, 129, 200, 256] {
            for dtype in [DType::F16, DType::BF16] {
                for mask in [Mask::None, Mask::Causal(Align::TopLeft)] {
                    for (outputs, kv_len) in [Outputs::O, Outputs::OAndLse]
                        .into_iter()
                        .flat_map(|outputs| [500, 1105].map(|kv_len| (outputs, kv_len)))
                    {
                        let shape = Shape {
                            kv_len,
                            ..shape(300, head_dim)
                        };
                        let problem = Problem::new(shape, dtype).unwrap();
                        let problem = problem.with_mask(mask).with_outputs(outputs);
                        met.insert(Variant::Half(choose(&problem, 132).unwrap().variant));
                    }
                }
            }
        }
        assert_eq!(met, known);
    }
}
