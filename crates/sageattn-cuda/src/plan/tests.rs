use std::collections::HashSet;
use std::num::NonZeroU32;

use sageattn_core::Shape;
use sageattn_kernels::abi::{AttnParams, HalfParams, PrepareParams};

use super::*;
use crate::buffer::Tensor;
use crate::launch::Params;
use crate::{attend_half, attend_sm90, quantize};

const H100: Machine = Machine {
    multiprocessors: 132,
    overlap: true,
    largest_cluster: 16,
    row_maximum: None,
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
        choice.attend.cut && twice(&choice).cut,
        "100 is 12.5 octets"
    );
    assert_eq!((choice.tiles, choice.samples), (4, 500));
    // 1000 rows in blocks of 192, for 16 heads.
    assert_eq!((choice.row_blocks, choice.works), (6, 96));
    let name = Variant::Attend(choice.attend).name();
    assert_eq!(name, "attn_i8_f8_sm90_d128_bf16_cut_max_c3s4");
}

#[test]
fn long_works_of_some_heads_come_before_short_ones() {
    let together = |shape: Shape, mask| {
        let problem = Problem::new(shape, DType::F16).unwrap().with_mask(mask);
        chosen(&problem, &Recipe::SAGE2_I8_F8).heads_together
    };
    let causal = Mask::Causal(Align::TopLeft);
    let heads = |kv_len, head_dim| Shape::mha(4, 32, kv_len, head_dim);
    // Equal works need no order.
    assert_eq!(together(heads(1024, 128), Mask::None), 1);
    // At most half as many heads as multiprocessors: 128 in two groups.
    assert_eq!(together(heads(1024, 128), causal), 64);
    // 384 KiB a head, 42 of them in 16 MiB: four equal groups instead of 42, 42, 42 and 2.
    assert_eq!(together(heads(1536, 128), causal), 32);
    assert_eq!(together(heads(8192, 128), causal), 8);
    // Four query heads read the same keys.
    let shared = Shape {
        kv_heads: 8,
        ..heads(8192, 128)
    };
    assert_eq!(together(shared, causal), 32);
    // Longer than L2, and fewer heads than a group.
    assert_eq!(together(heads(1 << 20, 128), causal), 1);
    assert_eq!(together(Shape::mha(1, 3, 1024, 64), causal), 3);
}

