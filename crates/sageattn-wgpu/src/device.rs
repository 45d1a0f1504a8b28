//! Devices and buffers: opened here or handed in by the caller.

use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use sageattn_core::{
    Backend, Buffer, DeviceInfo, DeviceKind, Error, Plan, Problem, Recipe, Unsupported,
};
use sageattn_shaders::Native;

use crate::buffer::{Owner, WgpuBuffer, check_copy};
use crate::pipeline::Pipelines;
use crate::plan::{self, WgpuPlan};
use crate::tier::{Facts, Forced, Tier};
use crate::tune::Findings;
use crate::vulkan;

/// A wgpu device as a backend. Cloning it gives another handle to the same device and kernels.
#[derive(Clone)]
pub struct Wgpu {
    pub(crate) context: Arc<Context>,
}

/// What the parts of this crate share of a device.
pub(crate) struct Context {
    pub(crate) device: wgpu::Device,
    pub(crate) queue: wgpu::Queue,
    owner: Owner,
    pub(crate) facts: Facts,
    /// What every plan must take, if the caller said so.
    pub(crate) forced: Option<Forced>,
    pub(crate) info: wgpu::AdapterInfo,
    pub(crate) native: Native,
    pub(crate) pipelines: Pipelines,
    pub(crate) findings: Findings,
    /// Operations that one dispatch may hold.
    pub(crate) dispatch_ops: u64,
    /// What the self-test found wrong and nothing can replace.
    pub(crate) broken: Vec<String>,
    /// Why the device was lost. Only set on devices opened here: a device has one such callback, and on
    /// the caller's it is the caller's.
    lost: Arc<Mutex<Option<String>>>,
}

/// The features that this crate makes use of where an adapter has them. None is needed:
///
/// | feature | for |
/// |---|---|
/// | `TIMESTAMP_QUERY` | [`Plan::profile`] on the device's own clock |
/// | `EXPERIMENTAL_COOPERATIVE_MATRIX`, `SHADER_F16` | matrix cores |
/// | `SUBGROUP`, `SUBGROUP_BARRIER` | the same, and few queries against many keys |
/// | `PASSTHROUGH_SHADERS` | matrix cores in 8-bit integers, on Vulkan |
///
/// wgpu opens a device with an experimental feature only if its descriptor says so:
/// [`wanted_descriptor`] does.
pub fn wanted_features(adapter: &wgpu::Adapter) -> wgpu::Features {
    use wgpu::Features;
    adapter.features()
        & (Features::TIMESTAMP_QUERY
            | Features::EXPERIMENTAL_COOPERATIVE_MATRIX
            | Features::SHADER_F16
            | Features::SUBGROUP
            | Features::SUBGROUP_BARRIER
            | Features::PASSTHROUGH_SHADERS)
}

/// What [`Wgpu::open`] asks an adapter for: [`wanted_features`], [`wanted_limits`], and leave to use the
/// experimental ones of these features. Add to it what the rest of a program needs.
pub fn wanted_descriptor(adapter: &wgpu::Adapter) -> wgpu::DeviceDescriptor<'static> {
    wgpu::DeviceDescriptor {
        label: Some("sageattn"),
        required_features: wanted_features(adapter),
        required_limits: wanted_limits(adapter),
        // SAFETY: The one experimental feature asked for is cooperative matrices, whose dangers wgpu
        // names as shapes that a device has not got and accesses out of bounds. The kernels that use
        // them take shapes from the adapter's own list, run in whole subgroups under uniform control
        // flow, and load and store inside padded ranges (`attend/matrix.rs`); each is compared with
        // the CPU's result before its first use, and not used when it differs.
        experimental_features: unsafe { wgpu::ExperimentalFeatures::enabled() },
        ..Default::default()
    }
}

