//! Misuse of the vocabulary: every wrong argument is an error that names it, never a panic.

#![allow(clippy::panic, reason = "a test fails by panicking, its helpers too")]

use proptest::prelude::*;

use sageattn_core::{
    Align, DType, Error, HostBuffer, HostTensor, Io, Layout, LseView, Mask, Outputs, Problem,
    Recipe, Shape, TensorView,
};

const SHAPE: Shape = Shape::mha(1, 2, 8, 64);

/// Bytes of one dense f16 tensor of [`SHAPE`].
const BYTES: usize = 2 * 2 * 8 * 64;

fn problem() -> Problem {
    Problem::new(SHAPE, DType::F16).expect("the shape is sound")
}

fn buffer(bytes: usize) -> HostBuffer {
    HostBuffer::new(vec![0; bytes])
}

/// Binds four tensors after `change` had its way with them.
fn bind_changed(change: impl FnOnce(&mut [(Layout, DType); 4])) -> Result<(), Error> {
    let buffers = [0; 4].map(|_| buffer(BYTES));
    let mut tensors = [(Layout::hnd(SHAPE.q()), DType::F16); 4];
    change(&mut tensors);
    let [q, k, v, out] =
        [0, 1, 2, 3].map(|i: usize| TensorView::new(&buffers[i], tensors[i].0, tensors[i].1));
    Io::bind(&problem(), q, k, v, out, None).map(|_| ())
}

/// The argument that a refusal names.
fn argument<T: std::fmt::Debug>(result: Result<T, Error>) -> String {
    match result {
        Err(Error::Invalid { argument, reason }) => {
            assert!(!reason.is_empty() && !reason.contains('\n'), "{reason:?}");
            argument
        }
        other => panic!("{other:?} where Error::Invalid was due"),
    }
}

#[test]
fn sound_tensors_bind() {
    bind_changed(|_| {}).unwrap();
}

#[test]
fn a_shape_that_does_not_fit_is_refused() {
    let shapes = [[1, 2, 8, 32], [1, 2, 9, 64], [1, 1, 8, 64], [2, 2, 8, 64]];
    for (index, name) in ["q", "k", "v", "out"].into_iter().enumerate() {
        for shape in shapes {
            let result = bind_changed(|tensors| tensors[index].0 = Layout::hnd(shape));
            assert_eq!(argument(result), name);
        }
    }
}

#[test]
fn another_element_type_is_refused() {
    for (index, name) in ["q", "k", "v", "out"].into_iter().enumerate() {
        let result = bind_changed(|tensors| tensors[index].1 = DType::BF16);
        assert_eq!(argument(result), name);
    }
}

#[test]
fn unaligned_strides_and_offsets_are_refused() {
    let layouts = [
        Layout::strided(SHAPE.q(), [8 * 65 * 2, 8 * 65, 65], 0),
        Layout::strided(SHAPE.q(), [1024, 8 * 64 + 4, 64], 0),
        Layout::strided(SHAPE.q(), [1024, 512, 64], 4),
    ];
    for layout in layouts {
        assert_eq!(argument(bind_changed(|tensors| tensors[1].0 = layout)), "k");
    }
}

#[test]
fn a_tensor_that_reaches_past_its_buffer_is_refused() {
    let layout = Layout::strided(SHAPE.q(), [1024, 512, 64], 8);
    assert_eq!(argument(bind_changed(|tensors| tensors[2].0 = layout)), "v");
    let layout = Layout::strided(SHAPE.q(), [0, usize::MAX & !7, 64], 0);
    assert_eq!(argument(bind_changed(|tensors| tensors[0].0 = layout)), "q");
}

#[test]
fn an_output_that_overlaps_itself_or_an_input_is_refused() {
    let broadcast = Layout::strided(SHAPE.q(), [0, 0, 64], 0);
    assert_eq!(
        argument(bind_changed(|tensors| tensors[3].0 = broadcast)),
        "out"
    );
    // Inputs may be broadcast: one head of keys for all.
    bind_changed(|tensors| tensors[1].0 = broadcast).unwrap();

    let (shared, other) = (buffer(2 * BYTES), buffer(BYTES));
    let layout = Layout::hnd(SHAPE.q());
    let behind = |elements| {
        let strides = layout.strides();
        Layout::strided(SHAPE.q(), strides, elements)
    };
    let other = TensorView::new(&other, layout, DType::F16);
    let view = |elements| TensorView::new(&shared, behind(elements), DType::F16);
    let bind = |offset| Io::bind(&problem(), other, view(0), other, view(offset), None);
    assert_eq!(argument(bind(BYTES / 2 - 8)), "out");
    bind(BYTES / 2).unwrap();
}