/// The constants of the two kernels that prepare K and V.
fn twice(choice: &Choice) -> Prepare {
    match choice.prepare {
        Preparation::Twice(prepare) => prepare,
        Preparation::Once { .. } => panic!("read once: {choice:?}"),
    }
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
            (twice(&choice).smooth, choice.samples),
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
    for (head_dim, kv_len) in [1, 8, 63, 64, 65, 72, 128, 129, 200, 256]
        .into_iter()
        .flat_map(|head_dim| [(head_dim, 500), (head_dim, 9000)])
    {
        for dtype in DType::ALL {
            for mask in [Mask::None, Mask::Causal(Align::TopLeft)] {
                for outputs in [Outputs::O, Outputs::OAndLse] {
                    for smooth in [Smooth::Off, Smooth::Mean] {
                        let problem = Problem::new(
                            Shape {
                                head_dim,
                                kv_len,
                                batch: 50,
                                ..shape()
                            },
                            dtype,
                        );
                        let problem = problem.unwrap();
                        for (recipe, q_len, maximum, largest_cluster) in [
                            (Recipe::SAGE2_I8_F8, 1, RowMaximum::Running, 16),
                            (Recipe::SAGE2_I8_F8, 1, RowMaximum::Lazy, 0),
                            (Recipe::SAGE2_I8_F8, 9999, RowMaximum::Running, 0),
                            (Recipe::SAGE2_I8_F8, 9999, RowMaximum::Lazy, 16),
                            (Recipe::I8_I8_DYN, 1, RowMaximum::Lazy, 0),
                            (Recipe::I8_I8_DYN, 9999, RowMaximum::Lazy, 16),
                        ] {
                            let shape = Shape {
                                q_len,
                                ..*problem.shape()
                            };
                            let problem = Problem::new(shape, dtype).unwrap();
                            let problem = problem.with_mask(mask).with_outputs(outputs);
                            let machine = Machine {
                                row_maximum: Some(maximum),
                                largest_cluster,
                                ..H100
                            };
                            let recipe = recipe.with_smooth(smooth);
                            let choice = choose(&problem, &recipe, machine).unwrap();
                            met.insert(Variant::Attend(choice.attend));
                            met.extend(match choice.prepare {
                                Preparation::Twice(prepare) => {
                                    vec![
                                        Variant::Statistics(prepare.statistics()),
                                        Variant::Encode(prepare),
                                    ]
                                }
                                Preparation::Once { variant, .. } => {
                                    vec![Variant::PrepareOnce(variant)]
                                }
                            });
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
fn entry_points_take_what_they_are_given() {
    for variant in variants() {
        let entries = match variant {
            Variant::Statistics(_) | Variant::Encode(_) | Variant::PrepareOnce(_) => {
                PrepareParams::ENTRIES
            }
            Variant::Attend(_) => AttnParams::ENTRIES,
            Variant::Half(_) => HalfParams::ENTRIES,
        };
        assert!(entries.contains(&variant.entry()), "{}", variant.name());
    }
}

#[test]
fn integers_follow_their_maximum_whatever_the_caller_wants_for_e4m3() {
    let machine = Machine {
        row_maximum: Some(RowMaximum::Lazy),
        ..H100
    };
    let problem = Problem::new(shape(), DType::BF16).unwrap();
    let choice = choose(&problem, &Recipe::I8_I8_DYN, machine).unwrap();
    assert!(choice.attend.running_max);
    let name = Variant::Attend(choice.attend).name();
    assert_eq!(name, "attn_i8_i8_sm90_d128_bf16_cut_c3s4");
    let name = Variant::Encode(twice(&choice)).name();
    assert_eq!(name, "kv_encode_d128_bf16_smooth_cut_i8");
    // Nothing is added up that nothing reads.
    let (scratch, _) = choice.scratch();
    let names: Vec<&str> = scratch.ranges().iter().map(|range| range.name).collect();
    assert!(!names.contains(&"v_tile_residuals"), "{names:?}");
}

#[test]
fn few_keys_follow_their_maximum() {
    let of = |kv_len, row_maximum| {
        let shape = Shape { kv_len, ..shape() };
        let machine = Machine {
            row_maximum,
            ..H100
        };
        let problem = Problem::new(shape, DType::F16).unwrap();
        let choice = choose(&problem, &Recipe::SAGE2_I8_F8, machine).unwrap();
        choice.attend.running_max
    };
    assert!(of(1, None));
    assert!(of(1023, None));
    assert!(!of(1024, None));
    assert!(!of(1023, Some(RowMaximum::Lazy)));
    assert!(of(1024, Some(RowMaximum::Running)));
}

#[test]
fn blocks_fit_a_multiprocessor() {
    for variant in variants() {
        let shared = match &variant {
            Variant::Attend(attend) => attend_sm90::shared_bytes(attend),
            Variant::Half(half) => attend_half::shared_bytes(half),
            Variant::PrepareOnce(once) => quantize::once_shared_bytes(once),
            Variant::Statistics(_) | Variant::Encode(_) => 0,
        };
        assert!(shared <= 227 * 1024, "{}: {shared}", variant.name());
    }
}

#[test]
fn clusters_take_turns_where_blocks_are_alone_and_hold_their_share() {
    for (keys, width, turns) in [
        (4096, 64, false),
        (16384, 64, false),
        (4096, 128, false),
        (6144, 128, false),
        (8192, 128, true),
        (12288, 128, true),
        (12289, 128, false),
        (4096, 256, true),
        (8192, 256, false),
    ] {
        let shape = Shape::mha(4, 32, keys, width);
        let problem = Problem::new(shape, DType::F16).unwrap();
        let choice = chosen(&problem, &Recipe::SAGE2_I8_F8);
        assert!(
            matches!(choice.prepare, Preparation::Once { takes_turns, .. } if takes_turns == turns),
            "{keys} x {width}: {choice:?}"
        );
    }
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
    assert_eq!(of_attend.v_residuals, prepare.v_residuals);
    assert_eq!(of_attend.k_mean, prepare.k_mean);
    assert_eq!(of_attend.next_work, prepare.next_work);
    // 4 (batch, KV head) pairs of 4 tiles of 128 x 128 codes.
    assert_eq!(prepare.k_codes - 4096, ranges.k_codes);
    assert!(ranges.k_codes + 4 * 4 * 128 * 128 <= scratch.bytes());

    let (statistics, encode) = (
        quantize::statistics(&choice, prepare),
        quantize::encode(&choice, &twice(&choice), prepare),
    );
    assert_eq!((statistics.grid, statistics.block), (4 * 4 * 2, 256));
    assert_eq!((encode.grid, encode.block), (4 * 4 * 2, 256));
    assert_eq!((attend.grid, attend.block), (96, 512));
    assert!(!statistics.overlaps_previous, "K and V may be fresh");
    assert!(encode.overlaps_previous && attend.overlaps_previous);
}

#[test]
fn one_launch_reads_once() {
    let many = Shape {
        batch: 50,
        kv_len: 1000,
        ..shape()
    };
    let problem = Problem::new(many, DType::F16).unwrap();
    let choice = chosen(&problem, &Recipe::SAGE2_I8_F8);
    let Preparation::Once {
        variant,
        takes_turns: false,
    } = choice.prepare
    else {
        panic!("{choice:?}");
    };
    let (scratch, ranges) = choice.scratch();
    assert!(scratch.ranges().iter().all(|range| range.name != "k_sums"));
    let tensor = Tensor {
        address: 16,
        strides: [1, 2, 3],
    };
    let params = quantize::params(&choice, &ranges, 4096, tensor, tensor);
    let launch = quantize::once(&choice, &variant, 200, params);
    assert_eq!((launch.grid, launch.cluster, launch.block), (800, 4, 256));
    assert_eq!(
        (params.pieces, params.tiles_per_piece, params.heads),
        (4, 2, 100)
    );
    assert!(!launch.overlaps_previous, "K and V may be fresh");
}
