//! The fair competitor: exact causal softmax attention over keys that are not quantized, as fast as this crate can make it.
//!
//! ```text
//! (1)  s_ij = q_i . k_j                                  j <= i
//! (2)  p_ij = exp(s_ij - lse_i),  lse_i = log sum_j exp(s_ij)
//! (3)  o_i  = sum_j p_ij v_j
//! ```
//!
//! No T x T matrix is ever whole. Blocks of queries meet tiles of keys; what a query has seen so far is held as a maximum m,
//! a sum l and an unfinished output, which the next tile corrects:
//!
//! ```text
//! (4)  m' = max(m, max_j s_ij)    l <- l exp(m - m') + sum_j exp(s_ij - m')    o <- o exp(m - m') + sum_j exp(s_ij - m') v_j
//! ```
//!
//! What makes it fast is what makes [`blockwise`](super::blockwise) fast: the same register tiles and exponential, scores
//! that lie with 64 queries or keys side by side, operands packed once for many products, and recomputation in backward from
//! `lse` alone. The half that causality hides is skipped: 64 queries meet keys up to their own 64, and only these are masked.
//!
//! One head uses all threads of the current rayon pool: forward shares blocks of queries, backward segments of keys, each
//! of which sums up its own d_q. Both are cut by T alone, so results have the same bits at any number of threads.
//!
//! A long sequence can come in pieces: [`KeyValues`] hold all keys and values so far, and grow; [`attend`] takes the queries of the
//! last of them, with relative biases if there are any.
//!
//! Cost: T^2 (K + V) operations forward, T^2 (3 K + 2 V) backward, T^2 / 2 exponentials in each. Memory beyond inputs and
//! outputs: per thread the tiles of 256 queries or keys, copies of inputs that are not contiguous, backward 8 d_q at most.
//! Source: the running maximum and sum are those of FlashAttention (Dao et al., arXiv 2205.14135).

use ndarray::{Array1, Array2, ArrayView1, ArrayView2, Axis, CowArray, Ix2};
use rayon::prelude::*;

use crate::compiled::compiled_here;
use crate::error::check_shape;
use crate::ops::aligned;
use crate::ops::finite::{all_finite, check_finite};
use crate::ops::matmul::prefetch_ahead;
use crate::ops::rows;
use crate::{Error, Scalar};

mod backward;
mod documents;
mod forward;
mod pieces;

pub use pieces::{KeyValues, PieceGradients, attend, attend_backward};
#[cfg(feature = "model")]
pub(crate) use pieces::{attend_backward_unchecked, attend_unchecked};

pub use documents::{backward_documents, forward_documents};

/// Rows that one task checks.
const ROWS: usize = 256;

/// Outputs o [T, V], and lse `[T]`, the logarithm of each query's sum of `exp(score)`.
///
/// ```
/// use transformer_vq::attention::quadratic;
/// use transformer_vq::ndarray::array;
///
/// // A query of zeros attends to everything equally: the means of 1; of 1, 3; of 1, 3, 8.
/// let (q, k, v) = (array![[0.0], [0.0], [0.0]], array![[5.0], [1.0], [2.0]], array![[1.0], [3.0], [8.0]]);
/// let (out, _) = quadratic::forward(q.view(), k.view(), v.view())?;
/// assert_eq!(out, array![[1.0], [2.0], [4.0]]);
/// # Ok::<(), transformer_vq::Error>(())
/// ```
///
/// # Shapes
/// `q` [T, K], already scaled, `k` [T, K], `v` [T, V].
///
/// # Errors
/// [`Error::Shape`], [`Error::NotFinite`].
pub fn forward<T: Scalar>(
    q: ArrayView2<'_, T>,
    k: ArrayView2<'_, T>,
    v: ArrayView2<'_, T>,
) -> Result<(Array2<T>, Array1<T>), Error> {
    let (mut out, mut lse) = (Array2::default((0, 0)), Array1::default(0));
    forward_into(q, k, v, &mut out, &mut lse)?;
    Ok((out, lse))
}

