//! Device memory: the caller's own, wrapped without a copy.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr, result};
use sageattn_core::{Buffer, Error, ROW_ALIGN, TensorView};

use crate::NAME;

/// Device memory of one CUDA context: a [`CudaSlice`] of the caller's, or a raw device address.
///
/// Work runs in the order of the stream that a [`Cuda`](crate::Cuda) has. Memory that other streams
/// write before, or read or free after, is ordered by the caller, with
/// [`CudaStream::join`](cudarc::driver::CudaStream::join) or an event; cudarc's own event tracking does
/// not see this library's kernels.
pub struct CudaBuffer {
    context: Arc<CudaContext>,
    address: u64,
    bytes: u64,
    /// The slice, where it is ours to free.
    owner: Option<Box<dyn Any + Send + Sync>>,
}

impl CudaBuffer {
    /// Takes a slice over; [`into_slice`](Self::into_slice) gives it back.
    pub fn from_slice<T: Send + Sync + 'static>(slice: CudaSlice<T>) -> Self {
        // Waits, on its own stream, for the slice's last tracked write.
        let (address, tracked) = slice.device_ptr(slice.stream());
        drop(tracked);
        Self {
            context: slice.context().clone(),
            address,
            bytes: slice.num_bytes() as u64,
            owner: Some(Box::new(slice)),
        }
    }

    /// The slice given to [`from_slice`](Self::from_slice); `None` when it was another type's, or this
    /// wraps a raw address.
    pub fn into_slice<T: 'static>(self) -> Option<CudaSlice<T>> {
        let slice = self.owner?.downcast::<CudaSlice<T>>().ok()?;
        Some(*slice)
    }

    /// Wraps memory that someone else owns: another library's tensor, a part of a slice.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the address is not a multiple of 16 bytes.
    ///
    /// # Safety
    /// - `address` starts `bytes` bytes of device memory that kernels in `context` may read and, where
    ///   the buffer is used for an output or as workspace, write.
    /// - The memory stays allocated until all work that used this buffer is done.
    pub unsafe fn from_raw(
        context: Arc<CudaContext>,
        address: u64,
        bytes: u64,
    ) -> Result<Self, Error> {
        if !address.is_multiple_of(ROW_ALIGN as u64) {
            let reason = format!("address {address:#x} is not a multiple of {ROW_ALIGN}");
            return Err(Error::invalid("buffer", reason));
        }
        Ok(Self {
            context,
            address,
            bytes,
            owner: None,
        })
    }

    /// The device address of the first byte.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// The context the memory belongs to.
    pub fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    /// Copies to the device and waits: the source may be pinned, and is free when this returns.
    pub(crate) fn write(
        &self,
        stream: &CudaStream,
        offset: u64,
        bytes: &[u8],
    ) -> Result<(), Error> {
        let failed = |error| Error::device("copying to the device", error);
        let to = self.place(offset, bytes.len())?;
        self.context.bind_to_thread().map_err(failed)?;
        // SAFETY: `to` and the length lie within the buffer; `bytes` outlives the copy, for which the
        // next call waits.
        unsafe { result::memcpy_htod_async(to, bytes, stream.cu_stream()) }
            .and_then(|()| stream.synchronize())
            .map_err(failed)
    }

    /// Waits for the stream and copies from the device.
    pub(crate) fn read(
        &self,
        stream: &CudaStream,
        offset: u64,
        bytes: &mut [u8],
    ) -> Result<(), Error> {
        let failed = |error| Error::device("copying from the device", error);
        let from = self.place(offset, bytes.len())?;
        self.context.bind_to_thread().map_err(failed)?;
        // SAFETY: `from` and the length lie within the buffer; `bytes` is borrowed until the next call
        // has waited for the copy.
        unsafe { result::memcpy_dtoh_async(bytes, from, stream.cu_stream()) }
            .and_then(|()| stream.synchronize())
            .map_err(failed)
    }

    fn place(&self, offset: u64, len: usize) -> Result<u64, Error> {
        let end = offset.checked_add(len as u64);
        if end.is_none_or(|end| end > self.bytes) {
            let reason = format!("{len} bytes at {offset} of a buffer of {}", self.bytes);
            return Err(Error::invalid("buffer", reason));
        }
        Ok(self.address + offset)
    }
}

impl Buffer for CudaBuffer {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    /// By address: the address space is one for all contexts and devices, so buffers of different
    /// allocations are merely far apart.
    fn distance_to(&self, other: &dyn Buffer) -> Option<i64> {
        let other = other.as_any().downcast_ref::<Self>()?;
        Some(other.address.wrapping_sub(self.address).cast_signed())
    }
}

impl fmt::Debug for CudaBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CudaBuffer")
            .field("device", &self.context.ordinal())
            .field("address", &format_args!("{:#x}", self.address))
            .field("bytes", &self.bytes)
            .field("owned", &self.owner.is_some())
            .finish()
    }
}

/// The buffer, when it is memory of this context.
pub(crate) fn in_context<'a>(
    context: &CudaContext,
    tensor: &'static str,
    buffer: &'a dyn Buffer,
) -> Result<&'a CudaBuffer, Error> {
    let buffer: Option<&CudaBuffer> = buffer.as_any().downcast_ref();
    buffer
        .filter(|buffer| buffer.context.cu_ctx() == context.cu_ctx())
        .ok_or_else(|| Error::ForeignBuffer {
            tensor,
            backend: format!("{NAME}, device {}", context.ordinal()),
        })
}

/// A tensor as kernels see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tensor {
    /// Of element 0.
    pub(crate) address: u64,
    /// Batch, head, row, in elements.
    pub(crate) strides: [i64; 3],
}

impl Tensor {
    pub(crate) fn resolve(
        context: &CudaContext,
        name: &'static str,
        view: &TensorView<'_>,
    ) -> Result<Self, Error> {
        let buffer = in_context(context, name, view.buffer)?;
        let offset = view.layout.offset() as u64 * view.dtype.size() as u64;
        Ok(Self {
            address: buffer.address + offset,
            // A stride that is walked fits 63 bits (`Io::bind`); one that is not is multiplied by zero.
            strides: view
                .layout
                .strides()
                .map(|stride| stride.cast_signed() as i64),
        })
    }
}
