//! AdamW: steps along the mean gradient over its root mean square, with decay apart from both.
//!
//! For step t = 1, 2, ... with the gradient g, clipped:
//!
//! ```text
//! (1)  m <- b1 m + (1 - b1) g
//!      v <- b2 v + (1 - b2) g g
//! (2)  m^ = m / (1 - b1^t)       v^ = v / (1 - b2^t)
//! (3)  p <- p - lr factor m^ / (sqrt(v^) + eps) - wd p
//! ```
//!
//! One pass over memory per parameter: reads p, g, m, v, writes p, m, v.
//!
//! Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (arXiv 1711.05101), with the clipping and the
//! constants of Transformer-VQ (Lingle, arXiv 2309.16354).

use ndarray::{ArrayViewD, ArrayViewMutD, Zip};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{CHUNK, Moment, Pace, check, common, normal, unit};
use crate::ops::simd::on_best_simd;
use crate::{Error, Scalar};

/// The constants of AdamW.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdamW {
    /// Step size at a factor of 1.
    pub learning_rate: f64,
    /// What the mean of the gradient keeps per step, in [0, 1).
    pub beta1: f64,
    /// What the mean of the squared gradient keeps per step, in [0, 1).
    pub beta2: f64,
    /// Added to the root mean square.
    pub epsilon: f64,
    /// The part of a matrix that one step takes away, in [0, 1).
    pub weight_decay: f64,
    /// The largest norm of all gradients together; longer ones are scaled down to it.
    pub clip: Option<f64>,
}

impl Default for AdamW {
    /// The published recipe for byte-level text, with a learning rate of 1e-3 (published: 4e-4, for 190 million
    /// parameters).
    fn default() -> Self {
        AdamW {
            learning_rate: 1e-3,
            beta1: 0.9,
            beta2: 0.98,
            epsilon: 1e-9,
            weight_decay: 2e-4,
            clip: Some(0.1),
        }
    }
}

impl AdamW {
    /// Checks the fields.
    ///
    /// # Errors
    /// [`Error::Invalid`] names the first field that cannot be.
    pub fn validate(&self) -> Result<(), Error> {
        let [learning_rate, weight_decay, clip] = common(self.learning_rate, self.weight_decay, self.clip);
        let (beta1, beta2) = (unit("beta1", self.beta1), unit("beta2", self.beta2));
        check([learning_rate, beta1, beta2, normal("epsilon", self.epsilon), weight_decay, clip])
    }

    pub(super) fn moments(shape: &[usize]) -> Vec<Moment> {
        let moment = |name, squares| Moment { name, shape: shape.to_vec(), squares };
        vec![moment("m", false), moment("v", true)]
    }

    /// Moves one parameter and its two moments, all of one shape.
    pub(super) fn update<T: Scalar>(
        &self,
        t: u64,
        pace: &Pace,
        mut parameter: ArrayViewMutD<'_, T>,
        gradient: ArrayViewD<'_, T>,
        mut m: ArrayViewMutD<'_, T>,
        mut v: ArrayViewMutD<'_, T>,
    ) {
        let step = Step::new(self, t, pace);
        let slices = (parameter.as_slice_mut(), gradient.as_slice(), m.as_slice_mut(), v.as_slice_mut());
        if let (Some(p), Some(g), Some(m), Some(v)) = slices {
            p.par_chunks_mut(CHUNK)
                .zip(g.par_chunks(CHUNK))
                .zip(m.par_chunks_mut(CHUNK).zip(v.par_chunks_mut(CHUNK)))
                .for_each(|((p, g), (m, v))| on_best_simd!(update_slices(step, p, g, m, v)));
        } else {
            Zip::from(&mut parameter)
                .and(&gradient)
                .and(&mut m)
                .and(&mut v)
                .for_each(|p, &g, m, v| step.update_one(p, g, m, v));
        }
    }
}

/// One step's numbers, rounded to the type of the parameters.
#[derive(Debug, Clone, Copy)]
struct Step<T> {
    gradient_scale: T,
    beta1: T,
    beta2: T,
    rest1: T,
    rest2: T,
    unbias1: T,
    unbias2: T,
    epsilon: T,
    rate: T,
    decay: T,
}

impl<T: Scalar> Step<T> {
    fn new(adamw: &AdamW, t: u64, pace: &Pace) -> Self {
        let unbias = |beta: f64| T::from_f64(1.0 / (1.0 - beta.powf(t as f64)));
        Step {
            gradient_scale: T::from_f64(pace.gradient_scale),
            beta1: T::from_f64(adamw.beta1),
            beta2: T::from_f64(adamw.beta2),
            rest1: T::from_f64(1.0 - adamw.beta1),
            rest2: T::from_f64(1.0 - adamw.beta2),
            unbias1: unbias(adamw.beta1),
            unbias2: unbias(adamw.beta2),
            epsilon: T::from_f64(adamw.epsilon),
            rate: T::from_f64(adamw.learning_rate * pace.factor),
            decay: T::from_f64(pace.decay),
        }
    }

    #[inline(always)]
    fn update_one(&self, p: &mut T, g: T, m: &mut T, v: &mut T) {
        let g = g * self.gradient_scale;
        *m = self.beta1 * *m + self.rest1 * g; // (1)
        *v = self.beta2 * *v + self.rest2 * (g * g);
        let m_hat = *m * self.unbias1; // (2)
        let v_hat = *v * self.unbias2;
        *p = *p - (self.rate * m_hat / (v_hat.sqrt() + self.epsilon) + self.decay * *p); // (3)
    }
}

#[inline(always)]
fn update_slices<T: Scalar>(step: Step<T>, p: &mut [T], g: &[T], m: &mut [T], v: &mut [T]) {
    for (((p, &g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
        step.update_one(p, g, m, v);
    }
}
