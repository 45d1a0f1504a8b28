//! What a recipe computes, rounding for rounding: the oracle that kernels are compared with.
//!
//! For each query row, over key tiles in the kernel's order (the notation of arXiv 2410.02367,
//! algorithm 1, in base 2):
//!
//! ```text
//! s_j = c (q_codes . k_codes_j)        c = softmax_scale * log2(e) * q_scale * k_scale_j
//! m'  = max(m, max_j s_j)              or kept at m: see Reference
//! a   = 2^(m - m')
//! p_j = round(2^(s_j - m'))            floats or integers, each recipe its own rounding
//! l   = a l + sum_j p_j                of the rounded p or not: see Divisor
//! O   = a O + sum_j p_j v_j
//! ```
//!
//! and in the end `O = v_scale (O / l + r)`, where `r` is the mean of what e4m3 rounded off V in the
//! tiles that the row's block of rows sees, and zero in the other recipes.

use std::f32::consts::{LN_2, LOG2_E};

use half::{bf16, f16};
use rayon::prelude::*;

use super::exact::dot;
use super::quantize::{self, Codes, RESIDUAL_ROWS, RESIDUAL_TILE, VOperand};
use super::{e4m3, exact, for_all_rows, kv_head, to_f32};
use crate::{
    DType, Divisor, HostOutput, KeyOrder, Outputs, Problem, PvQuant, QkQuant, Recipe, Reference,
    Rounding, SmoothQ,
};

/// The exponent offset of e4m3 P: `2^8 = 256` is a power of two, so it scales without rounding, and
/// stays below e4m3's 448.
const E4M3_P_EXPONENT: f32 = 8.0;

/// Attention under a recipe, in f32, before O is rounded to the tensors' element type.
///
/// `q`, `k` and `v` are dense `[batch, heads, len, head_dim]`.
pub fn attend(
    problem: &Problem,
    recipe: &Recipe,
    rounding: &Rounding,
    tensors: [&[f32]; 3],
) -> HostOutput {
    Prepared::new(problem, recipe, tensors).attend(rounding)
}

/// Tensors quantized as the recipe says: the first half of a call.
#[derive(Debug)]
pub struct Prepared<'a> {
    problem: Problem,
    recipe: Recipe,
    tensors: [&'a [f32]; 3],
    /// Per (batch, query head).
    queries: Vec<Operand>,
    /// Per (batch, KV head).
    keys: Vec<Operand>,
    /// Per (batch, KV head).
    values: Vec<VOperand>,
}

/// What a kernel made of Q and K, for [`Prepared::adopt`]. What a kernel does not show stays the
/// oracle's.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct KernelCodes {
    /// Q's codes and scales, per (batch, query head).
    pub q: Option<Vec<Codes>>,
    /// K's codes and scales, per (batch, KV head).
    pub k: Option<Vec<Codes>>,
    /// What was subtracted from the keys, per (batch, KV head).
    pub k_means: Option<Vec<Vec<f32>>>,
}

/// Q or K of one head: what is left after subtracting the mean, and its codes.
#[derive(Debug, Default)]
struct Operand {
    /// The rows that were quantized: Q, or K less its offset.
    rows: Vec<f32>,
    /// K's offset, or the means of Q's blocks one after the other; empty when there are none.
    means: Vec<f32>,
    /// Widened so that the compiler finds the multiply-add of 16-bit pairs.
    codes: Vec<i16>,
    scales: Vec<f32>,
}

