//! Callers' own devices, buffers and encoders; errors; what must not change.

use libtest_mimic::Failed;
use sageattn_core::{
    Align, Backend, Clock, DType, Error, HostBuffer, HostTensor, Io, Layout, LseView, Mask,
    Outputs, Plan, Problem, Recipe, Shape, Staged, TensorView,
};
use sageattn_wgpu::Wgpu;
use sageattn_wgpu::wgpu;

use crate::Test;
use crate::support::{Inputs, check, noise, run};

pub(crate) const TESTS: &[Test] = &[
    (
        "a_device_with_default_limits_agrees_with_the_oracle",
        default_limits,
    ),
    (
        "replaced_instructions_agree_with_the_oracle",
        replaced_instructions,
    ),
    ("two_calls_in_one_encoder_keep_their_own_views", one_encoder),
    ("bytes_around_the_output_stay", guard_bytes),
    ("two_runs_are_bitwise_the_same", deterministic),
    ("cut_dispatches_change_no_bit", cut_dispatches),
    (
        "tensors_above_the_binding_limit_are_cut_or_refused",
        binding_limit,
    ),
    ("buffers_that_do_not_fit_are_errors", bad_buffers),
    ("a_profile_has_every_stage", profile),
];

const RECIPES: [Recipe; 3] = [Recipe::SAGE1_B, Recipe::SAGE1_T, Recipe::I8_I8_DYN];

/// A device as an application would make it: nothing asked for that this crate wants.
pub(crate) fn plain_device(gpu: &Wgpu, limits: wgpu::Limits) -> Result<Wgpu, Failed> {
    let name = gpu.device().name;
    let adapter = Wgpu::adapters()
        .into_iter()
        .find(|adapter| adapter.get_info().name == name)
        .ok_or("the adapter is gone")?;
    let request = adapter.request_device(&wgpu::DeviceDescriptor {
        required_limits: limits,
        ..Default::default()
    });
    let (device, queue) = pollster::block_on(request)?;
    Ok(Wgpu::new(device, queue)?)
}

fn default_limits(gpu: &Wgpu) -> Result<(), Failed> {
    let small = plain_device(gpu, wgpu::Limits::default())?;
    for recipe in RECIPES {
        for head_dim in [40, 128, 256] {
            let problem = Problem::new(Shape::mha(1, 2, 150, head_dim), DType::F16)?
                .with_mask(Mask::Causal(Align::TopLeft))
                .with_outputs(Outputs::OAndLse);
            check(&small, &problem, &recipe, &Inputs::noise(problem.shape()))?;
        }
    }
    Ok(())
}

fn replaced_instructions(gpu: &Wgpu) -> Result<(), Failed> {
    let plain = gpu.without_native_instructions();
    for recipe in [Recipe::SAGE1_B, Recipe::I8_I8_DYN] {
        let problem = Problem::new(Shape::mha(1, 1, 90, 64), DType::BF16)?;
        check(&plain, &problem, &recipe, &Inputs::noise(problem.shape()))?;
    }
    Ok(())
}

