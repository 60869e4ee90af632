//! AdamW: steps along the mean gradient over its root mean square, with decay apart from both.
//!
//! For step t = 1, 2, ... with the gradient G of everything that is trained and `factor` from the schedule:
//!
//! ```text
//! (1)  g <- g min(1, clip / |G|)                     |G| over all gradients together
//! (2)  m <- b1 m + (1 - b1) g
//!      v <- b2 v + (1 - b2) g g
//! (3)  m^ = m / (1 - b1^t)       v^ = v / (1 - b2^t)
//! (4)  p <- p - lr factor m^ / (sqrt(v^) + eps) - wd p
//! ```
//!
//! The decay `wd p` reads the old p and is scaled by neither `lr` nor `factor`; it is for embedding and projection
//! matrices only. One pass over memory per parameter: reads p, g, m, v, writes p, m, v.
//!
//! Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (arXiv 1711.05101), with the clipping and the
//! constants of Transformer-VQ (Lingle, arXiv 2309.16354).

use ndarray::{ArrayViewD, ArrayViewMutD, Zip};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::ops::simd::on_best_simd;
use crate::{Error, Scalar};

/// Elements that one task works on: enough to hide the cost of a task, few enough to share one matrix.
const CHUNK: usize = 16_384;

/// The optimizer's constants.
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
        let unit = |x: f64| (0.0..1.0).contains(&x);
        // An epsilon that is 0 in f32 would make 0 / 0 of a gradient of 0.
        let normal = |x: f64| x.is_finite() && x >= f64::from(f32::MIN_POSITIVE);
        let checks = [
            ("learning_rate", self.learning_rate, self.learning_rate >= 0.0, "finite and not negative"),
            ("beta1", self.beta1, unit(self.beta1), "in [0, 1)"),
            ("beta2", self.beta2, unit(self.beta2), "in [0, 1)"),
            ("epsilon", self.epsilon, normal(self.epsilon), "finite and at least 1.2e-38"),
            ("weight_decay", self.weight_decay, unit(self.weight_decay), "in [0, 1)"),
            ("clip", self.clip.unwrap_or(1.0), self.clip.is_none_or(|x| x > 0.0), "finite and above 0"),
        ];
        match checks.into_iter().find(|&(_, got, holds, _)| !(holds && got.is_finite())) {
            Some((what, got, _, expected)) => Err(Error::invalid(what, expected, got)),
            None => Ok(()),
        }
    }

    /// (1): what gradients with this norm, which must be finite, are multiplied by.
    pub(crate) fn gradient_scale(&self, norm: f64) -> f64 {
        debug_assert!(norm.is_finite(), "a step along infinity");
        match self.clip {
            Some(clip) if norm > clip => clip / norm,
            _ => 1.0,
        }
    }

    /// The numbers that step `t` (counted from 1) applies to every parameter.
    pub(crate) fn step<T: Scalar>(&self, t: u64, factor: f64, gradient_scale: f64) -> Step<T> {
        debug_assert!(t > 0, "steps are counted from 1");
        let unbias = |beta: f64| T::from_f64(1.0 / (1.0 - beta.powf(t as f64)));
        Step {
            gradient_scale: T::from_f64(gradient_scale),
            beta1: T::from_f64(self.beta1),
            beta2: T::from_f64(self.beta2),
            rest1: T::from_f64(1.0 - self.beta1),
            rest2: T::from_f64(1.0 - self.beta2),
            unbias1: unbias(self.beta1),
            unbias2: unbias(self.beta2),
            epsilon: T::from_f64(self.epsilon),
            rate: T::from_f64(self.learning_rate * factor),
            decay: T::from_f64(self.weight_decay),
        }
    }
}

