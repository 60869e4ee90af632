//! The factor on the learning rate: up along a line, then down along half a cosine.
//!
//! With p in [0, 1] the part of the run that is over, w the part that is warm-up, and alpha the last factor:
//!
//! ```text
//! (1)  p < w        p / w
//! (2)  w <= p < 1   alpha + (1 - alpha) (1 + cos(pi (p - w) / (1 - w))) / 2
//! (3)  otherwise    alpha
//! ```
//!
//! The clock is whatever gives p: step n of N is p = n / N, a run that is stopped by the wall clock takes elapsed over
//! allowed seconds. In steps, with w = W / N, (1) is n / W, so the first step is 0, and (2) has (n - W) / (N - W).
//!
//! Source: the recipe of Transformer-VQ (Lingle, arXiv 2309.16354).

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

use crate::Error;

/// Linear warm-up, then a cosine down to a floor.
///
/// ```
/// use transformer_vq::train::Schedule;
///
/// let schedule = Schedule::with_warmup_steps(10, 40)?;
/// assert_eq!(schedule.factor_at_step(0, 40), 0.0);
/// assert_eq!(schedule.factor_at_step(10, 40), 1.0);
/// assert_eq!(schedule.factor_at_progress(1.0), 0.1);
/// # Ok::<(), transformer_vq::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Schedule {
    /// The part of the whole run that is warm-up, in [0, 1].
    pub warmup: f64,
    /// The factor at the end of the run and after it, in [0, 1].
    pub alpha: f64,
}

impl Default for Schedule {
    /// The published recipe: 10,000 of 125,000 steps of warm-up, down to a tenth.
    fn default() -> Self {
        Schedule { warmup: 0.08, alpha: 0.1 }
    }
}

impl Schedule {
    /// A schedule of these two numbers, checked.
    ///
    /// # Errors
    /// [`Error::Invalid`] if one of them is not in [0, 1].
    pub fn new(warmup: f64, alpha: f64) -> Result<Self, Error> {
        let schedule = Schedule { warmup, alpha };
        schedule.validate()?;
        Ok(schedule)
    }

    /// The schedule of a run of `steps` steps, the first `warmup` of which are warm-up; alpha is a tenth.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there are no steps, or fewer than those of the warm-up.
    pub fn with_warmup_steps(warmup: u64, steps: u64) -> Result<Self, Error> {
        if steps == 0 {
            return Err(Error::invalid("steps", "at least 1", steps));
        }
        if warmup > steps {
            return Err(Error::invalid("warmup", format!("at most the {steps} steps of the run"), warmup));
        }
        Schedule::new(warmup as f64 / steps as f64, Schedule::default().alpha)
    }

    /// Checks the fields.
    ///
    /// # Errors
    /// [`Error::Invalid`] if one of them is not in [0, 1].
    pub fn validate(&self) -> Result<(), Error> {
        for (what, value) in [("warmup", self.warmup), ("alpha", self.alpha)] {
            if !(0.0..=1.0).contains(&value) {
                return Err(Error::invalid(what, "in [0, 1]", value));
            }
        }
        Ok(())
    }

    /// The factor for step `step` (counted from 0) of a run of `steps` steps.
    pub fn factor_at_step(&self, step: u64, steps: u64) -> f64 {
        self.factor_at_progress(step as f64 / steps as f64)
    }

    /// The factor when this part of the run is over: 0 at its beginning, 1 at its end. What lies before counts as the
    /// beginning; what lies after, or is not a number, as the end.
    pub fn factor_at_progress(&self, progress: f64) -> f64 {
        let &Schedule { warmup, alpha } = self;
        let progress = if progress < 0.0 { 0.0 } else { progress };
        if progress < warmup {
            progress / warmup // (1)
        } else if progress < 1.0 {
            let angle = PI * (progress - warmup) / (1.0 - warmup);
            alpha + (1.0 - alpha) * (1.0 + angle.cos()) / 2.0 // (2)
        } else {
            alpha // (3)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The recipe as it is written down for steps.
    fn by_steps(n: u64, warmup: u64, steps: u64, alpha: f64) -> f64 {
        if n < warmup {
            return n as f64 / warmup as f64;
        }
        let part = (n - warmup) as f64 / (steps - warmup) as f64;
        alpha + (1.0 - alpha) * (1.0 + (PI * part).cos()) / 2.0
    }

    #[test]
    fn steps_follow_the_recipe() {
        for (warmup, steps) in [(0, 1), (0, 7), (1, 2), (3, 7), (10, 40), (6, 7), (999, 125_000)] {
            let schedule = Schedule::with_warmup_steps(warmup, steps).unwrap();
            for n in 0..steps {
                let (got, expected) = (schedule.factor_at_step(n, steps), by_steps(n, warmup, steps, 0.1));
                assert!((got - expected).abs() < 1e-12, "step {n} of {steps}, warm-up {warmup}: {got}");
                assert_eq!(got, schedule.factor_at_progress(n as f64 / steps as f64));
            }
            assert_eq!(schedule.factor_at_step(warmup, steps), 1.0, "warm-up ends at its last step");
            for n in [steps, steps + 1, u64::MAX] {
                assert_eq!(schedule.factor_at_step(n, steps), 0.1);
            }
        }
        let schedule = Schedule::with_warmup_steps(4, 4).unwrap();
        assert_eq!([0, 1, 3, 4].map(|n| schedule.factor_at_step(n, 4)), [0.0, 0.25, 0.75, 0.1]);
    }

    #[test]
    fn known_points() {
        let schedule = Schedule::new(0.2, 0.5).unwrap();
        let points = [(-1.0, 0.0), (0.0, 0.0), (0.1, 0.5), (0.2, 1.0), (0.6, 0.75), (1.0, 0.5), (9.0, 0.5)];
        for (progress, factor) in points {
            assert!((schedule.factor_at_progress(progress) - factor).abs() < 1e-15, "at {progress}");
        }
        assert_eq!(schedule.factor_at_progress(f64::NAN), 0.5);
        assert_eq!(schedule.factor_at_step(0, 0), 0.5);
        assert_eq!(Schedule::new(0.0, 0.1).unwrap().factor_at_progress(0.0), 1.0);
    }

    #[test]
    fn impossible_schedules_are_refused() {
        for (warmup, alpha) in
            [(-0.1, 0.1), (1.1, 0.1), (f64::NAN, 0.1), (0.1, -0.1), (0.1, 1.1), (0.1, f64::NAN)]
        {
            assert!(matches!(Schedule::new(warmup, alpha), Err(Error::Invalid { .. })), "{warmup} {alpha}");
        }
        assert!(matches!(Schedule::with_warmup_steps(0, 0), Err(Error::Invalid { what: "steps", .. })));
        assert!(matches!(Schedule::with_warmup_steps(5, 4), Err(Error::Invalid { what: "warmup", .. })));
    }
}
