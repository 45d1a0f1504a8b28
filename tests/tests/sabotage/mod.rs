//! A backend that is right but for one planted bug. It computes with the faithful oracle, keeps its
//! quantized operands in the workspace as a GPU backend does, and lives in the CPU backend's memory.

use std::sync::atomic::{AtomicUsize, Ordering};

use sageattn_core::reference::faithful;
use sageattn_core::reference::quantize::{integer_codes, key_offset, subtract};
use sageattn_core::scratch::{Scratch, ScratchRange, ScratchType};
use sageattn_core::{
    Align, Backend, Buffer, Cpu, Description, DeviceInfo, Error, HostOutput, HostTensor, Io,
    Layout, Mask, Plan, Problem, Profile, QkQuant, Recipe, Rounding, Shape, Smooth, TensorView,
    Unsupported,
};

/// What is wrong. Bugs of one row are in the last row of the last head that has the means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bug {
    None,
    /// LSE of one row lacks `scale * (q . mean)`.
    LseUncorrected,
    /// One row does not see the last key.
    TailShort,
    /// One row sees a key of zeros behind the last.
    TailLong,
    /// One row takes its mask from the other alignment.
    TopLeft,
    /// One group of keys is multiplied by the next group's scale.
    NeighbourScale,
    /// Four codes of the last key are what the workspace held before.
    StaleWord,
    /// One row is not written.
    DroppedRow,
    /// One row is zero.
    ZeroRow,
    /// One row is that of the head before.
    NeighbourHead,
    /// The byte behind the last row of O is written.
    GuardByte,
    /// The byte behind the first row of O is written.
    PaddingByte,
    /// The byte behind the last scratch range is written.
    ScratchGuard,
    /// The first byte of K is changed.
    InputByte,
    /// The last bit of one element is that of a counter.
    Nondeterminism,
    /// One code of K is one too large.
    Code,
    /// One code of Q is one too large.
    QCode,
    /// One scale of K is eight ulps off.
    Scale,
    /// One channel of the mean is off by a thousandth.
    Mean,
    /// A row that sees no key holds a tiny number.
    BlindRow,
}

#[derive(Debug)]
pub(crate) struct Sabotaged {
    bug: Bug,
}

impl Sabotaged {
    pub(crate) fn new(bug: Bug) -> Self {
        Self { bug }
    }
}

impl Backend for Sabotaged {
    fn name(&self) -> &'static str {
        "sabotaged"
    }

    fn device(&self) -> DeviceInfo {
        Cpu::new().device()
    }

    fn supports(&self, _: &Problem, _: &Recipe) -> Result<(), Unsupported> {
        Ok(())
    }

    fn preferred(&self, _: &Problem) -> Recipe {
        Recipe::SAGE1_B
    }

    fn plan(&self, problem: &Problem, recipe: &Recipe) -> Result<Box<dyn Plan>, Error> {
        let shape = problem.shape();
        let (q_heads, kv_heads) = (shape.batch * shape.q_heads, shape.batch * shape.kv_heads);
        let mut scratch = Scratch::default();
        if let Some((grouping, _)) = integers(recipe) {
            let sizes = |heads: usize, rest: &[usize]| -> Vec<u64> {
                let sizes = [heads].into_iter().chain(rest.iter().copied());
                sizes.map(|n| n as u64).collect()
            };
            let (f32s, i8s) = (ScratchType::F32, ScratchType::I8);
            let dim = shape.head_dim;
            scratch.push("k_mean", f32s, &sizes(kv_heads, &[dim]));
            scratch.push("q_codes", i8s, &sizes(q_heads, &[shape.q_len, dim]));
            scratch.push(
                "q_scales",
                f32s,
                &sizes(q_heads, &[grouping.q().count(shape.q_len)]),
            );
            scratch.push("k_codes", i8s, &sizes(kv_heads, &[shape.kv_len, dim]));
            scratch.push(
                "k_scales",
                f32s,
                &sizes(kv_heads, &[grouping.k().count(shape.kv_len)]),
            );
        }
        Ok(Box::new(SabotagedPlan {
            bug: self.bug,
            problem: *problem,
            recipe: *recipe,
            scratch,
            runs: AtomicUsize::new(0),
        }))
    }

    fn alloc(&self, bytes: u64) -> Result<Box<dyn Buffer>, Error> {
        Cpu::new().alloc(bytes)
    }

    fn upload(&self, buffer: &dyn Buffer, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        Cpu::new().upload(buffer, offset, bytes)
    }

    fn download(&self, buffer: &dyn Buffer, offset: u64, bytes: &mut [u8]) -> Result<(), Error> {
        Cpu::new().download(buffer, offset, bytes)
    }

    fn synchronize(&self) -> Result<(), Error> {
        Ok(())
    }
}

