//! What lies where: the workspace, and the ranges of it and of the tensors that a dispatch binds.
//!
//! A binding has a largest size (128 MiB by default, 2 GiB at most on Vulkan), tensors have not. Where
//! one is larger, the call is cut into slices: whole, or batch by batch, or KV head by KV head, each
//! bound at its own offset. Within a slice kernels count in 32 bits.

use sageattn_core::scratch::{Scratch, ScratchRange, ScratchType};
use sageattn_core::{Error, Io, LseView, Problem, Shape, TensorView};
use sageattn_shaders::Codes;
use sageattn_shaders::abi::View;

use crate::device::Context;
use crate::merge::RangeResults;
use crate::pipeline::Range;

/// Rows of codes and of V are laid out up to a multiple of this: whole tiles and blocks of every kernel.
pub(crate) const ROW_PADDING: usize = 128;

/// The workspace of a plan.
#[derive(Clone, Debug)]
pub(crate) struct Workspace {
    pub(crate) scratch: Scratch,
    /// Bytes of a code of Q or K.
    pub(crate) code_bytes: u32,
    pub(crate) q_codes: ScratchRange,
    pub(crate) k_codes: ScratchRange,
    pub(crate) values: ScratchRange,
    /// Everything from here on is f32 and bound as one range.
    pub(crate) floats: u64,
    pub(crate) q_scales: ScratchRange,
    pub(crate) k_scales: ScratchRange,
    pub(crate) k_mean: Option<ScratchRange>,
    pub(crate) v_scales: Option<ScratchRange>,
    pub(crate) lse_bias: Option<ScratchRange>,
    pub(crate) partials: Option<ScratchRange>,
    /// Where keys are split over workgroups.
    pub(crate) results: Option<RangeResults>,
}

/// Sizes per (batch, head) that the workspace is made of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Extents {
    /// Channels of a row of codes.
    pub(crate) qk_dim: u32,
    /// How a code is stored.
    pub(crate) codes: Codes,
    /// Bytes of one head of V as laid out.
    pub(crate) value_bytes: u64,
    /// Scales of one head of Q and of K.
    pub(crate) q_groups: usize,
    pub(crate) k_groups: usize,
    pub(crate) smooth: bool,
    pub(crate) v_scaled: bool,
    pub(crate) lse_bias: bool,
    /// Partial results per head of the channel reductions; zero for none.
    pub(crate) splits: usize,
    /// Packs of queries per KV head, and ranges of keys that have results of their own; none where keys
    /// are not split.
    pub(crate) ranges: Option<[usize; 2]>,
}

impl Workspace {
    pub(crate) fn new(shape: &Shape, extents: &Extents) -> Self {
        let [b, hq, hkv] = [shape.batch, shape.q_heads, shape.kv_heads].map(|n| n as u64);
        let d = shape.head_dim as u64;
        let qk_dim = u64::from(extents.qk_dim);
        let mut scratch = Scratch::default();
        let q_rows = padded(shape.q_len) as u64;
        let kv_rows = padded(shape.kv_len) as u64;
        let code = match extents.codes {
            Codes::I8 => ScratchType::I8,
            Codes::F16 => ScratchType::F16,
        };
        let q_codes = scratch.push("q_codes", code, &[b, hq, q_rows, qk_dim]);
        let k_codes = scratch.push("k_codes", code, &[b, hkv, kv_rows, qk_dim]);
        let values = scratch.push("values", ScratchType::Bytes, &[b, hkv, extents.value_bytes]);
        let floats = scratch.bytes();
        let mut push = |name, shape: &[u64]| scratch.push(name, ScratchType::F32, shape);
        let q_scales = push("q_scales", &[b, hq, extents.q_groups as u64]);
        let k_scales = push("k_scales", &[b, hkv, extents.k_groups as u64]);
        let k_mean = extents.smooth.then(|| push("k_mean", &[b, hkv, d]));
        let v_scales = extents.v_scaled.then(|| push("v_scales", &[b, hkv, d]));
        let lse_bias = extents
            .lse_bias
            .then(|| push("lse_bias", &[b, hq, shape.q_len as u64]));
        let partials = (extents.splits > 0).then(|| {
            let channels = d.next_multiple_of(4);
            push("partials", &[b, hkv, extents.splits as u64, channels])
        });
        let results = extents
            .ranges
            .map(|[packs, splits]| RangeResults::push(&mut scratch, shape, packs, splits));
        Self {
            scratch,
            code_bytes: extents.codes.bytes(),
            q_codes,
            k_codes,
            values,
            floats,
            q_scales,
            k_scales,
            k_mean,
            v_scales,
            lse_bias,
            partials,
            results,
        }
    }

