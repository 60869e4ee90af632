//! k^ = c_z, and the gradient that it hands back to k and to c.
//!
//! ```text
//! (1) k^_j = c_{z_j}, bit for bit
//! (2) d_k_j = J_j^T d_k^_j
//! (3) d_c_s += sum_{j: z_j = s} d_k^_j                      directional: their share only
//! ```
//!
//! The argmin behind z has no useful derivative. The estimators pretend that `k^ = sg(J) k + const`:
//! - straight-through: J = I;
//! - rotation: J turns k into the direction of c_z and stretches it to its length (see [`Rotation`]);
//! - directional: k^ is k moved towards c_z by their distance; J leaves out the direction between them, which is c_z's;
//! - none: J = 0.
//!
//! (3) is the derivative of (1), whatever the estimator. Training by the losses of VQ-VAE leaves it out; a codebook that
//! learns by gradient may take it as well. Under the directional estimator it is what the keys do not get.
//!
//! Cost: N K for the look-up and for (3), nothing for straight-through, one pass over keys and gradients for the others.

use ndarray::{Array3, Array4, ArrayView1, ArrayView2, ArrayView3, ArrayView4, ArrayViewMut2, Axis, Zip, s};
use rayon::prelude::*;

use super::stats::add_rows_by_code;
use super::{Rotation, check_codes, directional, rotation};
use crate::compiled::compiled_here;
use crate::error::{check_memory, check_shape};
use crate::ops::finite::{all_finite, check_finite};
use crate::{Error, Scalar};

/// Keys of one task: with their gradients they stay in the second-level cache.
const KEYS_PER_TASK: usize = 256;

/// How a gradient passes from the quantized key to the key.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[cfg_attr(
    feature = "model",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields, rename_all = "snake_case")
)]
#[non_exhaustive]
pub enum Estimator {
    /// The gradient of the key is that of the quantized key.
    #[default]
    StraightThrough,
    /// The gradient is turned as the codeword must be to point along the key, and stretched by |codeword| / |key| or as
    /// [`RotationScale`](super::RotationScale) says.
    Rotation(Rotation),
    /// The key gets the gradient without its part along the line from key to codeword; that part is the codeword's.
    Directional,
    /// The key gets nothing.
    None,
}

impl Estimator {
    /// Checks the numbers in it.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a largest scale that is not finite and above 0.
    pub fn validate(self) -> Result<(), Error> {
        match self {
            Estimator::Rotation(rotation) => rotation.scale.validate(),
            _ => Ok(()),
        }
    }

    /// The gradient of the keys, in the place of that of the quantized keys: `d_k_j = J_j^T d_k^_j`, J the matrix by which this
    /// estimator takes a key to its codeword.
    ///
    /// Runs on the threads of the current rayon pool.
    ///
    /// # Shapes
    /// `keys` and `d_quantized` [B, H, T, K], `codes` [B, H, T], `codewords` [H, S, K] as they were in [`lookup`]; the
    /// gradient [B, H, T, K].
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::OutOfRange`] for a code that is not below S, [`Error::NotFinite`], and as
    /// [`validate`](Self::validate).
    ///
    /// ```
    /// use transformer_vq::codebook::{Estimator, Rotation};
    /// use transformer_vq::ndarray::array;
    ///
    /// // The codeword lies a quarter turn to the left of the key and is twice as long.
    /// let (keys, codewords) = (array![[[[1.0, 0.0]]]], array![[[0.0, 2.0]]]);
    /// let estimator = Estimator::Rotation(Rotation::default());
    /// let codes = array![[[0]]];
    /// // What pushes the codeword outwards pushes the key outwards, twice as much.
    /// let d = estimator.key_gradient(keys.view(), codes.view(), codewords.view(), array![[[[0.0, 1.0]]]])?;
    /// assert_eq!(d, array![[[[2.0, 0.0]]]]);
    /// # Ok::<(), transformer_vq::Error>(())
    /// ```
    pub fn key_gradient<T: Scalar>(
        self,
        keys: ArrayView4<'_, T>,
        codes: ArrayView3<'_, u32>,
        codewords: ArrayView3<'_, T>,
        d_quantized: Array4<T>,
    ) -> Result<Array4<T>, Error> {
        compiled_here!(
            T,
            Estimator::key_gradient_here::<T>,
            fn(
                Estimator,
                ArrayView4<'_, T>,
                ArrayView3<'_, u32>,
                ArrayView3<'_, T>,
                Array4<T>,
            ) -> Result<Array4<T>, Error>
        )(self, keys, codes, codewords, d_quantized)
    }

