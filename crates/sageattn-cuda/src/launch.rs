//! Loaded kernels and their launches: the only file that hands memory to the device's code.

use std::ffi::{CString, c_void};
use std::fmt;
use std::marker::PhantomData;
use std::mem::offset_of;
use std::ptr;
use std::sync::Arc;

use bytemuck::Pod;
use cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};
use sageattn_core::Error;
use sageattn_kernels::abi::{AttnParams, HalfParams, PrepareParams};

/// A struct that kernels take as their only parameter, by value, as `__grid_constant__`.
///
/// # Safety
/// Its fields have the sizes and the order of its twin in abi.cuh.
pub(crate) unsafe trait Params: Pod {
    /// The `extern "C"` functions with the one parameter `const __grid_constant__ Self`.
    const ENTRIES: &'static [&'static str];
    /// Every field and where it lies, in bytes: the compiler of the kernels confirms it.
    const FIELDS: &'static [(&'static str, usize)];
}

macro_rules! fields {
    ($($field:ident)*) => {
        &[$((stringify!($field), offset_of!(Self, $field))),*]
    };
}

// SAFETY: ten device addresses, six i64, eight u32, one device address: 168 bytes without padding, as
// PrepareParams in abi.cuh; compiling a kernel checks size and offsets.
unsafe impl Params for PrepareParams {
    const ENTRIES: &'static [&'static str] = &["kv_statistics", "kv_encode", "kv_prepare_sm90"];
    const FIELDS: &'static [(&'static str, usize)] = fields! {
        k v k_sums v_maxima k_mean v_scales v_residuals k_scales k_codes v_codes k_stride v_stride kv_heads kv_len
        head_dim tiles pieces tiles_per_piece samples heads next_work
    };
}

// SAFETY: nine device addresses, six i64, nine u32, one f32, one i64, one device address: 176 bytes
// without padding, as AttnParams in abi.cuh; compiling a kernel checks size and offsets.
unsafe impl Params for AttnParams {
    const ENTRIES: &'static [&'static str] = &["attn_i8_f8_sm90", "attn_i8_i8_sm90"];
    const FIELDS: &'static [(&'static str, usize)] = fields! {
        q o lse k_codes v_codes k_scales v_scales v_residuals k_mean q_stride o_stride batch q_heads
        q_heads_per_kv_head q_len kv_len head_dim tiles row_blocks heads_together softmax_scale diagonal next_work
    };
}

// SAFETY: three tensor maps of 128 bytes, two device addresses, four i64, eight u32, one f32, eleven u32:
// 512 bytes without padding, as HalfParams in abi.cuh; compiling a kernel checks size and offsets.
unsafe impl Params for HalfParams {
    const ENTRIES: &'static [&'static str] = &["attn_half_sm90"];
    const FIELDS: &'static [(&'static str, usize)] = fields! {
        q_map k_map v_map o lse o_stride diagonal heads q_heads q_heads_per_kv_head q_len kv_len head_dim
        row_blocks items softmax_scale reserved
    };
}

/// One launch: how many threads, and on what.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Launch<P> {
    /// Blocks, in one dimension.
    pub(crate) grid: u32,
    /// Threads in a block.
    pub(crate) block: u32,
    /// Blocks of a cluster, which share their shared memory; 1 for none. Divides `grid`.
    pub(crate) cluster: u32,
    /// Dynamic shared memory of a block, in bytes.
    pub(crate) shared: u32,
    /// The kernel waits itself for the launch before it (griddepcontrol.wait), so it may start early.
    pub(crate) overlaps_previous: bool,
    /// What the kernel is told. Addresses in it come from tensors that were bound to the problem, and
    /// from a workspace that was checked for size and overlap.
    pub(crate) params: P,
}

/// Clusters up to this size run wherever clusters do; larger ones where a kernel has been allowed them.
const PORTABLE_CLUSTER: u32 = 8;

impl<P> Launch<P> {
    fn cluster_attribute(&self) -> sys::CUlaunchAttribute {
        sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue {
                clusterDim: sys::CUlaunchAttributeValue_union__bindgen_ty_1 {
                    x: self.cluster,
                    y: 1,
                    z: 1,
                },
            },
        }
    }

    fn overlap_attribute() -> sys::CUlaunchAttribute {
        sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue {
                programmaticStreamSerializationAllowed: 1,
            },
        }
    }

    fn config(
        &self,
        stream: sys::CUstream,
        attributes: &mut [sys::CUlaunchAttribute],
    ) -> sys::CUlaunchConfig {
        sys::CUlaunchConfig {
            gridDimX: self.grid,
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: self.block,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: self.shared,
            hStream: stream,
            attrs: attributes.as_mut_ptr(),
            #[expect(clippy::cast_possible_truncation, reason = "at most two")]
            numAttrs: attributes.len() as u32,
        }
    }
}

/// A kernel on a device, of those that take `P`.
pub(crate) struct Kernel<P> {
    context: Arc<CudaContext>,
    module: sys::CUmodule,
    function: sys::CUfunction,
    name: String,
    params: PhantomData<fn(P)>,
}

