//! A plan: the stages of one problem, recorded on demand.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sageattn_core::{
    Buffer, Clock, Description, Divisor, Error, Grouping, Io, Mask, Outputs, Plan, Problem,
    Profile, PvQuant, QkQuant, Recipe, Reference, Rounding, Smooth, Unsupported,
};
use sageattn_shaders::{
    AttendVariant, ChannelOp, DType, KEY_TILE, PACK_ROWS, Pv, RowGroups, Variant,
};

use crate::decode::{self, Decode, MAX_QUERIES};
use crate::device::Context;
use crate::memory::{Binder, Extents, Workspace, binding_need, index, padded};
use crate::pipeline::{ParamCache, Step, record};
use crate::quantize::{self, MAX_SAMPLES, shader_dtype};
use crate::tier::{self, Forced, Request, Tier};

/// Scores stay below 3e38 for |Q| and |K| up to 1e15 under any softmax scale up to this.
const MAX_SOFTMAX_SCALE: f32 = 1e5;

/// The kernels chosen for one problem and recipe.
#[derive(Clone, Debug)]
pub(crate) struct Kernels {
    pub(crate) recipe: Recipe,
    grouping: Grouping,
    /// What V's channels are divided by, if anything.
    pub(crate) v_scale: Option<ChannelOp>,
    /// The attention kernel. The stages before it write what it reads.
    pub(crate) attend: AttendVariant,
}

/// How a call is computed.
#[derive(Clone, Debug)]
enum Method {
    /// Q and K are quantized and V laid out, then attended to.
    Quantized(Kernels),
    /// The tensors are read as they are, a range of keys at a time.
    Decode(Decode),
}

/// An attention plan on a wgpu device.
pub struct WgpuPlan {
    context: Arc<Context>,
    problem: Problem,
    recipe: Recipe,
    method: Method,
    workspace: Workspace,
    params: ParamCache,
}

/// The groups and the second product of the recipes that the kernels know.
fn known(recipe: &Recipe) -> Option<(Grouping, RowGroups, RowGroups, Pv)> {
    let QkQuant::Int8(grouping) = recipe.qk else {
        return None;
    };
    let (q, k) = match grouping {
        Grouping::PerToken => (RowGroups::TOKEN, RowGroups::TOKEN),
        Grouping::PerBlock { q: 128, k: 64 } => (RowGroups::BLOCK_128, RowGroups::BLOCK_64),
        Grouping::PerThread { q: 16, k: 128 } => (RowGroups::THREAD_Q16, RowGroups::THREAD_K128),
        _ => return None,
    };
    let pv = match recipe.pv {
        PvQuant::F16 => Pv::F16,
        PvQuant::Int8Dynamic => Pv::I8,
        _ => return None,
    };
    Some((grouping, q, k, pv))
}

/// Every need of a request that the device does not meet.
pub(crate) fn supports(
    context: &Context,
    problem: &Problem,
    recipe: &Recipe,
) -> Result<(), Unsupported> {
    match choose(context, problem, recipe, &context.order()) {
        Ok(_) => Ok(()),
        Err(missing) => Err(context.unsupported(missing)),
    }
}

/// The recipe that the device computes fastest at SageAttention's accuracy.
pub(crate) fn preferred(context: &Arc<Context>, problem: &Problem) -> Recipe {
    let decodes = decode::suits(problem) && supports(context, problem, &Recipe::HALF).is_ok();
    if decodes && context.forced.is_none() {
        return Recipe::HALF;
    }
    let request = request(problem, Pv::F16, RowGroups::BLOCK_128, RowGroups::BLOCK_64);
    let order = context.ranked(&request, &Recipe::SAGE1_B);
    // Without a measurement the order that is known without one.
    let order = order.unwrap_or_else(|_| context.order());
    let kernel = tier::choose(&context.facts, &request, &order);
    match kernel.map(|kernel| Tier::of(&kernel)) {
        Ok(Tier::Dot) if context.forced.is_none() => Recipe::I8_I8_DYN,
        _ => Recipe::SAGE1_B,
    }
}

