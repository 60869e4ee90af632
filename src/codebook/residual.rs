//! Codebooks in turn: each level quantizes what the levels before it have left.
//!
//! ```text
//! (1) r_0 = k,   z_l = argmin_s |r_l - c^l_s|^2,   r_{l+1} = r_l - c^l_{z_l}              levels l = 0, 1, ...
//! (2) k^ = c^0_{z_0} + c^1_{z_1} + ...                                                    summed in this order
//! (3) loss_l = sum_h sum_j m_j |r^{l+1}_j|^2 / Z,   d_k_j += w (2 / Z) m_j sum_l r^{l+1}_j,   Z = sum m_j     commitment
//! (4) d_k = J^T d_k^ + (3), J that of the estimator between k and k^
//! ```
//!
//! L levels of S codes tell S^L vectors apart at the price of L S. Codewords are constants in (1), so that each r_l has the
//! derivative of k: the estimator is applied once, to the whole sum, and the commitment of every level reaches the keys.
//!
//! One level is an ordinary codebook with the same functions. Heads are groups: [`split`](super::groups::split) cuts vectors
//! into H parts, each with codebooks of its own (product quantization), and [`join`](super::groups::join) puts them together
//! again.
//!
//! Cost: that of its levels, and N K per level for the residuals. Sources: residual quantization as in SoundStream (Zeghidour
//! et al., 2021); product quantization (Jégou et al., 2011).
//!
//! ```
//! use transformer_vq::codebook::{Codebook, Ema, Estimator, Residual, groups, start};
//! use transformer_vq::ndarray::Array3;
//!
//! let vectors = Array3::from_shape_fn((1, 200, 6), |(_, t, i)| ((t * (i + 3)) as f32).sin()); // [B, T, D]
//! let keys = groups::split(vectors.view(), 2)?; // [B, H, T, K]: two groups of width 3
//! let mut codebooks = Residual::from_keys(keys.view(), 4, |level, left| {
//!     let codewords = start::k_means(left, 8, None, 10, level as u64)?;
//!     Ok(Codebook::ema(Ema::from_codewords(codewords, 0.99)?))
//! })?;
//!
//! // A step of training: your loss gives the gradient of the quantized vectors.
//! let (output, saved) = codebooks.forward(keys.view(), None)?;
//! let d_quantized = &output.quantized * 2.0;
//! let d_keys = saved.backward(keys.view(), None, d_quantized.view(), Estimator::default(), 0.25)?;
//! codebooks.update(&output.stats)?;
//! assert_eq!(groups::join(d_keys.view())?.dim(), vectors.dim());
//!
//! // In use: 4 x 2 codes of 3 bits instead of 6 numbers.
//! let codes = codebooks.encode(keys.view())?; // [L, B, H, T]
//! let decoded = groups::join(codebooks.decode(codes.view())?.view())?;
//! assert_eq!(decoded.dim(), vectors.dim());
//! # Ok::<(), transformer_vq::Error>(())
//! ```

use ndarray::{Array1, Array2, Array3, Array4, ArrayView2, ArrayView3, ArrayView4, Axis, Zip, s};
use rayon::prelude::*;

use super::assign::assign_heads;
use super::{CodeStats, Codebook, Estimator, commitment, lookup};
use crate::compiled::compiled_here;
use crate::error::{check_memory, check_shape};
use crate::ops::finite::check_finite;
use crate::{Error, Scalar};

/// Codebooks in turn, all with the same heads and width.
#[derive(Debug, Clone, PartialEq)]
pub struct Residual<T> {
    levels: Vec<Codebook<T>>,
}

/// What keys become, and what they say about the codes.
#[derive(Debug, Clone, PartialEq)]
pub struct Quantized<T> {
    /// (2): [B, H, T, K], bit for bit what [`Residual::decode`] makes of the codes.
    pub quantized: Array4<T>,
    /// [L, B, H, T].
    pub codes: Array4<u32>,
    /// Statistics of each level, of the positions that count.
    pub stats: Vec<CodeStats<T>>,
    /// The mean square of what each level leaves [L, H], over the positions that count: (3) before its sum over heads.
    pub mean_errors: Array2<f64>,
    /// The mean square of the keys `[H]`, over the positions that count.
    pub mean_squares: Array1<f64>,
}

