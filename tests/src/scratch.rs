//! The quantized operands that a plan leaves in its workspace, held to the definitions: the K mean and
//! the scales to their formulas, the codes to rounding given the tier's own mean and scale. This reads
//! the definitions once more, independently of the oracle's code.

use half::f16;
use sageattn_core::reference::faithful::KernelCodes;
use sageattn_core::reference::quantize::Codes;
use sageattn_core::scratch::{ScratchRange, ScratchType};
use sageattn_core::{Description, Grouping, Groups, Problem, QkQuant, Smooth, SmoothQ};

use crate::bounds;

/// Groups whose amax is below this count as zero.
const ZERO_AMAX: f32 = 1e-30;

/// How many codes differed from the formula, and how many were compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Compared {
    /// Codes one off, within reach of a tie.
    pub near_ties: usize,
    /// All codes.
    pub codes: usize,
}

/// Checks every range it knows: `k_mean`, `q_codes`, `q_scales`, `k_codes`, `k_scales`, and returns what
/// they hold. A plan without them has nothing to check.
///
/// # Errors
/// The first violation, with its place.
pub fn check(
    description: &Description,
    problem: &Problem,
    [q, k, _]: [&[f32]; 3],
    bytes: &[u8],
) -> Result<(Compared, KernelCodes), String> {
    let shape = problem.shape();
    let (grouping, largest, smooth_q) = match description.recipe.qk {
        QkQuant::None => return Ok(Default::default()),
        QkQuant::Int8(grouping) => (grouping, 127.0, SmoothQ::Off),
        QkQuant::Int4(grouping, smooth_q) => (grouping, 7.0, smooth_q),
    };
    let find = |name: &str| description.scratch.iter().find(|range| range.name == name);
    let heads = shape.batch * shape.kv_heads;
    let zero = vec![0.0; heads * shape.head_dim];
    let mean = match (find("k_mean"), description.recipe.smooth) {
        (_, Smooth::Off) => zero,
        (None, _) if find("k_codes").is_none() => zero,
        (None, _) => return Err("k_codes without the k_mean they were smoothed by".to_owned()),
        (Some(range), smooth) => {
            let mean = floats(range, bytes, heads, shape.head_dim)?;
            check_mean(smooth, k, shape.kv_len, shape.head_dim, &mean)?;
            mean
        }
    };
    let smoothed: Vec<f32> = k
        .chunks_exact(shape.head_dim)
        .enumerate()
        .flat_map(|(row, values)| {
            let head = row / shape.kv_len * shape.head_dim;
            values.iter().zip(&mean[head..]).map(|(x, mean)| x - mean)
        })
        .collect();

    let k = Side {
        name: "k",
        rows: &smoothed,
        heads,
        len: shape.kv_len,
        dim: shape.head_dim,
        groups: Grouping::k(grouping),
        largest,
    };
    let mut compared = Compared::default();
    let mut kernel = KernelCodes {
        k: k.check(find("k_codes"), find("k_scales"), bytes, &mut compared)?,
        ..KernelCodes::default()
    };
    if kernel.k.is_some() {
        let means = mean.chunks_exact(shape.head_dim);
        kernel.k_means = Some(means.map(<[f32]>::to_vec).collect());
    }
    // The means of smoothed Q are no named range, so its codes cannot be recomputed from scratch.
    if smooth_q == SmoothQ::Off {
        let q = Side {
            name: "q",
            rows: q,
            heads: shape.batch * shape.q_heads,
            len: shape.q_len,
            dim: shape.head_dim,
            groups: Grouping::q(grouping),
            largest,
        };
        kernel.q = q.check(find("q_codes"), find("q_scales"), bytes, &mut compared)?;
    }
    Ok((compared, kernel))
}

/// Q or K as it was quantized.
struct Side<'a> {
    name: &'static str,
    rows: &'a [f32],
    heads: usize,
    len: usize,
    dim: usize,
    groups: Groups,
    largest: f32,
}

