//! Whether what attention over batch and heads is given fits together; the part of it that one head reads.

use ndarray::{Array2, Array3, Axis, s};

use super::{BatchBiases, BatchInputs};
use crate::attention::{AttentionState, Biases, Inputs, VqAttention};
use crate::error::check_shape;
use crate::ops::finite::check_finite;
use crate::{Error, Scalar};

impl<T: Scalar> BatchBiases<'_, T> {
    pub(super) fn check(
        &self,
        (h, n_key_heads): (usize, usize),
        k: usize,
        window: usize,
    ) -> Result<(), Error> {
        check_shape("biases.content", &[h, k], self.content.shape())?;
        check_shape("biases.position", &[h, k], self.position.shape())?;
        check_shape("biases.relative", &[n_key_heads, window + 1, k], self.relative.shape())?;
        check_finite("biases.content", self.content)?;
        check_finite("biases.position", self.position)?;
        check_finite("biases.relative", self.relative)
    }
}

impl<T: Scalar> BatchInputs<'_, T> {
    /// Whether this can be computed, as far as sizes say.
    pub(super) fn check_shapes(
        &self,
        attention: &VqAttention,
        (n_heads, n_codes, d_k): (usize, usize, usize),
        states: &Array2<AttentionState<T>>,
    ) -> Result<(), Error> {
        self.check_arrays(attention)?;
        let (b, _, t, _) = self.k.dim();
        check_shape("k", &[b, n_heads, t, d_k], self.k.shape())?;
        check_shape("states", &[b, n_heads], states.shape())?;
        let d_v = self.v.len_of(Axis(3));
        states.iter().try_for_each(|state| state.check(n_codes, d_k, d_v, attention.window))
    }

    pub(super) fn check_arrays(&self, attention: &VqAttention) -> Result<(), Error> {
        attention.validate()?;
        let (b, h, t, k) = self.q.dim();
        // Any number of key heads that divides that of queries.
        let n_key_heads =
            Some(self.n_key_heads()).filter(|&n| n > 0 && h > 0 && h.is_multiple_of(n)).unwrap_or(h);
        check_shape("k", &[b, n_key_heads, t, k], self.k.shape())?;
        check_shape("v", &[b, n_key_heads, t, self.v.len_of(Axis(3))], self.v.shape())?;
        if let Some(mask) = &self.mask {
            check_shape("mask", &[b, t], mask.shape())?;
        }
        self.check_documents()?;
        self.biases.as_ref().map_or(Ok(()), |biases| biases.check((h, n_key_heads), k, attention.window))
    }

    /// The inputs of query head h of sequence b, as far as they exist.
    pub(super) fn head<'s>(
        &'s self,
        b: usize,
        h: usize,
        codes: &'s Array3<u32>,
        codewords: &'s Array3<T>,
    ) -> Inputs<'s, T> {
        let (key_head, len) = (h / self.group(), self.len_of(b));
        Inputs {
            q: self.q.slice(s![b, h, ..len, ..]),
            codes: codes.slice(s![b, key_head, ..len]),
            v: self.v.slice(s![b, key_head, ..len, ..]),
            starts: self.starts.as_ref().map(|starts| starts.slice(s![b, ..len])),
            codewords: codewords.slice(s![key_head, .., ..]),
            biases: self.biases.as_ref().map(|biases| Biases {
                content: biases.content.row(h),
                position: biases.position.row(h),
                relative: biases.relative.slice(s![key_head, .., ..]),
            }),
        }
    }
}
