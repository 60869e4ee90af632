//! Several documents in one sequence: each is attended to as if it had been fed alone.
//!
//! ```text
//! starts     0 0 0 1 0 0 0 0 1 1 0 0
//! documents  ----- --------- - -----           the first goes on from the piece before, the last goes on in the next
//! ```
//!
//! A token at which a document starts sees nothing before it, and nor do those after it. Blocks are counted from there, the
//! state after a piece is that of its last document, and a document that goes on over pieces keeps its state. So a form runs on
//! each document by itself, all but the first with a fresh state, on the threads of the current rayon pool.

use std::ops::Range;

use ndarray::{ArrayView1, ArrayView2, s};
use rayon::prelude::*;

use super::blockwise::{HeadGradients, RowGradients, RowOutputs, Saved, add_gradients};
use super::{AttentionState, Inputs};
use crate::Scalar;

/// Tasks into which documents are gathered at most.
const TASKS: usize = 16;

/// The positions of each document of a piece; none where no document starts in it.
pub(super) fn documents(starts: Option<ArrayView1<'_, bool>>) -> Option<Vec<Range<usize>>> {
    let starts = starts.filter(|starts| starts.iter().any(|&start| start))?;
    let mut documents = vec![];
    let mut from = 0;
    for (t, _) in starts.iter().enumerate().filter(|&(t, &start)| start && t > 0) {
        documents.push(from..t);
        from = t;
    }
    documents.push(from..starts.len());
    Some(documents)
}

/// Neighbours together, in at most [`TASKS`] parts.
fn gather<X>(mut all: Vec<X>) -> Vec<Vec<X>> {
    let per_task = all.len().div_ceil(TASKS).max(1);
    let mut parts = vec![];
    while !all.is_empty() {
        let later = all.split_off(per_task.min(all.len()));
        parts.push(std::mem::replace(&mut all, later));
    }
    parts
}

/// Runs `form` on every document; `state` is that of before the piece and becomes that of the last document. Returns whether
/// all say so.
pub(super) fn forward<T: Scalar>(
    documents: &[Range<usize>],
    inputs: &Inputs<'_, T>,
    state: &mut AttentionState<T>,
    rows: RowOutputs<'_, T>,
    form: impl Fn(&Inputs<'_, T>, &mut AttentionState<T>, RowOutputs<'_, T>) -> bool + Sync,
) -> bool {
    let mut tasks = vec![];
    let mut rest = rows;
    for document in documents {
        let (rows, later) = rest.split_at(document.len());
        tasks.push((inputs.document(document.clone()), rows));
        rest = later;
    }
    let mut finite = true;
    if inputs.starts.is_some_and(|starts| !starts[0]) {
        let (inputs, rows) = tasks.remove(0);
        finite &= form(&inputs, state, rows);
    }
    state.reset();
    let (inputs, rows) = tasks.pop().expect("a document starts");
    let fresh = (!tasks.is_empty()).then(|| state.clone());
    let run = |tasks: Vec<(Inputs<'_, T>, RowOutputs<'_, T>)>| {
        let mut state = fresh.clone().expect("there are tasks");
        tasks.into_iter().fold(true, |finite, (inputs, rows)| {
            state.reset();
            finite & form(&inputs, &mut state, rows)
        })
    };
    let others = || gather(tasks).into_par_iter().map(run).reduce(|| true, |a, b| a & b);
    let (others, last) = rayon::join(others, || form(&inputs, state, rows));
    finite & others & last
}

/// Runs `form` on every document, and adds up the gradients that are not those of rows in the order of documents.
///
/// # Shapes
/// `d_out` [T, V].
pub(super) fn backward<T: Scalar>(
    documents: &[Range<usize>],
    inputs: &Inputs<'_, T>,
    saved: Saved<T>,
    d_out: ArrayView2<'_, T>,
    rows: RowGradients<'_, T>,
    form: impl Fn(&Inputs<'_, T>, Saved<T>, ArrayView2<'_, T>, RowGradients<'_, T>) -> HeadGradients<T> + Sync,
) -> HeadGradients<T> {
    let mut tasks = vec![];
    let mut rest = rows;
    for document in documents {
        let (rows, later) = rest.split_at(document.len());
        tasks.push((document.clone(), rows));
        rest = later;
    }
    let Saved { lse, start } = saved;
    let continues = inputs.starts.is_some_and(|starts| !starts[0]);
    let run = |(document, rows): (Range<usize>, RowGradients<'_, T>)| {
        let start = if continues && document.start == 0 { start.clone() } else { start.fresh() };
        let saved = Saved { lse: lse.slice(s![document.clone()]).to_owned(), start };
        form(&inputs.document(document.clone()), saved, d_out.slice(s![document, ..]), rows)
    };
    let add = |mut sums, more| {
        add_gradients(&mut sums, more);
        sums
    };
    let run_all = |tasks: Vec<_>| tasks.into_iter().map(run).reduce(add).expect("at least one");
    let done: Vec<HeadGradients<T>> = gather(tasks).into_par_iter().map(run_all).collect();
    done.into_iter().reduce(add).expect("a document starts")
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::*;

    #[test]
    fn documents_begin_where_they_start() {
        assert_eq!(documents(None), None);
        assert_eq!(documents(Some(array![false, false].view())), None);
        assert_eq!(documents(Some(array![].view())), None);
        let of = |starts: &[bool]| documents(Some(starts.into())).unwrap();
        assert_eq!((of(&[true]).len(), of(&[true])[0].clone()), (1, 0..1));
        assert_eq!(of(&[true, false, true]), [0..2, 2..3]);
        assert_eq!(of(&[false, true, true, false]), [0..1, 1..2, 2..4]);
    }

    #[test]
    fn gathered_neighbours_keep_their_order() {
        for n in 0..70 {
            let parts = gather(Vec::from_iter(0..n));
            assert!(parts.len() <= TASKS && parts.iter().all(|part| !part.is_empty()));
            assert!(parts.into_iter().flatten().eq(0..n));
        }
    }
}
