use std::collections::HashSet;
use std::num::NonZeroU32;

use sageattn_core::Shape;

use super::*;

const H100: Machine = Machine {
    multiprocessors: 132,
    overlap: true,
    lazy_maximum: false,
};

fn shape() -> Shape {
    Shape {
        batch: 2,
        q_heads: 8,
        kv_heads: 2,
        q_len: 1000,
        kv_len: 500,
        head_dim: 100,
    }
}

fn chosen(problem: &Problem, recipe: &Recipe) -> Choice {
    choose(problem, recipe, H100).unwrap()
}

#[test]
fn sizes_follow_from_the_problem() {
    let problem = Problem::new(shape(), DType::BF16).unwrap();
    let choice = chosen(&problem, &Recipe::SAGE2_I8_F8);
    assert_eq!((choice.attend.width, choice.head_dim), (128, 100));
    assert!(
        choice.attend.cut && choice.prepare.cut,
        "100 is 12.5 octets"
    );
    assert_eq!((choice.tiles, choice.samples), (4, 500));
    // 1000 rows in blocks of 192, for 16 heads.
    assert_eq!((choice.row_blocks, choice.works), (6, 96));
    let name = Variant::Attend(choice.attend).name();
    assert_eq!(name, "attn_i8_f8_sm90_d128_bf16_cut_max_c3s5");
}

#[test]
fn the_diagonal_is_where_the_mask_says() {
    let problem = Problem::new(shape(), DType::F16).unwrap();
    for (mask, causal, diagonal) in [
        (Mask::None, false, 0),
        (Mask::Causal(Align::TopLeft), true, 0),
        (Mask::Causal(Align::BottomRight), true, -500),
    ] {
        let choice = chosen(&problem.with_mask(mask), &Recipe::SAGE2_I8_F8);
        assert_eq!((choice.attend.causal, choice.diagonal), (causal, diagonal));
        for row in [0, 499, 500, 999] {
            let visible = mask.visible_keys(row, 1000, 500) as i64;
            let by_kernel = match causal {
                false => 500,
                true => (row as i64 + choice.diagonal + 1).clamp(0, 500),
            };
            assert_eq!(visible, by_kernel, "{mask:?}, row {row}");
        }
    }
}

#[test]
fn smoothing_decides_what_is_averaged() {
    let problem = Problem::new(shape(), DType::F16).unwrap();
    let sampled = |n| Smooth::Sampled(NonZeroU32::new(n).unwrap());
    for (smooth, subtracted, samples) in [
        (Smooth::Off, false, 500),
        (Smooth::Mean, true, 500),
        (sampled(64), true, 64),
        (sampled(501), true, 500),
    ] {
        let choice = chosen(&problem, &Recipe::SAGE2_I8_F8.with_smooth(smooth));
        assert_eq!(
            (choice.prepare.smooth, choice.samples),
            (subtracted, samples)
        );
    }
}

#[test]
fn a_refusal_lists_everything() {
    let long = Shape {
        q_len: 1 << 30,
        batch: 1 << 20,
        ..Shape::mha(1, 1, 1, 64)
    };
    let problem = Problem::new(long, DType::F16).unwrap();
    let missing = choose(&problem, &Recipe::SAGE1_B, H100).unwrap_err();
    assert_eq!(missing.len(), 2, "{missing:?}");
    assert!(missing[0].contains("sage1-b"), "{missing:?}");
    assert!(missing[1].contains("queries"), "{missing:?}");
}

#[test]
fn every_choice_is_among_the_variants_that_tests_compile() {
    let known: HashSet<Variant> = variants().into_iter().collect();
    assert_eq!(known.len(), variants().len());
    let mut met = HashSet::new();
    for head_dim in [1, 8, 63, 64, 65, 72, 128, 129, 200, 256] {
        for dtype in DType::ALL {
            for mask in [Mask::None, Mask::Causal(Align::TopLeft)] {
                for outputs in [Outputs::O, Outputs::OAndLse] {
                    for smooth in [Smooth::Off, Smooth::Mean] {
                        let problem = Problem::new(
                            Shape {
                                head_dim,
                                ..shape()
                            },
                            dtype,
                        );
                        let problem = problem.unwrap().with_mask(mask).with_outputs(outputs);
                        let recipe = Recipe::SAGE2_I8_F8.with_smooth(smooth);
                        for lazy_maximum in [false, true] {
                            let machine = Machine {
                                lazy_maximum,
                                ..H100
                            };
                            let choice = choose(&problem, &recipe, machine).unwrap();
                            met.extend([
                                Variant::Statistics(choice.prepare),
                                Variant::Encode(choice.prepare),
                                Variant::Attend(choice.attend),
                            ]);
                        }
                    }
                }
            }
        }
    }
    let quantized = |variant: &Variant| !matches!(variant, Variant::Half(_));
    assert_eq!(met, known.into_iter().filter(quantized).collect());
}

#[test]
fn blocks_fit_a_multiprocessor() {
    for variant in variants() {
        let shared = match &variant {
            Variant::Attend(attend) => attend_sm90::shared_bytes(attend),
            Variant::Half(half) => attend_half::shared_bytes(half),
            Variant::Statistics(_) | Variant::Encode(_) => 0,
        };
        assert!(shared <= 227 * 1024, "{}: {shared}", variant.name());
    }
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

#[test]
fn launches_stay_within_the_workspace() {
    let problem = Problem::new(shape(), DType::F16).unwrap();
    let choice = chosen(&problem, &Recipe::SAGE2_I8_F8);
    let (scratch, ranges) = choice.scratch();
    for pair in scratch.ranges().windows(2) {
        assert!(pair[0].offset + pair[0].bytes <= pair[1].offset, "{pair:?}");
    }
    let tensor = |address| Tensor {
        address,
        strides: [1, 2, 3],
    };
    let prepare = quantize::params(&choice, &ranges, 4096, tensor(16), tensor(32));
    let attend = attend_sm90::attend(&choice, &ranges, 4096, tensor(48), tensor(64), Some(80));
    assert_eq!((prepare.k, prepare.v), (16, 32));
    let of_attend = attend.params;
    assert_eq!((of_attend.q, of_attend.o, of_attend.lse), (48, 64, 80));
    assert_eq!(of_attend.k_codes, prepare.k_codes);
    assert_eq!(of_attend.v_codes, prepare.v_codes);
    assert_eq!(of_attend.k_scales, prepare.k_scales);
    assert_eq!(of_attend.v_scales, prepare.v_scales);
    assert_eq!(of_attend.k_mean, prepare.k_mean);
    assert_eq!(of_attend.next_work, prepare.next_work);
    // 4 (batch, KV head) pairs of 4 tiles of 128 x 128 codes.
    assert_eq!(prepare.k_codes - 4096, ranges.k_codes);
    assert!(ranges.k_codes + 4 * 4 * 128 * 128 <= scratch.bytes());

    let (statistics, encode) = (
        quantize::statistics(&choice, prepare),
        quantize::encode(&choice, prepare),
    );
    assert_eq!((statistics.grid, statistics.block), (4 * 4 * 2, 256));
    assert_eq!((encode.grid, encode.block), (4 * 4 * 2, 256));
    assert_eq!((attend.grid, attend.block), (96, 512));
    assert!(!statistics.overlaps_previous, "K and V may be fresh");
    assert!(encode.overlaps_previous && attend.overlaps_previous);
}