impl<'a> Prepared<'a> {
    /// Quantizes Q, K and V.
    pub fn new(problem: &Problem, recipe: &Recipe, tensors: [&'a [f32]; 3]) -> Self {
        let mut prepared = Self {
            problem: *problem,
            recipe: *recipe,
            tensors,
            queries: Vec::new(),
            keys: Vec::new(),
            values: Vec::new(),
        };
        if prepared.is_exact() {
            return prepared;
        }
        let [q, k, v] = tensors;
        let shape = problem.shape();
        let q_rows = q.par_chunks_exact(shape.q_len * shape.head_dim);
        let k_rows = k.par_chunks_exact(shape.kv_len * shape.head_dim);
        let v_rows = v.par_chunks_exact(shape.kv_len * shape.head_dim);
        prepared.queries = q_rows.map(|rows| prepared.query_operand(rows)).collect();
        prepared.keys = k_rows.map(|rows| prepared.key_operand(rows)).collect();
        prepared.values = v_rows.map(|rows| prepared.value_operand(rows)).collect();
        prepared
    }

    /// Goes on from a kernel's codes instead of the oracle's. A code at a tie may differ between them
    /// and moves a whole row's scores; with this, attention is compared apart from quantization.
    pub fn adopt(&mut self, kernel: KernelCodes) {
        let means = kernel.k_means.into_iter().flatten();
        for (operand, means) in self.keys.iter_mut().zip(means) {
            operand.means = means;
        }
        let q = self.queries.iter_mut().zip(kernel.q.into_iter().flatten());
        let k = self.keys.iter_mut().zip(kernel.k.into_iter().flatten());
        for (operand, codes) in q.chain(k) {
            operand.take(codes);
        }
    }

    fn is_exact(&self) -> bool {
        (self.recipe.qk, self.recipe.pv) == (QkQuant::None, PvQuant::None)
    }

    fn query_operand(&self, rows: &[f32]) -> Operand {
        let head_dim = self.problem.shape().head_dim;
        match self.recipe.qk {
            QkQuant::None => Operand {
                rows: rows.to_vec(),
                ..Operand::default()
            },
            QkQuant::Int8(groups) => {
                Operand::quantize(rows.to_vec(), Vec::new(), head_dim, groups.q(), 127.0)
            }
            QkQuant::Int4(groups, SmoothQ::Off) => {
                Operand::quantize(rows.to_vec(), Vec::new(), head_dim, groups.q(), 7.0)
            }
            QkQuant::Int4(groups, SmoothQ::BlockMean) => {
                let (mut smoothed, mut means) = (Vec::new(), Vec::new());
                for block in rows.chunks(SmoothQ::BLOCK * head_dim) {
                    let mean = quantize::mean_of_rows(block, head_dim, 0..block.len() / head_dim);
                    smoothed.extend(quantize::subtract(block, &mean));
                    means.extend(mean);
                }
                Operand::quantize(smoothed, means, head_dim, groups.q(), 7.0)
            }
        }
    }

    fn key_operand(&self, rows: &[f32]) -> Operand {
        let head_dim = self.problem.shape().head_dim;
        let offset = quantize::key_offset(self.recipe.smooth, rows, head_dim);
        let smoothed = quantize::subtract(rows, &offset);
        match self.recipe.qk {
            QkQuant::None => Operand {
                rows: smoothed,
                means: offset,
                ..Operand::default()
            },
            QkQuant::Int8(groups) => {
                Operand::quantize(smoothed, offset, head_dim, groups.k(), 127.0)
            }
            QkQuant::Int4(groups, _) => {
                Operand::quantize(smoothed, offset, head_dim, groups.k(), 7.0)
            }
        }
    }

    fn value_operand(&self, rows: &[f32]) -> VOperand {
        let head_dim = self.problem.shape().head_dim;
        match self.recipe.pv {
            PvQuant::None | PvQuant::Native => VOperand {
                values: rows.to_vec(),
                scales: vec![1.0; head_dim],
                residual_sums: Vec::new(),
            },
            PvQuant::F16 => quantize::v_f16(rows, head_dim, self.problem.dtype()),
            PvQuant::E4m3 => quantize::v_e4m3(rows, head_dim),
            PvQuant::Int8Static | PvQuant::Int8Dynamic => quantize::v_int8(rows, head_dim),
        }
    }

    /// The second half of a call: scores, softmax, P V.
    pub fn attend(&self, rounding: &Rounding) -> HostOutput {
        let (out, lse) = if self.is_exact() {
            let exact = exact::attend(&self.problem, self.tensors);
            (narrow(&exact.out), narrow(&exact.lse))
        } else {
            for_all_rows(&self.problem, |head, row, out| {
                self.attend_row(rounding, head, row, out)
            })
        };
        HostOutput {
            out,
            lse: (self.problem.outputs() == Outputs::OAndLse).then_some(lse),
        }
    }

    fn attend_row(&self, rounding: &Rounding, head: usize, row: usize, out: &mut [f32]) -> f32 {
        let head_dim = self.problem.shape().head_dim;
        let kv_head = kv_head(&self.problem, head);
        let values = &self.values[kv_head];
        let mut softmax = OnlineSoftmax::new(head_dim, self.problem.dtype(), rounding.reference);
        let mut scores = Vec::with_capacity(rounding.key_tile);

        for keys in tiles(self.problem.visible_keys(row), rounding) {
            scores.clear();
            scores.extend(keys.clone().map(|key| self.score(head, row, kv_head, key)));
            let tile = &values.values[keys.start * head_dim..keys.end * head_dim];
            softmax.step(&scores, tile, self.recipe.pv);
        }
        softmax.finish(
            values,
            self.residual(values, row),
            self.recipe.pv,
            rounding.divisor,
            out,
        );

        // The scores were those of the smoothed keys: LSE(Q K^T) = LSE(Q K'^T) + scale q . mean.
        let query = &self.tensors[0][(head * self.problem.shape().q_len + row) * head_dim..];
        let offset = &self.keys[kv_head].means;
        let correction = to_f32(dot(&query[..head_dim], offset)) * self.problem.softmax_scale();
        softmax.lse() + correction
    }

    /// Sums over the tiles that a row's block of rows sees of what rounding took from V, and the number
    /// of keys in them.
    fn residual<'v>(&self, values: &'v VOperand, row: usize) -> Option<(&'v [f32], f32)> {
        let shape = self.problem.shape();
        let last_row =
            (row / RESIDUAL_ROWS * RESIDUAL_ROWS + RESIDUAL_ROWS - 1).min(shape.q_len - 1);
        let tiles = self.problem.visible_keys(last_row).div_ceil(RESIDUAL_TILE);
        let sums = values.residual_sums.chunks_exact(shape.head_dim);
        let of_tiles = sums.take(tiles).next_back()?;
        Some((of_tiles, (tiles * RESIDUAL_TILE).min(shape.kv_len) as f32))
    }

