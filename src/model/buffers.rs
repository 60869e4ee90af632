//! Large arrays that a model keeps from one pass to the next.
//!
//! Memory that comes fresh from the system costs a page fault per 4 KB, a tenth of a unit's time. The arrays of a
//! pass are as large as those of the pass before: what one gives back, the next one takes.

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use ndarray::{Array, Array1, Array2, Array4, Dimension, s};

use super::NormParameters;
use crate::ops::{aligned, linear, rms_norm};
use crate::{Error, Scalar};

/// Smaller arrays are left to the allocator, which keeps their pages itself.
const LEAST_BYTES: usize = 1 << 20;

/// An array that so many passes had no use for is freed.
const PASSES: u64 = 8;

/// Arrays that are not in use, of any lengths.
///
/// They are no part of what a model is: all are equal.
pub(super) struct Buffers<T>(Mutex<Kept<T>>);

struct Kept<T> {
    /// Passes begun.
    pass: u64,
    /// The last pass that used each, in the order in which they were given back.
    arrays: Vec<(u64, Array1<T>)>,
}

impl<T> Buffers<T> {
    /// Frees what has not been used for some time.
    pub fn begin_pass(&self) {
        let mut kept = self.lock();
        kept.pass += 1;
        let pass = kept.pass;
        kept.arrays.retain(|&(used, _)| pass - used <= PASSES);
    }

    /// Takes back an array that came from here.
    pub fn give<D: Dimension>(&self, array: Array<T, D>) {
        let len = array.len();
        let (numbers, first) = array.into_raw_vec_and_offset();
        if let Some(first) = first
            && is_large::<T>(len)
            && numbers.len() <= len + aligned::unused::<T>()
        {
            let array = Array1::from_vec(numbers).slice_move(s![first..first + len]);
            let mut kept = self.lock();
            let pass = kept.pass;
            kept.arrays.push((pass, array));
        }
    }

    /// As [`give`](Self::give), several.
    pub fn give_all(&self, arrays: impl IntoIterator<Item = Array2<T>>) {
        arrays.into_iter().for_each(|array| self.give(array));
    }

    /// The latest of this length, whose end may still be in a cache.
    fn find(&self, len: usize) -> Option<Array1<T>> {
        let arrays = &mut self.lock().arrays;
        let latest = arrays.iter().rposition(|(_, array)| array.len() == len)?;
        Some(arrays.remove(latest).1)
    }

