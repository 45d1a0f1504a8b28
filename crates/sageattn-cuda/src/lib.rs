//! Quantized attention on NVIDIA's tensor cores: the `cuda` backend of `sageattn`.
//!
//! Needs a driver (12.0 or later), a GPU of compute capability 9.0 and NVIDIA's run-time compiler NVRTC (12.1
//! or later); no CUDA toolkit, neither to build nor to run. Kernels are compiled when first planned and kept on
//! disk. What is missing on a machine is told, not guessed:
//!
//! ```
//! use sageattn_core::Backend;
//! use sageattn_cuda::Cuda;
//!
//! match Cuda::all() {
//!     Ok(devices) => devices.iter().for_each(|cuda| println!("{:?}", cuda.device())),
//!     Err(error) => println!("{error}"), // no CUDA device: libcuda.so.1 not found
//! }
//! ```
//!
//! Tensors that are on the device already stay where they are: [`Cuda::on_stream`] takes the caller's
//! stream, [`CudaBuffer`] wraps a [`CudaSlice`](cudarc::driver::CudaSlice) or a device address. `cudarc`
//! is re-exported; its version is part of this crate's interface.
//!
//! # Plans on CUDA
//! - [`Plan::run`] makes the stream's context current for the calling thread, enqueues one kernel
//!   (`half`), two or three and returns. It can be captured in a CUDA graph; the graph needs plan, tensors and workspace for
//!   as long as it is launched.
//! - A plan belongs to the stream that it was made on, and its kernels run in that stream's order.
//!   Different plans, each with its own workspace, may run at the same time on different streams,
//!   devices and threads.
//! - [`Backend::plan`] compiles and loads: not while the stream is being captured.
//!
//! | environment variable | meaning |
//! |---|---|
//! | `SAGEATTN_NVRTC` | the NVRTC library to use, a path |
//! | `SAGEATTN_CACHE` | the folder for compiled kernels; empty for none |

mod attend_half;
mod attend_sm90;
mod buffer;
pub mod compile;
mod launch;
mod plan;
mod preferred;
mod quantize;
mod tensor_map;
mod variant;

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

pub use buffer::CudaBuffer;
use bytemuck::Zeroable;
pub use cudarc;
use cudarc::driver::sys::{CUdevice_attribute, CUresult};
use cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};
use sageattn_core::scratch::Scratch;
use sageattn_core::{
    Backend, Buffer, DeviceInfo, DeviceKind, Error, Plan, Problem, Recipe, Unsupported,
};
use sageattn_kernels::abi::{AttnParams, HalfParams, PrepareParams};

use crate::compile::{Cache, Nvrtc};
use crate::launch::{Kernel, Params};
use crate::plan::half::{self, HalfChoice};
use crate::plan::{Choice, CudaPlan, Machine, Preparation, Prepared, Stages};
pub use crate::plan::{RowMaximum, variants};
pub use crate::variant::{Attend, Half, HalfTile, Prepare, PrepareOnce, PvCodes, Variant, WIDTHS};

const NAME: &str = "cuda";

/// The compute capability that the kernels are written for.
const CAPABILITY: (i32, i32) = (9, 0);

/// The oldest driver whose interface has all that is used.
const OLDEST_DRIVER: i32 = 12_000;

/// Blocks of the largest cluster that the compute capability allows.
const LARGEST_CLUSTER: u32 = 16;

/// From this driver on, launches that overlap can be captured in graphs.
const OVERLAP_IN_GRAPHS: i32 = 12_030;

/// An NVIDIA GPU, and the stream that its work goes to. Clones share both, and what is compiled.
#[derive(Clone, Debug)]
pub struct Cuda {
    stream: Arc<CudaStream>,
    nvrtc: Arc<Nvrtc>,
    cache: Cache,
    info: DeviceInfo,
    machine: Machine,
    prepare: Loaded<PrepareParams>,
    attend: Loaded<AttnParams>,
    half: Loaded<HalfParams>,
}

/// Kernels in use on this device.
type Loaded<P> = Arc<Mutex<HashMap<Variant, Arc<Kernel<P>>>>>;