#[derive(Debug)]
struct SabotagedPlan {
    bug: Bug,
    problem: Problem,
    recipe: Recipe,
    scratch: Scratch,
    runs: AtomicUsize,
}

impl Plan for SabotagedPlan {
    fn describe(&self) -> Description {
        Description {
            variant: format!("sabotaged_{:?}", self.bug),
            recipe: self.recipe,
            rounding: Rounding::of(&self.recipe),
            scratch: self.scratch.ranges().to_vec(),
        }
    }

    fn workspace_bytes(&self) -> u64 {
        self.scratch.bytes()
    }

    fn run(&self, io: &Io<'_>, workspace: &dyn Buffer) -> Result<(), Error> {
        io.check_run(&self.problem, workspace, self.workspace_bytes())?;
        let [q, k, v] = [io.q(), io.k(), io.v()].map(read);
        let (q, k, v) = (q?, k?, v?);
        let stale = self.stale_word(workspace)?;
        self.write_scratch(workspace, [&q, &k])?;

        let rounding = Rounding::of(&self.recipe);
        let mut result = faithful::attend(&self.problem, &self.recipe, &rounding, [&q, &k, &v]);
        self.spoil_values(&mut result, [&q, &k, &v], stale)?;
        let mut out = result.out;
        if self.bug == Bug::Nondeterminism
            && let Some(x) = out.first_mut()
        {
            let run = self.runs.fetch_add(1, Ordering::Relaxed);
            // The tenth bit behind the point shows in every element type but bf16.
            *x *= 1.0 + (run % 2) as f32 * 2.0f32.powi(-10);
        }
        self.write_out(io.out(), &out)?;
        if let (Some(view), Some(lse)) = (io.lse(), &result.lse) {
            let bytes: Vec<u8> = lse.iter().flat_map(|x| x.to_le_bytes()).collect();
            Cpu::new().upload(view.buffer, 4 * view.offset as u64, &bytes)?;
        }
        if self.bug == Bug::InputByte {
            let first = 4 * (io.k().layout.offset() * io.k().dtype.size() / 4) as u64;
            edit(io.k().buffer, first, |byte| byte ^ 1)?;
        }
        Ok(())
    }

    fn profile(&self, _: &Io<'_>, _: &dyn Buffer) -> Result<Profile, Error> {
        Err(Error::invalid("profile", "no test asks for it"))
    }
}

impl SabotagedPlan {
    /// The bugs that change numbers.
    fn spoil_values(
        &self,
        result: &mut HostOutput,
        [q, k, v]: [&[f32]; 3],
        stale: [i8; 4],
    ) -> Result<(), Error> {
        let shape = *self.problem.shape();
        let (dim, q_len) = (shape.head_dim, shape.q_len);
        let rows = shape.batch * shape.q_heads * q_len;
        let last = rows - 1;
        let mut replace = |row: usize, by: &HostOutput| {
            result.out[row * dim..][..dim].copy_from_slice(&by.out[row * dim..][..dim]);
            if let (Some(lse), Some(by)) = (&mut result.lse, &by.lse) {
                lse[row] = by[row];
            }
        };
        match self.bug {
            Bug::LseUncorrected => {
                let correction = self.correction(last, q, k);
                if let Some(lse) = &mut result.lse {
                    lse[last] -= correction;
                }
            }
            Bug::TailShort if self.problem.mask() == Mask::None && shape.kv_len > 1 => {
                replace(last, &self.with_keys(shape.kv_len - 1, [q, k, v])?);
            }
            Bug::TailLong if self.problem.mask() == Mask::None => {
                replace(last, &self.with_keys(shape.kv_len + 1, [q, k, v])?);
            }
            Bug::TopLeft if self.problem.mask() == Mask::Causal(Align::BottomRight) => {
                let other = self.problem.with_mask(Mask::Causal(Align::TopLeft));
                let rounding = Rounding::of(&self.recipe);
                replace(
                    last - (q_len - 1),
                    &faithful::attend(&other, &self.recipe, &rounding, [q, k, v]),
                );
            }
            Bug::NeighbourScale | Bug::StaleWord => {
                let other = self.with_changed_keys([q, k, v], stale)?;
                for row in rows - shape.heads_per_kv() * q_len..rows {
                    replace(row, &other);
                }
            }
            Bug::ZeroRow => result.out[last * dim..].fill(0.0),
            Bug::NeighbourHead if last >= q_len => {
                let from = (last - q_len) * dim;
                result.out.copy_within(from..from + dim, last * dim);
            }
            Bug::BlindRow if self.problem.visible_keys(0) == 0 => result.out[0] = 1e-3,
            _ => {}
        }
        Ok(())
    }