impl Side<'_> {
    fn check(
        &self,
        codes: Option<&ScratchRange>,
        scales: Option<&ScratchRange>,
        bytes: &[u8],
        total: &mut Compared,
    ) -> Result<Option<Vec<Codes>>, String> {
        let (codes, scales) = match (codes, scales) {
            (None, None) => return Ok(None),
            (Some(codes), Some(scales)) => (codes, scales),
            _ => return Err(format!("{}: codes and scales come together", self.name)),
        };
        let count = self.groups.count(self.len);
        let scales = floats(scales, bytes, self.heads, count)?;
        let rows_stored = self.rows_stored(codes)?;
        let mut compared = Compared::default();
        let mut stored_codes = Vec::with_capacity(self.heads);
        for head in 0..self.heads {
            let mut codes_of_head = Vec::with_capacity(self.len * self.dim);
            let scales = &scales[head * count..][..count];
            let amax = self.amax(head, count);
            self.check_scales(head, scales, &amax)?;
            for row in 0..self.len {
                let group = self.groups.of(row);
                let values = &self.rows[(head * self.len + row) * self.dim..][..self.dim];
                let start = (head * rows_stored.0 + row) * rows_stored.1;
                let stored = stored_codes_at(codes, bytes, start, self.dim)?;
                codes_of_head.extend_from_slice(&stored);
                for (channel, (&x, &code)) in values.iter().zip(&stored).enumerate() {
                    let zero = amax[group] < ZERO_AMAX;
                    let verdict = judge(x, scales[group], zero, self.largest, code);
                    let near_tie = verdict.map_err(|expected| {
                        let name = self.name;
                        format!("{name}_codes: head {head}, row {row}, channel {channel} is {code}, not {expected} ({x} / {})", scales[group])
                    })?;
                    compared.near_ties += usize::from(near_tie);
                    compared.codes += 1;
                }
            }
            stored_codes.push(Codes {
                codes: codes_of_head,
                scales: scales.to_vec(),
            });
        }
        // A code in a thousand lies that near a tie by chance.
        if compared.near_ties > compared.codes / 100 + 2 {
            return Err(format!(
                "{}_codes: {compared:?}, too many at ties",
                self.name
            ));
        }
        total.near_ties += compared.near_ties;
        total.codes += compared.codes;
        Ok(Some(stored_codes))
    }

    /// Rows per head and codes per row in storage, padding included.
    fn rows_stored(&self, range: &ScratchRange) -> Result<(usize, usize), String> {
        let [.., rows, dim] = range.shape[..] else {
            return Err(format!("{}: codes without rows", range.name));
        };
        let (rows, dim) = (to_usize(rows), to_usize(dim));
        let size = match range.kind {
            ScratchType::I8 => 1,
            ScratchType::F16 => 2,
            ScratchType::F32 | ScratchType::Bytes => 0,
        };
        let whole = size > 0 && rows >= self.len && dim >= self.dim;
        if !whole || to_usize(range.bytes) != size * self.heads * rows * dim {
            return Err(format!(
                "{}: {range:?} is not [.., heads, rows, head_dim] of {} x {} x {}",
                range.name, self.heads, self.len, self.dim
            ));
        }
        Ok((rows, dim))
    }

    fn amax(&self, head: usize, count: usize) -> Vec<f32> {
        let mut amax = vec![0.0f32; count];
        for row in 0..self.len {
            let values = &self.rows[(head * self.len + row) * self.dim..][..self.dim];
            let group = &mut amax[self.groups.of(row)];
            *group = values.iter().fold(*group, |max, x| max.max(x.abs()));
        }
        amax
    }

    fn check_scales(&self, head: usize, scales: &[f32], amax: &[f32]) -> Result<(), String> {
        let mut occupied = vec![false; amax.len()];
        (0..self.len).for_each(|row| occupied[self.groups.of(row)] = true);
        for (group, (&scale, &amax)) in scales.iter().zip(amax).enumerate() {
            let expected = if amax < ZERO_AMAX {
                1.0
            } else {
                amax / self.largest
            };
            // Groups without rows are padding: they scale nothing.
            if occupied[group] && ulps(scale, expected) > bounds::SCALE_ULPS {
                let name = self.name;
                return Err(format!(
                    "{name}_scales: head {head}, group {group} is {scale}, not {expected}"
                ));
            }
        }
        Ok(())
    }
}

/// `count` codes of a range of 8-bit codes, or of whole numbers in f16, from code `start` on.
fn stored_codes_at(
    range: &ScratchRange,
    bytes: &[u8],
    start: usize,
    count: usize,
) -> Result<Vec<i8>, String> {
    let bytes = &bytes[to_usize(range.offset)..];
    if range.kind != ScratchType::F16 {
        let stored = bytes[start..][..count].iter();
        return Ok(stored.map(|code| code.cast_signed()).collect());
    }
    let halves = &bytes.as_chunks().0[start..][..count];
    let stored = halves.iter().map(|&half| {
        let x = f16::from_le_bytes(half).to_f32();
        let fits = x.fract() == 0.0 && x.abs() <= 127.0;
        let not_a_code = || format!("{}: {x} is no code", range.name);
        #[allow(clippy::cast_possible_truncation, reason = "it was just compared")]
        fits.then_some(x as i8).ok_or_else(not_a_code)
    });
    stored.collect()
}

