//! Tensors in host memory, and the shortest way from them through a backend and back.

use std::any::Any;
use std::fmt;
use std::sync::{PoisonError, RwLock};

use half::{bf16, f16};

use crate::{
    Backend, Buffer, DType, Description, Error, Io, Layout, LseView, Outputs, Plan, Problem,
    Profile, Recipe, TensorView,
};

/// A tensor in host memory: raw little-endian bytes, as files hold them, and their layout.
#[derive(Clone, PartialEq)]
pub struct HostTensor {
    layout: Layout,
    dtype: DType,
    bytes: Vec<u8>,
}

impl HostTensor {
    /// A tensor over raw bytes.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the layout reaches past the bytes.
    pub fn from_bytes(layout: Layout, dtype: DType, bytes: Vec<u8>) -> Result<Self, Error> {
        let needed = layout.end().and_then(|end| end.checked_mul(dtype.size()));
        if needed.is_none_or(|needed| needed > bytes.len()) {
            let reason = format!("{layout:?} of {dtype} reaches past {} bytes", bytes.len());
            return Err(Error::invalid("tensor", reason));
        }
        Ok(Self {
            layout,
            dtype,
            bytes,
        })
    }

    /// A tensor from dense values in `[batch, heads, len, head_dim]` order, rounded to nearest even;
    /// bytes that no element covers are zero.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the number of values is not the layout's, or its strides reach past what
    /// memory can hold.
    pub fn from_f32(layout: Layout, dtype: DType, values: &[f32]) -> Result<Self, Error> {
        if layout.shape().iter().product::<usize>() != values.len() {
            let reason = format!("{} values for shape {:?}", values.len(), layout.shape());
            return Err(Error::invalid("tensor", reason));
        }
        let size = layout.end().and_then(|end| end.checked_mul(dtype.size()));
        let Some(size) = size.filter(|&size| isize::try_from(size).is_ok()) else {
            return Err(Error::invalid(
                "tensor",
                format!("{layout:?} does not fit memory"),
            ));
        };
        let mut bytes = vec![0; size];
        write_dense(&mut bytes, &layout, dtype, values);
        Ok(Self {
            layout,
            dtype,
            bytes,
        })
    }

    /// The values in dense `[batch, heads, len, head_dim]` order.
    pub fn to_f32(&self) -> Vec<f32> {
        read_dense(&self.bytes, &self.layout, self.dtype)
    }

    /// The same values in another layout of the same shape.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the shapes differ.
    pub fn repack(&self, layout: Layout) -> Result<Self, Error> {
        Self::from_f32(layout, self.dtype, &self.to_f32())
    }

    /// Where the elements are.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The raw bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

impl fmt::Debug for HostTensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostTensor")
            .field("layout", &self.layout)
            .field("dtype", &self.dtype)
            .finish_non_exhaustive()
    }
}

/// Host memory as a [`Buffer`], for the CPU backend.
pub struct HostBuffer {
    bytes: RwLock<Vec<u8>>,
    len: u64,
}

impl HostBuffer {
    /// A buffer that owns `bytes`.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self {
            len: bytes.len() as u64,
            bytes: RwLock::new(bytes),
        }
    }

    /// Reads under a shared lock.
    pub fn read<T>(&self, f: impl FnOnce(&[u8]) -> T) -> T {
        // A panic while the lock was held cannot leave bytes half-typed: any byte is a valid byte.
        f(&self.bytes.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Writes under an exclusive lock.
    pub fn write<T>(&self, f: impl FnOnce(&mut [u8]) -> T) -> T {
        f(&mut self.bytes.write().unwrap_or_else(PoisonError::into_inner))
    }
}

impl fmt::Debug for HostBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostBuffer")
            .field("len", &self.len)
            .finish()
    }
}