    fn key_gradient_here<T: Scalar>(
        self,
        keys: ArrayView4<'_, T>,
        codes: ArrayView3<'_, u32>,
        codewords: ArrayView3<'_, T>,
        d_quantized: Array4<T>,
    ) -> Result<Array4<T>, Error> {
        self.check(keys, codes, codewords, d_quantized.view())?;
        let (_, n_heads, len, d_k) = keys.dim();
        let mut d = if d_quantized.is_standard_layout() {
            d_quantized
        } else {
            d_quantized.as_standard_layout().into_owned()
        };
        let values = d.as_slice_mut().expect("standard layout");
        let of_head = |(i, d): (usize, &mut [T])| {
            let (b, h) = (i / n_heads, i % n_heads);
            let codewords = codewords.index_axis(Axis(0), h);
            let lengths = rotation::lengths(codewords);
            let of_task = |(task, d): (usize, &mut [T])| {
                let of = task * KEYS_PER_TASK..len.min((task + 1) * KEYS_PER_TASK);
                let d = ArrayViewMut2::from_shape((of.len(), d_k), d).expect("whole rows");
                let (keys, codes) = (keys.slice(s![b, h, of.clone(), ..]), codes.slice(s![b, h, of]));
                // One task's rows at a time, while they are in the cache.
                if let Estimator::Rotation(rotation) = self {
                    return rotation::backward(rotation, keys, codes, codewords, &lengths, d);
                }
                let finite = all_finite(keys) && all_finite(d.view());
                if finite {
                    self.key_backward(keys, codes, codewords, d);
                }
                finite
            };
            let tasks = d.par_chunks_mut((KEYS_PER_TASK * d_k).max(1)).enumerate();
            tasks.map(of_task).reduce(|| true, |a, b| a & b)
        };
        let heads = values.par_chunks_mut((len * d_k).max(1)).enumerate();
        if !heads.map(of_head).reduce(|| true, |a, b| a & b) {
            // What has overflowed is not found here.
            check_finite("keys", keys)?;
            check_finite("d_quantized", d.view())?;
        }
        Ok(d)
    }

    /// The gradient of the codewords, for those that learn from it: the sum of `d_k^_j` over the keys of each code; under
    /// [`Directional`](Self::Directional), of what those keys do not get.
    ///
    /// Runs on the threads of the current rayon pool.
    ///
    /// # Shapes
    /// As [`key_gradient`](Self::key_gradient); the gradient [H, S, K].
    ///
    /// # Errors
    /// As [`key_gradient`](Self::key_gradient).
    pub fn codeword_gradient<T: Scalar>(
        self,
        keys: ArrayView4<'_, T>,
        codes: ArrayView3<'_, u32>,
        codewords: ArrayView3<'_, T>,
        d_quantized: ArrayView4<'_, T>,
    ) -> Result<Array3<T>, Error> {
        compiled_here!(
            T,
            Estimator::codeword_gradient_here::<T>,
            fn(
                Estimator,
                ArrayView4<'_, T>,
                ArrayView3<'_, u32>,
                ArrayView3<'_, T>,
                ArrayView4<'_, T>,
            ) -> Result<Array3<T>, Error>
        )(self, keys, codes, codewords, d_quantized)
    }

    fn codeword_gradient_here<T: Scalar>(
        self,
        keys: ArrayView4<'_, T>,
        codes: ArrayView3<'_, u32>,
        codewords: ArrayView3<'_, T>,
        d_quantized: ArrayView4<'_, T>,
    ) -> Result<Array3<T>, Error> {
        self.check(keys, codes, codewords, d_quantized)?;
        check_finite("keys", keys)?;
        check_finite("d_quantized", d_quantized)?;
        let mut d_codewords = Array3::zeros(codewords.raw_dim());
        d_codewords.axis_iter_mut(Axis(0)).into_par_iter().enumerate().for_each(|(h, mut d_codewords)| {
            for (b, d) in d_quantized.outer_iter().enumerate() {
                let of = s![b, h, .., ..];
                let (codes, codewords) = (codes.slice(s![b, h, ..]), codewords.index_axis(Axis(0), h));
                let d = d.index_axis(Axis(0), h);
                self.add_codeword_gradient(keys.slice(of), codes, codewords, d, d_codewords.view_mut());
            }
        });
        Ok(d_codewords)
    }