    /// The same call on another number of keys: the last left out, or one of the mean added behind it.
    fn with_keys(&self, kv_len: usize, [q, k, v]: [&[f32]; 3]) -> Result<HostOutput, Error> {
        let shape = *self.problem.shape();
        let old = shape.kv_len * shape.head_dim;
        let mut keys = Vec::new();
        let mut values = Vec::new();
        for (k, v) in k.chunks_exact(old).zip(v.chunks_exact(old)) {
            let mean = key_offset(self.recipe.smooth, k, shape.head_dim);
            let kept = old.min(kv_len * shape.head_dim);
            keys.extend_from_slice(&k[..kept]);
            values.extend_from_slice(&v[..kept]);
            if kv_len > shape.kv_len {
                keys.extend(mean);
                values.extend(vec![0.0; shape.head_dim]);
            }
        }
        let shape = Shape { kv_len, ..shape };
        let problem = Problem::new(shape, self.problem.dtype())
            .and_then(|p| p.with_softmax_scale(self.problem.softmax_scale()))?
            .with_outputs(self.problem.outputs());
        let rounding = Rounding::of(&self.recipe);
        Ok(faithful::attend(
            &problem,
            &self.recipe,
            &rounding,
            [q, &keys, &values],
        ))
    }

    /// The same call with some smoothed keys changed after their scales were taken.
    fn with_changed_keys(
        &self,
        [q, k, v]: [&[f32]; 3],
        stale: [i8; 4],
    ) -> Result<HostOutput, Error> {
        let (dim, kv_len) = (self.problem.shape().head_dim, self.problem.shape().kv_len);
        let Some((grouping, largest)) = integers(&self.recipe) else {
            return Err(Error::invalid("recipe", "the bug needs integer codes"));
        };
        let mut keys = Vec::new();
        for head in k.chunks_exact(kv_len * dim) {
            let mean = key_offset(self.recipe.smooth, head, dim);
            let mut smoothed = subtract(head, &mean);
            let groups = grouping.k();
            let scales = integer_codes(&smoothed, dim, groups, largest).scales;
            for (row, values) in smoothed.chunks_exact_mut(dim).enumerate() {
                let group = groups.of(row);
                if self.bug == Bug::NeighbourScale && group == 0 && scales.len() > 1 {
                    values.iter_mut().for_each(|x| *x *= scales[1] / scales[0]);
                }
                if self.bug == Bug::StaleWord && row == kv_len - 1 {
                    let codes = stale.iter().map(|&code| f32::from(code) * scales[group]);
                    values.iter_mut().zip(codes).for_each(|(x, code)| *x = code);
                }
            }
            keys.extend(smoothed);
        }
        let recipe = self.recipe.with_smooth(Smooth::Off);
        let mut result = faithful::attend(
            &self.problem,
            &recipe,
            &Rounding::of(&recipe),
            [q, &keys, v],
        );
        if let Some(lse) = &mut result.lse {
            for (row, lse) in lse.iter_mut().enumerate() {
                *lse += self.correction(row, q, k);
            }
        }
        Ok(result)
    }

    /// `scale * (q . mean)` of one row.
    fn correction(&self, row: usize, q: &[f32], k: &[f32]) -> f32 {
        let shape = self.problem.shape();
        let dim = shape.head_dim;
        let kv_head = row / shape.q_len / shape.heads_per_kv();
        let keys = &k[kv_head * shape.kv_len * dim..][..shape.kv_len * dim];
        let mean = key_offset(self.recipe.smooth, keys, dim);
        let dot: f32 = q[row * dim..].iter().zip(mean).map(|(q, m)| q * m).sum();
        self.problem.softmax_scale() * dot
    }

    fn range(&self, name: &str) -> Option<&ScratchRange> {
        self.scratch
            .ranges()
            .iter()
            .find(|range| range.name == name)
    }

    /// What the workspace holds where the last key's first four codes belong.
    fn stale_word(&self, workspace: &dyn Buffer) -> Result<[i8; 4], Error> {
        let mut word = [0; 4];
        if let Some(range) = self.range("k_codes") {
            let at = range.offset + range.bytes - self.problem.shape().head_dim as u64;
            Cpu::new().download(workspace, at / 4 * 4, &mut word)?;
        }
        Ok(word.map(u8::cast_signed))
    }