impl Cuda {
    /// The device of that number, in the driver's order, on its primary context and a stream of its
    /// own.
    ///
    /// # Errors
    /// [`Error::Device`] without driver, device or NVRTC, [`Error::Unsupported`] for a compute capability that this
    /// version has no kernels for. The text says which.
    pub fn new(ordinal: usize) -> Result<Self, Error> {
        driver()?;
        let failed = |error| Error::device(format!("opening CUDA device {ordinal}"), error);
        let context = CudaContext::new(ordinal).map_err(failed)?;
        check_capability(&context)?;
        Self::on_stream(context.new_stream().map_err(failed)?)
    }

    /// The caller's stream and context.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn on_stream(stream: Arc<CudaStream>) -> Result<Self, Error> {
        let driver = driver()?;
        let context = stream.context();
        check_capability(context)?;
        let nvrtc = Nvrtc::find(Some(driver / 1000))?;
        let failed = |error| Error::device("asking for the device's properties", error);
        let count = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let multiprocessors = context.attribute(count).map_err(failed)?;
        let info = DeviceInfo {
            name: context.name().map_err(failed)?,
            driver: format!("CUDA driver {}, {nvrtc}", dotted(driver)),
            kind: DeviceKind::Gpu,
        };
        Ok(Self {
            nvrtc: Arc::new(nvrtc),
            cache: Cache::from_env(),
            info,
            machine: Machine {
                multiprocessors: multiprocessors.unsigned_abs(),
                overlap: driver >= OVERLAP_IN_GRAPHS,
                largest_cluster: LARGEST_CLUSTER,
                row_maximum: None,
            },
            prepare: Loaded::default(),
            attend: Loaded::default(),
            half: Loaded::default(),
            stream,
        })
    }

    /// Fixes how `sage2-i8-f8` keeps row maxima. Without it plans choose: [`RowMaximum::Running`] below 1024
    /// keys, [`RowMaximum::Lazy`] from there on.
    #[must_use]
    pub fn with_row_maximum(mut self, maximum: RowMaximum) -> Self {
        self.machine.row_maximum = Some(maximum);
        self
    }

    /// Each device that the driver lists: ready, or why not.
    ///
    /// # Errors
    /// [`Error::Device`] when there is no usable driver.
    pub fn devices() -> Result<Vec<Result<Self, Error>>, Error> {
        driver()?;
        let count = CudaContext::device_count();
        let count = count.map_err(|error| no_device(error.to_string()))?;
        Ok((0..count.unsigned_abs() as usize).map(Self::new).collect())
    }

    /// Every usable device.
    ///
    /// # Errors
    /// [`Error::Device`] when there is none, with the reason for each.
    pub fn all() -> Result<Vec<Self>, Error> {
        let (mut ready, mut reasons) = (Vec::new(), Vec::new());
        for (ordinal, device) in Self::devices()?.into_iter().enumerate() {
            match device {
                Ok(device) => ready.push(device),
                Err(error) => {
                    tracing::debug!(ordinal, %error, "passed over a CUDA device");
                    reasons.push(error.to_string());
                }
            }
        }
        if ready.is_empty() {
            reasons.dedup();
            return Err(no_device(match reasons.is_empty() {
                true => "the driver lists none".to_owned(),
                false => reasons.join("; "),
            }));
        }
        Ok(ready)
    }

    /// The stream that all work goes to.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    fn choose(
        &self,
        problem: &Problem,
        recipe: &Recipe,
        machine: Machine,
    ) -> Result<Choice, Unsupported> {
        plan::choose(problem, recipe, machine).map_err(|missing| self.refusal(missing))
    }

    fn choose_half(&self, problem: &Problem) -> Result<HalfChoice, Unsupported> {
        half::choose(problem, self.machine.multiprocessors).map_err(|missing| self.refusal(missing))
    }

    fn refusal(&self, missing: Vec<String>) -> Unsupported {
        Unsupported {
            backend: format!("{NAME} ({})", self.info.name),
            missing,
        }
    }

    /// Chooses, and loads the kernels that prepare K and V. Where this device, perhaps a part of one,
    /// cannot place clusters of the size chosen, chooses among smaller ones.
    fn prepared(&self, problem: &Problem, recipe: &Recipe) -> Result<(Choice, Prepared), Error> {
        let mut machine = self.machine;
        loop {
            let choice = self.choose(problem, recipe, machine)?;
            let kernel = |variant, shared| self.kernel(&self.prepare, variant, shared);
            let prepared = match choice.prepare {
                Preparation::Twice(variant) => Prepared::Twice {
                    variant,
                    statistics: kernel(Variant::Statistics(variant.statistics()), 0)?,
                    encode: kernel(Variant::Encode(variant), 0)?,
                },
                Preparation::Once {
                    variant,
                    takes_turns,
                } => {
                    let shared = quantize::once_shared_bytes(&variant);
                    let kernel = kernel(Variant::PrepareOnce(variant), shared)?;
                    let launch = quantize::once(&choice, &variant, 1, PrepareParams::zeroed());
                    let resident = kernel.resident_clusters(&launch)?;
                    if resident == 0 {
                        tracing::debug!(blocks = launch.cluster, "clusters are too large here");
                        machine.largest_cluster = launch.cluster / 2;
                        continue;
                    }
                    let jobs = 2 * choice.batch * choice.kv_heads;
                    Prepared::Once {
                        variant,
                        clusters: if takes_turns {
                            resident.min(jobs)
                        } else {
                            jobs
                        },
                        kernel,
                    }
                }
            };
            return Ok((choice, prepared));
        }
    }

    /// The kernel, loaded and if need be compiled. Two threads that ask at once may both compile.
    fn kernel<P: Params>(
        &self,
        loaded: &Loaded<P>,
        variant: Variant,
        shared: u32,
    ) -> Result<Arc<Kernel<P>>, Error> {
        let find = || locked(loaded, |kernels| kernels.get(&variant).cloned());
        if let Some(kernel) = find() {
            return Ok(kernel);
        }
        let cubin = self.nvrtc.cubin(&self.cache, &variant)?;
        let context = self.stream.context();
        let kernel = Kernel::load(context, variant.name(), variant.entry(), &cubin, shared)?;
        let kernel = Arc::new(kernel);
        Ok(locked(loaded, |kernels| {
            kernels.entry(variant).or_insert(kernel).clone()
        }))
    }
}