    fn check<T: Scalar>(
        self,
        keys: ArrayView4<'_, T>,
        codes: ArrayView3<'_, u32>,
        codewords: ArrayView3<'_, T>,
        d_quantized: ArrayView4<'_, T>,
    ) -> Result<(), Error> {
        let (n_sequences, n_heads, len, d_k) = keys.dim();
        let n_codes = codewords.len_of(Axis(1));
        self.validate()?;
        check_shape("codes", &[n_sequences, n_heads, len], codes.shape())?;
        check_shape("codewords", &[n_heads, n_codes, d_k], codewords.shape())?;
        check_shape("d_quantized", keys.shape(), d_quantized.shape())?;
        check_codes(codes, n_codes)?;
        check_finite("codewords", codewords)
    }

    /// (2) in place: `d` comes as the gradient of the quantized keys and leaves as that of the keys.
    ///
    /// # Shapes
    /// `keys` and `d` [N, K], `codes` `[N]`, `codewords` as they were in forward [S, K].
    pub(crate) fn key_backward<T: Scalar>(
        self,
        keys: ArrayView2<'_, T>,
        codes: ArrayView1<'_, u32>,
        codewords: ArrayView2<'_, T>,
        mut d: ArrayViewMut2<'_, T>,
    ) {
        debug_assert_eq!(keys.dim(), d.dim());
        debug_assert_eq!(d.dim(), (codes.len(), codewords.ncols()));
        match self {
            Estimator::StraightThrough => {}
            Estimator::Rotation(rotation) => {
                rotation::backward(rotation, keys, codes, codewords, &rotation::lengths(codewords), d);
            }
            Estimator::Directional => directional::backward(keys, codes, codewords, d),
            Estimator::None => d.fill(T::zero()),
        }
    }

    /// (3), added to `d_codewords` [S, K]; `d` is the gradient of the quantized keys.
    pub(crate) fn add_codeword_gradient<T: Scalar>(
        self,
        keys: ArrayView2<'_, T>,
        codes: ArrayView1<'_, u32>,
        codewords: ArrayView2<'_, T>,
        d: ArrayView2<'_, T>,
        d_codewords: ArrayViewMut2<'_, T>,
    ) {
        match self {
            Estimator::Directional => {
                directional::add_codeword_gradient(keys, codes, codewords, d, d_codewords)
            }
            _ => add_rows_by_code(d, codes, None, d_codewords),
        }
    }
}

/// The codewords that the codes stand for, `k^_j = c_{z_j}`, bit for bit.
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
    check_memory::<T>("quantized keys", &[n_sequences, n_heads, len, d_k])?;
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

/// Calls `f` with rows whose elements lie side by side: the same arrays, or copies where they are not.
///
/// # Shapes
/// `keys` and `d` [N, K], `codewords` [S, K], of any strides.
pub(super) fn contiguous_rows<T: Scalar, R>(
    keys: ArrayView2<'_, T>,
    codewords: ArrayView2<'_, T>,
    mut d: ArrayViewMut2<'_, T>,
    f: impl Fn(ArrayView2<'_, T>, ArrayView2<'_, T>, ArrayViewMut2<'_, T>) -> R,
) -> R {
    let codewords = codewords.as_standard_layout();
    let copy; // of the keys
    let keys = if side_by_side(keys) {
        keys
    } else {
        copy = keys.as_standard_layout().into_owned();
        copy.view()
    };
    if side_by_side(d.view()) {
        f(keys, codewords.view(), d)
    } else {
        let mut copy = d.as_standard_layout().into_owned();
        let result = f(keys, codewords.view(), copy.view_mut());
        d.assign(&copy);
        result
    }
}

fn side_by_side<T>(x: ArrayView2<'_, T>) -> bool {
    x.ncols() <= 1 || x.strides()[1] == 1
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
        let mut d_codewords = array![[1.0, 1.0]];
        let codes = array![0, 0];
        let (keys, codes, codewords, through) =
            (keys.view(), codes.view(), codewords.view(), Estimator::default());
        through.add_codeword_gradient(keys, codes, codewords, d.view(), d_codewords.view_mut());
        through.key_backward(keys, codes, codewords, d.view_mut());
        assert_eq!(d, expected);
        assert_eq!(d_codewords, array![[1.5, 7.0]]);
    }

    #[test]
    fn look_ups_write_every_element() {
        let codewords = array![[1.0, 2.0], [3.0, 4.0]];
        let mut quantized = Array2::from_elem((3, 2), f64::NAN);
        lookup_into(array![1, 0, 1].view(), codewords.view(), quantized.view_mut());
        assert_eq!(quantized, array![[3.0, 4.0], [1.0, 2.0], [3.0, 4.0]]);
    }
}