    /// Where the kept arrays lie.
    #[cfg(test)]
    pub fn places(&self) -> std::collections::BTreeSet<usize> {
        self.lock().arrays.iter().map(|(_, array)| array.as_ptr().addr()).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Kept<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: Scalar> Buffers<T> {
    /// An array in standard layout whose numbers have no meaning.
    pub fn take(&self, shape: (usize, usize)) -> Array2<T> {
        let len = shape.0 * shape.1;
        let found = if is_large::<T>(len) { self.find(len) } else { None };
        match found {
            Some(array) => array.into_shape_with_order(shape).expect("of this length"),
            None => aligned::array(shape),
        }
    }

    /// A copy.
    pub fn copy(&self, array: &Array2<T>) -> Array2<T> {
        let mut copy = self.take(array.dim());
        copy.assign(array);
        copy
    }

    /// x w, of `x` [N, in] and `w` [in, out].
    pub fn product(&self, x: &Array2<T>, w: &Array2<T>) -> Array2<T> {
        let mut y = self.take((x.nrows(), w.ncols()));
        linear::forward_into(x.view(), w.view(), &mut y);
        y
    }

    /// RMSNorm(x) * gain + bias of `x` [N, D], and what its backward needs.
    pub fn normalize(
        &self,
        x: &Array2<T>,
        norm: &NormParameters<T>,
    ) -> Result<(Array2<T>, rms_norm::Saved<T>), Error> {
        let mut y = self.take(x.dim());
        let saved = rms_norm::forward_affine_into(x.view(), norm.gain.view(), norm.bias.view(), &mut y)?;
        Ok((y, saved))
    }

    /// As [`take`](Self::take) [B, H, T, width], laid out token by token.
    pub fn take_heads(&self, (b, h, t): (usize, usize, usize), width: usize) -> Array4<T> {
        let rows = self.take((b * t, h * width));
        let heads = rows.into_shape_with_order((b, t, h, width)).expect("standard layout");
        heads.permuted_axes([0, 2, 1, 3])
    }
}

fn is_large<T>(len: usize) -> bool {
    len * size_of::<T>() >= LEAST_BYTES
}

impl<T> Default for Buffers<T> {
    fn default() -> Self {
        Buffers(Mutex::new(Kept { pass: 0, arrays: vec![] }))
    }
}

impl<T> PartialEq for Buffers<T> {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl<T> fmt::Debug for Buffers<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Buffers")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Dropout, DropoutSeed, FeedForward, FeedForwardKind, ModelConfig, Transformer};

    const ROWS: usize = 1024;
    const WIDTH: usize = LEAST_BYTES / size_of::<f32>() / ROWS;

    fn kept(buffers: &Buffers<f32>) -> Vec<usize> {
        buffers.lock().arrays.iter().map(|(_, array)| array.len()).collect()
    }

    #[test]
    fn an_array_that_was_given_is_taken_by_its_length() {
        let buffers = Buffers::default();
        let mut array: Array2<f32> = buffers.take((ROWS, WIDTH));
        array[[1, 2]] = 7.0;
        buffers.give(array);
        assert_eq!(buffers.take((ROWS, WIDTH + 1))[[1, 2]], 0.0);
        assert_eq!(buffers.take((WIDTH, ROWS))[[0, WIDTH + 2]], 7.0);
        assert!(kept(&buffers).is_empty());
        // Of heads, in the order of memory; and one too small to keep.
        let heads = buffers.take_heads((2, 4, ROWS / 8), WIDTH);
        assert_eq!((heads.dim(), heads.strides()[1]), ((2, 4, ROWS / 8, WIDTH), WIDTH as isize));
        buffers.give(heads);
        buffers.give(buffers.take((ROWS, WIDTH - 1)));
        assert_eq!(kept(&buffers), [ROWS * WIDTH]);
    }

    /// Every kind of layer gives back what it takes and nothing else: passes like the ones before take nothing new.
    #[test]
    fn passes_alike_take_the_same_arrays() {
        let gated = ModelConfig {
            vocab_size: 4,
            d_model: 64,
            d_k: 8,
            n_codes: 8,
            d_v: 64,
            n_layers: 2,
            ..ModelConfig::default()
        };
        let swiglu = Some(FeedForward { kind: FeedForwardKind::SwiGlu, width: 128 });
        let gelu = Some(FeedForward { kind: FeedForwardKind::Gelu, width: 64 });
        let dropout = Dropout { residual: 0.5, ..Dropout::default() };
        let configs = [
            ModelConfig { final_norm: false, ..gated.clone() },
            ModelConfig { recompute: true, dropout, feed_forward: swiglu, ..gated.clone() },
            ModelConfig { gate: false, n_heads: 2, n_key_heads: Some(1), feed_forward: gelu, ..gated },
        ];
        for config in configs {
            let model = Transformer::new(config, 1).unwrap();
            let tokens = Array2::from_shape_fn((2, 4096), |(b, t)| (b as u32 + t as u32 / 3) % 4);
            let mut kept = vec![];
            for i in 0..6 {
                let mut state = model.new_state(2).unwrap();
                let dropout = Some(DropoutSeed { seed: 1, step: i, sequence: 0, first: 0 });
                let (logits, _, saved) =
                    model.forward_dropping(tokens.view(), None, &mut state, dropout).unwrap();
                model.backward(saved, logits, &mut model.zero_gradients()).unwrap();
                kept.push(model.buffers.places());
            }
            assert!(kept[0].len() > 4);
            assert_eq!(kept[1], kept[5]);
            // A forward pass alone, and a piece to infer, leave what they find.
            drop(model.forward(tokens.view(), None, &mut model.new_state(2).unwrap()).unwrap());
            model.push(tokens.view(), &mut model.new_state(2).unwrap()).unwrap();
            assert_eq!(kept[5], model.buffers.places());
        }
    }

    #[test]
    fn what_no_pass_uses_is_freed() {
        let buffers = Buffers::<f32>::default();
        let (a, b) = (buffers.take((ROWS, WIDTH)), buffers.take((ROWS, 2 * WIDTH)));
        buffers.give(a);
        buffers.give(b);
        for _ in 0..2 * PASSES {
            buffers.begin_pass();
            buffers.give(buffers.take((ROWS, WIDTH)));
        }
        assert_eq!(kept(&buffers), [ROWS * WIDTH]);
    }
}