    /// One score in log2 units.
    fn score(&self, head: usize, row: usize, kv_head: usize, key: usize) -> f32 {
        let head_dim = self.problem.shape().head_dim;
        let scale_log2 = self.problem.softmax_scale() * LOG2_E;
        let (q, k) = (&self.queries[head], &self.keys[kv_head]);
        let groups = match self.recipe.qk {
            QkQuant::None => {
                return to_f32(dot(q.row(row, head_dim), k.row(key, head_dim))) * scale_log2;
            }
            QkQuant::Int8(groups) | QkQuant::Int4(groups, _) => groups,
        };
        let products = q
            .codes_of(row, head_dim)
            .iter()
            .zip(k.codes_of(key, head_dim));
        let sum: i32 = products.map(|(&q, &k)| i32::from(q) * i32::from(k)).sum();
        let scales = q.scales[groups.q().of(row)] * k.scales[groups.k().of(key)];
        // |sum| <= 256 * 127^2 < 2^23: exact in f32.
        let score = sum as f32 * (scale_log2 * scales);
        match self.recipe.qk {
            QkQuant::Int4(_, SmoothQ::BlockMean) => {
                let mean = &q.means[row / SmoothQ::BLOCK * head_dim..][..head_dim];
                score + to_f32(dot(mean, k.row(key, head_dim))) * scale_log2
            }
            _ => score,
        }
    }
}

impl Operand {
    fn quantize(
        rows: Vec<f32>,
        means: Vec<f32>,
        head_dim: usize,
        groups: crate::Groups,
        largest_code: f32,
    ) -> Self {
        let quantized = quantize::integer_codes(&rows, head_dim, groups, largest_code);
        let mut operand = Self {
            rows,
            means,
            ..Self::default()
        };
        operand.take(quantized);
        operand
    }