/// Q, K and V of two sequences interleaved in one buffer of the application, O in another.
fn one_encoder(gpu: &Wgpu) -> Result<(), Failed> {
    let (device, queue) = (gpu.wgpu_device(), gpu.wgpu_queue());
    let shape = Shape::mha(1, 2, 90, 32);
    let problem = Problem::new(shape, DType::F16)?.with_outputs(Outputs::OAndLse);
    let plan = gpu.plan_wgpu(&problem, &Recipe::SAGE1_B)?;

    // [token][q, k, v][sequence][head][channel]
    let token = 3 * 2 * 2 * 32;
    let packed_layout = |part: usize, sequence: usize| {
        let offset = (part * 2 + sequence) * 2 * 32;
        Layout::strided(shape.q(), [0, 32, token], offset)
    };
    let values = noise(9, 90 * token);
    let whole = HostTensor::from_f32(Layout::hnd([1, 1, 90, token]), DType::F16, &values)?;
    let buffer = |size: u64| {
        device.create_buffer(&wgpu::BufferDescriptor {
            label: None,
            size,
            usage: wgpu::BufferUsages::STORAGE
                | wgpu::BufferUsages::COPY_DST
                | wgpu::BufferUsages::COPY_SRC,
            mapped_at_creation: false,
        })
    };
    let packed = buffer(whole.bytes().len() as u64);
    queue.write_buffer(&packed, 0, whole.bytes());
    let packed = gpu.wrap(packed);
    // O of both sequences as NHD, and their LSE behind it, all in one buffer.
    let out_len = 90 * 4 * 32;
    let results = gpu.wrap(buffer(2 * out_len + 4 * 2 * 2 * 96));
    let workspace = gpu.wrap(buffer(plan.workspace_bytes()));

    let mut encoder = device.create_command_encoder(&Default::default());
    for sequence in 0..2 {
        let view = |part| TensorView::new(&packed, packed_layout(part, sequence), DType::F16);
        let out = Layout::strided(shape.q(), [0, 32, 4 * 32], sequence * 2 * 32);
        let io = Io::bind(
            &problem,
            view(0),
            view(1),
            view(2),
            TensorView::new(&results, out, DType::F16),
            Some(LseView {
                buffer: &results,
                offset: usize::try_from(out_len)? / 2 + sequence * 2 * 96,
            }),
        )?;
        plan.encode(&mut encoder, &io, &workspace)?;
    }
    queue.submit([encoder.finish()]);

    let mut bytes = vec![0; usize::try_from(2 * out_len + 4 * 2 * 2 * 96)?];
    gpu.download(&results, 0, &mut bytes)?;
    let (out_bytes, lse_bytes) = bytes.split_at(usize::try_from(2 * out_len)?);
    for sequence in 0..2 {
        let part = |part| {
            let layout = packed_layout(part, sequence);
            HostTensor::from_bytes(layout, DType::F16, whole.bytes().to_vec())
        };
        let dense = Inputs {
            q: part(0)?.to_f32(),
            k: part(1)?.to_f32(),
            v: part(2)?.to_f32(),
        };
        let expected = run(gpu, &problem, &Recipe::SAGE1_B, &dense)?;
        let out = Layout::strided(shape.q(), [0, 32, 4 * 32], sequence * 2 * 32);
        let got = HostTensor::from_bytes(out, DType::F16, out_bytes.to_vec())?.to_f32();
        if got != expected.out {
            return Err(format!("O of sequence {sequence} differs").into());
        }
        let lse: Vec<f32> = lse_bytes.as_chunks().0[sequence * 2 * 96..][..180]
            .iter()
            .map(|&word| f32::from_le_bytes(word))
            .collect();
        if Some(lse) != expected.lse {
            return Err(format!("LSE of sequence {sequence} differs").into());
        }
    }
    Ok(())
}

fn guard_bytes(gpu: &Wgpu) -> Result<(), Failed> {
    for (dtype, head_dim) in [
        (DType::F16, 13),
        (DType::BF16, 7),
        (DType::F32, 5),
        (DType::F16, 66),
    ] {
        let shape = Shape::mha(2, 2, 70, head_dim);
        let problem = Problem::new(shape, dtype)?;
        let inputs = Inputs::noise(&shape);
        let row = head_dim.next_multiple_of(16) + 16;
        let layout = Layout::strided(shape.q(), [2 * 70 * row, 70 * row, row], 32);
        let end = (layout.end().ok_or("too large")? + 64) * dtype.size();
        let poison = vec![0xa5; end.next_multiple_of(4)];

        let plan = gpu.plan(&problem, &Recipe::SAGE1_B)?;
        let workspace = gpu.alloc(plan.workspace_bytes() + 64)?;
        let tail = vec![0x5a; 64];
        gpu.upload(workspace.as_ref(), plan.workspace_bytes(), &tail)?;
        let out = gpu.alloc(poison.len() as u64)?;
        gpu.upload(out.as_ref(), 0, &poison)?;
        let mut buffers = Vec::new();
        for tensor in &inputs.tensors(&problem) {
            let mut bytes = tensor.bytes().to_vec();
            bytes.resize(bytes.len().next_multiple_of(4), 0);
            let buffer = gpu.alloc(bytes.len() as u64)?;
            gpu.upload(buffer.as_ref(), 0, &bytes)?;
            buffers.push((buffer, *tensor.layout()));
        }
        let view = |i: usize| TensorView::new(buffers[i].0.as_ref(), buffers[i].1, dtype);
        let out_view = TensorView::new(out.as_ref(), layout, dtype);
        let io = Io::bind(&problem, view(0), view(1), view(2), out_view, None)?;
        plan.run(&io, workspace.as_ref())?;

        let mut bytes = vec![0; poison.len()];
        gpu.download(out.as_ref(), 0, &mut bytes)?;
        let got = HostTensor::from_bytes(layout, dtype, bytes.clone())?.to_f32();
        if got != run(gpu, &problem, &Recipe::SAGE1_B, &inputs)?.out {
            return Err(format!("{dtype} d{head_dim}: O differs from a dense call's").into());
        }
        let mut written = vec![false; bytes.len()];
        for pair in 0..4 {
            for query in 0..70 {
                let start = layout.row(pair / 2, pair % 2, query) * dtype.size();
                written[start..start + head_dim * dtype.size()].fill(true);
            }
        }
        let strays = bytes
            .iter()
            .zip(&written)
            .filter(|&(&byte, &w)| !w && byte != 0xa5);
        if strays.count() > 0 {
            return Err(format!("{dtype} d{head_dim}: bytes around O changed").into());
        }
        let mut guard = vec![0; 64];
        gpu.download(workspace.as_ref(), plan.workspace_bytes(), &mut guard)?;
        if guard != tail {
            return Err("bytes behind the workspace changed".into());
        }
    }
    Ok(())
}