impl Backend for Cuda {
    fn name(&self) -> &'static str {
        NAME
    }

    fn device(&self) -> DeviceInfo {
        self.info.clone()
    }

    fn supports(&self, problem: &Problem, recipe: &Recipe) -> Result<(), Unsupported> {
        match *recipe {
            Recipe::HALF => self.choose_half(problem).map(|_| ()),
            _ => self.choose(problem, recipe, self.machine).map(|_| ()),
        }
    }

    fn preferred(&self, problem: &Problem) -> Recipe {
        preferred::preferred(problem, self.machine.row_maximum.is_some())
    }

    fn tiers(&self) -> Vec<&'static str> {
        RowMaximum::NAMED.map(|(name, _)| name).to_vec()
    }

    /// `running` or `lazy`: see [`Cuda::with_row_maximum`].
    fn with_tier(&self, tier: &str) -> Result<Arc<dyn Backend>, Error> {
        let named = RowMaximum::NAMED
            .into_iter()
            .find(|(name, _)| *name == tier);
        match named {
            Some((_, maximum)) => Ok(Arc::new(self.clone().with_row_maximum(maximum))),
            None => {
                let known = self.tiers().join(", ");
                let reason = format!("unknown name {tier:?}; {NAME} has {known}");
                Err(Error::invalid("tier", reason))
            }
        }
    }

    fn plan(&self, problem: &Problem, recipe: &Recipe) -> Result<Box<dyn Plan>, Error> {
        let (scratch, stages) = if *recipe == Recipe::HALF {
            let choice = self.choose_half(problem)?;
            let shared = attend_half::shared_bytes(&choice.variant);
            let attend = self.kernel(&self.half, Variant::Half(choice.variant), shared)?;
            (Scratch::default(), Stages::Half { choice, attend })
        } else {
            let (choice, prepared) = self.prepared(problem, recipe)?;
            let (scratch, ranges) = choice.scratch();
            let shared = attend_sm90::shared_bytes(&choice.attend);
            let attend = self.kernel(&self.attend, Variant::Attend(choice.attend), shared)?;
            let stages = Stages::Quantized {
                choice,
                ranges,
                prepared,
                attend,
            };
            (scratch, stages)
        };
        let plan = CudaPlan {
            stream: self.stream.clone(),
            problem: *problem,
            recipe: *recipe,
            scratch,
            stages,
        };
        tracing::debug!(plan = %plan.describe(), stages = ?plan.stages, "planned");
        Ok(Box::new(plan))
    }

    fn alloc(&self, bytes: u64) -> Result<Box<dyn Buffer>, Error> {
        let len = usize::try_from(bytes).map_err(|_| Error::OutOfMemory { bytes })?;
        // SAFETY: device memory is read by kernels and copied as bytes, for which any content is valid.
        match unsafe { self.stream.alloc::<u8>(len.max(1)) } {
            Ok(slice) => Ok(Box::new(CudaBuffer::from_slice(slice))),
            Err(DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                Err(Error::OutOfMemory { bytes })
            }
            Err(error) => Err(Error::device(format!("allocating {bytes} bytes"), error)),
        }
    }

    fn upload(&self, buffer: &dyn Buffer, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        let buffer = buffer::in_context(self.stream.context(), "buffer", buffer)?;
        buffer.write(&self.stream, offset, bytes)
    }

    fn download(&self, buffer: &dyn Buffer, offset: u64, bytes: &mut [u8]) -> Result<(), Error> {
        let buffer = buffer::in_context(self.stream.context(), "buffer", buffer)?;
        buffer.read(&self.stream, offset, bytes)
    }

    fn synchronize(&self) -> Result<(), Error> {
        let waited = self.stream.synchronize();
        waited.map_err(|error| Error::device("waiting for the stream", error))
    }
}

