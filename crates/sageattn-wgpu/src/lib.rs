//! Quantized attention on every GPU that [wgpu] reaches: Vulkan, Metal and DirectX 12.
//!
//! [`Wgpu`] is a [`Backend`](sageattn_core::Backend). It opens a device of its own ([`Wgpu::best`]) or
//! works on the caller's ([`Wgpu::new`]), on the caller's buffers ([`Wgpu::wrap`]) and, with
//! [`WgpuPlan::encode`], in the caller's command encoder: nothing is copied and nothing is submitted
//! behind the caller's back.
//!
//! ```no_run
//! use sageattn_core::{DType, HostTensor, Layout, Problem, Recipe, Shape, attend_host};
//! use sageattn_wgpu::Wgpu;
//!
//! let gpu = Wgpu::best()?;
//! let problem = Problem::new(Shape::mha(1, 8, 512, 64), DType::F16)?;
//! let x = HostTensor::from_f32(Layout::hnd([1, 8, 512, 64]), DType::F16, &[0.5; 8 * 512 * 64])?;
//! let output = attend_host(&gpu, &problem, &Recipe::SAGE1_B, [&x, &x, &x])?;
//! assert_eq!(output.out.len(), 8 * 512 * 64);
//! # Ok::<(), sageattn_core::Error>(())
//! ```
//!
//! Which instructions a device gets right is tested when it is opened; what fails is replaced by slower
//! code with the same results, and reported through `tracing`.
//!
//! | file | holds |
//! |---|---|
//! | `device`, `buffer`, `self_test` | opening devices, wrapping buffers, what a device must prove |
//! | `memory` | what lies where in the workspace, and which bytes a dispatch binds |
//! | `pipeline` | kernels compiled once per device, and how they are recorded |
//! | `tier`, `tune` | the ways to compute attention, and which one a call takes; what was tried out |
//! | `quantize`, `attend` | what the stages bind and how they are cut into dispatches; a file per tier |
//! | `decode` | a few queries against many keys, without quantization |
//! | `merge` | keys split over workgroups: the ranges' results, put together |
//! | `vulkan` | what wgpu does not tell of a Vulkan device |
//! | `plan` | the sequence of the stages for one problem |
//!
//! The major version of wgpu is part of this crate's interface: use it through [`wgpu`].

mod attend;
mod buffer;
mod decode;
mod device;
mod memory;
mod merge;
mod pipeline;
mod plan;
mod quantize;
mod self_test;
mod tier;
mod tune;
mod vulkan;

pub use buffer::WgpuBuffer;
pub use device::{Wgpu, wanted_descriptor, wanted_features, wanted_limits};
pub use plan::WgpuPlan;
pub use tier::Tier;
pub use wgpu;