/// [`fn@forward`] into arrays that the caller keeps: what they hold does not matter, and those of another shape are replaced.
///
/// # Shapes
/// `q`, `k`, `v` as in [`fn@forward`]; `out` becomes [T, V], `lse` `[T]`.
///
/// # Errors
/// As [`fn@forward`]; the arrays are then as they were.
pub fn forward_into<T: Scalar>(
    q: ArrayView2<'_, T>,
    k: ArrayView2<'_, T>,
    v: ArrayView2<'_, T>,
    out: &mut Array2<T>,
    lse: &mut Array1<T>,
) -> Result<(), Error> {
    compiled_here!(
        T,
        forward_here::<T>,
        fn(
            ArrayView2<'_, T>,
            ArrayView2<'_, T>,
            ArrayView2<'_, T>,
            &mut Array2<T>,
            &mut Array1<T>,
        ) -> Result<(), Error>
    )(q, k, v, out, lse)
}

fn forward_here<T: Scalar>(
    q: ArrayView2<'_, T>,
    k: ArrayView2<'_, T>,
    v: ArrayView2<'_, T>,
    out: &mut Array2<T>,
    lse: &mut Array1<T>,
) -> Result<(), Error> {
    let [q, k, v] = checked_inputs(q, k, v)?;
    aligned::fit(out, v.dim());
    aligned::fit(lse, q.nrows());
    let given = forward::Given { q: q.view(), k: k.view(), v: v.view(), biases: None };
    forward::run(given, out.view_mut(), lse.as_slice_mut().expect("fitted"));
    Ok(())
}

/// Gradients of q, k and v, and the memory of sums that led to them where [`backward_into`] made them: up to eight times that of q.
#[derive(Debug, Clone)]
pub struct Gradients<T> {
    /// [T, K].
    pub q: Array2<T>,
    /// [T, K].
    pub k: Array2<T>,
    /// [T, V].
    pub v: Array2<T>,
    sums: backward::Sums<T>,
}

impl<T: Scalar> Default for Gradients<T> {
    fn default() -> Self {
        let [q, k, v] = std::array::from_fn(|_| Array2::default((0, 0)));
        Gradients { q, k, v, sums: backward::Sums::default() }
    }
}

impl<T: Scalar> Gradients<T> {
    /// Makes them those of keys and values of these shapes.
    fn fit(&mut self, keys: (usize, usize), values: (usize, usize)) {
        aligned::fit(&mut self.q, keys);
        aligned::fit(&mut self.k, keys);
        aligned::fit(&mut self.v, values);
    }
}

/// Gradients of `sum(d_out * out)` with respect to q, k and v.
///
/// ```text
/// (3)  dp_ij = dO_i . v_j               dv_j = sum_{i>=j} p_ij dO_i
/// (2)  ds_ij = p_ij (dp_ij - dO_i . o_i)
/// (1)  dq_i  = sum_{j<=i} ds_ij k_j     dk_j = sum_{i>=j} ds_ij q_i
/// ```
///
/// # Shapes
/// `q`, `k`, `v` as in [`fn@forward`], `out` [T, V] and `lse` `[T]` from there, `d_out` [T, V].
///
/// # Errors
/// As [`fn@forward`].
pub fn backward<T: Scalar>(
    q: ArrayView2<'_, T>,
    k: ArrayView2<'_, T>,
    v: ArrayView2<'_, T>,
    out: ArrayView2<'_, T>,
    lse: ArrayView1<'_, T>,
    d_out: ArrayView2<'_, T>,
) -> Result<Gradients<T>, Error> {
    let mut gradients = Gradients::default();
    backward_into(q, k, v, (out, lse), d_out, &mut gradients)?;
    gradients.sums = backward::Sums::default();
    Ok(gradients)
}

/// [`fn@backward`] into arrays that the caller keeps, as [`forward_into`] does. Those that come fresh from the system cost 4 % of the
/// time of narrow heads.
///
/// # Shapes
/// As [`fn@backward`]; `gradients` becomes what it returns.
///
/// # Errors
/// As [`fn@backward`]; the gradients are then as they were.
pub fn backward_into<T: Scalar>(
    q: ArrayView2<'_, T>,
    k: ArrayView2<'_, T>,
    v: ArrayView2<'_, T>,
    (out, lse): (ArrayView2<'_, T>, ArrayView1<'_, T>),
    d_out: ArrayView2<'_, T>,
    gradients: &mut Gradients<T>,
) -> Result<(), Error> {
    compiled_here!(
        T,
        backward_here::<T>,
        fn(
            ArrayView2<'_, T>,
            ArrayView2<'_, T>,
            ArrayView2<'_, T>,
            (ArrayView2<'_, T>, ArrayView1<'_, T>),
            ArrayView2<'_, T>,
            &mut Gradients<T>,
        ) -> Result<(), Error>
    )(q, k, v, (out, lse), d_out, gradients)
}