    fn take(&mut self, quantized: Codes) {
        self.codes = quantized.codes.into_iter().map(i16::from).collect();
        self.scales = quantized.scales;
    }

    fn row(&self, row: usize, head_dim: usize) -> &[f32] {
        &self.rows[row * head_dim..][..head_dim]
    }

    fn codes_of(&self, row: usize, head_dim: usize) -> &[i16] {
        &self.codes[row * head_dim..][..head_dim]
    }
}

/// The running state of one row.
struct OnlineSoftmax {
    rule: Reference,
    /// What `PvQuant::Native` rounds P to.
    dtype: DType,
    /// The reference in use, log2 units.
    reference: f32,
    /// The sum of the P that is multiplied.
    rounded_sum: f32,
    /// The sum of P before rounding.
    sum: f32,
    /// O before division.
    out: Vec<f32>,
    /// P V of the tile at hand.
    tile: Vec<f32>,
}

impl OnlineSoftmax {
    fn new(head_dim: usize, dtype: DType, rule: Reference) -> Self {
        Self {
            rule,
            dtype,
            reference: f32::NEG_INFINITY,
            rounded_sum: 0.0,
            sum: 0.0,
            out: vec![0.0; head_dim],
            tile: vec![0.0; head_dim],
        }
    }

    /// log2 of e4m3 P at the reference.
    fn e4m3_exponent(&self) -> f32 {
        match self.rule {
            Reference::Maximum { .. } => E4M3_P_EXPONENT,
            Reference::Sum { .. } => 0.0,
        }
    }

    /// The reference for a tile of these scores.
    fn reference_for(&self, scores: &[f32], tile_max: f32) -> f32 {
        let old = self.reference;
        match self.rule {
            Reference::Maximum { stale } if tile_max > old + stale => tile_max,
            Reference::Maximum { .. } => old,
            Reference::Sum { start, limit } => {
                // Tiles start at a multiple of eight keys.
                let mut sums = [0.0; 4];
                for (key, score) in scores.iter().enumerate() {
                    sums[key % 8 / 2] += (score - old).exp2();
                }
                match (sums.iter().any(|&sum| sum > limit), tile_max - start) {
                    (false, _) => old,
                    (true, from_maximum) if from_maximum > old => from_maximum,
                    (true, _) => old + 2.0,
                }
            }
        }
    }

    /// Takes in one tile of scores and its rows of V.
    fn step(&mut self, scores: &[f32], values: &[f32], pv: PvQuant) {
        let tile_max = scores.iter().fold(f32::NEG_INFINITY, |max, &s| max.max(s));
        let old = self.reference;
        self.reference = self.reference_for(scores, tile_max);
        let keep = match self.reference > old {
            true => (old - self.reference).exp2(),
            false => 1.0,
        };

        // A dynamic scale spends all of P's 8 bits on the tile's own maximum.
        let (base, tile_weight) = match pv {
            PvQuant::Int8Dynamic => (tile_max, (tile_max - self.reference).exp2()),
            _ => (self.reference, 1.0),
        };
        self.tile.fill(0.0);
        let (mut rounded_sum, mut sum) = (0.0, 0.0);
        let e4m3_exponent = self.e4m3_exponent();
        for (&score, value) in scores.iter().zip(values.chunks_exact(self.tile.len())) {
            let p = (score - base).exp2();
            let rounded = match pv {
                PvQuant::None => p,
                PvQuant::Native => self.dtype.round(p),
                PvQuant::F16 => f16::from_f32(p).to_f32(),
                PvQuant::E4m3 => e4m3::round((score - base + e4m3_exponent).exp2()),
                PvQuant::Int8Static => (127.0 * p).round_ties_even(),
                PvQuant::Int8Dynamic => (255.0 * p).round_ties_even(),
            };
            rounded_sum += rounded;
            sum += p;
            for (tile, v) in self.tile.iter_mut().zip(value) {
                *tile += rounded * v;
            }
        }
        self.rounded_sum = self.rounded_sum * keep + rounded_sum * tile_weight;
        self.sum = self.sum * keep + sum * tile_weight;
        for (out, tile) in self.out.iter_mut().zip(&self.tile) {
            *out = *out * keep + tile * tile_weight;
        }
    }

