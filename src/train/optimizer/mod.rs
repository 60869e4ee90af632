//! Optimizers: how a parameter moves, given its gradient. One choice of three, with its constants.
//!
//! | | direction u | kept per matrix [n, m] | source |
//! |---|---|---|---|
//! | [`AdamW`] | mean gradient over its root mean square | 2 n m numbers | Loshchilov and Hutter, arXiv 1711.05101 |
//! | [`Lion`] | sign of a mean gradient | n m | Chen et al., arXiv 2302.06675 |
//! | [`Adafactor`] | gradient over a factored root mean square | n + m | Shazeer and Stern, arXiv 1804.04235 |
//!
//! What they have in common, with G the gradient of everything that is trained and `factor` from the schedule:
//!
//! ```text
//! (1)  g <- g min(1, clip / |G|)                     |G| over all gradients together
//! (2)  p <- p - lr factor u - wd p
//! ```
//!
//! The decay `wd p` reads the old p and is scaled by neither `lr` nor `factor`; it is for embedding and projection matrices
//! only. (The papers of Lion and AdamW scale it by both: their lambda is `wd / lr`.)

mod adafactor;
mod adamw;
mod groups;
mod lion;
mod norm;
#[cfg(test)]
mod tests;

pub use adafactor::Adafactor;
pub use adamw::AdamW;
pub use groups::ParameterGroup;
pub(super) use groups::assign;
pub use lion::Lion;
use ndarray::{ArrayD, ArrayViewD, ArrayViewMutD};
pub(super) use norm::sum_of_squares;
use serde::{Deserialize, Serialize};

use crate::{Error, Scalar};

/// Elements that one task works on: enough to hide the cost of a task, few enough to share one matrix.
const CHUNK: usize = 16_384;

/// An optimizer with its constants.
///
/// ```
/// use transformer_vq::train::{Lion, Optimizer};
///
/// let optimizer: Optimizer = Lion { learning_rate: 3e-4, ..Lion::default() }.into();
/// optimizer.validate()?;
/// assert_eq!(optimizer.learning_rate(), 3e-4);
/// # Ok::<(), transformer_vq::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Optimizer {
    /// The mean gradient over its root mean square.
    #[serde(rename = "adamw")]
    AdamW(AdamW),
    /// The sign of a mean gradient.
    Lion(Lion),
    /// The gradient over a root mean square that is kept as a row and a column.
    Adafactor(Adafactor),
}

impl Default for Optimizer {
    /// AdamW, as published.
    fn default() -> Self {
        AdamW::default().into()
    }
}

impl From<AdamW> for Optimizer {
    fn from(adamw: AdamW) -> Self {
        Optimizer::AdamW(adamw)
    }
}

impl From<Lion> for Optimizer {
    fn from(lion: Lion) -> Self {
        Optimizer::Lion(lion)
    }
}

impl From<Adafactor> for Optimizer {
    fn from(adafactor: Adafactor) -> Self {
        Optimizer::Adafactor(adafactor)
    }
}

impl Optimizer {
    /// Checks the constants.
    ///
    /// # Errors
    /// [`Error::Invalid`] names the first one that cannot be.
    pub fn validate(&self) -> Result<(), Error> {
        match self {
            Optimizer::AdamW(adamw) => adamw.validate(),
            Optimizer::Lion(lion) => lion.validate(),
            Optimizer::Adafactor(adafactor) => adafactor.validate(),
        }
    }

    /// The step size at a factor of 1 of the schedule.
    pub fn learning_rate(&self) -> f64 {
        match self {
            Optimizer::AdamW(adamw) => adamw.learning_rate,
            Optimizer::Lion(lion) => lion.learning_rate,
            Optimizer::Adafactor(adafactor) => adafactor.learning_rate,
        }
    }

    /// The part of an embedding or projection matrix that a step takes away: `p <- p - lr factor u - wd p`.
    pub fn weight_decay(&self) -> f64 {
        match self {
            Optimizer::AdamW(adamw) => adamw.weight_decay,
            Optimizer::Lion(lion) => lion.weight_decay,
            Optimizer::Adafactor(adafactor) => adafactor.weight_decay,
        }
    }