/// One step's numbers, rounded to the type of the parameters.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Step<T> {
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
    /// Moves one parameter and its two moments, all of one shape; `decay` says whether the parameter decays.
    pub(crate) fn update(
        mut self,
        decay: bool,
        mut parameter: ArrayViewMutD<'_, T>,
        gradient: ArrayViewD<'_, T>,
        mut m: ArrayViewMutD<'_, T>,
        mut v: ArrayViewMutD<'_, T>,
    ) {
        if !decay {
            self.decay = T::zero();
        }
        let slices = (parameter.as_slice_mut(), gradient.as_slice(), m.as_slice_mut(), v.as_slice_mut());
        if let (Some(p), Some(g), Some(m), Some(v)) = slices {
            p.par_chunks_mut(CHUNK)
                .zip(g.par_chunks(CHUNK))
                .zip(m.par_chunks_mut(CHUNK).zip(v.par_chunks_mut(CHUNK)))
                .for_each(|((p, g), (m, v))| on_best_simd!(update_slices(self, p, g, m, v)));
        } else {
            Zip::from(&mut parameter)
                .and(&gradient)
                .and(&mut m)
                .and(&mut v)
                .for_each(|p, &g, m, v| self.update_one(p, g, m, v));
        }
    }

    #[inline(always)]
    fn update_one(&self, p: &mut T, g: T, m: &mut T, v: &mut T) {
        let g = g * self.gradient_scale; // (1)
        *m = self.beta1 * *m + self.rest1 * g; // (2)
        *v = self.beta2 * *v + self.rest2 * (g * g);
        let m_hat = *m * self.unbias1; // (3)
        let v_hat = *v * self.unbias2;
        *p = *p - (self.rate * m_hat / (v_hat.sqrt() + self.epsilon) + self.decay * *p); // (4)
    }
}

