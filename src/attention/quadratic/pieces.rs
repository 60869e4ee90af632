//! Exact attention piece by piece, with relative biases.
//!
//! ```text
//! (1)  s_ij = (q_i + u) . k_j + d_ij,   d_ij = (q_i + w) . r_{i-j}  for 0 <= i-j <= M, else 0
//! (2)  o_i  = sum_{j<=i} softmax_j(s_ij) v_j
//! ```
//!
//! The band `d` [T, M+1] is one product, and so are its gradients: `dq += dd r`, `dw = sum_i dd_i r`, `dr = dd^T (q + w)`.
//!
//! Cost: as the module above, T (P + T) for a piece of T tokens after P others, and T (M + 1) K for the band. One token goes by
//! products of a vector with the keys and the values.

use ndarray::{Array1, Array2, ArrayView1, ArrayView2, Axis, s};

use super::{backward, check_rows, deltas, forward};
use crate::attention::{BiasGradients, Biases};
use crate::compiled::compiled_here;
use crate::error::{check_memory, check_shape, checked_len};
use crate::ops::exp::exp_of_differences;
use crate::ops::finite::check_finite;
use crate::ops::matmul::vector_product;
use crate::ops::simd::on_best_simd;
use crate::ops::{parallel, rows};
use crate::{Error, Scalar};

/// All keys and values of one head so far: a state that grows with the sequence.
///
/// ```
/// use transformer_vq::attention::quadratic::{KeyValues, attend};
/// use transformer_vq::ndarray::array;
///
/// let mut all = KeyValues::new(1, 1)?;
/// for (v, mean) in [(1.0, 1.0), (3.0, 2.0), (8.0, 4.0)] {
///     all.push(array![[0.5]].view(), array![[v]].view())?;
///     // A query of zeros attends to everything equally.
///     let (out, _) = attend(array![[0.0]].view(), None, &all)?;
///     assert_eq!(out, array![[mean]]);
/// }
/// # Ok::<(), transformer_vq::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct KeyValues<T> {
    d_k: usize,
    d_v: usize,
    len: usize,
    k: Vec<T>,
    v: Vec<T>,
}

/// How much room there is for more does not count.
impl<T: PartialEq> PartialEq for KeyValues<T> {
    fn eq(&self, other: &Self) -> bool {
        (self.d_k, self.d_v, self.len) == (other.d_k, other.d_v, other.len)
            && self.k == other.k
            && self.v == other.v
    }
}

impl<T: Scalar> KeyValues<T> {
    /// Before the first token.
    ///
    /// # Errors
    /// [`Error::TooLarge`] for widths of which no key or value can exist.
    pub fn new(d_k: usize, d_v: usize) -> Result<Self, Error> {
        checked_len("k", &[d_k])?;
        checked_len("v", &[d_v])?;
        Ok(KeyValues { d_k, d_v, len: 0, k: vec![], v: vec![] })
    }

