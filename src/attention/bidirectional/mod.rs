//! Attention without an order of time: every query meets every key, of its own sequence or of another.
//!
//! ```text
//! (1)  a_is  = q_i . c_s                                     s over the codes that visible keys have
//! (2)  lse_i = log sum_s exp(a_is + ln N_s)                  P_is = exp(a_is + ln N_s - lse_i)
//! (3)  o_i   = sum_s P_is mu_s                               N_s, mu_s: how many visible keys have code s, mean of their values
//! ```
//!
//! That is softmax attention over the quantized keys, `o_i = sum_j softmax_j(q_i . c_{z_j}) v_j` ([`naive`]), code by code:
//! nothing is left of the length of the keys once they are counted. Backward:
//!
//! ```text
//! (3)  dP_is = dO_i . mu_s              G_s  = sum_i (P_is / N_s) dO_i      dv_j = G_{z_j}
//! (2)  dA_is = P_is (dP_is - sum_s P_is dP_is)
//! (1)  dq_i  = sum_s dA_is c_s          dc_s = sum_i dA_is q_i
//! ```
//!
//! All pairs are read through the codebook, so these gradients are exact and keys get none of the output's. They may be given
//! a share of their codeword's ([`key_gradient`]), the gradient if codewords were the means of their keys.
//!
//! A key mask says which keys exist. A query that sees none gives o = 0 and lse = -infinity, and no gradient.
//!
//! A content bias is added to queries by the caller. There are no relative biases: distances have no part in a mean.
//!
//! Queries are taken 64 at a time, as lanes; codes that no visible key has cost nothing. With T queries, T' keys and U such
//! codes it takes `2 T U (K + V)` operations forward, `T U (6 K + 4 V)` backward, and T' V for counts and means. Kept for
//! backward: lse `[T]`, counts and means. Source: Transformer-VQ (Lingle, arXiv 2309.16354), whose cache this is without time.

use ndarray::{Array1, Array2, ArrayView1, ArrayView2};

use crate::compiled::compiled_here;
use crate::error::check_shape;
use crate::ops::finite::check_finite;
use crate::{Error, Scalar};

mod heads;
pub mod naive;
mod sweep;
mod visible;

pub use heads::{
    BidirectionalAttention, BidirectionalGradients, BidirectionalInputs, BidirectionalOutput,
    BidirectionalSaved,
};
use visible::Visible;

/// One head: queries of one sequence, keys of the same or another.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a, T> {
    /// Queries [T, K], already scaled.
    pub q: ArrayView2<'a, T>,
    /// The code of every key `[T']`, each below S.
    pub codes: ArrayView1<'a, u32>,
    /// Values [T', V].
    pub v: ArrayView2<'a, T>,
    /// Codewords [S, K].
    pub codewords: ArrayView2<'a, T>,
    /// Which keys exist `[T']`; without it, all do.
    pub key_mask: Option<ArrayView1<'a, bool>>,
}

/// What attention returns for one head.
#[derive(Debug, Clone)]
pub struct Output<T> {
    /// o [T, V].
    pub out: Array2<T>,
    /// Logarithm of each query's sum of `exp(score)` `[T]`, nats.
    pub lse: Array1<T>,
}

/// Gradients of one head.
#[derive(Debug, Clone)]
pub struct Gradients<T> {
    /// [T, K].
    pub q: Array2<T>,
    /// [T', V]; 0 for keys that do not exist.
    pub v: Array2<T>,
    /// [S, K].
    pub codewords: Array2<T>,
}

/// What backward needs of forward: lse, and a count and a mean per code.
#[derive(Debug, Clone)]
pub struct Saved<T> {
    visible: Visible<T>,
    lse: Array1<T>,
}