    /// Writes `scale * (O / l + residual)`, or zero when the row saw no key.
    fn finish(
        &self,
        values: &VOperand,
        residual: Option<(&[f32], f32)>,
        pv: PvQuant,
        divisor: Divisor,
        out: &mut [f32],
    ) {
        if self.reference == f32::NEG_INFINITY {
            out.fill(0.0);
            return;
        }
        let divisor = match divisor {
            Divisor::RoundedP => self.rounded_sum,
            Divisor::UnroundedP => {
                self.sum
                    * match pv {
                        PvQuant::None | PvQuant::Native | PvQuant::F16 => 1.0,
                        PvQuant::E4m3 => self.e4m3_exponent().exp2(),
                        PvQuant::Int8Static => 127.0,
                        PvQuant::Int8Dynamic => 255.0,
                    }
            }
        };
        let sums = self.out.iter().zip(&values.scales).enumerate();
        for (result, (channel, (sum, scale))) in out.iter_mut().zip(sums) {
            let rounded_off = residual.map_or(0.0, |(sums, keys)| sums[channel] / keys);
            *result = (sum / divisor + rounded_off) * scale;
            if pv == PvQuant::E4m3 {
                // Not a weighted mean of codes any more; O's type may end where V does.
                let largest = largest_finite(self.dtype);
                *result = result.clamp(-largest, largest);
            }
        }
    }

    /// The natural logarithm of the unrounded sum; -inf when the row saw no key.
    fn lse(&self) -> f32 {
        (self.reference + self.sum.log2()) * LN_2
    }
}

/// The largest number of an element type.
fn largest_finite(dtype: DType) -> f32 {
    match dtype {
        DType::F16 => f16::MAX.to_f32(),
        DType::BF16 => bf16::MAX.to_f32(),
        DType::F32 => f32::MAX,
    }
}

/// The visible keys in tiles, counted from key 0, in the kernel's order.
fn tiles(visible: usize, rounding: &Rounding) -> impl Iterator<Item = std::ops::Range<usize>> {
    let (tile, order) = (rounding.key_tile, rounding.key_order);
    let count = visible.div_ceil(tile);
    (0..count).map(move |index| {
        let index = match order {
            KeyOrder::Ascending => index,
            KeyOrder::Descending => count - 1 - index,
        };
        index * tile..((index + 1) * tile).min(visible)
    })
}

