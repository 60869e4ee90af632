//! Formulas (1) to (4) of the module above.

use ndarray::{Array2, ArrayView2, ArrayView3, ArrayView4, Axis, s};
use rayon::prelude::*;

use super::{BatchInputs, BatchOutput, fit, parts};
use crate::Scalar;
use crate::attention::blockwise::RowOutputs;
use crate::attention::{AttentionState, Inputs, VqAttention};
use crate::codebook::assign::{KEYS_PER_TASK, assign_into};
use crate::codebook::packed::Table;
use crate::codebook::{CodeStats, commitment};
use crate::ops::aligned;

/// One form of attention on one head, in at most so many parts at once; whether q and v are finite.
type Form<T> = fn(&VqAttention, &Inputs<'_, T>, &mut AttentionState<T>, RowOutputs<'_, T>, usize) -> bool;

/// Forward on checked shapes, up to the statistics; whether q, k and v are finite.
pub(super) fn run<T: Scalar>(
    attention: &VqAttention,
    inputs: &BatchInputs<'_, T>,
    table: &Table<T>,
    states: &mut Array2<AttentionState<T>>,
    form: Form<T>,
    output: &mut BatchOutput<T>,
) -> bool {
    let (b, h, t, _) = inputs.q.dim();
    fit_all(inputs, output);
    let codes = output.codes.as_slice_mut().expect("fitted");
    let (errors, finite_keys) = quantize(inputs.k, inputs.mask, table, codes);
    output.commit_loss = errors / inputs.counted().max(1) as f64; // (3)
    // (2)
    let codes = &output.codes;
    let numbers = output.lse.rows_mut().into_iter().zip(output.cached_mass.rows_mut());
    let rows = parts(&mut output.out).into_iter().zip(numbers).map(|(out, (lse, cached_mass))| {
        let [lse, cached_mass] = [lse, cached_mass].map(|row| row.into_slice().expect("fitted"));
        RowOutputs { out, lse, cached_mass }
    });
    // All query heads of a group start from their key head's state. The first of them moves it, the others move copies.
    let group = inputs.group();
    let mut copies: Vec<_> =
        states.iter().flat_map(|state| std::iter::repeat_n(state, group - 1)).cloned().collect();
    let mut copies = copies.iter_mut();
    let mut in_order = Vec::with_capacity(b * h);
    for state in states.iter_mut() {
        in_order.push(state);
        in_order.extend(copies.by_ref().take(group - 1));
    }
    let segments = segments(b * h, t);
    let finite = rows
        .collect::<Vec<_>>()
        .into_par_iter()
        .zip(in_order)
        .enumerate()
        .map(|(n, (rows, state))| {
            let (rows, padding) = rows.split_at(inputs.len_of(n / h));
            padding.clear();
            form(attention, &inputs.head(n / h, n % h, codes, &table.codewords), state, rows, segments)
        })
        .reduce(|| true, |a, b| a & b);
    finite_keys & finite & inputs.padding_finite(&inputs.q) & inputs.padding_finite(&inputs.v)
}

/// (4)
pub(super) fn statistics<T: Scalar>(
    inputs: &BatchInputs<'_, T>,
    codes: ArrayView3<'_, u32>,
    n_codes: usize,
) -> CodeStats<T> {
    CodeStats::collect_checked(inputs.k.view(), codes, n_codes, inputs.mask)
}

/// Into how many segments a sequence is cut so that all threads have work. Each costs a copy of the cache and the time to
/// bring it there, so there are more of them than threads only where they are long.
fn segments(heads: usize, t: usize) -> usize {
    const LONG: usize = 4096;
    let threads = rayon::current_num_threads();
    let shares = (t / LONG / threads).clamp(1, 4);
    if threads == 1 { 1 } else { (threads * shares).div_ceil(heads.max(1)) }
}

/// (1), and the sum of squares of (3); whether the keys are finite (a key whose square overflows counts as not).
pub(in crate::attention) fn quantize<T: Scalar>(
    keys: ArrayView4<'_, T>,
    mask: Option<ArrayView2<'_, bool>>,
    table: &Table<T>,
    codes: &mut [u32],
) -> (f64, bool) {
    let (_, h, t, _) = keys.dim();
    let of_heads: Vec<(f64, bool)> = codes
        .par_chunks_mut(t.max(1))
        .enumerate()
        .flat_map(|(n, codes)| {
            codes.par_chunks_mut(KEYS_PER_TASK).enumerate().map(move |(i, codes)| (n, i, codes))
        })
        .map(|(n, i, codes)| {
            let start = i * KEYS_PER_TASK;
            let range = start..start + codes.len();
            let keys = keys.slice(s![n / h, n % h, range.clone(), ..]);
            let finite = assign_into(&table.packed[n % h], keys, codes);
            let mask = mask.as_ref().map(|mask| mask.slice_move(s![n / h, range]));
            let codewords = table.codewords.index_axis(Axis(0), n % h);
            (commitment::squared_error(keys, (&*codes).into(), codewords, mask), finite)
        })
        .collect();
    (of_heads.iter().map(|(error, _)| error).sum(), of_heads.iter().all(|(_, finite)| *finite))
}

/// Gives the arrays of `output` the shapes that belong to `inputs`.
pub(super) fn fit_all<T: Scalar>(inputs: &BatchInputs<'_, T>, output: &mut BatchOutput<T>) {
    let (b, h, t, _) = inputs.q.dim();
    fit(&mut output.out, (b, h, t), inputs.v.len_of(Axis(3)));
    aligned::fit(&mut output.codes, (b, inputs.n_key_heads(), t));
    aligned::fit(&mut output.lse, (b, h, t));
    aligned::fit(&mut output.cached_mass, (b, h, t));
}
