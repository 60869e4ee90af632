//! Quadratic attention to several documents in one sequence: each by itself, all at once.

use std::ops::Range;

use ndarray::{Array1, Array2, ArrayView1, ArrayView2, ArrayViewMut1, ArrayViewMut2, Axis, s};
use rayon::prelude::*;

use super::{Gradients, backward, checked_given, checked_inputs, forward};
use crate::attention::documents::documents;
use crate::error::check_shape;
use crate::{Error, Scalar};

/// As [`fn@forward`], where `starts` says which tokens are the first of a document: neither these nor later ones see anything
/// before them. Without a start at the first token, the document begins there all the same.
///
/// ```
/// use transformer_vq::attention::quadratic;
/// use transformer_vq::ndarray::array;
///
/// // Queries of zeros attend to everything they see equally: the means of 1; of 1, 3; of 8.
/// let (q, k, v) = (array![[0.0], [0.0], [0.0]], array![[5.0], [1.0], [2.0]], array![[1.0], [3.0], [8.0]]);
/// let starts = array![true, false, true];
/// let (out, _) = quadratic::forward_documents(q.view(), k.view(), v.view(), starts.view())?;
/// assert_eq!(out, array![[1.0], [2.0], [8.0]]);
/// # Ok::<(), transformer_vq::Error>(())
/// ```
///
/// # Shapes
/// As [`fn@forward`]; `starts` `[T]`.
///
/// # Errors
/// As [`fn@forward`].
pub fn forward_documents<T: Scalar>(
    q: ArrayView2<'_, T>,
    k: ArrayView2<'_, T>,
    v: ArrayView2<'_, T>,
    starts: ArrayView1<'_, bool>,
) -> Result<(Array2<T>, Array1<T>), Error> {
    let checked = checked_inputs(q, k, v)?;
    let [q, k, v] = checked.each_ref().map(|x| x.view());
    check_shape("starts", &[q.nrows()], starts.shape())?;
    let Some(documents) = documents(Some(starts)) else { return forward(q, k, v) };
    let (mut out, mut lse) = (Array2::zeros(v.raw_dim()), Array1::zeros(q.nrows()));
    let rows = cut(&documents, out.view_mut()).into_iter().zip(cut_numbers(&documents, lse.view_mut()));
    let tasks: Vec<_> = documents.iter().cloned().zip(rows).collect();
    tasks.into_par_iter().try_for_each(|(document, (mut out, mut lse))| {
        let [q, k, v] = [q, k, v].map(|x| x.slice_move(s![document.clone(), ..]));
        let (of_document, numbers) = forward(q, k, v)?;
        out.assign(&of_document);
        lse.assign(&numbers);
        Ok(())
    })?;
    Ok((out, lse))
}

/// As [`fn@backward`], given where documents start.
///
/// # Shapes
/// `q`, `k`, `v` and `starts` as in [`forward_documents`], `out` [T, V] and `lse` `[T]` from there, `d_out` [T, V].
///
/// # Errors
/// As [`forward_documents`].
pub fn backward_documents<T: Scalar>(
    (q, k, v): (ArrayView2<'_, T>, ArrayView2<'_, T>, ArrayView2<'_, T>),
    starts: ArrayView1<'_, bool>,
    (out, lse): (ArrayView2<'_, T>, ArrayView1<'_, T>),
    d_out: ArrayView2<'_, T>,
) -> Result<Gradients<T>, Error> {
    let checked = checked_inputs(q, k, v)?;
    let [q, k, v] = checked.each_ref().map(|x| x.view());
    check_shape("starts", &[q.nrows()], starts.shape())?;
    let d_out = checked_given(v, out, lse, d_out)?;
    let d_out = d_out.view();
    let Some(documents) = documents(Some(starts)) else { return backward(q, k, v, out, lse, d_out) };
    let mut d = Gradients::default();
    d.fit(q.dim(), v.dim());
    let rows = [&mut d.q, &mut d.k, &mut d.v].map(|array| cut(&documents, array.view_mut()));
    let [d_q, d_k, d_v] = rows;
    let tasks: Vec<_> = documents.iter().cloned().zip(d_q.into_iter().zip(d_k).zip(d_v)).collect();
    tasks.into_par_iter().try_for_each(|(document, ((mut d_q, mut d_k), mut d_v))| {
        let [q, k, v, out, d_out] = [q, k, v, out, d_out].map(|x| x.slice_move(s![document.clone(), ..]));
        let lse = lse.slice(s![document]);
        let of_document = backward(q, k, v, out, lse, d_out)?;
        d_q.assign(&of_document.q);
        d_k.assign(&of_document.k);
        d_v.assign(&of_document.v);
        Ok(())
    })?;
    Ok(d)
}

/// The rows of each document.
fn cut<'a, T>(documents: &[Range<usize>], mut rows: ArrayViewMut2<'a, T>) -> Vec<ArrayViewMut2<'a, T>> {
    let mut parts = vec![];
    for document in documents {
        let (part, rest) = rows.split_at(Axis(0), document.len());
        parts.push(part);
        rows = rest;
    }
    parts
}

/// As [`cut`], for one number per token.
fn cut_numbers<'a, T>(
    documents: &[Range<usize>],
    mut numbers: ArrayViewMut1<'a, T>,
) -> Vec<ArrayViewMut1<'a, T>> {
    let mut parts = vec![];
    for document in documents {
        let (part, rest) = numbers.split_at(Axis(0), document.len());
        parts.push(part);
        numbers = rest;
    }
    parts
}