/// The limits to ask an adapter for: wgpu's defaults, raised to what the adapter has wherever a larger
/// tensor or tile profits.
pub fn wanted_limits(adapter: &wgpu::Adapter) -> wgpu::Limits {
    let there = adapter.limits();
    wgpu::Limits {
        max_buffer_size: there.max_buffer_size,
        max_storage_buffer_binding_size: there.max_storage_buffer_binding_size,
        max_compute_workgroup_storage_size: there.max_compute_workgroup_storage_size,
        max_compute_invocations_per_workgroup: there.max_compute_invocations_per_workgroup,
        max_compute_workgroup_size_x: there.max_compute_workgroup_size_x,
        min_storage_buffer_offset_alignment: there.min_storage_buffer_offset_alignment,
        min_uniform_buffer_offset_alignment: there.min_uniform_buffer_offset_alignment,
        ..wgpu::Limits::default()
    }
    .or_worse_values_from(&there)
}

impl Wgpu {
    /// Opens the adapter that wgpu holds for the fastest.
    ///
    /// # Errors
    /// [`Error::Device`] when there is no adapter or it gives no device.
    pub fn best() -> Result<Self, Error> {
        let options = wgpu::RequestAdapterOptions {
            power_preference: wgpu::PowerPreference::HighPerformance,
            ..Default::default()
        };
        let adapter = pollster::block_on(instance().request_adapter(&options))
            .map_err(|source| Error::device("finding a GPU through wgpu", source))?;
        Self::open(&adapter)
    }

    /// Every adapter that wgpu finds, software ones too, for [`Wgpu::open`].
    pub fn adapters() -> Vec<wgpu::Adapter> {
        pollster::block_on(instance().enumerate_adapters(wgpu::Backends::all()))
    }

    /// Opens a device on an adapter, by [`wanted_descriptor`].
    ///
    /// # Errors
    /// [`Error::Device`] when the adapter gives no device or the self-test cannot run.
    pub fn open(adapter: &wgpu::Adapter) -> Result<Self, Error> {
        let request = adapter.request_device(&wanted_descriptor(adapter));
        let (device, queue) = pollster::block_on(request).map_err(|source| {
            Error::device(format!("opening {}", adapter.get_info().name), source)
        })?;
        // wgpu panics on an error that nobody asked for; every call here asks, so this is a last resort.
        device.on_uncaptured_error(Arc::new(|error| {
            tracing::error!(%error, "wgpu reported an error outside any call");
        }));
        let lost = Arc::new(Mutex::new(None));
        let slot = Arc::clone(&lost);
        device.set_device_lost_callback(move |reason, message| {
            let text = format!("{reason:?}: {message}");
            *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(text);
        });
        Self::with_lost_slot(Some(adapter), device, queue, lost)
    }

    /// Works on the caller's device and queue. The device's error handlers stay the caller's; what this
    /// crate causes is caught in error scopes of its own.
    ///
    /// Create the device with [`wanted_limits`]: wgpu's defaults work, with smaller tiles and bindings
    /// of at most 128 MiB. Matrix cores need the adapter as well: see [`Wgpu::on`].
    ///
    /// # Errors
    /// [`Error::Device`] when the self-test cannot run.
    pub fn new(device: wgpu::Device, queue: wgpu::Queue) -> Result<Self, Error> {
        Self::with_lost_slot(None, device, queue, Arc::default())
    }

    /// As [`Wgpu::new`], on a device of this adapter: only the adapter tells which shapes of matrices
    /// its devices multiply. Create the device by [`wanted_descriptor`]; what it lacks of that is done
    /// without.
    ///
    /// # Errors
    /// As [`Wgpu::new`].
    pub fn on(
        adapter: &wgpu::Adapter,
        device: wgpu::Device,
        queue: wgpu::Queue,
    ) -> Result<Self, Error> {
        Self::with_lost_slot(Some(adapter), device, queue, Arc::default())
    }