impl Buffer for HostBuffer {
    fn bytes(&self) -> u64 {
        self.len
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn distance_to(&self, other: &dyn Buffer) -> Option<i64> {
        let other = other.as_any().downcast_ref::<Self>()?;
        std::ptr::eq(self, other).then_some(0)
    }
}

/// One call, staged on a device: tensors uploaded, kernels planned, outputs and scratch allocated.
///
/// The convenience for files, tests and benchmarks. Applications that have tensors on the device
/// already bind them with [`Io::bind`] and run the plan on them without copies.
#[derive(Debug)]
pub struct Staged<'a> {
    backend: &'a dyn Backend,
    plan: Box<dyn Plan>,
    problem: Problem,
    inputs: [(Box<dyn Buffer>, Layout); 3],
    out: (Box<dyn Buffer>, Layout),
    lse: Option<Box<dyn Buffer>>,
    workspace: Box<dyn Buffer>,
}

/// What a staged call wrote, back on the host.
#[derive(Clone, Debug)]
pub struct HostOutput {
    /// O in dense `[batch, q_heads, q_len, head_dim]` order.
    pub out: Vec<f32>,
    /// LSE, when the problem asks for it.
    pub lse: Option<Vec<f32>>,
}

impl<'a> Staged<'a> {
    /// Plans the call and moves its tensors to the device. Rows that are not aligned to 16 bytes are
    /// repacked on the way.
    ///
    /// # Errors
    /// As [`Backend::plan`], [`Backend::alloc`], [`Backend::upload`] and [`Io::bind`].
    pub fn new(
        backend: &'a dyn Backend,
        problem: &Problem,
        recipe: &Recipe,
        [q, k, v]: [&HostTensor; 3],
    ) -> Result<Self, Error> {
        let plan = backend.plan(problem, recipe)?;
        let out_layout = Layout::hnd_padded(problem.shape().q(), problem.dtype());
        let out_bytes = padded_bytes(&out_layout, problem.dtype()) as u64;
        let lse_bytes = 4 * (problem.shape().q()[..3].iter().product::<usize>() as u64);
        let lse = match problem.outputs() {
            Outputs::O => None,
            Outputs::OAndLse => Some(backend.alloc(lse_bytes)?),
        };
        let staged = Self {
            inputs: [
                upload(backend, q)?,
                upload(backend, k)?,
                upload(backend, v)?,
            ],
            out: (backend.alloc(out_bytes)?, out_layout),
            lse,
            workspace: backend.alloc(plan.workspace_bytes().max(4))?,
            problem: *problem,
            backend,
            plan,
        };
        staged.io()?;
        Ok(staged)
    }

    /// What was planned.
    pub fn describe(&self) -> Description {
        self.plan.describe()
    }

    /// Enqueues one run.
    ///
    /// # Errors
    /// As [`Plan::run`].
    pub fn run(&self) -> Result<(), Error> {
        self.plan.run(&self.io()?, self.workspace.as_ref())
    }

    /// Runs once and tells how long each stage took.
    ///
    /// # Errors
    /// As [`Plan::profile`].
    pub fn profile(&self) -> Result<Profile, Error> {
        self.plan.profile(&self.io()?, self.workspace.as_ref())
    }

    /// Waits and brings the outputs back.
    ///
    /// # Errors
    /// As [`Backend::download`].
    pub fn output(&self) -> Result<HostOutput, Error> {
        let (buffer, layout) = &self.out;
        let mut bytes = vec![0; padded_bytes(layout, self.problem.dtype())];
        self.backend.download(buffer.as_ref(), 0, &mut bytes)?;
        let out = read_dense(&bytes, layout, self.problem.dtype());
        let lse = match &self.lse {
            None => None,
            Some(buffer) => {
                let mut lse = vec![0.0; self.problem.shape().q()[..3].iter().product()];
                let bytes = bytemuck::cast_slice_mut(&mut lse);
                self.backend.download(buffer.as_ref(), 0, bytes)?;
                Some(lse)
            }
        };
        Ok(HostOutput { out, lse })
    }

    fn io(&self) -> Result<Io<'_>, Error> {
        let dtype = self.problem.dtype();
        let [q, k, v] = &self.inputs;
        Io::bind(
            &self.problem,
            TensorView::new(q.0.as_ref(), q.1, dtype),
            TensorView::new(k.0.as_ref(), k.1, dtype),
            TensorView::new(v.0.as_ref(), v.1, dtype),
            TensorView::new(self.out.0.as_ref(), self.out.1, dtype),
            self.lse
                .as_deref()
                .map(|buffer| LseView { buffer, offset: 0 }),
        )
    }
}

