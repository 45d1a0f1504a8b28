//! One call with everything round it under watch: outputs and scratch poisoned before each run, and
//! every byte that the call has no business with compared after it.

use sageattn_core::{
    Backend, Buffer, DType, Description, Error, HostTensor, Io, Layout, LseView, Outputs, Plan,
    Problem, Recipe, TensorView,
};

use crate::case::Case;

/// Bytes watched before and behind each output, and behind the workspace.
const GUARD: usize = 1024;

/// What watched bytes hold: no float of any type that a kernel would write by chance.
const GUARD_BYTE: u8 = 0xa5;

/// What outputs and scratch hold before a run: NaN in every element type, in two forms, so that what
/// is read before it is written differs between two runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Poison {
    /// All bits set.
    Ones,
    /// The quietest NaN of each type.
    Quiet,
}

/// A call staged with guards.
#[derive(Debug)]
pub struct GuardedCall<'a> {
    backend: &'a dyn Backend,
    plan: Box<dyn Plan>,
    problem: Problem,
    inputs: Vec<Tensor>,
    out: Tensor,
    lse: Option<Box<dyn Buffer>>,
    workspace: Box<dyn Buffer>,
}

/// What one run left behind.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    /// O, dense.
    pub out: Vec<f32>,
    /// LSE, when asked for.
    pub lse: Option<Vec<f32>>,
    /// The workspace.
    pub scratch: Vec<u8>,
}

#[derive(Debug)]
struct Tensor {
    name: &'static str,
    buffer: Box<dyn Buffer>,
    layout: Layout,
    dtype: DType,
    /// What the buffer held at first.
    bytes: Vec<u8>,
}

impl<'a> GuardedCall<'a> {
    /// Plans the call and uploads its tensors in the case's arrangement, the bytes between them NaN.
    ///
    /// # Errors
    /// As the backend's own.
    pub fn new(
        backend: &'a dyn Backend,
        case: &Case,
        problem: &Problem,
        recipe: &Recipe,
        tensors: [&HostTensor; 3],
    ) -> Result<Self, Error> {
        let plan = backend.plan(problem, recipe)?;
        let mut inputs = Vec::with_capacity(3);
        for (name, tensor) in ["q", "k", "v"].into_iter().zip(tensors) {
            let layout = case.layout(tensor.layout().shape());
            inputs.push(Tensor::new(
                backend,
                name,
                layout,
                tensor.dtype(),
                0xff,
                tensor.bytes(),
            )?);
        }
        let dtype = problem.dtype();
        let out = shifted(case.layout(problem.shape().q()), GUARD / dtype.size());
        let out = Tensor::new(backend, "out", out, dtype, GUARD_BYTE, &[])?;
        let lse = match problem.outputs() {
            Outputs::O => None,
            Outputs::OAndLse => Some(backend.alloc(padded(2 * GUARD + 4 * rows(problem)) as u64)?),
        };
        let workspace = padded(to_usize(plan.workspace_bytes())? + GUARD);
        Ok(Self {
            workspace: backend.alloc(workspace as u64)?,
            problem: *problem,
            backend,
            plan,
            inputs,
            out,
            lse,
        })
    }

    /// What was planned.
    pub fn describe(&self) -> Description {
        self.plan.describe()
    }

    /// Poisons, runs once, and brings everything back.
    ///
    /// # Errors
    /// What was written that should not have been, or what the backend said.
    pub fn run(&self, poison: Poison) -> Result<Snapshot, String> {
        let text = |error: Error| error.to_string();
        self.fill(poison).map_err(text)?;
        let io = self.io().map_err(text)?;
        self.plan.run(&io, self.workspace.as_ref()).map_err(text)?;
        self.backend.synchronize().map_err(text)?;

        for input in &self.inputs {
            let after = self.download(input.buffer.as_ref()).map_err(text)?;
            unchanged(input.name, &input.bytes, &after)?;
        }
        let out = self.download(self.out.buffer.as_ref()).map_err(text)?;
        self.out.check_guards(&out)?;
        let dense = HostTensor::from_bytes(self.out.layout, self.out.dtype, out);
        Ok(Snapshot {
            out: dense.map_err(text)?.to_f32(),
            lse: self.lse_after()?,
            scratch: self.scratch_after()?,
        })
    }

    fn fill(&self, poison: Poison) -> Result<(), Error> {
        let mut out = self.out.bytes.clone();
        let element = poison.element(self.out.dtype);
        self.out.for_each_row(|start, len| {
            for slot in out[start..start + len].chunks_exact_mut(element.len()) {
                slot.copy_from_slice(&element);
            }
        });
        self.backend.upload(self.out.buffer.as_ref(), 0, &out)?;
        let word = poison.element(DType::F32);
        let words = |from: usize, len: usize, total: usize| {
            let mut bytes = vec![GUARD_BYTE; total];
            for slot in bytes[from..from + len].chunks_exact_mut(4) {
                slot.copy_from_slice(&word);
            }
            bytes
        };
        if let Some(lse) = &self.lse {
            let bytes = words(GUARD, 4 * rows(&self.problem), to_usize(lse.bytes())?);
            self.backend.upload(lse.as_ref(), 0, &bytes)?;
        }
        // Whole words of scratch are poisoned; bytes between ranges belong to no one.
        let mut scratch = vec![GUARD_BYTE; to_usize(self.workspace.bytes())?];
        for range in self.describe().scratch {
            let (start, len) = (to_usize(range.offset)?, to_usize(range.bytes)?);
            let poison = word.iter().copied().cycle();
            let slots = scratch[start..start + len].iter_mut();
            slots.zip(poison).for_each(|(slot, byte)| *slot = byte);
        }
        self.backend.upload(self.workspace.as_ref(), 0, &scratch)
    }

