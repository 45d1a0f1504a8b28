//! Memory of a device.

use std::any::Any;
use std::sync::Arc;

use sageattn_core::{Buffer, Error};

/// A caller's `wgpu::Buffer` as a tensor's memory, made by [`Wgpu::wrap`](crate::Wgpu::wrap). Nothing is copied.
#[derive(Clone, Debug)]
pub struct WgpuBuffer {
    pub(crate) owner: Owner,
    pub(crate) buffer: wgpu::Buffer,
}

/// Which [`Wgpu`] a buffer was made for. wgpu's own handles do not tell: those of two instances count
/// from the same number and compare equal.
#[derive(Clone, Debug, Default)]
pub(crate) struct Owner(Arc<()>);

impl PartialEq for Owner {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl WgpuBuffer {
    /// The buffer itself.
    pub fn wgpu_buffer(&self) -> &wgpu::Buffer {
        &self.buffer
    }
}

impl Buffer for WgpuBuffer {
    fn bytes(&self) -> u64 {
        self.buffer.size()
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn distance_to(&self, other: &dyn Buffer) -> Option<i64> {
        let other = other.as_any().downcast_ref::<Self>()?;
        (self.owner == other.owner && self.buffer == other.buffer).then_some(0)
    }
}

/// Checks a copy from or to the host.
pub(crate) fn check_copy(
    buffer: &wgpu::Buffer,
    offset: u64,
    len: usize,
    usage: wgpu::BufferUsages,
) -> Result<(), Error> {
    if !offset.is_multiple_of(4) || !len.is_multiple_of(4) {
        let reason = format!("offset {offset} and length {len} are to be multiples of 4 bytes");
        return Err(Error::invalid("buffer", reason));
    }
    let end = offset.checked_add(len as u64);
    if end.is_none_or(|end| end > buffer.size()) {
        let size = buffer.size();
        let reason = format!("{len} bytes at {offset} reach past the buffer's {size}");
        return Err(Error::invalid("buffer", reason));
    }
    if !buffer.usage().contains(usage) {
        return Err(Error::invalid(
            "buffer",
            format!("was created without {usage:?}"),
        ));
    }
    Ok(())
}