/// What the choice of the kernel looks at.
fn request(problem: &Problem, pv: Pv, q_groups: RowGroups, k_groups: RowGroups) -> Request {
    let shape = problem.shape();
    Request {
        q_len: shape.q_len,
        kv_len: shape.kv_len,
        heads_per_kv: shape.heads_per_kv(),
        pairs: shape.batch * shape.q_heads,
        // At most 256: `Problem` says so.
        head_dim: index(shape.head_dim as u64),
        pv,
        q_groups,
        k_groups,
    }
}

fn choose(
    context: &Context,
    problem: &Problem,
    recipe: &Recipe,
    order: &[Tier],
) -> Result<(Method, Workspace), Vec<String>> {
    let shape = problem.shape();
    let mut missing = context.broken.clone();
    let recipes = known(recipe);
    let half = *recipe == Recipe::HALF;
    if recipes.is_none() && !half {
        missing.push(format!(
            "recipe {recipe} (it has sage1-t, sage1-b, i8-i8-dyn and half)"
        ));
    }
    if half && shape.q_len > MAX_QUERIES {
        missing.push(format!(
            "recipe half for {} queries (at most {MAX_QUERIES}: its kernel is made for decoding)",
            shape.q_len
        ));
        return Err(missing);
    }
    if !matches!(problem.mask(), Mask::None | Mask::Causal(_)) {
        missing.push(format!("mask {:?}", problem.mask()));
    }
    if problem.softmax_scale().abs() > MAX_SOFTMAX_SCALE {
        let scale = problem.softmax_scale();
        missing.push(format!(
            "softmax scale {scale} (at most {MAX_SOFTMAX_SCALE})"
        ));
    }
    if let Smooth::Sampled(n) = recipe.smooth
        && (MAX_SAMPLES..shape.kv_len).contains(&(n.get() as usize))
    {
        missing.push(format!("{n} sampled keys (at most {MAX_SAMPLES})"));
    }
    let limits = &context.facts.limits;
    for (name, has, needs) in [
        (
            "storage buffers per stage",
            limits.max_storage_buffers_per_shader_stage,
            6,
        ),
        (
            "invocations per workgroup",
            limits
                .max_compute_invocations_per_workgroup
                .min(limits.max_compute_workgroup_size_x),
            sageattn_shaders::STAGE_WORKGROUP,
        ),
    ] {
        if has < needs {
            missing.push(format!("{needs} {name} (it has {has})"));
        }
    }
    if half {
        let (decode, workspace) = Decode::new(context, problem);
        missing.extend(size_needs(context, problem, &workspace));
        return match missing.is_empty() {
            true => Ok((Method::Decode(decode), workspace)),
            false => Err(missing),
        };
    }
    let Some((grouping, q_groups, k_groups, pv)) = recipes else {
        return Err(missing);
    };
    let request = request(problem, pv, q_groups, k_groups);
    let kernel = match context.forced {
        Some(Forced::Kernel(kernel)) => Ok(kernel),
        _ => tier::choose(&context.facts, &request, order),
    };
    let kernel = match kernel {
        Ok(kernel) => kernel,
        Err(needs) => {
            missing.extend(needs);
            return Err(missing);
        }
    };
    let dtype = shader_dtype(problem.dtype());
    let smooth = recipe.smooth != Smooth::Off;
    let lse = problem.outputs() == Outputs::OAndLse;
    let kernels = Kernels {
        recipe: *recipe,
        grouping,
        v_scale: match (pv, dtype) {
            (Pv::I8, _) => Some(ChannelOp::CodeScale),
            (Pv::F16, DType::F16) => None,
            (Pv::F16, DType::BF16 | DType::F32) => Some(ChannelOp::RangeFactor),
        },
        attend: AttendVariant {
            dtype,
            head_dim: request.head_dim,
            pv,
            q_groups,
            k_groups,
            causal: problem.mask() != Mask::None,
            lse,
            lse_bias: lse && smooth,
            kernel,
        },
    };
    let workspace = kernels.workspace(problem);
    missing.extend(size_needs(context, problem, &workspace));
    match missing.is_empty() {
        true => Ok((Method::Quantized(kernels), workspace)),
        false => Err(missing),
    }
}

