//! The backend on a GPU: against the oracles, and what only a device can show. The conformance suite
//! has the many cases; here are few, and the ways into the crate that the suite does not use.
//!
//! Without a device the tests are ignored, or fail when `SAGEATTN_REQUIRE` names `cuda`. The binary
//! needs no file of the repository.
#![allow(clippy::unwrap_used, reason = "a test reports by panicking")]

use std::env;
use std::num::NonZeroU32;
use std::process::ExitCode;
use std::sync::{Arc, Barrier};
use std::thread;

use libtest_mimic::{Arguments, Completion, Failed, Trial};
use sageattn_core::metrics::Metrics;
use sageattn_core::reference::{exact, faithful};
use sageattn_core::{
    Align, Backend, Clock, DType, Error, HostBuffer, HostOutput, HostTensor, Io, Layout, LseView,
    Mask, Outputs, Plan, Problem, Recipe, Shape, Smooth, Staged, TensorView, attend_host, round_to,
};
use sageattn_cuda::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use sageattn_cuda::{Cuda, CudaBuffer};

#[path = "gpu/codes.rs"]
mod codes;

const RECIPE: Recipe = Recipe::SAGE2_I8_F8;

type Test = fn(&Cuda) -> Result<(), Failed>;

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // They share a stream, and one of them captures it.
    arguments.test_threads = Some(1);
    let cuda = Cuda::all().map(|mut all| Arc::new(all.swap_remove(0)));
    let cuda = cuda.map_err(|error| error.to_string());
    let required =
        env::var("SAGEATTN_REQUIRE").is_ok_and(|list| list.split(',').any(|x| x == "cuda"));
    let tests: [(&str, Test); 14] = [
        ("head_dims_agree_with_the_oracles", head_dims),
        ("lengths_agree_with_the_oracles", lengths),
        ("masks_agree_with_the_oracles", masks),
        (
            "types_and_outputs_agree_with_the_oracles",
            types_and_outputs,
        ),
        (
            "scales_and_smoothing_agree_with_the_oracles",
            scales_and_smoothing,
        ),
        ("keys_and_values_are_coded_as_the_recipe_says", codes::codes),
        ("ten_runs_are_bitwise_equal", ten_runs),
        ("callers_memory_is_used_in_place", callers_memory),
        ("a_graph_replays_the_call", graph),
        ("two_threads_on_two_streams", two_threads),
        ("every_device_at_once", every_device),
        ("bytes_around_outputs_stay", guard_bytes),
        ("foreign_and_misaligned_memory_is_refused", refused_memory),
        ("a_profile_names_the_stages", profile),
    ];
    let trials = tests
        .into_iter()
        .map(|(name, test)| {
            let cuda = cuda.clone();
            Trial::ignorable_test(name, move || match cuda {
                Ok(cuda) => test(&cuda).map(|()| Completion::Completed),
                Err(reason) if required => Err(reason.into()),
                Err(reason) => Ok(Completion::ignored_with(reason)),
            })
        })
        .collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// Tensors of one call, dense on the host.
struct Call {
    problem: Problem,
    recipe: Recipe,
    tensors: [HostTensor; 3],
}

impl Call {
    fn new(shape: Shape, dtype: DType) -> Self {
        let problem = Problem::new(shape, dtype).unwrap();
        let tensor = |seed, dims: [usize; 4]| {
            let values = normal(seed, dims.iter().product());
            HostTensor::from_f32(Layout::hnd_padded(dims, dtype), dtype, &values).unwrap()
        };
        Self {
            problem,
            recipe: RECIPE,
            tensors: [
                tensor(1, shape.q()),
                tensor(2, shape.kv()),
                tensor(3, shape.kv()),
            ],
        }
    }

    fn with(self, change: impl FnOnce(Problem) -> Problem) -> Self {
        Self {
            problem: change(self.problem),
            ..self
        }
    }

    fn tensors(&self) -> [&HostTensor; 3] {
        self.tensors.each_ref()
    }

    fn run(&self, cuda: &Cuda) -> Result<HostOutput, Error> {
        attend_host(cuda, &self.problem, &self.recipe, self.tensors())
    }