fn backward_here<T: Scalar>(
    q: ArrayView2<'_, T>,
    k: ArrayView2<'_, T>,
    v: ArrayView2<'_, T>,
    (out, lse): (ArrayView2<'_, T>, ArrayView1<'_, T>),
    d_out: ArrayView2<'_, T>,
    gradients: &mut Gradients<T>,
) -> Result<(), Error> {
    let [q, k, v] = checked_inputs(q, k, v)?;
    let d_out = checked_given(v.view(), out, lse, d_out)?;
    let delta = deltas(out, d_out.view());
    let lse = lse.to_vec();
    gradients.fit(q.dim(), v.dim());
    let forward = forward::Given { q: q.view(), k: k.view(), v: v.view(), biases: None };
    let given = backward::Given { forward, d_out: d_out.view(), lse: &lse, delta: &delta };
    let Gradients { q, k, v, sums } = gradients;
    backward::run(&given, q.view_mut(), k.view_mut(), v.view_mut(), sums);
    Ok(())
}

/// `dO_i . o_i`.
fn deltas<T: Scalar>(out: ArrayView2<'_, T>, d_out: ArrayView2<'_, T>) -> Vec<T> {
    let mut delta = vec![T::zero(); out.nrows()];
    let parts = delta.par_chunks_mut(ROWS).zip(d_out.axis_chunks_iter(Axis(0), ROWS));
    parts.zip(out.axis_chunks_iter(Axis(0), ROWS)).for_each(|((delta, d_out), out)| {
        for ((delta, d_out), out) in delta.iter_mut().zip(d_out.rows()).zip(out.rows()) {
            *delta = d_out.dot(&out);
        }
    });
    delta
}

/// q, k and v, if they fit and are finite, with rows side by side: each is read many times.
fn checked_inputs<'a, T: Scalar>(
    q: ArrayView2<'a, T>,
    k: ArrayView2<'a, T>,
    v: ArrayView2<'a, T>,
) -> Result<[CowArray<'a, T, Ix2>; 3], Error> {
    check_shape("k", q.shape(), k.shape())?;
    check_shape("v", &[q.nrows(), v.ncols()], v.shape())?;
    let inputs = [q, k, v].map(contiguous);
    for (what, x) in ["q", "k", "v"].into_iter().zip(&inputs) {
        check_rows(what, x.view())?;
    }
    Ok(inputs)
}

/// `d_out`, if it and the rest that backward takes beside the inputs fit and are finite, with rows side by side.
fn checked_given<'a, T: Scalar>(
    v: ArrayView2<'_, T>,
    out: ArrayView2<'_, T>,
    lse: ArrayView1<'_, T>,
    d_out: ArrayView2<'a, T>,
) -> Result<CowArray<'a, T, Ix2>, Error> {
    check_shape("out", v.shape(), out.shape())?;
    check_shape("lse", &[v.nrows()], lse.shape())?;
    check_shape("d_out", v.shape(), d_out.shape())?;
    check_rows("out", out)?;
    check_finite("lse", lse)?;
    let d_out = contiguous(d_out);
    check_rows("d_out", d_out.view())?;
    Ok(d_out)
}

/// These rows, or where they do not lie side by side, a copy of them, made on all threads.
fn contiguous<T: Scalar>(rows: ArrayView2<'_, T>) -> CowArray<'_, T, Ix2> {
    if rows.is_standard_layout() {
        return rows.into();
    }
    let mut copy = aligned::array(rows.raw_dim());
    rows::map(rows.dim(), [rows], [&mut copy], |i, [row], [copy]| {
        prefetch_ahead(rows, i);
        copy.copy_from_slice(row);
    });
    copy.into()
}

/// [`check_finite`] on all threads.
fn check_rows<T: Scalar>(what: &'static str, x: ArrayView2<'_, T>) -> Result<(), Error> {
    if x.axis_chunks_iter(Axis(0), ROWS).into_par_iter().all(all_finite) {
        return Ok(());
    }
    check_finite(what, x)
}