/// What is too large for the device even when the call is cut into single KV heads. Tensors count as
/// dense here; views with gaps are looked at when they are bound.
fn size_needs(context: &Context, problem: &Problem, workspace: &Workspace) -> Vec<String> {
    let shape = problem.shape();
    let row = (shape.head_dim * problem.dtype().size()) as u64;
    let queries = (shape.q_len * shape.heads_per_kv()) as u64;
    let code = u64::from(workspace.code_bytes);
    let q_codes = workspace.q_codes.shape[2] * workspace.q_codes.shape[3] * code;
    let parts = [
        ("q", queries * row),
        ("k", shape.kv_len as u64 * row),
        ("v", shape.kv_len as u64 * row),
        ("out", queries * row),
        ("q_codes", q_codes * shape.heads_per_kv() as u64),
        (
            "k_codes",
            workspace.k_codes.shape[2] * workspace.k_codes.shape[3] * code,
        ),
        ("values", workspace.values.shape[2]),
    ];
    let limit = context.max_binding();
    let too_large = parts.into_iter().filter(|&(_, bytes)| bytes > limit);
    let mut missing: Vec<_> = too_large
        .map(|(name, bytes)| binding_need(name, bytes, limit))
        .collect();
    let floats = workspace.float_bytes();
    if floats > limit {
        missing.push(format!(
            "a binding of {floats} bytes for the f32 part of the workspace (its limit is {limit})"
        ));
    }
    let (bytes, limit) = (
        workspace.scratch.bytes(),
        context.facts.limits.max_buffer_size,
    );
    if bytes > limit {
        missing.push(format!(
            "a workspace buffer of {bytes} bytes (its limit is {limit})"
        ));
    }
    missing
}

impl Kernels {
    fn workspace(&self, problem: &Problem) -> Workspace {
        let shape = problem.shape();
        let attend = &self.attend;
        let tiles = padded(shape.kv_len) as u64 / u64::from(KEY_TILE);
        let reduced = [
            quantize::samples(self.recipe.smooth, shape.kv_len),
            self.v_scale.map(|_| shape.kv_len),
        ];
        let most_rows = reduced.into_iter().flatten().max();
        let extents = Extents {
            qk_dim: attend.qk_dim(),
            codes: attend.codes(),
            value_bytes: tiles * u64::from(attend.values().tile_bytes() * attend.pv_dim()),
            q_groups: self.grouping.q().count(shape.q_len),
            k_groups: self.grouping.k().count(shape.kv_len),
            smooth: self.recipe.smooth != Smooth::Off,
            v_scaled: self.v_scale.is_some(),
            lse_bias: attend.lse_bias,
            splits: most_rows.map_or(0, quantize::splits),
            ranges: attend.split().map(|keys| {
                let packs = shape.heads_per_kv() * shape.q_len.div_ceil(PACK_ROWS as usize);
                [packs, shape.kv_len.div_ceil(keys as usize)]
            }),
        };
        Workspace::new(shape, &extents)
    }
}

impl Method {
    /// The attention kernel, whose name stands for the call.
    fn variant(&self) -> Variant {
        match self {
            Self::Quantized(kernels) => Variant::Attend(kernels.attend),
            Self::Decode(decode) => decode.variant(),
        }
    }

    /// Keys per step of the softmax. Ranges of keys that are merged each have a maximum of their own,
    /// which `Rounding` cannot say; it takes the running one, and P differs by its rounding alone.
    fn key_tile(&self) -> u32 {
        match self {
            Self::Quantized(kernels) => kernels.attend.key_tile(),
            Self::Decode(decode) => decode.split(),
        }
    }

    fn stale(&self) -> f32 {
        match self {
            Self::Quantized(kernels) => f32::from(kernels.attend.stale()),
            Self::Decode(_) => 0.0,
        }
    }

    fn divisor(&self) -> Divisor {
        match self {
            Self::Quantized(kernels) if kernels.attend.divides_by_unrounded() => {
                Divisor::UnroundedP
            }
            Self::Quantized(_) | Self::Decode(_) => Divisor::RoundedP,
        }
    }
}

