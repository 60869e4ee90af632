//! The loss that pulls codewords towards their keys: the other side of the [`commitment`](super::commitment) loss.
//!
//! ```text
//! (1) loss = sum_h sum_j m_j |sg(k_j) - c_{z_j}|^2 / Z,   Z = sum m_j          m_j: 1 where counted
//! (2) d_c_s += w (2 / Z) (n_s c_s - sums_s)                                    n_s, sums_s: the code's count and sum
//! ```
//!
//! A sum over heads and dimensions, a mean over positions, as commitment is: the same number, which
//! [`commitment::loss`](super::commitment::loss) gives. The keys are constants here: this loss moves codewords only. All that
//! its gradient needs to know of the keys are their [`CodeStats`], those of micro-batches and machines merged.
//!
//! Cost: H S K. Source: VQ-VAE (van den Oord et al., 2017).

use ndarray::{Array3, ArrayView3, Zip};

use super::CodeStats;
use crate::error::check_shape;
use crate::ops::finite::check_finite;
use crate::{Error, Scalar};

/// (2): the gradient of `weight` times the loss; 0 for a code that no key took, and if nothing was counted.
///
/// # Shapes
/// `codewords` and the gradient [H, S, K].
///
/// # Errors
/// [`Error::Shape`] if the statistics are of another size, [`Error::NotFinite`] for their sums or codewords,
/// [`Error::Invalid`] for a weight that is not finite.
pub fn backward<T: Scalar>(
    stats: &CodeStats<T>,
    codewords: ArrayView3<'_, T>,
    weight: f64,
) -> Result<Array3<T>, Error> {
    check_shape("codewords", stats.sums().shape(), codewords.shape())?;
    check_finite("stats.sums", stats.sums())?;
    check_finite("codewords", codewords)?;
    if !weight.is_finite() {
        return Err(Error::invalid("weight", "finite", weight));
    }
    Ok(gradient(stats, codewords, weight))
}

/// [`backward`] on what is known to fit.
pub(crate) fn gradient<T: Scalar>(
    stats: &CodeStats<T>,
    codewords: ArrayView3<'_, T>,
    weight: f64,
) -> Array3<T> {
    let mut d = codewords.to_owned();
    let (sums, counts) = (stats.sums(), stats.counts());
    for ((mut d, sums), counts) in d.outer_iter_mut().zip(sums.outer_iter()).zip(counts.outer_iter()) {
        let total: f64 = counts.iter().map(|&n| n as f64).sum(); // Z
        let scale = T::from_f64(2.0 * weight / total.max(1.0));
        Zip::from(d.rows_mut()).and(sums.rows()).and(counts).for_each(|mut d, sum, &n| {
            let n = T::from_f64(n as f64);
            d.zip_mut_with(&sum, |c, &sum| *c = scale * (n * *c - sum));
        });
    }
    d
}