/// Whether a code is the rounded quotient (`Ok(false)`), its neighbour near a tie (`Ok(true)`), or
/// wrong (the code it should be).
fn judge(x: f32, scale: f32, zero: bool, largest: f32, code: i8) -> Result<bool, f64> {
    let quotient = if zero {
        0.0
    } else {
        f64::from(x) / f64::from(scale)
    };
    let largest = f64::from(largest);
    let expected = quotient.round_ties_even().clamp(-largest, largest);
    let off = (f64::from(code) - expected).abs();
    let from_tie = ((quotient - quotient.floor()) - 0.5).abs();
    if off == 0.0 {
        Ok(false)
    } else if off == 1.0 && from_tie <= bounds::TIE && f64::from(code).abs() <= largest {
        Ok(true)
    } else {
        Err(expected)
    }
}

fn check_mean(
    smooth: Smooth,
    k: &[f32],
    len: usize,
    dim: usize,
    mean: &[f32],
) -> Result<(), String> {
    let samples = match smooth {
        Smooth::Off => return Ok(()),
        Smooth::Mean => len,
        Smooth::Sampled(n) => usize::try_from(n.get()).unwrap_or(len).min(len),
    };
    for (head, keys) in k.chunks_exact(len * dim).enumerate() {
        let largest = keys.iter().fold(0.0f32, |max, x| max.max(x.abs()));
        for channel in 0..dim {
            let sum: f64 = (0..samples)
                .map(|i| f64::from(keys[i * len / samples * dim + channel]))
                .sum();
            let (expected, got) = (sum / samples as f64, f64::from(mean[head * dim + channel]));
            let error = (got - expected).abs();
            let bound = bounds::MEAN * f64::from(largest);
            if !bounds::within(error, bound) && expected.is_finite() {
                return Err(format!(
                    "k_mean: head {head}, channel {channel} is {got}, not {expected}"
                ));
            }
        }
    }
    Ok(())
}

/// The `[heads, count]` leading part of an f32 range whose rows may be padded.
fn floats(
    range: &ScratchRange,
    bytes: &[u8],
    heads: usize,
    count: usize,
) -> Result<Vec<f32>, String> {
    let stored = range.shape.last().copied().map_or(0, to_usize);
    let whole = range.kind == ScratchType::F32 && stored >= count;
    if !whole || to_usize(range.bytes) != 4 * heads * stored {
        return Err(format!(
            "{}: {range:?} is not [.., {heads}, {count}] of f32",
            range.name
        ));
    }
    let words = bytes[to_usize(range.offset)..][..to_usize(range.bytes)]
        .as_chunks()
        .0;
    let rows = words.chunks_exact(stored.max(1));
    Ok(rows
        .flat_map(|row| row[..count].iter().map(|&word| f32::from_le_bytes(word)))
        .collect())
}

/// Units in the last place between two positive floats; as many as there are when either is not.
fn ulps(a: f32, b: f32) -> u32 {
    if a > 0.0 && b > 0.0 {
        a.to_bits().abs_diff(b.to_bits())
    } else {
        u32::MAX
    }
}

/// The workspace was downloaded, so its offsets are indices.
fn to_usize(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_may_be_one_off_only_at_a_tie() {
        assert_eq!(judge(2.5, 1.0, false, 127.0, 2), Ok(false));
        assert_eq!(judge(2.5, 1.0, false, 127.0, 3), Ok(true));
        assert_eq!(judge(2.4, 1.0, false, 127.0, 3), Err(2.0));
        assert_eq!(judge(2.5, 1.0, false, 127.0, 4), Err(2.0));
        assert_eq!(judge(127.4999, 1.0, false, 127.0, -128), Err(127.0));
        assert_eq!(judge(-127.5, 1.0, false, 127.0, -128), Err(-127.0));
        assert_eq!(judge(1e-31, 1.0, true, 127.0, 0), Ok(false));
    }

    #[test]
    fn codes_in_f16_are_whole_numbers() {
        let range = ScratchRange {
            name: "q_codes",
            kind: ScratchType::F16,
            shape: vec![1, 1, 1, 3],
            offset: 2,
            bytes: 6,
        };
        let bytes = |codes: [f32; 3]| {
            let halves = codes.map(|x| f16::from_f32(x).to_le_bytes());
            [&[0, 0], halves.as_flattened()].concat()
        };
        let read = |codes| stored_codes_at(&range, &bytes(codes), 0, 3);
        assert_eq!(read([-127.0, 0.0, 5.0]), Ok(vec![-127, 0, 5]));
        assert!(read([0.0, 0.5, 0.0]).is_err());
        assert!(read([128.0, 0.0, 0.0]).is_err());
        assert!(read([0.0, 0.0, f32::NAN]).is_err());
    }

    #[test]
    fn ulps_count_representable_steps() {
        assert_eq!(ulps(1.0, 1.0), 0);
        assert_eq!(ulps(1.0, 1.0 + f32::EPSILON), 1);
        assert_eq!(ulps(f32::NAN, 1.0), u32::MAX);
    }
}