/// The driver's version, 12030 for 12.3, once it is known to work.
fn driver() -> Result<i32, Error> {
    static DRIVER: OnceLock<Result<i32, String>> = OnceLock::new();
    let opened = DRIVER.get_or_init(|| {
        // cudarc panics when it finds none of its names; these are two of them.
        let names: &[&str] = match cfg!(windows) {
            true => &["nvcuda.dll"],
            false => &["libcuda.so.1", "libcuda.so"],
        };
        // SAFETY: the driver's initialisers have no preconditions.
        if !(names.iter()).any(|name| unsafe { libloading::Library::new(*name) }.is_ok()) {
            return Err(format!("{} not found", names[0]));
        }
        result::init().map_err(|error| error.to_string())?;
        let mut version = 0;
        // SAFETY: a valid pointer to int.
        let asked = unsafe { sys::cuDriverGetVersion(&mut version) }.result();
        asked.map_err(|error| error.to_string())?;
        if version < OLDEST_DRIVER {
            let (have, need) = (dotted(version), dotted(OLDEST_DRIVER));
            return Err(format!("the driver is for CUDA {have}, {need} is needed"));
        }
        Ok(version)
    });
    opened.clone().map_err(no_device)
}

fn dotted(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

fn no_device(reason: String) -> Error {
    Error::device("no CUDA device", reason)
}

fn check_capability(context: &CudaContext) -> Result<(), Error> {
    let failed = |error| Error::device("asking for the compute capability", error);
    let (major, minor) = context.compute_capability().map_err(failed)?;
    let mut missing = Vec::new();
    if (major, minor) != CAPABILITY {
        missing.push(format!(
            "compute capability {major}.{minor}: this version has kernels for {}.{} only",
            CAPABILITY.0, CAPABILITY.1
        ));
    }
    let name = context.name().map_err(failed)?;
    Ok(Unsupported::unless_empty(
        format!("{NAME} ({name})"),
        missing,
    )?)
}

/// The map under its lock. A panic while it was held cannot leave it half changed.
fn locked<K: Eq + Hash, V, T>(
    map: &Mutex<HashMap<K, V>>,
    f: impl FnOnce(&mut HashMap<K, V>) -> T,
) -> T {
    f(&mut map.lock().unwrap_or_else(PoisonError::into_inner))
}