fn deterministic(gpu: &Wgpu) -> Result<(), Failed> {
    for recipe in RECIPES {
        let problem =
            Problem::new(Shape::mha(1, 3, 200, 64), DType::F32)?.with_outputs(Outputs::OAndLse);
        let inputs = Inputs::noise(problem.shape());
        let first = run(gpu, &problem, &recipe, &inputs)?;
        let second = run(gpu, &problem, &recipe, &inputs)?;
        if bits(&first.out) != bits(&second.out) || first.lse != second.lse {
            return Err(format!("{recipe}: two runs differ").into());
        }
    }
    Ok(())
}

fn cut_dispatches(gpu: &Wgpu) -> Result<(), Failed> {
    let problem = Problem::new(Shape::mha(2, 3, 300, 32), DType::F16)?
        .with_mask(Mask::Causal(Align::BottomRight))
        .with_outputs(Outputs::OAndLse);
    let inputs = Inputs::noise(problem.shape());
    let whole = run(gpu, &problem, &Recipe::I8_I8_DYN, &inputs)?;
    for ops in [1, 1 << 22, 1 << 24] {
        let cut = run(
            &gpu.with_dispatch_ops(ops),
            &problem,
            &Recipe::I8_I8_DYN,
            &inputs,
        )?;
        if bits(&whole.out) != bits(&cut.out) || whole.lse != cut.lse {
            return Err(format!("{ops} operations per dispatch change the result").into());
        }
    }
    Ok(())
}

fn binding_limit(gpu: &Wgpu) -> Result<(), Failed> {
    let problem =
        Problem::new(Shape::mha(2, 2, 200, 64), DType::BF16)?.with_outputs(Outputs::OAndLse);
    let inputs = Inputs::noise(problem.shape());
    let limited = |bytes| {
        plain_device(
            gpu,
            wgpu::Limits {
                max_storage_buffer_binding_size: bytes,
                ..wgpu::Limits::default()
            },
        )
    };
    let whole = plain_device(gpu, wgpu::Limits::default())?;
    let expected = run(&whole, &problem, &Recipe::SAGE1_B, &inputs)?;
    // One head of V takes 32 KiB as laid out: two heads fit 80 KiB, one fits 40.
    for bytes in [80 << 10, 40 << 10] {
        let got = run(&limited(bytes)?, &problem, &Recipe::SAGE1_B, &inputs)?;
        if bits(&got.out) != bits(&expected.out) || got.lse != expected.lse {
            return Err(format!("cutting at {bytes} bytes changes the result").into());
        }
    }
    match limited(20 << 10)?.plan(&problem, &Recipe::SAGE1_B) {
        Err(Error::Unsupported(refusal)) => {
            let text = refusal.to_string();
            let wanted = "25600 bytes for one KV head of k (its limit is 20480)";
            if !text.contains(wanted) {
                return Err(format!("the refusal does not say {wanted:?}: {text}").into());
            }
        }
        other => return Err(format!("not refused: {other:?}").into()),
    }
    Ok(())
}

