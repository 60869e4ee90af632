//! Formulas (1) to (4) of the module above.

use ndarray::{Axis, s};
use rayon::prelude::*;

use super::{BidirectionalInputs, BidirectionalOutput, BidirectionalSaved};
use crate::Scalar;
use crate::attention::bidirectional::{Visible, sweep};
use crate::attention::heads::{fit, parts, quantize};
use crate::codebook::CodeStats;
use crate::codebook::packed::Table;
use crate::ops::aligned;
use crate::ops::finite::all_finite;

/// Forward on checked shapes; whether q, k and v are finite.
pub(super) fn run<T: Scalar>(
    inputs: &BidirectionalInputs<'_, T>,
    table: &Table<T>,
    output: &mut BidirectionalOutput<T>,
) -> (BidirectionalSaved<T>, bool) {
    let (b, heads, t, _) = inputs.q.dim();
    let (_, h, keys, d_v) = inputs.v.dim();
    fit(&mut output.out, (b, heads, t), d_v);
    aligned::fit(&mut output.lse, (b, heads, t));
    aligned::fit(&mut output.codes, (b, h, keys));
    let codes = output.codes.as_slice_mut().expect("fitted");
    let (errors, finite_keys) = quantize(inputs.k, inputs.key_mask, table, codes); // (1)
    output.commit_loss = errors / inputs.counted().max(1) as f64; // (3)
    let codes = &output.codes;
    let of_head = |n: usize| {
        let (b, h) = (n / h, n % h);
        let (codes, v) = (codes.slice(s![b, h, ..]), inputs.v.slice(s![b, h, .., ..]));
        let codewords = table.codewords.index_axis(Axis(0), h);
        let mask = inputs.key_mask.as_ref().map(|mask| mask.row(b));
        (Visible::new(codes, v, codewords, mask), all_finite(v))
    };
    let (visible, finite_values): (Vec<_>, Vec<bool>) = (0..b * h).into_par_iter().map(of_head).unzip();
    // (2)
    let rows = parts(&mut output.out).into_iter().zip(output.lse.rows_mut());
    let finite = rows
        .collect::<Vec<_>>()
        .into_par_iter()
        .enumerate()
        .map(|(n, (out, lse))| {
            let q = inputs.q.slice(s![n / heads, n % heads, .., ..]);
            sweep::forward(&visible[n / (heads / h)], q, out, lse.into_slice().expect("fitted"))
        })
        .reduce(|| true, |a, b| a & b);
    output.stats =
        CodeStats::collect_checked(inputs.k, output.codes.view(), table.n_codes(), inputs.key_mask); // (4)
    let (lse, codes, codewords) = (output.lse.clone(), output.codes.clone(), table.codewords.clone());
    let finite = finite & finite_keys & finite_values.iter().all(|&finite| finite);
    (BidirectionalSaved { visible, lse, codes, codewords }, finite)
}