impl WgpuPlan {
    pub(crate) fn new(
        context: &Arc<Context>,
        problem: &Problem,
        recipe: &Recipe,
    ) -> Result<Self, Error> {
        let refuse = |missing| Error::from(context.unsupported(missing));
        // Before anything is measured: whether there is a choice at all.
        choose(context, problem, recipe, &context.order()).map_err(refuse)?;
        let request = known(recipe).map(|(_, q, k, pv)| request(problem, pv, q, k));
        let (method, workspace) = loop {
            let order = match &request {
                Some(request) => context.ranked(request, recipe)?,
                None => Vec::new(),
            };
            let chosen = choose(context, problem, recipe, &order).map_err(refuse)?;
            // A kernel is compiled and tried now, not in the first run. One that is wrong strikes its
            // tier from the order, or its instructions, so this ends.
            let trying = matches!(context.forced, Some(Forced::Kernel(_) | Forced::Decode(_)));
            let right = trying
                || match &chosen.0 {
                    Method::Quantized(kernels) => {
                        context.is_right(&kernels.attend, problem, recipe)?
                    }
                    Method::Decode(decode) => match decode.unproven() {
                        Some(variant) => context.decodes_right(&variant, problem)?,
                        None => true,
                    },
                };
            if right {
                break chosen;
            }
        };
        context.pipelines.get(context, &method.variant())?;
        let plan = Self {
            context: Arc::clone(context),
            problem: *problem,
            recipe: *recipe,
            method,
            workspace,
            params: ParamCache::default(),
        };
        tracing::debug!(variant = %plan.describe(), "planned");
        Ok(plan)
    }

    /// Records the whole call into the caller's encoder, which must not have a pass open. Nothing is
    /// submitted, and no buffer is mapped or written from the host: what the kernels need to know of
    /// this call's layouts lies in a small uniform buffer that is created the first time a plan meets
    /// them and never changes, so any number of calls may be recorded before the first is submitted.
    /// Calls recorded on one workspace run one after the other: wgpu orders them.
    ///
    /// # Errors
    /// As [`Plan::run`].
    pub fn encode(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        io: &Io<'_>,
        workspace: &dyn Buffer,
    ) -> Result<(), Error> {
        let steps = self.steps(io, workspace)?;
        record(&self.context, encoder, &steps, Some(&self.params), None)
    }

    /// K mean, quantization, attention: the data's path, in order.
    fn steps<'a>(
        &'a self,
        io: &'a Io<'a>,
        workspace: &'a dyn Buffer,
    ) -> Result<Vec<Step<'a>>, Error> {
        io.check_run(&self.problem, workspace, self.workspace_bytes())?;
        let binder = Binder::new(&self.context, io, &self.workspace, workspace)?;
        let slices = binder.slices()?;
        match &self.method {
            Method::Decode(decode) => decode.steps(&binder, &slices),
            Method::Quantized(kernels) => {
                let mut steps = kernels.prepare(&binder, &slices)?;
                for slice in &slices {
                    steps.push(kernels.attend(&binder, slice)?);
                }
                for slice in &slices {
                    steps.extend(kernels.merge(&binder, slice).transpose()?);
                }
                Ok(steps)
            }
        }
    }

    /// GPU time of each step, by timestamps.
    fn device_times(&self, steps: &[Step<'_>]) -> Result<Vec<Duration>, Error> {
        let context = &self.context;
        let count = 2 * steps.len();
        let bytes = 8 * count as u64;
        let queries = context.scoped("creating timestamp queries", || {
            context.device.create_query_set(&wgpu::QuerySetDescriptor {
                label: Some("sageattn profile"),
                ty: wgpu::QueryType::Timestamp,
                count: index(count as u64),
            })
        })?;
        let resolved = context.create_buffer(&wgpu::BufferDescriptor {
            label: Some("sageattn profile"),
            size: bytes,
            usage: wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC,
            mapped_at_creation: false,
        })?;
        let mut encoder = context.device.create_command_encoder(&Default::default());
        record(
            context,
            &mut encoder,
            steps,
            Some(&self.params),
            Some(&queries),
        )?;
        context.scoped("resolving timestamps", || {
            encoder.resolve_query_set(&queries, 0..index(count as u64), &resolved, 0);
        })?;
        context.submit(encoder)?;
        let mut ticks = vec![0u64; count];
        context.read(&resolved, 0, bytemuck::cast_slice_mut(&mut ticks))?;
        let period = f64::from(context.queue.get_timestamp_period());
        let spans = ticks.as_chunks::<2>().0.iter().map(|[start, end]| {
            let nanos = end.saturating_sub(*start) as f64 * period;
            Duration::from_secs_f64(nanos * 1e-9)
        });
        Ok(spans.collect())
    }

    /// Time of each step by the host's clock, submitted and waited for one by one.
    fn host_times(&self, steps: &[Step<'_>]) -> Result<Vec<Duration>, Error> {
        let context = &self.context;
        context.wait()?;
        let timed = steps.iter().map(|step| {
            let mut encoder = context.device.create_command_encoder(&Default::default());
            let step = std::slice::from_ref(step);
            record(context, &mut encoder, step, Some(&self.params), None)?;
            let start = Instant::now();
            context.submit(encoder)?;
            context.wait()?;
            Ok(start.elapsed())
        });
        timed.collect()
    }
}

impl fmt::Debug for WgpuPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WgpuPlan")
            .field("variant", &self.method.variant().name())
            .field("problem", &self.problem)
            .field("workspace_bytes", &self.workspace_bytes())
            .finish_non_exhaustive()
    }
}

