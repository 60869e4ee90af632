//! Lion: steps of one size along the sign of a mean gradient.
//!
//! With the gradient g, clipped:
//!
//! ```text
//! (1)  c = b1 m + (1 - b1) g
//! (2)  p <- p - lr factor sign(c) - wd p               sign(0) = 0
//! (3)  m <- b2 m + (1 - b2) g
//! ```
//!
//! Every number moves by lr, whatever its gradient: the learning rate is a third to a tenth of AdamW's. One pass over memory
//! per parameter: reads p, g, m, writes p, m; half of AdamW's moments.
//!
//! Source: Chen et al., "Symbolic Discovery of Optimization Algorithms" (arXiv 2302.06675), whose decay is scaled by lr.

use ndarray::{ArrayViewD, ArrayViewMutD, Zip};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{CHUNK, Moment, Pace, check, common, unit};
use crate::ops::simd::on_best_simd;
use crate::{Error, Scalar};

/// The constants of Lion.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lion {
    /// By how much every number moves at a factor of 1.
    pub learning_rate: f64,
    /// The part of the mean in the direction of a step, in [0, 1).
    pub beta1: f64,
    /// What the mean of the gradient keeps per step, in [0, 1).
    pub beta2: f64,
    /// The part of a matrix that one step takes away, in [0, 1).
    pub weight_decay: f64,
    /// The largest norm of all gradients together; longer ones are scaled down to it.
    pub clip: Option<f64>,
}

impl Default for Lion {
    /// The paper's constants, with a learning rate of a fifth of [`AdamW`](super::AdamW)'s.
    fn default() -> Self {
        Lion { learning_rate: 2e-4, beta1: 0.9, beta2: 0.99, weight_decay: 2e-4, clip: None }
    }
}

impl Lion {
    /// Checks the fields.
    ///
    /// # Errors
    /// [`Error::Invalid`] names the first field that cannot be.
    pub fn validate(&self) -> Result<(), Error> {
        let [learning_rate, weight_decay, clip] = common(self.learning_rate, self.weight_decay, self.clip);
        check([learning_rate, unit("beta1", self.beta1), unit("beta2", self.beta2), weight_decay, clip])
    }

    pub(super) fn moments(shape: &[usize]) -> Vec<Moment> {
        vec![Moment { name: "m", shape: shape.to_vec(), squares: false }]
    }

    /// Moves one parameter and its moment, both of one shape.
    pub(super) fn update<T: Scalar>(
        &self,
        pace: &Pace,
        mut parameter: ArrayViewMutD<'_, T>,
        gradient: ArrayViewD<'_, T>,
        mut m: ArrayViewMutD<'_, T>,
    ) {
        let step = Step::new(self, pace);
        let slices = (parameter.as_slice_mut(), gradient.as_slice(), m.as_slice_mut());
        if let (Some(p), Some(g), Some(m)) = slices {
            p.par_chunks_mut(CHUNK)
                .zip(g.par_chunks(CHUNK))
                .zip(m.par_chunks_mut(CHUNK))
                .for_each(|((p, g), m)| on_best_simd!(update_slices(step, p, g, m)));
        } else {
            Zip::from(&mut parameter)
                .and(&gradient)
                .and(&mut m)
                .for_each(|p, &g, m| step.update_one(p, g, m));
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
    rate: T,
    decay: T,
}

impl<T: Scalar> Step<T> {
    fn new(lion: &Lion, pace: &Pace) -> Self {
        Step {
            gradient_scale: T::from_f64(pace.gradient_scale),
            beta1: T::from_f64(lion.beta1),
            beta2: T::from_f64(lion.beta2),
            rest1: T::from_f64(1.0 - lion.beta1),
            rest2: T::from_f64(1.0 - lion.beta2),
            rate: T::from_f64(lion.learning_rate * pace.factor),
            decay: T::from_f64(pace.decay),
        }
    }

    #[inline(always)]
    fn update_one(&self, p: &mut T, g: T, m: &mut T) {
        let g = g * self.gradient_scale;
        let c = self.beta1 * *m + self.rest1 * g; // (1)
        let along = if c > T::zero() { self.rate } else { -self.rate }; // (2)
        let along = if c == T::zero() { T::zero() } else { along };
        *p = *p - (along + self.decay * *p);
        *m = self.beta2 * *m + self.rest2 * g; // (3)
    }
}

#[inline(always)]
fn update_slices<T: Scalar>(step: Step<T>, p: &mut [T], g: &[T], m: &mut [T]) {
    for ((p, &g), m) in p.iter_mut().zip(g).zip(m) {
        step.update_one(p, g, m);
    }
}
