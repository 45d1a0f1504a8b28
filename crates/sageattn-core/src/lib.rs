//! The vocabulary of `sageattn`: what quantized attention is asked for, how it is quantized, what a
//! backend promises, and two oracles that say what the result must be. No GPU, no unsafe code.
//!
//! ```
//! use sageattn_core::{Cpu, DType, HostTensor, Layout, Problem, Recipe, Shape, attend_host};
//!
//! let shape = Shape::mha(1, 2, 16, 8); // batch, heads, length, head_dim
//! let tensor = |seed: u16| {
//!     let values: Vec<f32> = (0..256).map(|i: u16| f32::from((i * 37 + seed) % 19) / 9.5 - 1.0).collect();
//!     HostTensor::from_f32(Layout::hnd(shape.q()), DType::F16, &values)
//! };
//! let (q, k, v) = (tensor(1)?, tensor(5)?, tensor(9)?);
//!
//! let problem = Problem::new(shape, DType::F16)?;
//! let got = attend_host(&Cpu::new(), &problem, &Recipe::SAGE1_B, [&q, &k, &v])?;
//! assert_eq!(got.out.len(), 256);
//! # Ok::<(), sageattn_core::Error>(())
//! ```
//!
//! | word | meaning |
//! |---|---|
//! | [`Problem`] | sizes, element type, mask, softmax scale, outputs: checked once |
//! | [`Recipe`] | which quantization: smoothing, Q K^T, P V |
//! | [`Layout`], [`TensorView`] | strides in elements, over memory the caller owns |
//! | [`Backend`] | a device that says what it supports and makes plans |
//! | [`Plan`] | chosen kernels for one problem and recipe: immutable, shareable |
//! | [`Io`] | tensors bound to a problem: checked once |
//! | [`mod@reference`] | what must come out: [`exact`](reference::exact) and [`faithful`](reference::faithful) |
//!
//! A call goes `Problem::new -> choose -> plan -> Io::bind -> run`; [`Staged`] does all of it for
//! tensors in host memory.

#![forbid(unsafe_code)]

mod backend;
pub mod calibrate;
mod cpu;
mod error;
mod groups;
mod host;
pub mod metrics;
mod problem;
mod recipe;
pub mod reference;
pub mod scratch;
mod tensor;

pub use backend::{
    Backend, Clock, Description, DeviceInfo, DeviceKind, Divisor, Io, KeyOrder, Plan, Profile,
    Reference, Rounding, choose,
};
pub use cpu::Cpu;
pub use error::{Error, Unsupported};
pub use groups::{Grouping, Groups};
pub use host::{HostBuffer, HostOutput, HostTensor, Staged, attend_host, round_to};
pub use problem::{Align, MAX_HEAD_DIM, MAX_LEN, Mask, Outputs, Problem, Shape};
pub use recipe::{PvQuant, QkQuant, Recipe, Smooth, SmoothQ};
pub use tensor::{Buffer, DType, Layout, LseView, ROW_ALIGN, TensorView};