    /// The largest norm of all gradients together, if there is one.
    pub fn clip(&self) -> Option<f64> {
        match self {
            Optimizer::AdamW(adamw) => adamw.clip,
            Optimizer::Lion(lion) => lion.clip,
            Optimizer::Adafactor(adafactor) => adafactor.clip,
        }
    }

    /// As it is called in files.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Optimizer::AdamW(_) => "adamw",
            Optimizer::Lion(_) => "lion",
            Optimizer::Adafactor(_) => "adafactor",
        }
    }

    /// (1): what gradients with this norm, which must be finite, are multiplied by.
    pub(super) fn gradient_scale(&self, norm: f64) -> f64 {
        debug_assert!(norm.is_finite(), "a step along infinity");
        match self.clip() {
            Some(clip) if norm > clip => clip / norm,
            _ => 1.0,
        }
    }

    /// The moments of a parameter of this shape: their names, their shapes, and whether none of their numbers is negative.
    pub(super) fn moments(&self, shape: &[usize]) -> Vec<Moment> {
        match self {
            Optimizer::AdamW(_) => AdamW::moments(shape),
            Optimizer::Lion(_) => Lion::moments(shape),
            Optimizer::Adafactor(_) => Adafactor::moments(shape),
        }
    }

    /// (2): moves one parameter and its moments, which are as [`moments`](Self::moments) says, by step `t`, counted from 1.
    pub(super) fn update<T: Scalar>(
        &self,
        t: u64,
        pace: &Pace,
        parameter: ArrayViewMutD<'_, T>,
        gradient: ArrayViewD<'_, T>,
        moments: &mut [ArrayD<T>],
    ) {
        debug_assert!(t > 0, "steps are counted from 1");
        match (self, moments) {
            (Optimizer::AdamW(adamw), [m, v]) => {
                adamw.update(t, pace, parameter, gradient, m.view_mut(), v.view_mut());
            }
            (Optimizer::Lion(lion), [m]) => lion.update(pace, parameter, gradient, m.view_mut()),
            (Optimizer::Adafactor(adafactor), moments) => {
                adafactor.update(t, pace, parameter, gradient, moments);
            }
            _ => unreachable!("as many moments as the optimizer has"),
        }
    }
}

/// One array that an optimizer keeps of a parameter, at first all zero.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Moment {
    pub name: &'static str,
    pub shape: Vec<usize>,
    /// Whether it is a mean of squares.
    pub squares: bool,
}

/// What a step takes from outside for one parameter.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pace {
    /// On the learning rate.
    pub factor: f64,
    /// (1)
    pub gradient_scale: f64,
    /// wd of (2) for this parameter.
    pub decay: f64,
}

/// A constant: its name, its value, whether it can be, and what it must be.
type Check = (&'static str, f64, bool, &'static str);

/// The error of the first constant that cannot be or is not finite.
fn check(checks: impl IntoIterator<Item = Check>) -> Result<(), Error> {
    match checks.into_iter().find(|&(_, got, holds, _)| !(holds && got.is_finite())) {
        Some((what, got, _, expected)) => Err(Error::invalid(what, expected, got)),
        None => Ok(()),
    }
}

/// The checks of the constants that all have.
fn common(learning_rate: f64, weight_decay: f64, clip: Option<f64>) -> [Check; 3] {
    [
        ("learning_rate", learning_rate, learning_rate >= 0.0, "finite and not negative"),
        unit("weight_decay", weight_decay),
        ("clip", clip.unwrap_or(1.0), clip.is_none_or(|x| x > 0.0), "finite and above 0"),
    ]
}

fn unit(what: &'static str, x: f64) -> Check {
    (what, x, (0.0..1.0).contains(&x), "in [0, 1)")
}

/// Something that keeps a division from 0 / 0: it must not be 0 in `f32` either.
fn normal(what: &'static str, x: f64) -> Check {
    (what, x, x.is_finite() && x >= f64::from(f32::MIN_POSITIVE), "finite and at least 1.2e-38")
}