#[inline(always)]
fn update_slices<T: Scalar>(step: Step<T>, p: &mut [T], g: &[T], m: &mut [T], v: &mut [T]) {
    for (((p, &g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
        step.update_one(p, g, m, v);
    }
}

/// The sum of the squares of one parameter's gradient. The square root of the sum over all parameters is the norm that
/// [`AdamW::gradient_scale`] wants.
///
/// Summed in `f64` and in an order that the number of elements alone decides.
pub(crate) fn sum_of_squares<T: Scalar>(gradient: ArrayViewD<'_, T>) -> f64 {
    let gradient = gradient.as_standard_layout();
    let gradient = gradient.as_slice().expect("standard layout");
    let parts: Vec<f64> =
        gradient.par_chunks(CHUNK).map(|chunk| on_best_simd!(sum_of_squares_of_slice(chunk))).collect();
    parts.iter().sum()
}

#[inline(always)]
fn sum_of_squares_of_slice<T: Scalar>(x: &[T]) -> f64 {
    // Independent sums, so that the additions need not wait for each other and fill a register.
    const LANES: usize = 16;
    let mut sums = [0.0; LANES];
    let (blocks, rest) = x.as_chunks::<LANES>();
    for block in blocks {
        for (sum, &x) in sums.iter_mut().zip(block) {
            *sum += x.as_f64() * x.as_f64();
        }
    }
    for (sum, &x) in sums.iter_mut().zip(rest) {
        *sum += x.as_f64() * x.as_f64();
    }
    sums.iter().sum()
}

#[cfg(test)]
mod tests {
    use ndarray::{ArrayD, Axis};

    use super::*;

    /// Parameters of all ranks, empty ones, and one longer than a task's share.
    fn shapes() -> Vec<Vec<usize>> {
        vec![vec![], vec![0], vec![1], vec![3, 5], vec![2, 0, 4], vec![2, 3, 7], vec![CHUNK + 13]]
    }

    /// A number in (-1, 1) that differs from parameter to parameter, element to element and step to step.
    fn number(parameter: usize, element: usize, step: u64) -> f64 {
        (1.0 + parameter as f64 * 1.7 + element as f64 * 0.37 + step as f64 * 2.3).sin()
    }

    fn filled<T: Scalar>(f: impl Fn(usize, usize) -> f64) -> Vec<ArrayD<T>> {
        let fill = |(k, shape): (usize, Vec<usize>)| {
            let len = shape.iter().product();
            let values = (0..len).map(|i| T::from_f64(f(k, i))).collect();
            ArrayD::from_shape_vec(shape, values).unwrap()
        };
        shapes().into_iter().enumerate().map(fill).collect()
    }

    /// Fifty steps with gradients that grow, so that a clipping norm in between is first off and then on.
    fn gradient(parameter: usize, element: usize, step: u64) -> f64 {
        number(parameter, element, step) * 0.001 * (step + 1) as f64
    }

    const STEPS: u64 = 50;

    fn run<T: Scalar>(adamw: &AdamW, layout: impl Fn(ArrayD<T>) -> ArrayD<T>) -> Vec<ArrayD<T>> {
        let start = |f: fn(usize, usize) -> f64| filled(f).into_iter().map(&layout).collect::<Vec<_>>();
        let mut parameters = start(|k, i| number(k, i, 99));
        let (mut m, mut v) = (start(|_, _| 0.0), start(|_, _| 0.0));
        for step in 0..STEPS {
            let gradients = filled::<T>(|k, i| gradient(k, i, step));
            let norm = gradients.iter().map(|g| sum_of_squares(g.view())).sum::<f64>().sqrt();
            let step = adamw.step(step + 1, factor(step), adamw.gradient_scale(norm));
            for (k, p) in parameters.iter_mut().enumerate() {
                step.update(k % 2 == 1, p.view_mut(), gradients[k].view(), m[k].view_mut(), v[k].view_mut());
            }
        }
        parameters
    }

    fn factor(step: u64) -> f64 {
        (step as f64 / 10.0).min(1.0)
    }

    /// The definition, one number at a time, with the corrections as divisions and the decay as its own subtraction.
    fn slow(adamw: &AdamW) -> Vec<Vec<f64>> {
        let sizes: Vec<usize> = shapes().iter().map(|shape| shape.iter().product()).collect();
        let mut norms = vec![0.0; STEPS as usize];
        for (step, norm) in norms.iter_mut().enumerate() {
            for (k, &n) in sizes.iter().enumerate() {
                for i in 0..n {
                    *norm += gradient(k, i, step as u64).powi(2);
                }
            }
            *norm = norm.sqrt();
        }
        let clipped = |g: f64, norm: f64| match adamw.clip {
            Some(clip) if norm > clip => g / norm * clip,
            _ => g,
        };
        if let Some(clip) = adamw.clip {
            assert!(norms[0] < clip && norms[STEPS as usize - 1] > clip, "a clip that is off and on");
        }
        let one = |k: usize, i: usize| {
            let (mut p, mut m, mut v) = (number(k, i, 99), 0.0, 0.0);
            for step in 0..STEPS {
                let g = clipped(gradient(k, i, step), norms[step as usize]);
                m = adamw.beta1 * m + (1.0 - adamw.beta1) * g;
                v = adamw.beta2 * v + (1.0 - adamw.beta2) * g * g;
                let m_hat = m / (1.0 - adamw.beta1.powi(step as i32 + 1));
                let v_hat = v / (1.0 - adamw.beta2.powi(step as i32 + 1));
                let old = p;
                p -= adamw.learning_rate * factor(step) * m_hat / (v_hat.sqrt() + adamw.epsilon);
                if k % 2 == 1 {
                    p -= adamw.weight_decay * old;
                }
            }
            p
        };
        sizes.iter().enumerate().map(|(k, &n)| (0..n).map(|i| one(k, i)).collect()).collect()
    }

    fn relative_rms<T: Scalar>(got: &[ArrayD<T>], expected: &[Vec<f64>]) -> f64 {
        let expected = expected.iter().flatten();
        let (mut error, mut size) = (0.0, 0.0);
        for (&got, expected) in got.iter().flatten().zip(expected) {
            error += (got.as_f64() - expected).powi(2);
            size += expected.powi(2);
        }
        (error / size).sqrt()
    }

    #[test]
    fn fifty_steps_equal_the_definition() {
        let base = AdamW { epsilon: 1e-3, weight_decay: 0.01, ..AdamW::default() };
        for clip in [None, Some(2.0)] {
            let adamw = AdamW { clip, ..base };
            let expected = slow(&adamw);
            let error = relative_rms(&run::<f64>(&adamw, |x| x), &expected);
            assert!(error < 1e-14, "f64, clip {clip:?}: {error:e}");
            let error = relative_rms(&run::<f32>(&adamw, |x| x), &expected);
            assert!(error < 1e-6, "f32, clip {clip:?}: {error:e}");
        }
    }

    #[test]
    fn layouts_and_thread_counts_do_not_change_a_bit() {
        let adamw = AdamW { clip: Some(2.0), ..AdamW::default() };
        let plain = run::<f32>(&adamw, |x| x);
        let column_major = |x: ArrayD<f32>| x.t().as_standard_layout().into_owned().reversed_axes();
        assert_eq!(run::<f32>(&adamw, column_major), plain);
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            assert_eq!(pool.install(|| run::<f32>(&adamw, |x| x)), plain, "{threads} threads");
        }
    }

    #[test]
    fn squares_are_summed_in_any_layout_and_length() {
        for n in [0, 1, 15, 16, 17, 1000, CHUNK, CHUNK + 1, 3 * CHUNK + 5] {
            // Integers: every sum is exact.
            let x = ArrayD::from_shape_fn(vec![n, 2], |i| (i[0] % 13) as f32 - (i[1] * 5) as f32);
            let expected: f64 = x.iter().map(|&x| f64::from(x * x)).sum();
            assert_eq!(sum_of_squares(x.view()), expected);
            assert_eq!(sum_of_squares(x.t()), expected);
            let back = x.slice_axis(Axis(0), ndarray::Slice::new(0, None, -1));
            assert_eq!(sum_of_squares(back), expected);
        }
    }

    #[test]
    fn clipping_bounds_the_norm() {
        let adamw = AdamW { clip: Some(0.5), ..AdamW::default() };
        assert_eq!([0.0, 0.5, 1.0, 5.0].map(|norm| adamw.gradient_scale(norm)), [1.0, 1.0, 0.5, 0.1]);
        assert_eq!(AdamW { clip: None, ..adamw }.gradient_scale(1e9), 1.0);
    }

    #[test]
    fn nothing_trained_stays_finite() {
        let adamw = AdamW { epsilon: 2e-38, ..AdamW::default() };
        assert_eq!(adamw.validate(), Ok(()));
        let (mut p, mut m, mut v) = (filled::<f32>(|_, _| 1.0), filled(|_, _| 0.0), filled(|_, _| 0.0));
        let zeros = filled::<f32>(|_, _| 0.0);
        for (k, p) in p.iter_mut().enumerate() {
            let step = adamw.step(u64::MAX, 1.0, adamw.gradient_scale(0.0));
            step.update(false, p.view_mut(), zeros[k].view(), m[k].view_mut(), v[k].view_mut());
        }
        assert_eq!(p, filled::<f32>(|_, _| 1.0));
    }

    #[test]
    fn impossible_constants_are_refused() {
        assert_eq!(AdamW::default().validate(), Ok(()));
        let refused = |change: fn(&mut AdamW, f64), values: &[f64], name: &str| {
            for &value in values {
                let mut adamw = AdamW::default();
                change(&mut adamw, value);
                let error = adamw.validate().unwrap_err();
                assert!(matches!(error, Error::Invalid { what, .. } if what == name), "{name}: {error}");
            }
        };
        let (nan, inf) = (f64::NAN, f64::INFINITY);
        refused(|a, x| a.learning_rate = x, &[-1e-3, nan, inf], "learning_rate");
        refused(|a, x| a.beta1 = x, &[-0.1, 1.0, nan], "beta1");
        refused(|a, x| a.beta2 = x, &[-0.1, 1.0, nan], "beta2");
        refused(|a, x| a.epsilon = x, &[0.0, -1e-9, 1e-40, nan, inf], "epsilon");
        refused(|a, x| a.weight_decay = x, &[-0.1, 1.0, nan], "weight_decay");
        refused(|a, x| a.clip = Some(x), &[0.0, -1.0, nan, inf], "clip");
    }
}