    fn with_lost_slot(
        adapter: Option<&wgpu::Adapter>,
        device: wgpu::Device,
        queue: wgpu::Queue,
        lost: Arc<Mutex<Option<String>>>,
    ) -> Result<Self, Error> {
        let info = device.adapter_info();
        // A second's work on the slowest of its kind: drivers reset a GPU that answers nothing for two.
        let dispatch_ops = match info.device_type {
            wgpu::DeviceType::DiscreteGpu | wgpu::DeviceType::Cpu => 1 << 40,
            _ => 1 << 36,
        };
        let mut context = Context {
            facts: Facts {
                limits: device.limits(),
                features: device.features(),
                matrices: adapter
                    .map(wgpu::Adapter::cooperative_matrix_properties)
                    .unwrap_or_default(),
                i8_matrices: vulkan::i8_matrices(&device),
                subgroup: subgroup(&info),
                // Metal's functions for matrices take pointers to numbers.
                vector_items: info.backend != wgpu::Backend::Metal,
                lone_components: info.backend == wgpu::Backend::Vulkan,
            },
            forced: None,
            native: Native::ALL,
            pipelines: Pipelines::default(),
            findings: Findings::default(),
            broken: Vec::new(),
            device,
            queue,
            owner: Owner::default(),
            info,
            dispatch_ops,
            lost,
        };
        context.self_test()?;
        context.prove_matrix_layout()?;
        Ok(Self {
            context: Arc::new(context),
        })
    }

    /// The same device with another bound on the work of one dispatch, in operations of the two matrix
    /// products. Lower it where other work on the GPU must not wait, or where a watchdog is strict.
    #[must_use]
    pub fn with_dispatch_ops(&self, ops: u64) -> Self {
        self.with(|context| context.dispatch_ops = ops)
    }

    /// The same device without the instructions that the self-test may strike out: kernels do their work
    /// the long way round, with the same results. For drivers whose faults the self-test misses.
    #[must_use]
    pub fn without_native_instructions(&self) -> Self {
        self.with(|context| {
            context.native = Native {
                dot: false,
                pack: false,
            };
            // Compiled kernels are known by their variant, which does not tell the two apart.
            context.pipelines = Pipelines::default();
            context.findings = Findings::default();
        })
    }

    /// The same device, on which every plan takes this tier: for comparisons, for tests, and for
    /// results that stay the same whatever a later version prefers. A request that the tier does not
    /// take is refused.
    ///
    /// Without it the first plan of a kind measures the tiers that could take it (100 ms), so which one it
    /// takes depends on what the device was doing meanwhile. With it nothing is measured: the same problem
    /// and recipe get the same kernel, and the same bits, in every run on the device. A kernel's first use
    /// still compares it with the CPU.
    ///
    /// ```no_run
    /// use sageattn_core::{DType, Plan, Problem, Recipe, Shape};
    /// use sageattn_wgpu::{Tier, Wgpu};
    ///
    /// let gpu = Wgpu::best()?.with_tier(Tier::Dot)?;
    /// let problem = Problem::new(Shape::mha(1, 8, 512, 64), DType::F16)?;
    /// let plan = gpu.plan_wgpu(&problem, &Recipe::SAGE1_B)?;
    /// assert!(plan.describe().variant.starts_with("attend_dot_"));
    /// # Ok::<(), sageattn_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Unsupported`] with what the device lacks for the tier.
    pub fn with_tier(&self, tier: Tier) -> Result<Self, Error> {
        let context = &self.context;
        let mut lacks = tier.lacks(&context.facts);
        lacks.extend(context.findings.struck(tier));
        if !lacks.is_empty() {
            let in_tier = |lack| format!("tier {tier}: {lack}");
            let missing = lacks.into_iter().map(in_tier).collect();
            return Err(context.unsupported(missing).into());
        }
        Ok(self.with(|context| context.forced = Some(Forced::Tier(tier))))
    }

    /// The tiers that this device has and nothing was found wrong with, in the order in which plans try
    /// them where nothing has been measured. How a plan was made is told by the name of its variant.
    pub fn tiers(&self) -> Vec<Tier> {
        let facts = &self.context.facts;
        let mut tiers = self.context.order();
        tiers.retain(|tier| tier.lacks(facts).is_empty());
        tiers
    }