    /// Runs, and compares with both oracles.
    fn check(&self, cuda: &Cuda) -> Result<(), Failed> {
        let what = format!("{:?} {}", self.problem, self.recipe);
        let got = self.run(cuda).map_err(|error| format!("{what}: {error}"))?;
        let [q, k, v] = self.tensors().map(HostTensor::to_f32);
        let tensors = [&q[..], &k[..], &v[..]];
        let rounding = cuda.plan(&self.problem, &self.recipe)?.describe().rounding;
        let mut want = faithful::attend(&self.problem, &self.recipe, &rounding, tensors);
        round_to(self.problem.dtype(), &mut want.out);

        // The tensor core sums e4m3 products in fewer bits than f32; bf16 adds a rounding of its own.
        let bound = match self.problem.dtype() {
            DType::F16 | DType::F32 => 2e-3,
            DType::BF16 => 3e-3,
        };
        let expected: Vec<f64> = want.out.iter().copied().map(f64::from).collect();
        let metrics = Metrics::compare(&got.out, &expected);
        let head_dim = self.problem.shape().head_dim;
        let row = Metrics::worst_row(&got.out, &expected, head_dim, 0.1);
        if !(metrics.rel_l1 <= bound && row <= 0.05 && metrics.not_finite == 0) {
            return Err(format!("{what}: faithful: {metrics:?}, worst row {row}").into());
        }
        let exact = exact::attend(&self.problem, tensors);
        let metrics = Metrics::compare(&got.out, &exact.out);
        if !(metrics.rel_l1 <= 0.06 && metrics.not_finite == 0) {
            return Err(format!("{what}: exact: {metrics:?}").into());
        }
        let (got, want) = (got.lse.unwrap_or_default(), want.lse.unwrap_or_default());
        assert_eq!(got.len(), want.len(), "{what}");
        for (row, (got, want)) in got.iter().zip(want).enumerate() {
            let near = (got - want).abs() <= 1e-4 * want.abs().max(1.0);
            if !(near || *got == want) {
                return Err(format!("{what}: LSE of row {row} is {got}, not {want}").into());
            }
        }
        Ok(())
    }
}

/// Bell-shaped values: sums of twelve uniform ones.
fn normal(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    let mut sum = || (0..12).map(|_| uniform()).sum::<f32>() - 6.0;
    (0..len).map(|_| sum()).collect()
}

fn gqa(q_len: usize, kv_len: usize, head_dim: usize) -> Shape {
    Shape {
        batch: 2,
        q_heads: 4,
        kv_heads: 2,
        q_len,
        kv_len,
        head_dim,
    }
}

fn head_dims(cuda: &Cuda) -> Result<(), Failed> {
    for head_dim in [1, 20, 64, 72, 100, 128, 160, 250, 256] {
        Call::new(gqa(130, 200, head_dim), DType::F16).check(cuda)?;
    }
    Ok(())
}

fn lengths(cuda: &Cuda) -> Result<(), Failed> {
    for len in [1, 15, 63, 64, 65, 127, 128, 129, 192, 193, 513] {
        Call::new(gqa(len, 300, 64), DType::F16).check(cuda)?;
        Call::new(gqa(70, len, 128), DType::F16).check(cuda)?;
    }
    Ok(())
}

fn masks(cuda: &Cuda) -> Result<(), Failed> {
    for (q_len, kv_len) in [(300, 300), (129, 400), (400, 129), (1, 257), (257, 1)] {
        for align in [Align::TopLeft, Align::BottomRight] {
            for head_dim in [64, 128, 256] {
                Call::new(gqa(q_len, kv_len, head_dim), DType::F16)
                    .with(|problem| problem.with_mask(Mask::Causal(align)))
                    .with(|problem| problem.with_outputs(Outputs::OAndLse))
                    .check(cuda)?;
            }
        }
    }
    Ok(())
}

fn types_and_outputs(cuda: &Cuda) -> Result<(), Failed> {
    for dtype in DType::ALL {
        for head_dim in [60, 64, 128, 250, 256] {
            Call::new(gqa(150, 190, head_dim), dtype)
                .with(|problem| problem.with_outputs(Outputs::OAndLse))
                .check(cuda)?;
        }
    }
    Ok(())
}

