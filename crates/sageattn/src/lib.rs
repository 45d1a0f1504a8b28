//! Quantized attention on every GPU, and without one.
//!
//! SageAttention computes `softmax(Q K^T) V` with Q and K in 8-bit (or 4-bit) integers and P and V in
//! 8 or 16 bits, at the accuracy of 16-bit attention: <https://arxiv.org/abs/2410.02367>,
//! <https://arxiv.org/abs/2411.10958>. This crate is its forward pass behind one interface, with
//! one definition of the numerics that every backend is tested against.
//!
//! # From host memory
//!
//! ```
//! use sageattn::{DType, Device, HostTensor, Layout, Problem, Shape, attend_host};
//!
//! // One batch, two heads, five queries and keys of 64 channels.
//! let problem = Problem::new(Shape::mha(1, 2, 5, 64), DType::F16)?;
//! let values: Vec<f32> = (0..2 * 5 * 64).map(|i| (i as f32 * 0.37).sin()).collect();
//! let tensor = HostTensor::from_f32(Layout::hnd([1, 2, 5, 64]), DType::F16, &values)?;
//!
//! let device = Device::best();
//! let recipe = device.preferred(&problem);
//! let output = attend_host(&*device, &problem, &recipe, [&tensor, &tensor, &tensor])?;
//! assert_eq!(output.out.len(), 2 * 5 * 64);
//! # Ok::<(), sageattn::Error>(())
//! ```
//!
//! # How accurate is it?
//!
//! The reference is computed in f64, and the metrics are those of the papers.
//!
//! ```
//! use sageattn::metrics::Metrics;
//! use sageattn::{DType, Device, HostTensor, Layout, Problem, Recipe, Shape, attend_host, reference};
//!
//! let problem = Problem::new(Shape::mha(1, 1, 64, 32), DType::F32)?;
//! let values: Vec<f32> = (0..64 * 32).map(|i| (i as f32 * 0.37).sin()).collect();
//! let tensor = HostTensor::from_f32(Layout::hnd([1, 1, 64, 32]), DType::F32, &values)?;
//!
//! let (device, recipe) = Device::best_for(&problem, Some(Recipe::SAGE1_T))?;
//! let output = attend_host(&*device, &problem, &recipe, [&tensor; 3])?;
//! let exact = reference::exact::attend(&problem, [values.as_slice(); 3]);
//! let metrics = Metrics::compare(&output.out, &exact.out);
//! assert!(metrics.cosine > 0.999);
//! # Ok::<(), sageattn::Error>(())
//! ```
//!
//! # On tensors that are on the device already
//!
//! Nothing is copied: bind views of your buffers to the problem, give the plan its workspace, and run
//! it as often as you like. A run only enqueues work.
//!
//! ```
//! use sageattn::{DType, Device, Io, Layout, Problem, Recipe, Shape, TensorView};
//!
//! let problem = Problem::new(Shape::mha(1, 2, 5, 64), DType::F16)?;
//! let (device, recipe) = Device::best_for(&problem, Some(Recipe::SAGE1_B))?;
//! let plan = device.plan(&problem, &recipe)?;
//!
//! // Stand-ins for the application's own buffers.
//! let layout = Layout::nhd([1, 2, 5, 64]);
//! let bytes = 2 * 5 * 64 * DType::F16.size() as u64;
//! let (q, k, v) = (device.alloc(bytes)?, device.alloc(bytes)?, device.alloc(bytes)?);
//! let out = device.alloc(bytes)?;
//! # for buffer in [&q, &k, &v] {
//! #     device.upload(buffer.as_ref(), 0, &vec![0; bytes as usize])?;
//! # }
//! let workspace = device.alloc(plan.workspace_bytes().max(4))?;
//!
//! let io = Io::bind(
//!     &problem,
//!     TensorView::new(q.as_ref(), layout, DType::F16),
//!     TensorView::new(k.as_ref(), layout, DType::F16),
//!     TensorView::new(v.as_ref(), layout, DType::F16),
//!     TensorView::new(out.as_ref(), layout, DType::F16),
//!     None,
//! )?;
//! plan.run(&io, workspace.as_ref())?;
//! device.synchronize()?;
//! # Ok::<(), sageattn::Error>(())
//! ```
//!
//! # Two vocabularies
//!
//! | here | elsewhere |
//! |---|---|
//! | [`Problem`] | the arguments of `scaled_dot_product_attention`, without the tensors |
//! | [`Shape::q_len`], [`Shape::kv_len`] | `seqlen_q`, `seqlen_k`; `L`, `S` |
//! | [`Layout::hnd`], [`Layout::nhd`] | `tensor_layout="HND"`, `"NHD"`; `[B, H, N, D]`, `[B, N, H, D]` |
//! | [`Mask::Causal`] with [`Align::TopLeft`] | PyTorch's `is_causal=True` |
//! | [`Mask::Causal`] with [`Align::BottomRight`] | FlashAttention's `causal=True`, from 2.1 |
//! | [`Shape::kv_heads`] below [`Shape::q_heads`] | GQA, MQA, `enable_gqa=True` |
//! | [`Smooth::Mean`] | `smooth_k=True` |
//! | [`Grouping::PerThread`] | `qk_quant_gran="per_thread"` |
//! | [`Outputs::OAndLse`] | `return_lse=True` |
//! | [`Recipe`] | which `sageattn_qk_int8_pv_*` function is called |
//! | workspace | the tensors those functions allocate on every call |
//!
//! # The map
//!
//! - What is computed: [`Problem`], [`Shape`], [`Mask`], [`DType`], [`Outputs`].
//! - How it is quantized: [`Recipe`], [`Smooth`], [`Grouping`]; which recipe a layer bears:
//!   [`mod@calibrate`].
//! - Where tensors lie: [`Layout`], [`TensorView`], [`Buffer`], [`Io`]; in host memory: [`HostTensor`],
//!   [`Staged`], [`attend_host`].
//! - Who computes it: [`Device`], [`Backend`], [`Plan`], [`choose`]; on the application's own GPU device,
//!   buffers, stream or command encoder: `cuda_backend`, `wgpu_backend`.
//! - How well: [`metrics`], and [`mod@reference`] for the two oracles.
//! - What can go wrong: [`Error`].
//!
//! # Features
//!
//! - `cuda` (on by default): NVIDIA's tensor cores; needs no CUDA toolkit, neither to build nor to run.
//! - `wgpu` (on by default): the portable GPU tier.
//!
//! A feature leaves a backend out; none changes what the others do. The CPU backend is always there.

mod device;

pub use device::{Device, Refusal, Survey};
pub use sageattn_core::*;
/// The CUDA tier: for applications that have a stream and device memory of their own.
#[cfg(feature = "cuda")]
pub use sageattn_cuda as cuda_backend;
/// The portable GPU tier: for applications that have a wgpu device, buffers and encoders of their own.
#[cfg(feature = "wgpu")]
pub use sageattn_wgpu as wgpu_backend;

/// The README's code has to build like any other.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;