    /// A workspace without codes: all of it is f32.
    pub(crate) fn of_floats(scratch: Scratch) -> Self {
        let none = |name| ScratchRange {
            name,
            kind: ScratchType::Bytes,
            shape: vec![1, 1, 0, 0],
            offset: 0,
            bytes: 0,
        };
        Self {
            scratch,
            code_bytes: 0,
            q_codes: none("q_codes"),
            k_codes: none("k_codes"),
            values: none("values"),
            floats: 0,
            q_scales: none("q_scales"),
            k_scales: none("k_scales"),
            k_mean: None,
            v_scales: None,
            lse_bias: None,
            partials: None,
            results: None,
        }
    }

    /// Bytes of the range of all f32 numbers.
    pub(crate) fn float_bytes(&self) -> u64 {
        self.scratch.bytes() - self.floats
    }

    /// Where the numbers of a head begin in the range of all f32 numbers; zero for a range not there.
    pub(crate) fn float_index(&self, range: Option<&ScratchRange>, pair: usize) -> u32 {
        let Some(range) = range else { return 0 };
        let per_pair: u64 = range.shape[2..].iter().product();
        index((range.offset - self.floats) / 4 + pair as u64 * per_pair)
    }
}

/// A row count as codes are laid out.
pub(crate) fn padded(rows: usize) -> usize {
    rows.next_multiple_of(ROW_PADDING)
}

/// Narrows a number that kernels count in 32 bits: a length or head count that `Problem` bounds, or an
/// index into a binding.
#[allow(
    clippy::cast_possible_truncation,
    reason = "`Problem` keeps lengths and head counts below 2^30, `Context::max_binding` bindings below 2^32 bytes"
)]
pub(crate) fn index(n: u64) -> u32 {
    debug_assert!(u32::try_from(n).is_ok(), "{n} takes more than 32 bits");
    n as u32
}

/// Some batches and KV heads of a call: all heads of some batches, or some heads of one batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slice {
    pub(crate) batch: usize,
    pub(crate) batches: usize,
    pub(crate) kv_head: usize,
    pub(crate) kv_heads: usize,
    heads_per_kv: usize,
    /// KV heads per batch of the whole call.
    all_kv_heads: usize,
}

/// Which side of the attention a tensor is on: its heads are query heads or KV heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Q,
    Kv,
}

impl Slice {
    /// The ways to cut a call, coarsest first.
    fn cuts(shape: &Shape) -> [Vec<Self>; 3] {
        let slice = |batch, batches, kv_head, kv_heads| Self {
            batch,
            batches,
            kv_head,
            kv_heads,
            heads_per_kv: shape.heads_per_kv(),
            all_kv_heads: shape.kv_heads,
        };
        let whole = slice(0, shape.batch, 0, shape.kv_heads);
        let per_batch = (0..shape.batch).map(|b| slice(b, 1, 0, shape.kv_heads));
        let per_head =
            (0..shape.batch).flat_map(|b| (0..shape.kv_heads).map(move |h| slice(b, 1, h, 1)));
        [vec![whole], per_batch.collect(), per_head.collect()]
    }

    /// First head and number of heads per batch.
    pub(crate) fn heads(&self, side: Side) -> (usize, usize) {
        let factor = match side {
            Side::Q => self.heads_per_kv,
            Side::Kv => 1,
        };
        (self.kv_head * factor, self.kv_heads * factor)
    }

    /// First (batch, head) pair of the whole call, and number of pairs.
    pub(crate) fn pairs(&self, side: Side) -> (usize, usize) {
        let factor = match side {
            Side::Q => self.heads_per_kv,
            Side::Kv => 1,
        };
        let first = (self.batch * self.all_kv_heads + self.kv_head) * factor;
        (first, self.batches * self.kv_heads * factor)
    }
}

/// The tensors of one call and how they are bound.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Binder<'a> {
    pub(crate) context: &'a Context,
    pub(crate) io: &'a Io<'a>,
    pub(crate) workspace: &'a Workspace,
    pub(crate) buffer: &'a wgpu::Buffer,
}

