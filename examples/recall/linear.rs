//! Causal linear attention without softmax, the baseline whose state is a matrix.
//!
//! ```text
//! (1)  f(x) = elu(x) + 1,   v'_j = (v_j, 1)
//! (2)  y_i = sum_{j<=i} (f(q_i) . f(k_j)) v'_j  =  f(q_i) . S_i,   S_i = sum_{j<=i} f(k_j) v'_j
//! (3)  o_i = n_i / d_i   where y_i = (n_i, d_i)
//! ```
//!
//! State: K (V + 1) numbers. Every sum over pairs here and in backward is one function, [`causal`]. Source: Katharopoulos et al.,
//! "Transformers are RNNs" (arXiv 2006.16236).

use transformer_vq::ndarray::{Array2, ArrayView2, Axis, concatenate, s};
use transformer_vq::ops::linear::forward as product;
use transformer_vq::{Error, Scalar};

/// Tokens that meet pair by pair; those before them are in S.
const BLOCK: usize = 64;

/// Outputs [T, V] and y [T, V + 1] from queries and keys [T, K] and values [T, V].
pub fn forward<T: Scalar>(
    q: ArrayView2<'_, T>,
    k: ArrayView2<'_, T>,
    v: ArrayView2<'_, T>,
) -> Result<(Array2<T>, Array2<T>), Error> {
    let y = causal(q.mapv(feature).view(), k.mapv(feature).view(), with_one(v).view())?; // (2)
    let (n, d) = y.view().split_at(Axis(1), v.ncols());
    Ok((&n / &d, y)) // (3)
}

/// Gradients of q, k and v.
pub fn backward<T: Scalar>(
    q: ArrayView2<'_, T>,
    k: ArrayView2<'_, T>,
    v: ArrayView2<'_, T>,
    y: ArrayView2<'_, T>,
    d_out: ArrayView2<'_, T>,
) -> Result<[Array2<T>; 3], Error> {
    // (3)
    let (n, d) = y.split_at(Axis(1), v.ncols());
    let d_n = &d_out / &d;
    let d_d = (&d_n * &n / d).sum_axis(Axis(1)).mapv(|x| -x).insert_axis(Axis(1));
    let d_y = concatenate![Axis(1), d_n, d_d];
    // (2)
    let (f_q, f_k, v_1) = (q.mapv(feature), k.mapv(feature), with_one(v));
    let d_f_q = causal(d_y.view(), v_1.view(), f_k.view())?;
    let d_f_k = anticausal(v_1.view(), d_y.view(), f_q.view())?;
    let d_v = anticausal(f_k.view(), f_q.view(), d_y.view())?.slice(s![.., ..v.ncols()]).to_owned();
    // (1)
    Ok([d_f_q * q.mapv(slope), d_f_k * k.mapv(slope), d_v])
}

/// (1)
fn feature<T: Scalar>(x: T) -> T {
    if x > T::zero() { x + T::one() } else { x.exp() }
}

fn slope<T: Scalar>(x: T) -> T {
    if x > T::zero() { T::one() } else { x.exp() }
}

fn with_one<T: Scalar>(v: ArrayView2<'_, T>) -> Array2<T> {
    concatenate![Axis(1), v, Array2::ones((v.nrows(), 1))]
}

/// sum_{j<=i} (a_i . b_j) c_j for every i.
fn causal<T: Scalar>(
    a: ArrayView2<'_, T>,
    b: ArrayView2<'_, T>,
    c: ArrayView2<'_, T>,
) -> Result<Array2<T>, Error> {
    let mut out = Array2::zeros((a.nrows(), c.ncols()));
    let mut state = Array2::zeros((b.ncols(), c.ncols()));
    let blocks = a.axis_chunks_iter(Axis(0), BLOCK).zip(b.axis_chunks_iter(Axis(0), BLOCK));
    let blocks = blocks.zip(c.axis_chunks_iter(Axis(0), BLOCK));
    for (((a, b), c), mut out) in blocks.zip(out.axis_chunks_iter_mut(Axis(0), BLOCK)) {
        let mut scores = product(a, b.t(), None)?;
        scores.indexed_iter_mut().filter(|((i, j), _)| j > i).for_each(|(_, score)| *score = T::zero());
        out.assign(&(product(scores.view(), c, None)? + product(a, state.view(), None)?));
        state += &product(b.t(), c, None)?;
    }
    Ok(out)
}

/// sum_{i>=j} (a_j . b_i) c_i for every j.
fn anticausal<T: Scalar>(
    a: ArrayView2<'_, T>,
    b: ArrayView2<'_, T>,
    c: ArrayView2<'_, T>,
) -> Result<Array2<T>, Error> {
    let [a, b, c] = [a, b, c].map(|x| x.slice(s![..;-1, ..]).as_standard_layout().into_owned());
    let reversed = causal(a.view(), b.view(), c.view())?;
    Ok(reversed.slice(s![..;-1, ..]).as_standard_layout().into_owned())
}

/// Compares outputs with formula (2) as it stands, and gradients with finite differences; the worst relative errors of both.
pub fn check() -> Result<(f64, f64), Error> {
    use transformer_vq::check::{finite_difference, relative_rms};
    let wave = |n: usize, width| {
        Array2::from_shape_fn((BLOCK + 7, width), |(t, i)| ((t * n + i * i + n) as f64 * 0.7).sin())
    };
    let (q, k, v, d_out) = (wave(3, 5), wave(5, 5), wave(7, 4), wave(11, 4));
    type View<'a> = ArrayView2<'a, f64>;
    let loss = |q: View<'_>, k: View<'_>, v: View<'_>| (by_pairs(q, k, v) * &d_out).sum();
    let (q, k, v) = (q.view(), k.view(), v.view());
    let (out, y) = forward(q, k, v)?;
    let output_error = relative_rms(&out, &by_pairs(q, k, v));
    let [d_q, d_k, d_v] = backward(q, k, v, y.view(), d_out.view())?;
    let errors = [
        relative_rms(&d_q, &finite_difference(|q| loss(q, k, v), &q, 1e-3)),
        relative_rms(&d_k, &finite_difference(|k| loss(q, k, v), &k, 1e-3)),
        relative_rms(&d_v, &finite_difference(|v| loss(q, k, v), &v, 1e-3)),
    ];
    Ok((output_error, errors.into_iter().fold(0.0, f64::max)))
}

/// The definition, pair by pair.
fn by_pairs(q: ArrayView2<'_, f64>, k: ArrayView2<'_, f64>, v: ArrayView2<'_, f64>) -> Array2<f64> {
    let mut out = Array2::zeros(v.raw_dim());
    for i in 0..q.nrows() {
        let weights = Vec::from_iter(
            (0..=i)
                .map(|j| q.row(i).iter().zip(k.row(j)).map(|(&q, &k)| feature(q) * feature(k)).sum::<f64>()),
        );
        let sum = weights.iter().sum::<f64>();
        weights.iter().enumerate().for_each(|(j, w)| out.row_mut(i).scaled_add(w / sum, &v.row(j)));
    }
    out
}