impl<T: Scalar> Quantized<T> {
    /// (3): the unweighted loss of all levels.
    pub fn commit_loss(&self) -> f64 {
        self.mean_errors.sum()
    }

    /// What each level leaves, relative to the keys [L, H]: mean squares of both; 0 without error, infinite for keys that are all
    /// zero, NaN for a head that has no mean square.
    pub fn relative_errors(&self) -> Array2<f64> {
        let square = |head: usize| self.mean_squares.get(head).copied().unwrap_or(f64::NAN);
        let relative = |(_, head), &error: &f64| if error > 0.0 { error / square(head) } else { 0.0 };
        Zip::indexed(&self.mean_errors).map_collect(relative)
    }
}

/// What backward needs of forward, beside the keys.
#[derive(Debug, Clone)]
pub struct Saved<T> {
    codes: Array4<u32>,        // [L, B, H, T]
    codewords: Vec<Array3<T>>, // of each level [H, S, K]
}

impl<T: Scalar> Residual<T> {
    /// Levels made elsewhere, the coarsest first.
    ///
    /// # Errors
    /// [`Error::Empty`] without levels, [`Error::Shape`] if heads or widths differ. Numbers of codes may differ.
    pub fn new(levels: Vec<Codebook<T>>) -> Result<Self, Error> {
        let Some(first) = levels.first() else { return Err(Error::Empty { what: "levels" }) };
        let expected = [first.n_heads(), first.d_k()];
        levels
            .iter()
            .try_for_each(|level| check_shape("levels", &expected, &[level.n_heads(), level.d_k()]))?;
        Ok(Residual { levels })
    }

    /// Levels made one after the other: `start(level, left)` makes one from what those before it have left of the keys.
    ///
    /// # Shapes
    /// `keys` and `left` [B, H, T, K].
    ///
    /// # Errors
    /// Those of `start`, of [`Residual::new`], and [`Error::Shape`] or [`Error::NotFinite`] for keys.
    pub fn from_keys(
        keys: ArrayView4<'_, T>,
        n_levels: usize,
        mut start: impl FnMut(usize, ArrayView4<'_, T>) -> Result<Codebook<T>, Error>,
    ) -> Result<Self, Error> {
        check_finite("keys", keys)?;
        let mut left = keys.to_owned();
        let mut levels = vec![];
        for level in 0..n_levels {
            let codebook = start(level, left.view())?;
            quantize(&mut left, codebook.codewords().view())?;
            levels.push(codebook);
        }
        Self::new(levels)
    }

    /// The levels, the coarsest first.
    pub fn levels(&self) -> &[Codebook<T>] {
        &self.levels
    }

    /// (1): the codes [L, B, H, T] of keys [B, H, T, K].
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::NotFinite`], [`Error::TooLarge`].
    pub fn encode(&self, keys: ArrayView4<'_, T>) -> Result<Array4<u32>, Error> {
        compiled_here!(
            T,
            Residual::<T>::encode_here,
            fn(&Residual<T>, ArrayView4<'_, T>) -> Result<Array4<u32>, Error>
        )(self, keys)
    }

    fn encode_here(&self, keys: ArrayView4<'_, T>) -> Result<Array4<u32>, Error> {
        let (mut codes, mut left) = self.begin(keys)?;
        for (level, mut codes) in self.levels.iter().zip(codes.outer_iter_mut()) {
            codes.assign(&quantize(&mut left, level.codewords().view())?);
        }
        Ok(codes)
    }

    /// (2): the vectors [B, H, T, K] that codes [L, B, H, T] stand for; the first levels alone give coarser ones.
    ///
    /// # Errors
    /// [`Error::Empty`] without a level, [`Error::Shape`] for other heads or more levels than there are, [`Error::OutOfRange`],
    /// [`Error::TooLarge`].
    pub fn decode(&self, codes: ArrayView4<'_, u32>) -> Result<Array4<T>, Error> {
        let (n_levels, n_sequences, _, len) = codes.dim();
        let n_heads = self.levels[0].n_heads();
        let expected = [n_levels.min(self.levels.len()), n_sequences, n_heads, len];
        check_shape("codes", &expected, codes.shape())?;
        if n_levels == 0 {
            return Err(Error::Empty { what: "codes" });
        }
        let levels = &self.levels[..n_levels];
        sum_of_levels(&levels.iter().map(Codebook::codewords).collect::<Vec<_>>(), codes)
    }

    /// (1) and (2), with losses and statistics of the positions that count.
    ///
    /// # Shapes
    /// `keys` [B, H, T, K], `mask` [B, T]: true where a position counts, without one all do. What does not count is quantized as
    /// well.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::NotFinite`], [`Error::TooLarge`].
    pub fn forward(
        &self,
        keys: ArrayView4<'_, T>,
        mask: Option<ArrayView2<'_, bool>>,
    ) -> Result<(Quantized<T>, Saved<T>), Error> {
        compiled_here!(
            T,
            Residual::<T>::forward_here,
            fn(
                &Residual<T>,
                ArrayView4<'_, T>,
                Option<ArrayView2<'_, bool>>,
            ) -> Result<(Quantized<T>, Saved<T>), Error>
        )(self, keys, mask)
    }