    fn lse_after(&self) -> Result<Option<Vec<f32>>, String> {
        let Some(lse) = &self.lse else {
            return Ok(None);
        };
        let bytes = self.download(lse.as_ref()).map_err(|e| e.to_string())?;
        let (start, end) = (GUARD, GUARD + 4 * rows(&self.problem));
        guarded("lse", &bytes[..start])?;
        guarded("lse", &bytes[end..])?;
        let words = bytes[start..end].as_chunks().0;
        Ok(Some(
            words.iter().map(|&word| f32::from_le_bytes(word)).collect(),
        ))
    }

    fn scratch_after(&self) -> Result<Vec<u8>, String> {
        let mut bytes = self
            .download(self.workspace.as_ref())
            .map_err(|e| e.to_string())?;
        let mut ranges = self.describe().scratch;
        ranges.sort_by_key(|range| range.offset);
        let mut end = 0;
        for range in &ranges {
            let start = to_usize(range.offset).map_err(|e| e.to_string())?;
            if start < end {
                return Err(format!("scratch: {} overlaps its neighbour", range.name));
            }
            guarded("the scratch before a range", &bytes[end..start])
                .map_err(|text| format!("{text} ({})", range.name))?;
            end = start + to_usize(range.bytes).map_err(|e| e.to_string())?;
        }
        guarded("the workspace", &bytes[end..])?;
        bytes.truncate(end);
        Ok(bytes)
    }

    fn download(&self, buffer: &dyn Buffer) -> Result<Vec<u8>, Error> {
        let mut bytes = vec![0; to_usize(buffer.bytes())?];
        self.backend.download(buffer, 0, &mut bytes)?;
        Ok(bytes)
    }

    fn io(&self) -> Result<Io<'_>, Error> {
        let [q, k, v] = &self.inputs[..] else {
            return Err(Error::invalid("inputs", "there are three"));
        };
        let lse = self.lse.as_deref().map(|buffer| LseView {
            buffer,
            offset: GUARD / 4,
        });
        Io::bind(
            &self.problem,
            q.view(),
            k.view(),
            v.view(),
            self.out.view(),
            lse,
        )
    }
}

impl Tensor {
    /// Allocates a buffer for a layout, fills it with `between` and puts the dense elements in.
    fn new(
        backend: &dyn Backend,
        name: &'static str,
        layout: Layout,
        dtype: DType,
        between: u8,
        dense: &[u8],
    ) -> Result<Self, Error> {
        let end = layout
            .end()
            .unwrap_or(usize::MAX)
            .saturating_mul(dtype.size());
        let mut tensor = Self {
            name,
            layout,
            dtype,
            bytes: vec![between; padded(end.saturating_add(GUARD))],
            buffer: backend.alloc(padded(end.saturating_add(GUARD)) as u64)?,
        };
        let mut bytes = std::mem::take(&mut tensor.bytes);
        let mut from = 0;
        if !dense.is_empty() {
            tensor.for_each_row(|start, len| {
                bytes[start..start + len].copy_from_slice(&dense[from..from + len]);
                from += len;
            });
        }
        backend.upload(tensor.buffer.as_ref(), 0, &bytes)?;
        tensor.bytes = bytes;
        Ok(tensor)
    }

    fn view(&self) -> TensorView<'_> {
        TensorView::new(self.buffer.as_ref(), self.layout, self.dtype)
    }

    /// Calls `f(first byte, bytes)` for every row, in dense order.
    fn for_each_row(&self, mut f: impl FnMut(usize, usize)) {
        let [batches, heads, len, dim] = self.layout.shape();
        for batch in 0..batches {
            for head in 0..heads {
                for row in 0..len {
                    let start = self.layout.row(batch, head, row);
                    f(start * self.dtype.size(), dim * self.dtype.size());
                }
            }
        }
    }

    /// Everything but the elements is what it was.
    fn check_guards(&self, after: &[u8]) -> Result<(), String> {
        let mut expected = self.bytes.clone();
        self.for_each_row(|start, len| {
            expected[start..start + len].copy_from_slice(&after[start..start + len]);
        });
        unchanged(self.name, &expected, after)
    }
}

impl Poison {
    fn element(self, dtype: DType) -> Vec<u8> {
        match (self, dtype) {
            (Self::Ones, dtype) => vec![0xff; dtype.size()],
            (Self::Quiet, DType::F16) => vec![0x01, 0x7e],
            (Self::Quiet, DType::BF16) => vec![0xc1, 0x7f],
            (Self::Quiet, DType::F32) => vec![0x02, 0x01, 0xc0, 0x7f],
        }
    }
}

fn shifted(layout: Layout, elements: usize) -> Layout {
    Layout::strided(layout.shape(), layout.strides(), layout.offset() + elements)
}

fn rows(problem: &Problem) -> usize {
    problem.shape().q()[..3].iter().product()
}

fn padded(bytes: usize) -> usize {
    bytes.next_multiple_of(256)
}

fn to_usize(bytes: u64) -> Result<usize, Error> {
    usize::try_from(bytes).map_err(|_| Error::OutOfMemory { bytes })
}

fn guarded(what: &str, bytes: &[u8]) -> Result<(), String> {
    match bytes.iter().position(|&byte| byte != GUARD_BYTE) {
        None => Ok(()),
        Some(at) => Err(format!(
            "{what}: guard byte {at} of {} was written",
            bytes.len()
        )),
    }
}

fn unchanged(what: &str, before: &[u8], after: &[u8]) -> Result<(), String> {
    match before.iter().zip(after).position(|(a, b)| a != b) {
        None => Ok(()),
        Some(at) => Err(format!(
            "{what}: byte {at} outside its elements was written"
        )),
    }
}