impl<'a> Binder<'a> {
    /// Checks what depends on the device's buffers, and wraps a call's tensors.
    pub(crate) fn new(
        context: &'a Context,
        io: &'a Io<'a>,
        workspace: &'a Workspace,
        buffer: &'a dyn sageattn_core::Buffer,
    ) -> Result<Self, Error> {
        let buffer = context.own("workspace", buffer)?;
        check_usage("workspace", buffer)?;
        let views = [
            ("q", io.q()),
            ("k", io.k()),
            ("v", io.v()),
            ("out", io.out()),
        ];
        for (name, view) in views {
            let tensor = context.own(name, view.buffer)?;
            check_usage(name, tensor)?;
            let end = view.layout.end().unwrap_or(usize::MAX) as u64 * view.dtype.size() as u64;
            if end.next_multiple_of(4) > tensor.size() {
                let reason = format!(
                    "ends inside the last word of a buffer of {} bytes; the GPU reads whole words",
                    tensor.size()
                );
                return Err(Error::invalid(name, reason));
            }
            if name != "out" && tensor == buffer {
                let reason = format!(
                    "shares a wgpu::Buffer with {name}: one dispatch would read and write it, which \
                     wgpu refuses"
                );
                return Err(Error::invalid("workspace", reason));
            }
        }
        if let Some(lse) = io.lse() {
            check_usage("lse", context.own("lse", lse.buffer)?)?;
        }
        Ok(Self {
            context,
            io,
            workspace,
            buffer,
        })
    }

    /// The coarsest cut of the call whose ranges all fit a binding.
    pub(crate) fn slices(&self) -> Result<Vec<Slice>, Error> {
        let limit = self.context.max_binding();
        let mut too_large = None;
        for slices in Slice::cuts(self.io.problem().shape()) {
            too_large = None;
            for slice in &slices {
                let largest = self
                    .sizes(slice)
                    .into_iter()
                    .max_by_key(|&(_, bytes)| bytes);
                too_large = too_large.or(largest.filter(|&(_, bytes)| bytes > limit));
            }
            if too_large.is_none() {
                return Ok(slices);
            }
        }
        let missing = too_large.map(|(name, bytes)| binding_need(name, bytes, limit));
        Err(self
            .context
            .unsupported(missing.into_iter().collect())
            .into())
    }

    /// The largest range that each tensor needs bound, alignment included.
    fn sizes(&self, slice: &Slice) -> Vec<(&'static str, u64)> {
        let io = self.io;
        let mut ranges = vec![
            ("q", tensor_bytes(io.q(), slice, Side::Q)),
            ("k", tensor_bytes(io.k(), slice, Side::Kv)),
            ("v", tensor_bytes(io.v(), slice, Side::Kv)),
            ("out", tensor_bytes(io.out(), slice, Side::Q)),
        ];
        if let Some(lse) = io.lse() {
            ranges.push(("lse", lse_bytes(io.problem(), lse, slice)));
        }
        let w = self.workspace;
        for (range, side) in [
            (&w.q_codes, Side::Q),
            (&w.k_codes, Side::Kv),
            (&w.values, Side::Kv),
        ] {
            ranges.push((range.name, scratch_bytes(range, slice, side)));
        }
        let aligned = ranges.into_iter().map(|(name, (start, end))| {
            let (offset, bytes) = self.context.aligned(start, end);
            debug_assert!(offset <= start);
            (name, bytes)
        });
        aligned
            .chain([("the f32 part of the workspace", w.float_bytes())])
            .collect()
    }

    /// Binds one of the tensors; the view counts words from the range's start.
    pub(crate) fn tensor(
        &self,
        name: &'static str,
        view: &TensorView<'a>,
        slice: &Slice,
        side: Side,
    ) -> Result<(Range<'a>, View), Error> {
        let (start, end) = tensor_bytes(view, slice, side);
        let buffer = self.context.own(name, view.buffer)?;
        let (range, offset) = self.range(buffer, start, end);
        let [batch, head, row] = view.layout.strides();
        let heads = slice.heads(side).1;
        let words = |count: usize, stride: usize| match count {
            1 => 0,
            _ => index((stride * view.dtype.size() / 4) as u64),
        };
        let view = View {
            batch: words(slice.batches, batch),
            head: words(heads, head),
            row: words(view.layout.shape()[2], row),
            offset: index(offset / 4),
        };
        Ok((range, view))
    }

    /// Binds a part of the workspace; returns where the slice begins in it, in bytes.
    pub(crate) fn scratch(
        &self,
        range: &ScratchRange,
        slice: &Slice,
        side: Side,
    ) -> (Range<'a>, u64) {
        let (start, end) = scratch_bytes(range, slice, side);
        self.range(self.buffer, start, end)
    }