    fn forward_here(
        &self,
        keys: ArrayView4<'_, T>,
        mask: Option<ArrayView2<'_, bool>>,
    ) -> Result<(Quantized<T>, Saved<T>), Error> {
        let (mut codes, mut left) = self.begin(keys)?;
        let (n_sequences, n_heads, len, d_k) = keys.dim();
        let zeros = (Array3::zeros((n_sequences, n_heads, len)), Array3::zeros((n_heads, 1, d_k)));
        // The distance from zero.
        let mean_squares = commitment::mean_error(keys, zeros.0.view(), zeros.1.view(), mask)?;
        let mut mean_errors = Array2::zeros((self.levels.len(), n_heads));
        let mut stats = Vec::with_capacity(self.levels.len());
        let codewords: Vec<_> = self.levels.iter().map(Codebook::codewords).collect();
        for (l, codewords) in codewords.iter().enumerate() {
            let before = left.clone();
            let of_level = quantize(&mut left, codewords.view())?;
            let (before, of_level) = (before.view(), of_level.view());
            stats.push(CodeStats::collect(before, of_level, codewords.len_of(Axis(1)), mask)?);
            let errors = commitment::mean_error(before, of_level, codewords.view(), mask)?;
            mean_errors.row_mut(l).assign(&errors);
            codes.index_axis_mut(Axis(0), l).assign(&of_level);
        }
        let quantized = sum_of_levels(&codewords, codes.view())?;
        let output = Quantized { quantized, codes: codes.clone(), stats, mean_errors, mean_squares };
        Ok((output, Saved { codes, codewords }))
    }

    /// Learns from the statistics of one step, level by level.
    ///
    /// # Errors
    /// [`Error::Shape`] if there are not as many as levels, and those of [`Codebook::update`]; the codebooks are then as they
    /// were.
    pub fn update(&mut self, stats: &[CodeStats<T>]) -> Result<(), Error> {
        check_shape("stats", &[self.levels.len()], &[stats.len()])?;
        let mut levels = self.levels.clone();
        levels.iter_mut().zip(stats).try_for_each(|(level, stats)| level.update(stats))?;
        self.levels = levels;
        Ok(())
    }

    /// [`Codebook::revive`] on each level, with what the revived levels before it leave; the number of codes revived on each.
    ///
    /// # Errors
    /// Those of [`Codebook::revive`]; the codebooks are then as they were.
    pub fn revive(
        &mut self,
        keys: ArrayView4<'_, T>,
        mask: Option<ArrayView2<'_, bool>>,
        ratio: f64,
        seed: u64,
    ) -> Result<Vec<usize>, Error> {
        let (_, mut left) = self.begin(keys)?;
        let mut levels = self.levels.clone();
        let mut revived = Vec::with_capacity(levels.len());
        for (l, level) in (0..).zip(&mut levels) {
            revived.push(level.revive(left.view(), mask, ratio, seed.wrapping_add(l))?);
            quantize(&mut left, level.codewords().view())?;
        }
        self.levels = levels;
        Ok(revived)
    }