    fn write_scratch(&self, workspace: &dyn Buffer, [q, k]: [&[f32]; 2]) -> Result<(), Error> {
        let shape = self.problem.shape();
        let dim = shape.head_dim;
        let Some((grouping, largest)) = integers(&self.recipe) else {
            return Ok(());
        };
        let (mut means, mut q_codes, mut k_codes) = (Vec::new(), Vec::new(), Vec::new());
        let (mut q_scales, mut k_scales) = (Vec::new(), Vec::new());
        for head in k.chunks_exact(shape.kv_len * dim) {
            let mean = key_offset(self.recipe.smooth, head, dim);
            let codes = integer_codes(&subtract(head, &mean), dim, grouping.k(), largest);
            means.extend(mean);
            k_codes.extend(codes.codes);
            k_scales.extend(codes.scales);
        }
        for head in q.chunks_exact(shape.q_len * dim) {
            let codes = integer_codes(head, dim, grouping.q(), largest);
            q_codes.extend(codes.codes);
            q_scales.extend(codes.scales);
        }
        match self.bug {
            // A code at the end of the range would be clamped.
            Bug::Code => k_codes
                .iter_mut()
                .rev()
                .find(|x| **x < 100)
                .into_iter()
                .for_each(|x| *x += 1),
            Bug::QCode => q_codes
                .iter_mut()
                .rev()
                .find(|x| **x < 100)
                .into_iter()
                .for_each(|x| *x += 1),
            Bug::Scale => k_scales[0] = f32::from_bits(k_scales[0].to_bits() + 8),
            Bug::Mean => means[0] += 1e-3,
            _ => {}
        }
        let floats = |x: &[f32]| x.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        let codes = |x: &[i8]| x.iter().map(|x| x.cast_unsigned()).collect::<Vec<u8>>();
        let contents = [
            ("k_mean", floats(&means)),
            ("q_codes", codes(&q_codes)),
            ("q_scales", floats(&q_scales)),
            ("k_codes", codes(&k_codes)),
            ("k_scales", floats(&k_scales)),
        ];
        for (name, bytes) in contents {
            if let Some(range) = self.range(name) {
                Cpu::new().upload(workspace, range.offset, &bytes)?;
            }
        }
        if self.bug == Bug::ScratchGuard
            && let Some(range) = self.scratch.ranges().last()
        {
            edit(workspace, range.offset + range.bytes, |_| 0)?;
        }
        Ok(())
    }

    fn write_out(&self, view: &TensorView<'_>, values: &[f32]) -> Result<(), Error> {
        let dense = HostTensor::from_f32(Layout::hnd(view.layout.shape()), view.dtype, values)?;
        let row_bytes = view.layout.shape()[3] * view.dtype.size();
        let rows: Vec<u64> = first_bytes(view);
        let written = rows.len() - usize::from(self.bug == Bug::DroppedRow);
        for (&start, row) in rows[..written]
            .iter()
            .zip(dense.bytes().chunks_exact(row_bytes))
        {
            Cpu::new().upload(view.buffer, start, row)?;
        }
        match self.bug {
            Bug::GuardByte => edit(view.buffer, rows[rows.len() - 1] + row_bytes as u64, |_| 0),
            // Where rows are dense the next row's first byte would be hit.
            Bug::PaddingByte if !rows.contains(&(rows[0] + row_bytes as u64)) => {
                edit(view.buffer, rows[0] + row_bytes as u64, |_| 0)
            }
            _ => Ok(()),
        }
    }
}

/// The grouping and the largest code of a recipe with integer codes.
fn integers(recipe: &Recipe) -> Option<(sageattn_core::Grouping, f32)> {
    match recipe.qk {
        QkQuant::None => None,
        QkQuant::Int8(grouping) => Some((grouping, 127.0)),
        QkQuant::Int4(grouping, _) => Some((grouping, 7.0)),
    }
}

fn read(view: &TensorView<'_>) -> Result<Vec<f32>, Error> {
    let bytes = view.buffer.bytes();
    let len = usize::try_from(bytes).map_err(|_| Error::OutOfMemory { bytes })?;
    let mut bytes = vec![0; len];
    Cpu::new().download(view.buffer, 0, &mut bytes)?;
    Ok(HostTensor::from_bytes(view.layout, view.dtype, bytes)?.to_f32())
}

/// The first byte of every row, in dense order.
fn first_bytes(view: &TensorView<'_>) -> Vec<u64> {
    let [batches, heads, len, _] = view.layout.shape();
    let mut starts = Vec::new();
    for batch in 0..batches {
        for head in 0..heads {
            for row in 0..len {
                starts.push((view.layout.row(batch, head, row) * view.dtype.size()) as u64);
            }
        }
    }
    starts
}

/// Changes one byte.
fn edit(buffer: &dyn Buffer, at: u64, change: impl Fn(u8) -> u8) -> Result<(), Error> {
    let mut byte = [0];
    Cpu::new().download(buffer, at, &mut byte)?;
    Cpu::new().upload(buffer, at, &[change(byte[0])])
}
