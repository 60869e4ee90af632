//! Which key head a query head reads; which positions of a batch exist, which count, and whether their numbers are finite.

use ndarray::{Array2, Array3, ArrayView3, ArrayView4, Axis, s};

use super::{BatchBiases, BatchInputs};
use crate::error::check_shape;
use crate::ops::finite::{all_finite, check_finite};
use crate::{Error, Scalar};

impl<T: Scalar> BatchInputs<'_, T> {
    /// Checks where documents start and sequences end.
    pub(super) fn check_documents(&self) -> Result<(), Error> {
        let (b, _, t, _) = self.q.dim();
        if let Some(starts) = &self.starts {
            check_shape("starts", &[b, t], starts.shape())?;
        }
        let Some(lengths) = &self.lengths else { return Ok(()) };
        check_shape("lengths", &[b], lengths.shape())?;
        let beyond = lengths.iter().find(|&&len| len > t);
        beyond.map_or(Ok(()), |len| {
            Err(Error::invalid("lengths", format!("at most {t}, the tokens there are"), len))
        })
    }

    /// Hk.
    pub(super) fn n_key_heads(&self) -> usize {
        self.k.len_of(Axis(1))
    }

    /// H / Hk: query heads that read one key head.
    pub(crate) fn group(&self) -> usize {
        self.q.len_of(Axis(1)).checked_div(self.n_key_heads()).unwrap_or(1)
    }

    /// Checks that lse [B, H, T] comes from sequences of these lengths: where a token does not exist it is -infinity.
    pub(super) fn check_saved(&self, lse: &Array3<T>) -> Result<(), Error> {
        let (b, h, t, _) = self.q.dim();
        check_shape("saved.lse", &[b, h, t], lse.shape())?;
        for (b, lse) in lse.outer_iter().enumerate() {
            for lse in lse.outer_iter() {
                let existed = lse.iter().filter(|&&lse| lse != T::neg_infinity()).count();
                check_shape("saved.lse", &[self.len_of(b)], &[existed])?;
            }
        }
        Ok(())
    }

    /// Tokens of sequence b that exist.
    pub(super) fn len_of(&self, b: usize) -> usize {
        self.lengths.as_ref().map_or(self.q.len_of(Axis(2)), |lengths| lengths[b])
    }

    /// Where padding hides positions: those that count in the loss and in the statistics.
    pub(super) fn counting(&self) -> Option<Array2<bool>> {
        let (b, _, t, _) = self.q.dim();
        let counts = |(b, t)| t < self.len_of(b) && self.mask.as_ref().is_none_or(|mask| mask[[b, t]]);
        self.lengths.map(|_| Array2::from_shape_fn((b, t), counts))
    }

    /// The same with [`counting`](Self::counting), where it is something, as the mask.
    pub(super) fn with_mask<'s>(&'s self, counting: Option<&'s Array2<bool>>) -> BatchInputs<'s, T> {
        let biases = self.biases.as_ref().map(|biases| BatchBiases {
            content: biases.content.view(),
            position: biases.position.view(),
            relative: biases.relative.view(),
        });
        BatchInputs {
            biases,
            mask: counting.map(|mask| mask.view()).or(self.mask.as_ref().map(|mask| mask.view())),
            starts: self.starts.as_ref().map(|starts| starts.view()),
            lengths: self.lengths.as_ref().map(|lengths| lengths.view()),
            ..BatchInputs::new(self.q.view(), self.k.view(), self.v.view())
        }
    }

    /// Whether padding is finite in this array [B, H, T, width].
    pub(super) fn padding_finite(&self, x: &ArrayView4<'_, T>) -> bool {
        let finite = |b: usize, x: ArrayView3<'_, T>| {
            x.outer_iter().all(|x| all_finite(x.slice(s![self.len_of(b).., ..])))
        };
        self.lengths.is_none() || x.outer_iter().enumerate().all(|(b, x)| finite(b, x))
    }

    /// Checks q, k and v: a pass over all of them, made only where a cheaper look says that there is something to find.
    pub(super) fn check_finite(&self) -> Result<(), Error> {
        check_finite("q", self.q.view())?;
        check_finite("k", self.k.view())?;
        check_finite("v", self.v.view())
    }

    /// Positions that count: the denominator of (3).
    pub(super) fn counted(&self) -> usize {
        let (b, _, t, _) = self.q.dim();
        self.mask.as_ref().map_or(b * t, |mask| mask.iter().filter(|&&m| m).count())
    }
}