fn scales_and_smoothing(cuda: &Cuda) -> Result<(), Failed> {
    for scale in [0.0, -0.1, 0.3] {
        Call::new(gqa(150, 190, 64), DType::F16)
            .with(|problem| problem.with_softmax_scale(scale).unwrap())
            .with(|problem| problem.with_outputs(Outputs::OAndLse))
            .check(cuda)?;
    }
    let sampled = NonZeroU32::new(50).map(Smooth::Sampled).unwrap();
    for smooth in [Smooth::Off, sampled] {
        let mut call = Call::new(gqa(150, 190, 64), DType::F16)
            .with(|problem| problem.with_outputs(Outputs::OAndLse));
        call.recipe = RECIPE.with_smooth(smooth);
        call.check(cuda)?;
    }
    Ok(())
}

fn ten_runs(cuda: &Cuda) -> Result<(), Failed> {
    let call = Call::new(Shape::mha(2, 8, 777, 128), DType::F16)
        .with(|problem| problem.with_mask(Mask::Causal(Align::TopLeft)));
    let staged = Staged::new(cuda, &call.problem, &call.recipe, call.tensors())?;
    let mut first = None;
    for run in 0..10 {
        staged.run()?;
        let out = staged.output()?.out;
        let first = first.get_or_insert_with(|| out.clone());
        assert_eq!(*first, out, "run {run}");
    }
    Ok(())
}

/// One call's memory, all of it the caller's own slices.
struct OnDevice<'a> {
    cuda: &'a Cuda,
    plan: Box<dyn Plan>,
    q: CudaBuffer,
    k: CudaBuffer,
    v: CudaBuffer,
    out: CudaBuffer,
    workspace: CudaBuffer,
}

impl<'a> OnDevice<'a> {
    fn new(cuda: &'a Cuda, call: &Call) -> Self {
        let plan = cuda.plan(&call.problem, &call.recipe).unwrap();
        let slice = |bytes: &[u8]| CudaBuffer::from_slice(cuda.stream().clone_htod(bytes).unwrap());
        let [q, k, v] = call.tensors().map(|tensor| slice(tensor.bytes()));
        let workspace = vec![0xa5; usize::try_from(plan.workspace_bytes()).unwrap()];
        Self {
            cuda,
            out: slice(&vec![0xa5; call.tensors[0].bytes().len()]),
            workspace: slice(&workspace),
            plan,
            q,
            k,
            v,
        }
    }

    fn io(&self, call: &Call) -> Io<'_> {
        let view =
            |buffer, like: &HostTensor| TensorView::new(buffer, *like.layout(), like.dtype());
        let [q, k, v] = call.tensors();
        Io::bind(
            &call.problem,
            view(&self.q, q),
            view(&self.k, k),
            view(&self.v, v),
            view(&self.out, q),
            None,
        )
        .unwrap()
    }

    fn read(&self, buffer: &CudaBuffer) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(sageattn_core::Buffer::bytes(buffer)).unwrap()];
        self.cuda.download(buffer, 0, &mut bytes).unwrap();
        bytes
    }

    /// O as the convenience functions give it.
    fn output(&self, call: &Call) -> Vec<f32> {
        let q = &call.tensors[0];
        let bytes = self.read(&self.out);
        HostTensor::from_bytes(*q.layout(), q.dtype(), bytes)
            .unwrap()
            .to_f32()
    }
}

fn callers_memory(cuda: &Cuda) -> Result<(), Failed> {
    let call = Call::new(gqa(200, 300, 128), DType::F16);
    let want = call.run(cuda)?.out;

    let device = OnDevice::new(cuda, &call);
    device.plan.run(&device.io(&call), &device.workspace)?;
    assert_eq!(device.output(&call), want);

    // K again, 4096 bytes into a larger allocation, by its address.
    let stream = cuda.stream();
    let k = call.tensors[1].bytes();
    let larger = CudaBuffer::from_slice(stream.clone_htod(&[&[0xa5; 4096], k].concat()).unwrap());
    // SAFETY: the tail of `larger`, which outlives the buffer's last use.
    let raw = unsafe {
        let context = stream.context().clone();
        CudaBuffer::from_raw(context, larger.address() + 4096, k.len() as u64)
    }?;
    let device = OnDevice {
        k: raw,
        ..OnDevice::new(cuda, &call)
    };
    device.plan.run(&device.io(&call), &device.workspace)?;
    assert_eq!(device.output(&call), want);

    let back = device.q.into_slice::<u8>().ok_or("the slice is lost")?;
    assert_eq!(stream.clone_dtoh(&back)?, call.tensors[0].bytes());
    Ok(())
}