    /// Appends the keys and values of the next tokens.
    ///
    /// # Shapes
    /// `k` [T, K], `v` [T, V].
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::NotFinite`], [`Error::TooLarge`]. Then nothing is appended.
    pub fn push(&mut self, k: ArrayView2<'_, T>, v: ArrayView2<'_, T>) -> Result<(), Error> {
        let t = k.nrows();
        check_shape("k", &[t, self.d_k], k.shape())?;
        check_shape("v", &[t, self.d_v], v.shape())?;
        check_rows("k", k)?;
        check_rows("v", v)?;
        check_memory::<T>("k", &[self.len.saturating_add(t), self.d_k])?;
        check_memory::<T>("v", &[self.len.saturating_add(t), self.d_v])?;
        self.append(k, v);
        Ok(())
    }

    /// [`push`](Self::push) of what is known to fit.
    pub(crate) fn append(&mut self, k: ArrayView2<'_, T>, v: ArrayView2<'_, T>) {
        self.len += k.nrows();
        self.k.extend(k.iter());
        self.v.extend(v.iter());
    }

    /// Tokens so far.
    pub fn position(&self) -> u64 {
        self.len as u64
    }

    /// All keys [P, K].
    pub fn keys(&self) -> ArrayView2<'_, T> {
        ArrayView2::from_shape((self.len, self.d_k), &self.k).expect("a row per token")
    }

    /// All values [P, V].
    pub fn values(&self) -> ArrayView2<'_, T> {
        ArrayView2::from_shape((self.len, self.d_v), &self.v).expect("a row per token")
    }

    /// Bytes of memory, with the room for tokens to come that has been made: they grow with the position.
    pub fn size_in_bytes(&self) -> usize {
        (self.k.capacity() + self.v.capacity()) * size_of::<T>() + 3 * size_of::<usize>()
    }
}

/// Outputs o [T, V], and lse `[T]`, of queries that belong to the last T keys.
///
/// # Shapes
/// `q` [T, K], already scaled; `biases` of any M.
///
/// # Errors
/// [`Error::Shape`], [`Error::NotFinite`], and [`Error::Invalid`] for more queries than keys.
pub fn attend<T: Scalar>(
    q: ArrayView2<'_, T>,
    biases: Option<Biases<'_, T>>,
    all: &KeyValues<T>,
) -> Result<(Array2<T>, Array1<T>), Error> {
    compiled_here!(
        T,
        attend_here::<T>,
        fn(ArrayView2<'_, T>, Option<Biases<'_, T>>, &KeyValues<T>) -> Result<(Array2<T>, Array1<T>), Error>
    )(q, biases, all)
}

fn attend_here<T: Scalar>(
    q: ArrayView2<'_, T>,
    biases: Option<Biases<'_, T>>,
    all: &KeyValues<T>,
) -> Result<(Array2<T>, Array1<T>), Error> {
    check(q, biases.as_ref(), all)?;
    Ok(attend_unchecked(q, biases, all))
}

/// [`attend`] on what is known to fit.
pub(crate) fn attend_unchecked<T: Scalar>(
    q: ArrayView2<'_, T>,
    biases: Option<Biases<'_, T>>,
    all: &KeyValues<T>,
) -> (Array2<T>, Array1<T>) {
    let (t, d_v) = (q.nrows(), all.d_v);
    let mut out = Array2::zeros((t, d_v));
    let mut lse = Array1::zeros(t);
    let (q_content, band) = biased(q, biases);
    if t == 1 {
        let band = band.as_ref().map(|band| band.row(0));
        lse[0] = token(q_content.row(0), band, all, out.row_mut(0).into_slice().expect("a row"));
        return (out, lse);
    }
    let biases = band.as_ref().map(|band| band.view());
    let given = forward::Given { q: q_content.view(), k: all.keys(), v: all.values(), biases };
    forward::run(given, out.view_mut(), lse.as_slice_mut().expect("freshly made"));
    (out, lse)
}

/// q + u, and the band.
fn biased<T: Scalar>(q: ArrayView2<'_, T>, biases: Option<Biases<'_, T>>) -> (Array2<T>, Option<Array2<T>>) {
    match biases {
        Some(Biases { content, position, relative }) => {
            let band = parallel::product((&q + &position).view(), relative.t());
            (&q + &content, Some(band))
        }
        None => (q.as_standard_layout().into_owned(), None),
    }
}

/// One query, that of the last key; returns its lse.
fn token<T: Scalar>(
    q: ArrayView1<'_, T>,
    band: Option<ArrayView1<'_, T>>,
    all: &KeyValues<T>,
    out: &mut [T],
) -> T {
    let mut scores = vec![T::zero(); all.len];
    vector_product(&[(q, all.keys().t())], &mut scores); // (1)
    for (score, &bias) in scores.iter_mut().rev().zip(band.iter().flatten()) {
        *score += bias;
    }
    let max = rows::max(&scores);
    on_best_simd!(simd => exp_of_differences(simd, &mut scores, max));
    let sum = rows::sum(&scores);
    vector_product(&[(ArrayView1::from(&scores), all.values())], out); // (2)
    out.iter_mut().for_each(|out| *out /= sum);
    max + sum.ln()
}

/// What [`attend_backward`] returns.
#[derive(Debug, Clone)]
pub struct PieceGradients<T> {
    /// [T, K].
    pub q: Array2<T>,
    /// Of the last T keys [T, K].
    pub k: Array2<T>,
    /// Of their values [T, V].
    pub v: Array2<T>,
    /// Of the biases, if there are any.
    pub biases: Option<BiasGradients<T>>,
}

/// Gradients of `sum(d_out * out)` with respect to the queries, to the last T keys and values, and to the biases. Earlier keys
/// and values are constants.
///
/// # Shapes
/// `q`, `biases` and `all` as in [`attend`], `out` [T, V] and `lse` `[T]` from there, `d_out` [T, V].
///
/// # Errors
/// As [`attend`].
pub fn attend_backward<T: Scalar>(
    q: ArrayView2<'_, T>,
    biases: Option<Biases<'_, T>>,
    all: &KeyValues<T>,
    out: ArrayView2<'_, T>,
    lse: ArrayView1<'_, T>,
    d_out: ArrayView2<'_, T>,
) -> Result<PieceGradients<T>, Error> {
    compiled_here!(
        T,
        attend_backward_here::<T>,
        fn(
            ArrayView2<'_, T>,
            Option<Biases<'_, T>>,
            &KeyValues<T>,
            ArrayView2<'_, T>,
            ArrayView1<'_, T>,
            ArrayView2<'_, T>,
        ) -> Result<PieceGradients<T>, Error>
    )(q, biases, all, out, lse, d_out)
}

fn attend_backward_here<T: Scalar>(
    q: ArrayView2<'_, T>,
    biases: Option<Biases<'_, T>>,
    all: &KeyValues<T>,
    out: ArrayView2<'_, T>,
    lse: ArrayView1<'_, T>,
    d_out: ArrayView2<'_, T>,
) -> Result<PieceGradients<T>, Error> {
    check(q, biases.as_ref(), all)?;
    let shape = [q.nrows(), all.d_v];
    check_shape("out", &shape, out.shape())?;
    check_shape("lse", &shape[..1], lse.shape())?;
    check_shape("d_out", &shape, d_out.shape())?;
    check_rows("out", out)?;
    check_finite("lse", lse)?;
    check_rows("d_out", d_out)?;
    Ok(attend_backward_unchecked(q, biases, all, out, lse, d_out))
}

/// [`attend_backward`] on what is known to fit.
pub(crate) fn attend_backward_unchecked<T: Scalar>(
    q: ArrayView2<'_, T>,
    biases: Option<Biases<'_, T>>,
    all: &KeyValues<T>,
    out: ArrayView2<'_, T>,
    lse: ArrayView1<'_, T>,
    d_out: ArrayView2<'_, T>,
) -> PieceGradients<T> {
    let (q_content, band) = biased(q, biases);
    let (delta, lse, d_out) = (deltas(out, d_out), lse.to_vec(), d_out.as_standard_layout());
    let (mut d_k, mut d_v) = (Array2::zeros((all.len, all.d_k)), Array2::zeros((all.len, all.d_v)));
    let mut d_q = Array2::zeros(q.raw_dim());
    let of_band = band.as_ref().map(|band| band.view());
    let forward = forward::Given { q: q_content.view(), k: all.keys(), v: all.values(), biases: of_band };
    let given = backward::Given { forward, d_out: d_out.view(), lse: &lse, delta: &delta };
    let d_band =
        backward::run(&given, d_q.view_mut(), d_k.view_mut(), d_v.view_mut(), &mut backward::Sums::default());
    let past = s![all.len - q.nrows().., ..];
    let d_biases = biases.zip(d_band).map(|(Biases { position, relative, .. }, d_band)| {
        let content = d_q.sum_axis(Axis(0));
        let d_q_position = parallel::product(d_band.view(), relative);
        d_q += &d_q_position;
        let mut d_relative = Array2::zeros(relative.raw_dim());
        parallel::add_product(d_band.t(), (&q + &position).view(), d_relative.view_mut());
        BiasGradients { content, position: d_q_position.sum_axis(Axis(0)), relative: d_relative }
    });
    PieceGradients {
        q: d_q,
        k: d_k.slice_move(past).as_standard_layout().into_owned(),
        v: d_v.slice_move(past).as_standard_layout().into_owned(),
        biases: d_biases,
    }
}

fn check<T: Scalar>(
    q: ArrayView2<'_, T>,
    biases: Option<&Biases<'_, T>>,
    all: &KeyValues<T>,
) -> Result<(), Error> {
    let (t, k) = (q.nrows(), all.d_k);
    check_shape("q", &[t, k], q.shape())?;
    if t > all.len {
        return Err(Error::invalid("q", format!("at most {} queries, one per key", all.len), t));
    }
    check_rows("q", q)?;
    let Some(Biases { content, position, relative }) = biases else { return Ok(()) };
    check_shape("biases.content", &[k], content.shape())?;
    check_shape("biases.position", &[k], position.shape())?;
    check_shape("biases.relative", &[relative.nrows().max(1), k], relative.shape())?;
    check_finite("biases.content", *content)?;
    check_finite("biases.position", *position)?;
    check_finite("biases.relative", *relative)
}