impl Plan for WgpuPlan {
    fn describe(&self) -> Description {
        Description {
            variant: self.method.variant().name(),
            recipe: self.recipe,
            rounding: Rounding {
                key_tile: self.method.key_tile() as usize,
                reference: Reference::Maximum {
                    stale: self.method.stale(),
                },
                divisor: self.method.divisor(),
                ..Rounding::of(&self.recipe)
            },
            scratch: self.workspace.scratch.ranges().to_vec(),
        }
    }

    fn workspace_bytes(&self) -> u64 {
        self.workspace.scratch.bytes()
    }

    fn run(&self, io: &Io<'_>, workspace: &dyn Buffer) -> Result<(), Error> {
        let mut encoder = self
            .context
            .device
            .create_command_encoder(&Default::default());
        self.encode(&mut encoder, io, workspace)?;
        self.context.submit(encoder)
    }

    fn profile(&self, io: &Io<'_>, workspace: &dyn Buffer) -> Result<Profile, Error> {
        let steps = self.steps(io, workspace)?;
        let features = self.context.device.features();
        let timestamps = features.contains(wgpu::Features::TIMESTAMP_QUERY)
            && 2 * steps.len() <= wgpu::QUERY_SET_MAX_QUERIES as usize;
        let (times, clock) = match timestamps {
            true => (self.device_times(&steps)?, Clock::Device),
            false => (self.host_times(&steps)?, Clock::Host),
        };
        let mut stages: Vec<(&'static str, Duration)> = Vec::new();
        for (step, time) in steps.iter().zip(times) {
            match stages.last_mut() {
                Some((stage, total)) if *stage == step.stage => *total += time,
                _ => stages.push((step.stage, time)),
            }
        }
        Ok(Profile { stages, clock })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_and_oracles_count_groups_alike() {
        for recipe in [Recipe::SAGE1_T, Recipe::SAGE1_B, Recipe::I8_I8_DYN] {
            let (grouping, q, k, _) = known(&recipe).unwrap();
            for row in 0..700u32 {
                assert_eq!(
                    q.of(row) as usize,
                    grouping.q().of(row as usize),
                    "{recipe}"
                );
                assert_eq!(
                    k.of(row) as usize,
                    grouping.k().of(row as usize),
                    "{recipe}"
                );
            }
        }
    }

    #[test]
    fn recipes_without_kernels_are_told_apart() {
        for recipe in [Recipe::SAGE1_VB, Recipe::SAGE2_I8_F8, Recipe::EXACT] {
            assert_eq!(known(&recipe), None, "{recipe}");
        }
    }
}