#[test]
fn lse_is_there_when_asked_for_and_only_then() {
    let tensors = [0; 4].map(|_| buffer(BYTES));
    let lse = buffer(4 * 16 + 16);
    let views = [0, 1, 2, 3]
        .map(|i: usize| TensorView::new(&tensors[i], Layout::hnd(SHAPE.q()), DType::F16));
    let [q, k, v, out] = views;
    let with = problem().with_outputs(Outputs::OAndLse);
    let view = |offset| {
        Some(LseView {
            buffer: &lse,
            offset,
        })
    };
    let shared = Some(LseView {
        buffer: &tensors[3],
        offset: 0,
    });
    assert_eq!(argument(Io::bind(&with, q, k, v, out, None)), "lse");
    assert_eq!(argument(Io::bind(&problem(), q, k, v, out, view(0))), "lse");
    assert_eq!(argument(Io::bind(&with, q, k, v, out, view(1))), "lse");
    assert_eq!(argument(Io::bind(&with, q, k, v, out, view(8))), "lse");
    assert_eq!(argument(Io::bind(&with, q, k, v, out, shared)), "lse");
    Io::bind(&with, q, k, v, out, view(4)).unwrap();
}

#[test]
fn bad_problems_name_the_argument() {
    let bad = [
        (
            Shape {
                head_dim: 257,
                ..SHAPE
            },
            "head_dim",
        ),
        (
            Shape {
                head_dim: 0,
                ..SHAPE
            },
            "head_dim",
        ),
        (Shape { q_len: 0, ..SHAPE }, "q_len"),
        (Shape { batch: 0, ..SHAPE }, "batch"),
        (
            Shape {
                q_heads: 3,
                ..SHAPE
            },
            "q_heads",
        ),
    ];
    for (shape, name) in bad {
        assert_eq!(argument(Problem::new(shape, DType::F32)), name);
    }
    for scale in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        assert_eq!(
            argument(problem().with_softmax_scale(scale)),
            "softmax scale"
        );
    }
    assert_eq!(argument("sage3".parse::<Recipe>()), "recipe");
}

fn any_mask() -> impl Strategy<Value = Mask> {
    prop_oneof![
        Just(Mask::None),
        Just(Mask::Causal(Align::TopLeft)),
        Just(Mask::Causal(Align::BottomRight)),
    ]
}

fn any_dtype() -> impl Strategy<Value = DType> {
    (0usize..3).prop_map(|index| DType::ALL[index])
}

/// Sizes from nothing to beyond every limit.
fn any_size() -> impl Strategy<Value = usize> {
    prop_oneof![0usize..10, 200usize..300, any::<usize>()]
}

proptest! {
    #[test]
    fn no_shape_panics(
        sizes in proptest::array::uniform6(any_size()),
        dtype in any_dtype(),
        mask in any_mask(),
    ) {
        let [batch, q_heads, kv_heads, q_len, kv_len, head_dim] = sizes;
        let shape = Shape { batch, q_heads, kv_heads, q_len, kv_len, head_dim };
        if let Ok(problem) = Problem::new(shape, dtype) {
            // What is accepted can be counted.
            let problem = problem.with_mask(mask);
            prop_assert!(problem.visible_pairs() <= (batch * q_heads) as u64 * (q_len as u64 * kv_len as u64));
            prop_assert!(problem.softmax_scale() > 0.0);
        }
    }

    #[test]
    fn no_layout_panics_and_what_binds_stays_in_its_buffer(
        strides in proptest::array::uniform3(any_size()),
        offset in any_size(),
        bytes in 0usize..8192,
    ) {
        let dense = [0; 3].map(|_| buffer(BYTES));
        let [q, k, v] = [0, 1, 2].map(|i: usize| TensorView::new(&dense[i], Layout::hnd(SHAPE.q()), DType::F16));
        let memory = buffer(bytes);
        let layout = Layout::strided(SHAPE.q(), strides, offset);
        let out = TensorView::new(&memory, layout, DType::F16);
        if Io::bind(&problem(), q, k, v, out, None).is_ok() {
            let last = layout.row(0, 1, 7) + 64;
            prop_assert!(2 * last <= bytes, "{layout:?} in {bytes} bytes");
        }
    }

    #[test]
    fn repacking_keeps_every_value(
        shape in (1usize..3, 1usize..4, 1usize..9, 1usize..40),
        dtype in any_dtype(),
    ) {
        let shape = [shape.0, shape.1, shape.2, shape.3];
        let values: Vec<f32> = (0u8..250).cycle().map(f32::from).take(shape.iter().product()).collect();
        let dense = HostTensor::from_f32(Layout::hnd(shape), dtype, &values).unwrap();
        for layout in [Layout::nhd(shape), Layout::nhd_padded(shape, dtype), Layout::hnd_padded(shape, dtype)] {
            let packed = dense.repack(layout).unwrap();
            prop_assert_eq!(&packed.to_f32(), &values);
            let back = packed.repack(Layout::hnd(shape)).unwrap();
            prop_assert_eq!(back.bytes(), dense.bytes());
        }
    }
}
