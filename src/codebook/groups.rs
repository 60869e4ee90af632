//! Vectors cut into parts of equal width, each part with a codebook of its own: product quantization.
//!
//! ```text
//! x [B, T, D]  <->  keys [B, H, T, K],   D = H K:   keys_h = the numbers h K .. (h + 1) K of x
//! ```
//!
//! Everything in this crate gives each head codewords of its own, so that a head is a group: H S codewords of width K tell S^H
//! vectors apart.

use ndarray::{Array3, Array4, ArrayView3, ArrayView4};

use crate::error::check_memory;
use crate::{Error, Scalar};

/// The parts of vectors, as keys.
///
/// # Shapes
/// `x` [B, T, D], the keys [B, H, T, K] with H = `n_groups` and K = D / H.
///
/// # Errors
/// [`Error::Invalid`] if `n_groups` is 0 or does not divide D, [`Error::TooLarge`].
pub fn split<T: Scalar>(x: ArrayView3<'_, T>, n_groups: usize) -> Result<Array4<T>, Error> {
    let (n_sequences, len, width) = x.dim();
    if n_groups == 0 || width % n_groups != 0 {
        return Err(Error::invalid("n_groups", format!("a divisor of the width {width}"), n_groups));
    }
    let d_k = width / n_groups;
    check_memory::<T>("keys", &[n_sequences, len, n_groups, d_k])?;
    let parts = x.to_shape((n_sequences, len, n_groups, d_k)).expect("as many elements");
    Ok(parts.permuted_axes([0, 2, 1, 3]).as_standard_layout().into_owned())
}

/// Vectors from their parts: what [`split`] undoes, and the gradient of it.
///
/// # Shapes
/// `keys` [B, H, T, K], the vectors [B, T, H K].
///
/// # Errors
/// [`Error::TooLarge`].
pub fn join<T: Scalar>(keys: ArrayView4<'_, T>) -> Result<Array3<T>, Error> {
    let (n_sequences, n_groups, len, d_k) = keys.dim();
    check_memory::<T>("vectors", keys.shape())?;
    let parts = keys.permuted_axes([0, 2, 1, 3]); // [B, T, H, K]
    Ok(parts.to_shape((n_sequences, len, n_groups * d_k)).expect("as many elements").into_owned())
}