fn graph(cuda: &Cuda) -> Result<(), Failed> {
    let call = Call::new(gqa(200, 300, 64), DType::F16);
    let device = OnDevice::new(cuda, &call);
    let io = device.io(&call);
    cuda.synchronize()?;
    let stream = cuda.stream();
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
    let captured = device.plan.run(&io, &device.workspace);
    let graph = stream.end_capture(CUgraphInstantiate_flags(0))?;
    captured?;
    let graph = graph.ok_or("an empty graph")?;
    let poison = vec![0xa5; call.tensors[0].bytes().len()];
    assert_eq!(device.read(&device.out), poison, "captured, not run");

    for seed in [10, 20, 30] {
        let mut fresh = Call::new(gqa(200, 300, 64), DType::F16);
        let values = normal(seed, 4 * 300 * 64);
        let layout = *fresh.tensors[1].layout();
        fresh.tensors[1] = HostTensor::from_f32(layout, DType::F16, &values)?;
        cuda.upload(&device.k, 0, fresh.tensors[1].bytes())?;
        cuda.upload(&device.out, 0, &poison)?;
        graph.launch()?;
        graph.launch()?;
        assert_eq!(device.output(&call), fresh.run(cuda)?.out, "seed {seed}");
    }
    Ok(())
}

fn two_threads(cuda: &Cuda) -> Result<(), Failed> {
    let shape = Shape::mha(1, 8, 1500, 128);
    let want = Call::new(shape, DType::F16).run(cuda)?.out;
    let start = Barrier::new(2);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let stream = cuda.stream().context().new_stream().unwrap();
                let own = Cuda::on_stream(stream).unwrap();
                let call = Call::new(shape, DType::F16);
                let staged = Staged::new(&own, &call.problem, &call.recipe, call.tensors());
                let staged = staged.unwrap();
                start.wait();
                for _ in 0..20 {
                    staged.run().unwrap();
                }
                assert_eq!(staged.output().unwrap().out, want);
            });
        }
    });

    // Kernels that this thread has loaded, clusters among them, in a plan of a thread that has used no
    // context yet.
    let call = Call::new(Shape::mha(1, 16, 1500, 128), DType::F16);
    let plan = || cuda.plan(&call.problem, &call.recipe).map(|_| ());
    plan()?;
    thread::scope(|scope| scope.spawn(plan).join().unwrap())?;
    Ok(())
}

fn every_device(_: &Cuda) -> Result<(), Failed> {
    let devices = Cuda::all()?;
    let shape = Shape::mha(1, 4, 700, 64);
    let want = Call::new(shape, DType::F16).run(&devices[0])?.out;
    // One thread drives all of them in turn, then each has its own.
    for device in &devices {
        assert_eq!(Call::new(shape, DType::F16).run(device)?.out, want);
    }
    thread::scope(|scope| {
        for device in &devices {
            scope.spawn(|| assert_eq!(Call::new(shape, DType::F16).run(device).unwrap().out, want));
        }
    });
    Ok(())
}