    pub(crate) fn with(&self, change: impl FnOnce(&mut Context)) -> Self {
        let old = &self.context;
        let mut context = Context {
            device: old.device.clone(),
            queue: old.queue.clone(),
            owner: old.owner.clone(),
            facts: old.facts.clone(),
            forced: old.forced,
            info: old.info.clone(),
            native: old.native,
            pipelines: old.pipelines.clone(),
            findings: old.findings.clone(),
            dispatch_ops: old.dispatch_ops,
            broken: old.broken.clone(),
            lost: Arc::clone(&old.lost),
        };
        change(&mut context);
        Self {
            context: Arc::new(context),
        }
    }

    /// The device, to create buffers and encoders on.
    pub fn wgpu_device(&self) -> &wgpu::Device {
        &self.context.device
    }

    /// The queue that [`Plan::run`] submits to.
    pub fn wgpu_queue(&self) -> &wgpu::Queue {
        &self.context.queue
    }

    /// A buffer of this device as a tensor's memory: for this [`Wgpu`] and those made from it. The buffer
    /// needs the usage `STORAGE`, and a size that covers its tensors up to a multiple of 4 bytes.
    ///
    /// The caller vouches that it is this device's: wgpu panics when a buffer of another instance is
    /// used, and gives no means to tell beforehand.
    pub fn wrap(&self, buffer: wgpu::Buffer) -> WgpuBuffer {
        WgpuBuffer {
            owner: self.context.owner.clone(),
            buffer,
        }
    }

    /// As [`Backend::plan`], with the type that can also [`encode`](WgpuPlan::encode).
    ///
    /// # Errors
    /// As [`Backend::plan`].
    pub fn plan_wgpu(&self, problem: &Problem, recipe: &Recipe) -> Result<WgpuPlan, Error> {
        WgpuPlan::new(&self.context, problem, recipe)
    }
}

impl fmt::Debug for Wgpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.context.fmt(f)
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wgpu")
            .field("name", &self.info.name)
            .field("backend", &self.info.backend)
            .field("native", &self.native)
            .finish_non_exhaustive()
    }
}

impl Backend for Wgpu {
    fn name(&self) -> &'static str {
        "wgpu"
    }

    fn device(&self) -> DeviceInfo {
        let info = &self.context.info;
        let driver = format!("{} {} {}", info.backend, info.driver, info.driver_info);
        DeviceInfo {
            name: info.name.clone(),
            driver: driver.trim_end().to_owned(),
            kind: match info.device_type {
                wgpu::DeviceType::Cpu => DeviceKind::SoftwareGpu,
                _ => DeviceKind::Gpu,
            },
        }
    }

    fn supports(&self, problem: &Problem, recipe: &Recipe) -> Result<(), Unsupported> {
        plan::supports(&self.context, problem, recipe)
    }

    /// `half` for few queries, where quantizing costs more than it saves. For more, `sage1-b` where a
    /// tier of matrix cores takes it; else `i8-i8-dyn`, whose two products are both packed dot products.
    fn preferred(&self, problem: &Problem) -> Recipe {
        plan::preferred(&self.context, problem)
    }

    fn tiers(&self) -> Vec<&'static str> {
        Self::tiers(self).into_iter().map(Tier::name).collect()
    }

    fn with_tier(&self, tier: &str) -> Result<Arc<dyn Backend>, Error> {
        Ok(Arc::new(Self::with_tier(self, tier.parse()?)?))
    }

    fn notes(&self) -> Vec<String> {
        let context = &self.context;
        let mut notes = context.findings.notes();
        if !context.native.dot {
            notes.push("packed dot products are replaced by integer arithmetic".to_owned());
        }
        if !context.native.pack {
            notes.push("the packing of f16 is replaced by integer arithmetic".to_owned());
        }
        notes.extend(
            context
                .broken
                .iter()
                .map(|need| format!("not usable for want of {need}")),
        );
        notes
    }

    fn plan(&self, problem: &Problem, recipe: &Recipe) -> Result<Box<dyn Plan>, Error> {
        Ok(Box::new(self.plan_wgpu(problem, recipe)?))
    }

    fn alloc(&self, bytes: u64) -> Result<Box<dyn Buffer>, Error> {
        let context = &self.context;
        let limit = context.facts.limits.max_buffer_size;
        if bytes > limit {
            let missing = format!("a buffer of {bytes} bytes (its limit is {limit})");
            return Err(context.unsupported(vec![missing]).into());
        }
        // wgpu binds multiples of 4 bytes, and nothing of length zero.
        let size = bytes.max(4).next_multiple_of(4).min(limit);
        let buffer = context.create_buffer(&wgpu::BufferDescriptor {
            label: Some("sageattn tensor"),
            size,
            usage: wgpu::BufferUsages::STORAGE
                | wgpu::BufferUsages::COPY_SRC
                | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        })?;
        Ok(Box::new(self.wrap(buffer)))
    }

    fn upload(&self, buffer: &dyn Buffer, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        let buffer = self.context.own("buffer", buffer)?;
        check_copy(buffer, offset, bytes.len(), wgpu::BufferUsages::COPY_DST)?;
        self.context.scoped("uploading", || {
            self.context.queue.write_buffer(buffer, offset, bytes);
        })
    }

    fn download(&self, buffer: &dyn Buffer, offset: u64, bytes: &mut [u8]) -> Result<(), Error> {
        let buffer = self.context.own("buffer", buffer)?;
        check_copy(buffer, offset, bytes.len(), wgpu::BufferUsages::COPY_SRC)?;
        self.context.read(buffer, offset, bytes)
    }

    fn synchronize(&self) -> Result<(), Error> {
        self.context.wait()
    }
}

