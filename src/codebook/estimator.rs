//! k^ = c_z, and the gradient that it hands back to k.
//!
//! ```text
//! (1) k^_j = c_{z_j}, bit for bit
//! (2) d_k_j = J_j^T d_k^_j
//! ```
//!
//! The argmin behind z has no useful derivative. The estimators pretend that `k^ = sg(J) k + const`:
//! - straight-through: J = I.
//!
//! Cost: N K for the look-up, nothing for straight-through.

use ndarray::{Array4, ArrayView1, ArrayView2, ArrayView3, ArrayViewMut2, Zip};

use super::check_codes;
use crate::error::{check_shape, checked_len};
use crate::{Error, Scalar};

/// How a gradient passes from the quantized key to the key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Estimator {
    /// The gradient of the key is that of the quantized key.
    #[default]
    StraightThrough,
}

impl Estimator {
    /// (2) in place: `d` comes as the gradient of the quantized keys and leaves as that of the keys.
    ///
    /// # Shapes
    /// `keys` [N, K], `codes` `[N]`, `codewords` [S, K] as they were in forward, `d` [N, K].
    pub(crate) fn backward<T: Scalar>(
        self,
        keys: ArrayView2<'_, T>,
        codes: ArrayView1<'_, u32>,
        codewords: ArrayView2<'_, T>,
        d: ArrayViewMut2<'_, T>,
    ) {
        debug_assert_eq!(keys.dim(), d.dim());
        debug_assert_eq!(d.dim(), (codes.len(), codewords.ncols()));
        match self {
            Estimator::StraightThrough => {}
        }
    }
}

/// (1): the codewords that the codes stand for.
///
/// # Shapes
/// `codes` [B, H, T], `codewords` [H, S, K], the quantized keys [B, H, T, K].
///
/// # Errors
/// [`Error::Shape`] if the numbers of heads differ, [`Error::OutOfRange`] for a code that is not below S,
/// [`Error::TooLarge`].
pub fn lookup<T: Scalar>(
    codes: ArrayView3<'_, u32>,
    codewords: ArrayView3<'_, T>,
) -> Result<Array4<T>, Error> {
    let (n_sequences, n_heads, len) = codes.dim();
    let (_, n_codes, d_k) = codewords.dim();
    check_shape("codewords", &[n_heads, n_codes, d_k], codewords.shape())?;
    checked_len("quantized keys", &[n_sequences, n_heads, len, d_k])?;
    check_codes(codes, n_codes)?;
    let mut quantized = Array4::zeros((n_sequences, n_heads, len, d_k));
    for (mut quantized, codes) in quantized.outer_iter_mut().zip(codes.outer_iter()) {
        let heads = quantized.outer_iter_mut().zip(codes.outer_iter()).zip(codewords.outer_iter());
        heads.for_each(|((quantized, codes), codewords)| lookup_into(codes, codewords, quantized));
    }
    Ok(quantized)
}

/// (1) for one head: `codes` `[N]`, `codewords` [S, K], `quantized` [N, K].
pub(crate) fn lookup_into<T: Scalar>(
    codes: ArrayView1<'_, u32>,
    codewords: ArrayView2<'_, T>,
    mut quantized: ArrayViewMut2<'_, T>,
) {
    Zip::from(quantized.rows_mut())
        .and(codes)
        .for_each(|mut row, &code| row.assign(&codewords.row(code as usize)));
}

#[cfg(test)]
mod tests {
    use ndarray::{Array2, array};

    use super::*;

    #[test]
    fn straight_through_is_the_identity() {
        let (keys, codewords) = (array![[1.0, 2.0], [3.0, 4.0]], array![[0.0, 1.0]]);
        let mut d = array![[0.5, -1.0], [f64::MIN_POSITIVE, 7.0]];
        let expected = d.clone();
        Estimator::default().backward(keys.view(), array![0, 0].view(), codewords.view(), d.view_mut());
        assert_eq!(d, expected);
    }

    #[test]
    fn look_ups_write_every_element() {
        let codewords = array![[1.0, 2.0], [3.0, 4.0]];
        let mut quantized = Array2::from_elem((3, 2), f64::NAN);
        lookup_into(array![1, 0, 1].view(), codewords.view(), quantized.view_mut());
        assert_eq!(quantized, array![[3.0, 4.0], [1.0, 2.0], [3.0, 4.0]]);
    }
}