// SAFETY: module and function are handles of the driver, which may be used from any thread whose
// current context is theirs; every use binds it first.
unsafe impl<P> Send for Kernel<P> {}
// SAFETY: as for `Send`; the driver synchronises launches of one function itself.
unsafe impl<P> Sync for Kernel<P> {}

impl<P: Params> Kernel<P> {
    /// Loads a cubin and allows its kernel as much dynamic shared memory as its launches ask for.
    pub(crate) fn load(
        context: &Arc<CudaContext>,
        name: String,
        entry: &str,
        cubin: &[u8],
        shared: u32,
    ) -> Result<Self, Error> {
        let failed = |error: DriverError| Error::device(format!("loading {name}"), error);
        if !P::ENTRIES.contains(&entry) {
            let reason = format!("{entry} does not take {}", std::any::type_name::<P>());
            return Err(Error::device(format!("loading {name}"), reason));
        }
        context.bind_to_thread().map_err(failed)?;
        // SAFETY: a whole cubin, from the compiler or from a cache entry whose checksum held.
        let module = unsafe { result::module::load_data(cubin.as_ptr().cast()) }.map_err(failed)?;
        // From here on, drop unloads it.
        let mut kernel = Self {
            context: context.clone(),
            module,
            function: ptr::null_mut(),
            name: name.clone(),
            params: PhantomData,
        };
        let entry = CString::new(entry).unwrap_or_default();
        // SAFETY: a module loaded in the current context.
        kernel.function = unsafe { result::module::get_function(module, entry) }.map_err(failed)?;
        #[expect(clippy::cast_possible_wrap, reason = "at most 227 KiB")]
        // SAFETY: a function of the current context.
        unsafe {
            result::function::set_function_attribute(
                kernel.function,
                sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                shared as i32,
            )
        }
        .map_err(failed)?;
        Ok(kernel)
    }

    /// How many of the launch's clusters the device runs at a time: 0 where it cannot place one. Allows
    /// the kernel clusters of that size.
    pub(crate) fn resident_clusters(&self, launch: &Launch<P>) -> Result<u32, Error> {
        let failed = |error| Error::device(format!("placing clusters of {}", self.name), error);
        // Loaded by another thread, perhaps.
        self.context.bind_to_thread().map_err(failed)?;
        if launch.cluster > PORTABLE_CLUSTER {
            // SAFETY: a function of the current context.
            unsafe {
                result::function::set_function_attribute(
                    self.function,
                    sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED,
                    1,
                )
            }
            .map_err(failed)?;
        }
        let mut attributes = [launch.cluster_attribute()];
        let config = launch.config(ptr::null_mut(), &mut attributes);
        let mut clusters = 0;
        // SAFETY: a function of the current context, and pointers that outlive the call.
        match unsafe { sys::cuOccupancyMaxActiveClusters(&mut clusters, self.function, &config) } {
            sys::CUresult::CUDA_ERROR_INVALID_CLUSTER_SIZE => Ok(0),
            code => code
                .result()
                .map_err(failed)
                .map(|()| clusters.max(0).unsigned_abs()),
        }
    }

    /// Enqueues the kernel. The stream's context is the kernel's, and current.
    pub(crate) fn enqueue(&self, stream: &CudaStream, launch: &Launch<P>) -> Result<(), Error> {
        // A cluster of one block is no cluster.
        let mut attributes = [launch.cluster_attribute(), Launch::<P>::overlap_attribute()];
        let first = usize::from(launch.cluster == 1);
        let end = 1 + usize::from(launch.overlaps_previous);
        let config = launch.config(stream.cu_stream(), &mut attributes[first..end]);
        let mut params = launch.params;
        let mut arguments: [*mut c_void; 1] = [ptr::from_mut(&mut params).cast()];
        // SAFETY:
        // - the kernel's parameter list is one `const __grid_constant__ P`, and `arguments` holds one
        //   pointer to a `P` (`Params::ENTRIES`, checked on load); the driver copies it before it
        //   returns, as it does `config` and `attributes`;
        // - addresses in `P` cover what the kernel reads and writes: tensors through `Io::bind`, scratch
        //   through `Io::check_run`, all in the kernel's context (`CudaBuffer::address_in`);
        // - memory is used in the order of `stream`; who frees it or uses it on another stream orders
        //   that, as the documentation of `Plan` on CUDA demands.
        unsafe {
            sys::cuLaunchKernelEx(
                &config,
                self.function,
                arguments.as_mut_ptr(),
                ptr::null_mut(),
            )
        }
        .result()
        .map_err(|error| Error::device(format!("launching {}", self.name), error))
    }
}

impl<P> Drop for Kernel<P> {
    fn drop(&mut self) {
        // SAFETY: loaded once, in this context; the function is not used again.
        let unloaded = self
            .context
            .bind_to_thread()
            .and_then(|()| unsafe { result::module::unload(self.module) });
        if let Err(error) = unloaded {
            tracing::debug!(kernel = self.name, %error, "unloading");
        }
    }
}

impl<P> fmt::Debug for Kernel<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kernel")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}
