//! The two oracles. [`exact`] says what attention is; [`faithful`] says what a recipe makes of it,
//! rounding where the kernels round. Both are scalar code over dense f32 values in
//! `[batch, heads, len, head_dim]` order, written to be compared with the papers' formulas.

pub mod e4m3;
pub mod exact;
pub mod faithful;
pub mod quantize;

use rayon::prelude::*;

use crate::Problem;

/// Rows of Q that one task computes: enough to pay for scheduling, few enough to balance a causal
/// mask.
const ROWS_PER_TASK: usize = 32;

/// Computes every row of O and LSE in parallel; `row(head, row, out)` fills one row and returns its
/// LSE. `head` counts (batch, query head) pairs.
fn for_all_rows<T: Copy + Default + Send>(
    problem: &Problem,
    row: impl Fn(usize, usize, &mut [T]) -> T + Sync,
) -> (Vec<T>, Vec<T>) {
    let shape = problem.shape();
    let (len, head_dim) = (shape.q_len, shape.head_dim);
    let heads = shape.batch * shape.q_heads;
    let mut out = vec![T::default(); heads * len * head_dim];
    let mut lse = vec![T::default(); heads * len];
    let heads_of_out = out.par_chunks_exact_mut(len * head_dim);
    let heads_of_lse = lse.par_chunks_exact_mut(len);
    (heads_of_out, heads_of_lse)
        .into_par_iter()
        .enumerate()
        .for_each(|(head, (out, lse))| {
            let out = out.par_chunks_mut(ROWS_PER_TASK * head_dim);
            let lse = lse.par_chunks_mut(ROWS_PER_TASK);
            (out, lse)
                .into_par_iter()
                .enumerate()
                .for_each(|(task, (out, lse))| {
                    let rows = out.chunks_exact_mut(head_dim).zip(lse);
                    for (index, (out, lse)) in rows.enumerate() {
                        *lse = row(head, task * ROWS_PER_TASK + index, out);
                    }
                });
        });
    (out, lse)
}

/// The (batch, KV head) pair that a (batch, query head) pair attends to.
fn kv_head(problem: &Problem, head: usize) -> usize {
    // q_heads is a multiple of kv_heads, so batches divide evenly as well.
    head / problem.shape().heads_per_kv()
}

/// Rounds to f32, which is what a kernel stores.
fn to_f32(x: f64) -> f32 {
    #[expect(clippy::cast_possible_truncation, reason = "rounding is the point")]
    {
        x as f32
    }
}