/// Attention on host tensors, start to end: plan, upload, run, download.
///
/// # Errors
/// As [`Staged::new`] and [`Staged::run`].
pub fn attend_host(
    backend: &dyn Backend,
    problem: &Problem,
    recipe: &Recipe,
    tensors: [&HostTensor; 3],
) -> Result<HostOutput, Error> {
    let staged = Staged::new(backend, problem, recipe, tensors)?;
    staged.run()?;
    staged.output()
}

fn upload(backend: &dyn Backend, tensor: &HostTensor) -> Result<(Box<dyn Buffer>, Layout), Error> {
    let fits = tensor
        .layout
        .check("tensor", tensor.dtype, tensor.bytes.len() as u64)
        .is_ok();
    let packed;
    let tensor = if fits {
        tensor
    } else {
        packed = tensor.repack(Layout::hnd_padded(tensor.layout.shape(), tensor.dtype))?;
        &packed
    };
    let mut bytes = std::borrow::Cow::Borrowed(tensor.bytes.as_slice());
    if !bytes.len().is_multiple_of(4) {
        let padded = bytes.len().next_multiple_of(4);
        bytes.to_mut().resize(padded, 0);
    }
    let buffer = backend.alloc(bytes.len() as u64)?;
    backend.upload(buffer.as_ref(), 0, &bytes)?;
    Ok((buffer, tensor.layout))
}

/// The bytes a tensor spans, in whole words as [`Backend::upload`] wants them.
fn padded_bytes(layout: &Layout, dtype: DType) -> usize {
    let bytes = layout.end().and_then(|end| end.checked_mul(dtype.size()));
    bytes
        .and_then(|bytes| bytes.checked_next_multiple_of(4))
        .unwrap_or(usize::MAX)
}

/// Reads a strided tensor into dense `[batch, heads, len, head_dim]` order. The layout lies within
/// `bytes`: its owner has checked.
pub(crate) fn read_dense(bytes: &[u8], layout: &Layout, dtype: DType) -> Vec<f32> {
    let [batches, heads, len, head_dim] = layout.shape();
    let mut values = Vec::with_capacity(batches * heads * len * head_dim);
    for_each_row(layout, |row| {
        let start = row * dtype.size();
        let row = &bytes[start..start + head_dim * dtype.size()];
        match dtype {
            DType::F16 => values.extend(elements(row).map(|b| f16::from_le_bytes(b).to_f32())),
            DType::BF16 => values.extend(elements(row).map(|b| bf16::from_le_bytes(b).to_f32())),
            DType::F32 => values.extend(elements(row).map(f32::from_le_bytes)),
        }
    });
    values
}

/// Writes dense values into a strided tensor, rounding to nearest even; other bytes stay as they are.
pub(crate) fn write_dense(bytes: &mut [u8], layout: &Layout, dtype: DType, values: &[f32]) {
    let head_dim = layout.shape()[3];
    let mut rows = values.chunks_exact(head_dim.max(1));
    for_each_row(layout, |row| {
        let Some(values) = rows.next() else { return };
        let start = row * dtype.size();
        let row = &mut bytes[start..start + head_dim * dtype.size()];
        for (slot, &value) in row.chunks_exact_mut(dtype.size()).zip(values) {
            match dtype {
                DType::F16 => slot.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
                DType::BF16 => slot.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
                DType::F32 => slot.copy_from_slice(&value.to_le_bytes()),
            }
        }
    });
}

fn for_each_row(layout: &Layout, mut f: impl FnMut(usize)) {
    let [batches, heads, len, _] = layout.shape();
    for batch in 0..batches {
        for head in 0..heads {
            for row in 0..len {
                f(layout.row(batch, head, row));
            }
        }
    }
}

fn elements<const N: usize>(row: &[u8]) -> impl Iterator<Item = [u8; N]> {
    row.as_chunks().0.iter().copied()
}

/// Rounds values to an element type and back, as storing them would.
pub fn round_to(dtype: DType, values: &mut [f32]) {
    values.iter_mut().for_each(|x| *x = dtype.round(*x));
}