/// O in rows with a gap, LSE and workspace, each between guards.
fn guard_bytes(cuda: &Cuda) -> Result<(), Failed> {
    const GUARD: usize = 1024;
    for (head_dim, dtype) in [
        (64, DType::F16),
        (100, DType::F16),
        (128, DType::BF16),
        (250, DType::F32),
    ] {
        let shape = gqa(130, 200, head_dim);
        let call = Call::new(shape, dtype).with(|problem| problem.with_outputs(Outputs::OAndLse));
        let device = OnDevice::new(cuda, &call);
        let stream = cuda.stream();
        let guarded = |bytes: usize| -> Result<CudaBuffer, Failed> {
            Ok(CudaBuffer::from_slice(
                stream.clone_htod(&vec![0xa5u8; bytes + 2 * GUARD])?,
            ))
        };
        let row = head_dim.next_multiple_of(8) + 16;
        let [heads, len] = [shape.q_heads, shape.q_len];
        let strides = [heads * len * row, row, heads * row];
        let layout = Layout::strided(shape.q(), strides, GUARD / dtype.size());
        let elements = shape.batch * heads * len * row;
        let out = guarded(elements * dtype.size())?;
        let rows = shape.batch * heads * len;
        let lse = guarded(4 * rows)?;
        let workspace_bytes = usize::try_from(device.plan.workspace_bytes())?;
        let workspace = guarded(workspace_bytes)?;
        // SAFETY: the middle of `workspace`, which outlives the buffer's last use.
        let inner = unsafe {
            let address = workspace.address() + GUARD as u64;
            CudaBuffer::from_raw(stream.context().clone(), address, workspace_bytes as u64)
        }?;
        let io = device.io(&call.without_lse());
        let io = Io::bind(
            &call.problem,
            *io.q(),
            *io.k(),
            *io.v(),
            TensorView::new(&out, layout, dtype),
            Some(LseView {
                buffer: &lse,
                offset: GUARD / 4,
            }),
        )?;
        cuda.plan(&call.problem, &call.recipe)?.run(&io, &inner)?;

        let bytes = device.read(&out);
        let mut element = vec![false; bytes.len()];
        for batch in 0..shape.batch {
            for head in 0..heads {
                for r in 0..len {
                    let start = layout.row(batch, head, r) * dtype.size();
                    element[start..start + head_dim * dtype.size()].fill(true);
                }
            }
        }
        for (at, (&byte, written)) in bytes.iter().zip(element).enumerate() {
            assert!(
                written || byte == 0xa5,
                "O: byte {at} of {head_dim} {dtype}"
            );
        }
        let want = call.run(cuda)?;
        let tensor = HostTensor::from_bytes(layout, dtype, bytes)?;
        assert_eq!(tensor.to_f32(), want.out);
        for (buffer, len) in [(&lse, 4 * rows), (&workspace, workspace_bytes)] {
            let bytes = device.read(buffer);
            let guards = bytes[..GUARD].iter().chain(&bytes[GUARD + len..]);
            assert!(
                guards.into_iter().all(|&byte| byte == 0xa5),
                "{head_dim} {dtype}"
            );
        }
    }
    Ok(())
}

impl Call {
    fn without_lse(&self) -> Self {
        Self {
            problem: self.problem.with_outputs(Outputs::O),
            recipe: self.recipe,
            tensors: self.tensors.clone(),
        }
    }
}

fn refused_memory(cuda: &Cuda) -> Result<(), Failed> {
    let call = Call::new(gqa(16, 16, 64), DType::F16);
    let device = OnDevice::new(cuda, &call);
    let host = HostBuffer::new(vec![0; call.tensors[1].bytes().len()]);
    let io = device.io(&call);
    let on_host = TensorView::new(&host, io.k().layout, DType::F16);
    let foreign = Io::bind(&call.problem, *io.q(), on_host, *io.v(), *io.out(), None)?;
    let error = device.plan.run(&foreign, &device.workspace).unwrap_err();
    assert!(
        matches!(error, Error::ForeignBuffer { tensor: "k", .. }),
        "{error}"
    );
    let error = device.plan.run(&io, &host).unwrap_err();
    assert!(
        matches!(error, Error::Invalid { .. } | Error::ForeignBuffer { .. }),
        "{error}"
    );

    let context = cuda.stream().context().clone();
    // SAFETY: refused, so never used.
    let error = unsafe { CudaBuffer::from_raw(context, device.q.address() + 8, 16) }.unwrap_err();
    assert!(matches!(error, Error::Invalid { .. }), "{error}");

    let error = cuda.upload(&device.q, u64::MAX, &[0; 4]).unwrap_err();
    assert!(matches!(error, Error::Invalid { .. }), "{error}");
    let error = cuda.alloc(1 << 50).unwrap_err();
    assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
    Ok(())
}

fn profile(cuda: &Cuda) -> Result<(), Failed> {
    for (heads, stages) in [
        (2, &["statistics", "encode", "attend"][..]),
        (16, &["prepare", "attend"]),
    ] {
        let call = Call::new(Shape::mha(1, heads, 2048, 128), DType::F16);
        let staged = Staged::new(cuda, &call.problem, &call.recipe, call.tensors())?;
        staged.run()?;
        let profile = staged.profile()?;
        let names: Vec<&str> = profile.stages.iter().map(|(name, _)| *name).collect();
        assert_eq!(names, stages, "{heads} heads");
        assert_eq!(profile.clock, Clock::Device);
        assert!(
            profile.stages.iter().all(|(_, time)| !time.is_zero()),
            "{profile:?}"
        );
    }
    Ok(())
}
