//! The ways into the crate that the conformance suite does not use: the caller's memory, graphs, threads.

use std::sync::Barrier;
use std::thread;

use libtest_mimic::Failed;
use sageattn_core::{
    Align, Backend, Clock, DType, Error, HostBuffer, HostTensor, Io, Layout, LseView, Mask,
    Outputs, Recipe, Shape, Staged, TensorView,
};
use sageattn_cuda::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use sageattn_cuda::{Cuda, CudaBuffer};

use crate::support::{Call, OnDevice, RECIPES, Test, gqa, normal};

pub(crate) const TESTS: &[Test] = &[
    ("ten_runs_are_bitwise_equal", ten_runs),
    ("callers_memory_is_used_in_place", callers_memory),
    ("a_graph_replays_the_call", graph),
    ("two_threads_on_two_streams", two_threads),
    ("every_device_at_once", every_device),
    ("bytes_around_outputs_stay", guard_bytes),
    ("foreign_and_misaligned_memory_is_refused", refused_memory),
    ("a_profile_names_the_stages", profile),
];

fn ten_runs(cuda: &Cuda) -> Result<(), Failed> {
    for recipe in RECIPES {
        let call = Call::new(Shape::mha(2, 8, 777, 128), DType::F16)
            .by(recipe)
            .with(|problem| problem.with_mask(Mask::Causal(Align::TopLeft)));
        let staged = Staged::new(cuda, &call.problem, &call.recipe, call.tensors())?;
        let mut first = None;
        for run in 0..10 {
            staged.run()?;
            let out = staged.output()?.out;
            let first = first.get_or_insert_with(|| out.clone());
            assert_eq!(*first, out, "{recipe}, run {run}");
        }
    }
    Ok(())
}

fn callers_memory(cuda: &Cuda) -> Result<(), Failed> {
    RECIPES
        .into_iter()
        .try_for_each(|recipe| callers_memory_of(cuda, recipe))
}

fn callers_memory_of(cuda: &Cuda, recipe: Recipe) -> Result<(), Failed> {
    let call = Call::new(gqa(200, 300, 128), DType::F16).by(recipe);
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
    RECIPES
        .into_iter()
        .try_for_each(|recipe| graph_of(cuda, recipe))
}

fn graph_of(cuda: &Cuda, recipe: Recipe) -> Result<(), Failed> {
    let call = Call::new(gqa(200, 300, 64), DType::F16).by(recipe);
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
        let mut fresh = Call::new(gqa(200, 300, 64), DType::F16).by(recipe);
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
    RECIPES
        .into_iter()
        .try_for_each(|recipe| two_threads_of(cuda, recipe))
}

fn two_threads_of(cuda: &Cuda, recipe: Recipe) -> Result<(), Failed> {
    let shape = Shape::mha(1, 8, 1500, 128);
    let want = Call::new(shape, DType::F16).by(recipe).run(cuda)?.out;
    let start = Barrier::new(2);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let stream = cuda.stream().context().new_stream().unwrap();
                let own = Cuda::on_stream(stream).unwrap();
                let call = Call::new(shape, DType::F16).by(recipe);
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
    let call = Call::new(Shape::mha(1, 16, 1500, 128), DType::F16).by(recipe);
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
    let [quantized, integers, half] = RECIPES;
    for (recipe, head_dim, dtype) in [
        (quantized, 64, DType::F16),
        (quantized, 100, DType::F16),
        (quantized, 128, DType::BF16),
        (quantized, 250, DType::F32),
        (integers, 64, DType::F16),
        (integers, 100, DType::F16),
        (integers, 128, DType::BF16),
        (integers, 250, DType::F32),
        (half, 64, DType::F16),
        (half, 100, DType::BF16),
        (half, 250, DType::F16),
    ] {
        let shape = gqa(130, 200, head_dim);
        let call = Call::new(shape, dtype)
            .by(recipe)
            .with(|problem| problem.with_outputs(Outputs::OAndLse));
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
    let [quantized, integers, half] = RECIPES;
    for (recipe, heads, stages) in [
        (quantized, 2, &["statistics", "encode", "attend"][..]),
        (quantized, 16, &["prepare", "attend"]),
        (integers, 2, &["statistics", "encode", "attend"]),
        (integers, 16, &["prepare", "attend"]),
        (half, 8, &["attend"]),
    ] {
        let call = Call::new(Shape::mha(1, heads, 2048, 128), DType::F16).by(recipe);
        let staged = Staged::new(cuda, &call.problem, &call.recipe, call.tensors())?;
        staged.run()?;
        let profile = staged.profile()?;
        let names: Vec<&str> = profile.stages.iter().map(|(name, _)| *name).collect();
        assert_eq!(names, stages, "{recipe}, {heads} heads");
        assert_eq!(profile.clock, Clock::Device);
        assert!(
            profile.stages.iter().all(|(_, time)| !time.is_zero()),
            "{profile:?}"
        );
    }
    Ok(())
}