fn bad_buffers(gpu: &Wgpu) -> Result<(), Failed> {
    let shape = Shape::mha(1, 1, 16, 32);
    let problem = Problem::new(shape, DType::F32)?;
    let plan = gpu.plan(&problem, &Recipe::SAGE1_B)?;
    let layout = Layout::hnd(shape.q());
    let bytes = 4 * 16 * 32;
    let good = [
        gpu.alloc(bytes)?,
        gpu.alloc(bytes)?,
        gpu.alloc(bytes)?,
        gpu.alloc(bytes)?,
    ];
    let workspace = gpu.alloc(plan.workspace_bytes())?;
    let attempt = |q: &dyn sageattn_core::Buffer, workspace: &dyn sageattn_core::Buffer| {
        let view = |buffer| TensorView::new(buffer, layout, DType::F32);
        let [_, k, v, out] = &good;
        let [k, v, out] = [k, v, out].map(|buffer| view(buffer.as_ref()));
        let io = Io::bind(&problem, view(q), k, v, out, None)?;
        plan.run(&io, workspace)
    };
    attempt(good[0].as_ref(), workspace.as_ref())?;

    let host = HostBuffer::new(vec![0; usize::try_from(bytes)?]);
    let foreign = attempt(&host, workspace.as_ref());
    if !matches!(foreign, Err(Error::ForeignBuffer { tensor: "q", .. })) {
        return Err(format!("a host buffer gave {foreign:?}").into());
    }
    let other = plain_device(gpu, wgpu::Limits::default())?.alloc(bytes)?;
    let foreign = attempt(other.as_ref(), workspace.as_ref());
    if !matches!(foreign, Err(Error::ForeignBuffer { tensor: "q", .. })) {
        return Err(format!("another device's buffer gave {foreign:?}").into());
    }
    let unusable = gpu.wgpu_device().create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size: bytes,
        usage: wgpu::BufferUsages::COPY_DST,
        mapped_at_creation: false,
    });
    let unusable = attempt(&gpu.wrap(unusable), workspace.as_ref());
    if !matches!(&unusable, Err(Error::Invalid { argument, .. }) if argument == "q") {
        return Err(format!("a buffer without STORAGE gave {unusable:?}").into());
    }
    // Q behind the workspace, in its buffer: nothing overlaps, but one dispatch reads and writes it.
    let shared = gpu.alloc(plan.workspace_bytes() + bytes)?;
    let at = usize::try_from(plan.workspace_bytes())? / 4;
    let [batch, head, row] = layout.strides();
    let behind = Layout::strided(shape.q(), [batch, head, row], at);
    let [_, k, v, out] = &good;
    let view = |buffer, layout| TensorView::new(buffer, layout, DType::F32);
    let io = Io::bind(
        &problem,
        view(shared.as_ref(), behind),
        view(k.as_ref(), layout),
        view(v.as_ref(), layout),
        view(out.as_ref(), layout),
        None,
    )?;
    let result = plan.run(&io, shared.as_ref());
    if !matches!(&result, Err(Error::Invalid { argument, .. }) if argument == "workspace") {
        return Err(format!("a shared workspace gave {result:?}").into());
    }
    if !matches!(
        gpu.alloc(u64::MAX / 2),
        Err(Error::Unsupported(_) | Error::OutOfMemory { .. })
    ) {
        return Err("half of all bytes were allocated".into());
    }
    let past = gpu.download(good[0].as_ref(), bytes, &mut [0; 4]);
    if !matches!(past, Err(Error::Invalid { .. })) {
        return Err(format!("a download past the end gave {past:?}").into());
    }
    // The device is still usable after all that.
    attempt(good[0].as_ref(), workspace.as_ref())?;
    Ok(gpu.synchronize()?)
}

fn profile(gpu: &Wgpu) -> Result<(), Failed> {
    let problem = Problem::new(Shape::mha(1, 2, 256, 64), DType::F16)?;
    let inputs = Inputs::noise(problem.shape());
    let [q, k, v] = inputs.tensors(&problem);
    for gpu in [gpu.clone(), plain_device(gpu, wgpu::Limits::default())?] {
        let staged = Staged::new(&gpu, &problem, &Recipe::SAGE1_B, [&q, &k, &v])?;
        staged.run()?;
        let profile = staged.profile()?;
        let names: Vec<_> = profile.stages.iter().map(|(name, _)| *name).collect();
        if names != ["k_mean", "quantize_q", "quantize_k", "quantize_v", "attend"] {
            return Err(format!("stages {names:?}").into());
        }
        let timestamps = gpu
            .wgpu_device()
            .features()
            .contains(wgpu::Features::TIMESTAMP_QUERY);
        let clock = if timestamps {
            Clock::Device
        } else {
            Clock::Host
        };
        if profile.clock != clock || profile.total().is_zero() {
            return Err(format!("{profile:?}").into());
        }
    }
    Ok(())
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}