/// The smallest and the largest subgroup of an adapter. wgpu reports what Metal allows in general; the
/// GPUs that have matrices have subgroups of 32.
fn subgroup(info: &wgpu::AdapterInfo) -> [u32; 2] {
    match info.backend {
        wgpu::Backend::Metal => [32, 32],
        _ => [info.subgroup_min_size, info.subgroup_max_size],
    }
}

/// One for the process: opening one loads drivers.
fn instance() -> &'static wgpu::Instance {
    static INSTANCE: OnceLock<wgpu::Instance> = OnceLock::new();
    INSTANCE.get_or_init(|| {
        wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env())
    })
}

impl Context {
    /// The tiers to try where nothing has been measured.
    pub(crate) fn order(&self) -> Vec<Tier> {
        let mut order = match self.forced {
            Some(Forced::Tier(tier)) => vec![tier],
            Some(Forced::Kernel(kernel)) => vec![Tier::of(&kernel)],
            Some(Forced::Decode(_)) | None => Tier::ALL.to_vec(),
        };
        if self.forced.is_none() && self.is_software() {
            // Matrices in software cost more than they save.
            order.reverse();
        }
        order.retain(|tier| self.findings.struck(*tier).is_none());
        order
    }

    /// A GPU interface in software.
    pub(crate) fn is_software(&self) -> bool {
        self.info.device_type == wgpu::DeviceType::Cpu
    }