    /// Checks keys; codes [L, B, H, T] to be written, and the keys as what is left at first.
    fn begin(&self, keys: ArrayView4<'_, T>) -> Result<(Array4<u32>, Array4<T>), Error> {
        let (n_sequences, _, len, _) = keys.dim();
        let (n_heads, d_k) = (self.levels[0].n_heads(), self.levels[0].d_k());
        check_shape("keys", &[n_sequences, n_heads, len, d_k], keys.shape())?;
        check_finite("keys", keys)?;
        check_memory::<u32>("codes", &[self.levels.len(), n_sequences, n_heads, len])?;
        check_memory::<T>("keys", keys.shape())?;
        Ok((Array4::zeros((self.levels.len(), n_sequences, n_heads, len)), keys.to_owned()))
    }
}

impl<T: Scalar> Saved<T> {
    /// (4): the gradient of the keys, given that of the quantized ones and the weight w of the commitment.
    ///
    /// # Shapes
    /// `keys` and `mask` as they were in forward, `d_quantized` [B, H, T, K], the gradient [B, H, T, K].
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::NotFinite`], [`Error::Invalid`] for a weight that is not finite, and as
    /// [`Estimator::validate`].
    pub fn backward(
        self,
        keys: ArrayView4<'_, T>,
        mask: Option<ArrayView2<'_, bool>>,
        d_quantized: ArrayView4<'_, T>,
        estimator: Estimator,
        commit_weight: f64,
    ) -> Result<Array4<T>, Error> {
        compiled_here!(
            T,
            Saved::<T>::backward_here,
            fn(
                Saved<T>,
                ArrayView4<'_, T>,
                Option<ArrayView2<'_, bool>>,
                ArrayView4<'_, T>,
                Estimator,
                f64,
            ) -> Result<Array4<T>, Error>
        )(self, keys, mask, d_quantized, estimator, commit_weight)
    }

    fn backward_here(
        self,
        keys: ArrayView4<'_, T>,
        mask: Option<ArrayView2<'_, bool>>,
        d_quantized: ArrayView4<'_, T>,
        estimator: Estimator,
        commit_weight: f64,
    ) -> Result<Array4<T>, Error> {
        let quantized = sum_of_levels(&self.codewords, self.codes.view())?;
        check_shape("keys", quantized.shape(), keys.shape())?;
        check_shape("d_quantized", quantized.shape(), d_quantized.shape())?;
        estimator.validate()?;
        check_finite("d_quantized", d_quantized)?;
        let mut d_keys = d_quantized.to_owned();
        // Each vector its own codeword: the estimator sees the sum as one look-up.
        let own = Array1::from_iter((0..).take(keys.len_of(Axis(2))));
        let of_sequences = d_keys.outer_iter_mut().into_par_iter().zip(quantized.outer_iter()).enumerate();
        of_sequences.for_each(|(b, (mut d_keys, quantized))| {
            for (h, (d, quantized)) in d_keys.outer_iter_mut().zip(quantized.outer_iter()).enumerate() {
                estimator.key_backward(keys.slice(s![b, h, .., ..]), own.view(), quantized, d);
            }
        });
        let mut left = keys.to_owned();
        for (codewords, codes) in self.codewords.iter().zip(self.codes.outer_iter()) {
            d_keys += &commitment::backward(left.view(), codes, codewords.view(), mask, commit_weight)?;
            left -= &lookup(codes, codewords.view())?;
        }
        Ok(d_keys)
    }
}

/// (1) of one level: takes the nearest codewords from what is left, and returns their codes [B, H, T].
fn quantize<T: Scalar>(left: &mut Array4<T>, codewords: ArrayView3<'_, T>) -> Result<Array3<u32>, Error> {
    let codes = assign_heads(left.view(), codewords)?;
    *left -= &lookup(codes.view(), codewords)?;
    Ok(codes)
}

/// (2), of at least one level.
fn sum_of_levels<T: Scalar>(codewords: &[Array3<T>], codes: ArrayView4<'_, u32>) -> Result<Array4<T>, Error> {
    // Begun with a look-up, not with zeros, which would turn -0 into 0.
    let mut sum = lookup(codes.index_axis(Axis(0), 0), codewords[0].view())?;
    for (codewords, codes) in codewords.iter().zip(codes.outer_iter()).skip(1) {
        sum += &lookup(codes, codewords.view())?;
    }
    Ok(sum)
}