    /// Binds all f32 numbers of the workspace.
    pub(crate) fn floats(&self) -> Range<'a> {
        let w = self.workspace;
        self.range(self.buffer, w.floats, w.scratch.bytes()).0
    }

    /// Binds the log-sum-exp; returns where the slice begins in it, in bytes. A call without one binds
    /// the workspace's numbers, which its kernel does not touch.
    pub(crate) fn lse(&self, slice: &Slice) -> Result<(Range<'a>, u64), Error> {
        let Some(lse) = self.io.lse() else {
            return Ok((self.floats(), 0));
        };
        let (start, end) = lse_bytes(self.io.problem(), lse, slice);
        Ok(self.range(self.context.own("lse", lse.buffer)?, start, end))
    }

    fn range(&self, buffer: &'a wgpu::Buffer, start: u64, end: u64) -> (Range<'a>, u64) {
        let (offset, bytes) = self.context.aligned(start, end);
        let range = Range {
            buffer,
            offset,
            bytes,
        };
        (range, start - offset)
    }
}

impl Context {
    /// Offset and size of the binding that holds the bytes from `start` to `end`.
    fn aligned(&self, start: u64, end: u64) -> (u64, u64) {
        // At least a vector: rows that start on one in their buffer do so in the binding.
        let align = u64::from(self.facts.limits.min_storage_buffer_offset_alignment).max(16);
        let offset = start / align * align;
        (offset, end.next_multiple_of(4) - offset)
    }
}

/// What a device lacks that cannot bind `bytes` of a tensor.
pub(crate) fn binding_need(name: &str, bytes: u64, limit: u64) -> String {
    format!("a binding of {bytes} bytes for one KV head of {name} (its limit is {limit})")
}

fn check_usage(name: &'static str, buffer: &wgpu::Buffer) -> Result<(), Error> {
    if buffer.usage().contains(wgpu::BufferUsages::STORAGE) {
        return Ok(());
    }
    let reason = format!(
        "its buffer has usage {:?}, which lacks STORAGE",
        buffer.usage()
    );
    Err(Error::invalid(name, reason))
}

fn tensor_bytes(view: &TensorView<'_>, slice: &Slice, side: Side) -> (u64, u64) {
    let (head, heads) = slice.heads(side);
    let [_, _, len, head_dim] = view.layout.shape();
    let first = view.layout.row(slice.batch, head, 0);
    let last = view
        .layout
        .row(slice.batch + slice.batches - 1, head + heads - 1, len - 1);
    let size = view.dtype.size() as u64;
    (first as u64 * size, (last + head_dim) as u64 * size)
}

fn scratch_bytes(range: &ScratchRange, slice: &Slice, side: Side) -> (u64, u64) {
    let pairs_stored = range.shape[0] * range.shape[1];
    let per_pair = range.bytes / pairs_stored.max(1);
    let (first, pairs) = slice.pairs(side);
    let start = range.offset + first as u64 * per_pair;
    (start, start + pairs as u64 * per_pair)
}

fn lse_bytes(problem: &Problem, lse: &LseView<'_>, slice: &Slice) -> (u64, u64) {
    let rows = problem.shape().q_len as u64;
    let (first, pairs) = slice.pairs(Side::Q);
    let start = 4 * (lse.offset as u64 + first as u64 * rows);
    (start, start + 4 * pairs as u64 * rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cut_covers_each_pair_once_and_in_order() {
        let shape = Shape {
            batch: 3,
            q_heads: 6,
            kv_heads: 2,
            ..Shape::mha(1, 1, 5, 16)
        };
        for slices in Slice::cuts(&shape) {
            for (side, heads) in [(Side::Q, 6), (Side::Kv, 2)] {
                let mut next = 0;
                for slice in &slices {
                    let (first, pairs) = slice.pairs(side);
                    assert_eq!(first, next, "{slice:?}");
                    assert_eq!(pairs, slice.batches * slice.heads(side).1);
                    next += pairs;
                }
                assert_eq!(next, 3 * heads);
            }
        }
    }

    #[test]
    fn scratch_ranges_of_heads_start_where_they_can_be_bound() {
        let extents = Extents {
            qk_dim: 16,
            codes: Codes::I8,
            value_bytes: 2 * 17 * 64 * 4,
            q_groups: 3,
            k_groups: 5,
            smooth: true,
            v_scaled: true,
            lse_bias: true,
            splits: 1,
            ranges: None,
        };
        let workspace = Workspace::new(&Shape::mha(2, 3, 130, 13), &extents);
        for range in [&workspace.q_codes, &workspace.k_codes, &workspace.values] {
            let per_pair: u64 = range.shape[2..].iter().product();
            assert!(per_pair.is_multiple_of(256), "{range:?}");
        }
        let mean = workspace.k_mean.as_ref();
        assert_eq!(
            workspace.float_index(mean, 2) - workspace.float_index(mean, 0),
            26
        );
        assert_eq!(workspace.float_index(None, 2), 0);
    }
}