    /// The wgpu buffer behind a tensor of this device.
    pub(crate) fn own<'a>(
        &self,
        tensor: &'static str,
        buffer: &'a dyn Buffer,
    ) -> Result<&'a wgpu::Buffer, Error> {
        buffer
            .as_any()
            .downcast_ref::<WgpuBuffer>()
            .filter(|buffer| buffer.owner == self.owner)
            .map(|buffer| &buffer.buffer)
            .ok_or_else(|| Error::ForeignBuffer {
                tensor,
                backend: self.title(),
            })
    }

    /// How the backend calls itself in messages.
    pub(crate) fn title(&self) -> String {
        format!("wgpu on {}", self.info.name)
    }

    pub(crate) fn unsupported(&self, missing: Vec<String>) -> Unsupported {
        Unsupported {
            backend: self.title(),
            missing,
        }
    }

    /// The largest binding: what the device says, within the 32 bits that kernels count bytes in.
    pub(crate) fn max_binding(&self) -> u64 {
        let limit = self.facts.limits.max_storage_buffer_binding_size;
        limit.min(u64::from(u32::MAX)) & !3
    }

    /// Runs `f` and turns what wgpu reports meanwhile into an error, whatever handlers the device has.
    pub(crate) fn scoped<T>(&self, doing: &str, f: impl FnOnce() -> T) -> Result<T, Error> {
        self.catch(f).map_err(|error| Error::device(doing, error))
    }

    pub(crate) fn catch<T>(&self, f: impl FnOnce() -> T) -> Result<T, wgpu::Error> {
        let memory = self.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let internal = self.device.push_error_scope(wgpu::ErrorFilter::Internal);
        let validation = self.device.push_error_scope(wgpu::ErrorFilter::Validation);
        let result = f();
        let errors = [validation, internal, memory].map(|scope| pollster::block_on(scope.pop()));
        match errors.into_iter().flatten().next() {
            None => Ok(result),
            Some(error) => Err(error),
        }
    }

    pub(crate) fn create_buffer(
        &self,
        descriptor: &wgpu::BufferDescriptor<'_>,
    ) -> Result<wgpu::Buffer, Error> {
        self.catch(|| self.device.create_buffer(descriptor))
            .map_err(|error| match error {
                wgpu::Error::OutOfMemory { .. } => Error::OutOfMemory {
                    bytes: descriptor.size,
                },
                other => Error::device("creating a buffer", other),
            })
    }

    /// Submits one encoder's commands.
    pub(crate) fn submit(&self, encoder: wgpu::CommandEncoder) -> Result<(), Error> {
        self.check_alive()?;
        self.scoped("submitting", || {
            self.queue.submit([encoder.finish()]);
        })
    }

    /// Waits for all submitted work.
    pub(crate) fn wait(&self) -> Result<(), Error> {
        self.device
            .poll(wgpu::PollType::wait_indefinitely())
            .map_err(|source| Error::device("waiting for the GPU", source))?;
        self.check_alive()
    }

    fn check_alive(&self) -> Result<(), Error> {
        let lost = self.lost.lock().unwrap_or_else(PoisonError::into_inner);
        match lost.as_ref() {
            None => Ok(()),
            Some(reason) => Err(Error::device("the device was lost", reason.as_str())),
        }
    }

    /// Waits for all work on a buffer and copies from it, through a buffer that the host can map.
    pub(crate) fn read(
        &self,
        buffer: &wgpu::Buffer,
        offset: u64,
        bytes: &mut [u8],
    ) -> Result<(), Error> {
        // The staging buffer is bounded, so that reading a large tensor back takes no second copy of it.
        const PIECE: usize = 64 << 20;
        let staging = self.create_buffer(&wgpu::BufferDescriptor {
            label: Some("sageattn download"),
            size: bytes.len().clamp(4, PIECE) as u64,
            usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        })?;
        for (number, piece) in bytes.chunks_mut(PIECE).enumerate() {
            let at = offset + (number * PIECE) as u64;
            let mut encoder = self.device.create_command_encoder(&Default::default());
            self.scoped("reading a buffer", || {
                encoder.copy_buffer_to_buffer(buffer, at, &staging, 0, piece.len() as u64);
            })?;
            self.submit(encoder)?;
            let (sender, receiver) = std::sync::mpsc::channel();
            let slice = staging.slice(..piece.len() as u64);
            self.scoped("mapping a buffer", || {
                slice.map_async(wgpu::MapMode::Read, move |result| {
                    // The receiver lives until the wait below has run this callback.
                    let _ = sender.send(result);
                });
            })?;
            self.wait()?;
            match receiver.recv() {
                Ok(Ok(())) => {}
                Ok(Err(source)) => return Err(Error::device("mapping a buffer", source)),
                Err(source) => return Err(Error::device("mapping a buffer", source)),
            }
            let mapped = slice
                .get_mapped_range()
                .map_err(|source| Error::device("mapping a buffer", source))?;
            piece.copy_from_slice(&mapped);
            drop(mapped);
            staging.unmap();
        }
        Ok(())
    }
}