/// Outputs of one head.
///
/// ```
/// use transformer_vq::attention::bidirectional::{self, Inputs};
/// use transformer_vq::ndarray::array;
///
/// // A query of zeros attends to all three keys equally, a query along codeword 1 to those of code 1.
/// let (q, codewords) = (array![[0.0, 0.0], [0.0, 50.0]], array![[1.0, 0.0], [0.0, 1.0]]);
/// let (codes, v) = (array![0, 1, 1], array![[0.0], [4.0], [8.0]]);
/// let inputs = Inputs {
///     q: q.view(), codes: codes.view(), v: v.view(), codewords: codewords.view(), key_mask: None,
/// };
/// let (output, _) = bidirectional::forward(&inputs)?;
/// assert!((output.out[[0, 0]] - 4.0f64).abs() < 1e-12 && (output.out[[1, 0]] - 6.0).abs() < 1e-12);
/// # Ok::<(), transformer_vq::Error>(())
/// ```
///
/// # Errors
/// Shapes that do not fit, numbers that are not finite (those of keys that do not exist included), codes that are not below S.
pub fn forward<T: Scalar>(inputs: &Inputs<'_, T>) -> Result<(Output<T>, Saved<T>), Error> {
    compiled_here!(T, forward_here::<T>, fn(&Inputs<'_, T>) -> Result<(Output<T>, Saved<T>), Error>)(inputs)
}

fn forward_here<T: Scalar>(inputs: &Inputs<'_, T>) -> Result<(Output<T>, Saved<T>), Error> {
    inputs.check()?;
    let t = inputs.q.nrows();
    let visible = Visible::new(inputs.codes, inputs.v, inputs.codewords, inputs.key_mask);
    let mut output = Output { out: Array2::zeros((t, inputs.v.ncols())), lse: Array1::zeros(t) };
    let lse = output.lse.as_slice_mut().expect("freshly made");
    sweep::forward(&visible, inputs.q, output.out.view_mut(), lse);
    let lse = output.lse.clone();
    Ok((output, Saved { visible, lse }))
}

/// Gradients of `sum(d_out * out)`.
///
/// # Shapes
/// `inputs` as in [`forward`], `d_out` [T, V].
///
/// # Errors
/// As [`forward`], and if `saved` comes from other sizes.
pub fn backward<T: Scalar>(
    inputs: &Inputs<'_, T>,
    saved: Saved<T>,
    d_out: ArrayView2<'_, T>,
) -> Result<Gradients<T>, Error> {
    compiled_here!(
        T,
        backward_here::<T>,
        fn(&Inputs<'_, T>, Saved<T>, ArrayView2<'_, T>) -> Result<Gradients<T>, Error>
    )(inputs, saved, d_out)
}

fn backward_here<T: Scalar>(
    inputs: &Inputs<'_, T>,
    saved: Saved<T>,
    d_out: ArrayView2<'_, T>,
) -> Result<Gradients<T>, Error> {
    inputs.check()?;
    let (t, d_v) = (inputs.q.nrows(), inputs.v.ncols());
    let Saved { visible, lse } = saved;
    check_shape("saved.lse", &[t], lse.shape())?;
    visible.check(inputs.codewords.dim(), d_v)?;
    if !visible.counts(inputs.codes, inputs.key_mask) {
        return Err(Error::invalid("codes", "those of forward, under its mask", "others"));
    }
    check_shape("d_out", &[t, d_v], d_out.shape())?;
    check_finite("d_out", d_out)?;
    let mut d_q = Array2::zeros(inputs.q.raw_dim());
    let lse = lse.as_standard_layout();
    let lse = lse.as_slice().expect("standard layout");
    let sums = sweep::backward(&visible, inputs.q, lse, d_out, d_q.view_mut(), sweep::segments(1, t));
    let mut d_v = Array2::zeros(inputs.v.raw_dim());
    visible.rows_of_keys(inputs.codes, inputs.key_mask, sums.values.view(), d_v.view_mut());
    let mut d_codewords = Array2::zeros(inputs.codewords.raw_dim());
    visible.add_to_codes(sums.codewords.view(), d_codewords.view_mut());
    Ok(Gradients { q: d_q, v: d_v, codewords: d_codewords })
}

/// What the keys get of their codeword's gradient, in equal shares: the gradient if codewords were the means of their keys.
///
/// ```text
/// dk^_j = dc_{z_j} / N_{z_j}                                 0 where the mask hides a key
/// ```
///
/// # Shapes
/// `codes` and `key_mask` `[T']`, `d_codewords` [S, K]; the gradient [T', K].
///
/// # Errors
/// [`Error::Shape`], [`Error::OutOfRange`] for a code that is not below S.
pub fn key_gradient<T: Scalar>(
    codes: ArrayView1<'_, u32>,
    key_mask: Option<ArrayView1<'_, bool>>,
    d_codewords: ArrayView2<'_, T>,
) -> Result<Array2<T>, Error> {
    compiled_here!(
        T,
        key_gradient_here::<T>,
        fn(ArrayView1<'_, u32>, Option<ArrayView1<'_, bool>>, ArrayView2<'_, T>) -> Result<Array2<T>, Error>
    )(codes, key_mask, d_codewords)
}

fn key_gradient_here<T: Scalar>(
    codes: ArrayView1<'_, u32>,
    key_mask: Option<ArrayView1<'_, bool>>,
    d_codewords: ArrayView2<'_, T>,
) -> Result<Array2<T>, Error> {
    check_keys(codes, key_mask, d_codewords.nrows())?;
    let exists = |j: &usize| key_mask.is_none_or(|mask| mask[*j]);
    let mut counts = vec![0u64; d_codewords.nrows()];
    (0..codes.len()).filter(exists).for_each(|j| counts[codes[j] as usize] += 1);
    let mut d_keys = Array2::zeros((codes.len(), d_codewords.ncols()));
    for j in (0..codes.len()).filter(exists) {
        let code = codes[j] as usize;
        d_keys.row_mut(j).scaled_add(T::from_f64(1.0 / counts[code] as f64), &d_codewords.row(code));
    }
    Ok(d_keys)
}

impl<T: Scalar> Inputs<'_, T> {
    fn check(&self) -> Result<(), Error> {
        let (s, k) = self.codewords.dim();
        let keys = self.codes.len();
        check_shape("v", &[keys, self.v.ncols()], self.v.shape())?;
        check_shape("codewords", &[s, self.q.ncols()], &[s, k])?;
        if self.codewords.is_empty() {
            return Err(Error::Empty { what: "codewords" });
        }
        check_keys(self.codes, self.key_mask, s)?;
        check_finite("q", self.q)?;
        check_finite("v", self.v)?;
        check_finite("codewords", self.codewords)
    }

    /// The keys that exist.
    fn visible_keys(&self) -> impl Iterator<Item = usize> {
        (0..self.codes.len()).filter(|&j| self.key_mask.is_none_or(|mask| mask[j]))
    }
}

/// Checks the codes of keys and their mask.
fn check_keys(
    codes: ArrayView1<'_, u32>,
    key_mask: Option<ArrayView1<'_, bool>>,
    n_codes: usize,
) -> Result<(), Error> {
    if let Some(mask) = key_mask {
        check_shape("key_mask", &[codes.len()], mask.shape())?;
    }
    let beyond = codes.indexed_iter().find(|&(_, &code)| code as usize >= n_codes);
    beyond.map_or(Ok(()), |(j, &code)| {
        Err(Error::OutOfRange { what: "codes", index: vec![j], got: code.into(), limit: n_codes })
    })
}