fn narrow(values: &[f64]) -> Vec<f32> {
    values.iter().copied().map(to_f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Align, DType, Mask, Shape, metrics::Metrics};

    const LAZY: Rounding = Rounding {
        key_tile: 128,
        key_order: KeyOrder::Ascending,
        reference: Reference::Sum {
            start: 3.0,
            limit: 448.0,
        },
        divisor: Divisor::UnroundedP,
    };

    /// Values in [-1, 1); those of rows from `quiet` on eight times as large.
    fn noise(seed: u32, rows: usize, head_dim: usize, quiet: usize) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            f32::from((state >> 16) as u16) / 32768.0 - 1.0
        };
        let gain = |row| if row < quiet { 1.0 } else { 8.0 };
        (0..rows * head_dim)
            .map(|i| gain(i / head_dim) * next())
            .collect()
    }

    /// The loud keys come last, so references must rise; one query has no key.
    #[test]
    fn a_reference_checked_by_sums_changes_rounding_only() {
        let shape = Shape {
            q_len: 301,
            kv_len: 300,
            ..Shape::mha(1, 1, 1, 32)
        };
        let problem = Problem::new(shape, DType::F32).unwrap();
        let problem = problem
            .with_mask(Mask::Causal(Align::BottomRight))
            .with_outputs(Outputs::OAndLse);
        let (q, k, v) = (
            noise(1, 301, 32, 0),
            noise(2, 300, 32, 200),
            noise(3, 300, 32, 300),
        );
        let recipe = Recipe::SAGE2_I8_F8;
        let prepared = Prepared::new(&problem, &recipe, [&q, &k, &v]);
        let (plain, lazy) = (
            prepared.attend(&Rounding::of(&recipe)),
            prepared.attend(&LAZY),
        );
        assert_eq!(lazy.out[..32], [0.0; 32]);
        assert_ne!(plain.out, lazy.out);
        let reference: Vec<f64> = exact::attend(&problem, [&q, &k, &v]).out;
        let error = |result: &HostOutput| Metrics::compare(&result.out, &reference).rel_l1;
        assert!(error(&lazy) < 0.05, "{}", error(&lazy));
        assert!(error(&lazy) < 1.2 * error(&plain), "{}", error(&plain));
        for (plain, lazy) in plain.lse.unwrap().iter().zip(lazy.lse.unwrap()) {
            assert!(
                *plain == lazy || (plain - lazy).abs() < 1e-4,
                "{plain} {lazy}"
            );
        }
    }

    /// Causal, so that rows take what belongs to the tiles that they see.
    #[test]
    fn v_residuals_take_away_error() {
        let problem = Problem::new(Shape::mha(1, 1, 400, 16), DType::F32).unwrap();
        let problem = problem.with_mask(Mask::Causal(Align::TopLeft));
        let tensors = [1, 2, 3].map(|seed| noise(seed, 400, 16, 400));
        let tensors = tensors.each_ref().map(|tensor| &tensor[..]);
        let recipe = Recipe::SAGE2_I8_F8;
        let mut prepared = Prepared::new(&problem, &recipe, tensors);
        let exact = exact::attend(&problem, tensors).out;
        let error = |prepared: &Prepared<'_>| {
            let out = prepared.attend(&Rounding::of(&recipe)).out;
            Metrics::compare(&out, &exact).rel_l1
        };
        let with = error(&prepared);
        prepared.values[0].residual_sums.clear();
        let without = error(&prepared);
        assert!(with < 0.9 * without, "{with} {without}");
    }

    /// One key has all the weight and the largest number of the type; the others, which e4m3 rounds down by
    /// 15.9 of 448, pull the mean residual up.
    #[test]
    fn v_residuals_do_not_lift_o_out_of_the_range_of_its_type() {
        let shape = Shape {
            kv_len: 100,
            ..Shape::mha(1, 1, 1, 1)
        };
        let problem = Problem::new(shape, DType::F16).unwrap();
        let problem = problem.with_softmax_scale(1.0).unwrap();
        let largest = f16::MAX.to_f32();
        let (mut k, mut v) = ([0.0; 100], [largest * 431.9 / 448.0; 100]);
        k[3] = 50.0;
        v[3] = largest;
        let recipe = Recipe::SAGE2_I8_F8;
        let rounding = Rounding::of(&recipe);
        let got = attend(&problem, &recipe, &rounding, [&[1.0], &k, &v]);
        assert_eq!(got.out, [largest]);
    }

    #[test]
    fn the_reference_stays_while_sums_are_small() {
        let mut row = OnlineSoftmax::new(1, DType::F16, LAZY.reference);
        let mut step = |score: f32, keys: usize| {
            row.step(&vec![score; keys], &vec![1.0; keys], PvQuant::E4m3);
            row.reference
        };
        assert_eq!(step(1.0, 8), -2.0, "the first key sets it");
        assert_eq!(step(-5.0, 128), -2.0);
        // 2^7.8 = 223, two of them a thread; then 2^7.9 = 239.
        assert_eq!(step(5.8, 8), -2.0);
        assert_eq!(step(5.9, 8), 2.9f32);
        // 32 times 2^4: no P is large, but there are many.
        let start = OnlineSoftmax {
            reference: 0.0,
            ..OnlineSoftmax::new(
                1,
                DType::F16,
                Reference::Sum {
                    start: 5.0,
                    limit: 448.0,
                },
            )
        };
        assert_eq!(start.reference_for(&[4.0; 128], 4.0), 2.0);
    }
}
