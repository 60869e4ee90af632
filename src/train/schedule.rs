//! The factor on the learning rate: up along a line, then down along one of four curves.
//!
//! With p in [0, 1] the part of the run that is over, w the part that is warm-up, alpha the least factor after it, and
//! x = (p - w) / (1 - w) what is over of the rest:
//!
//! ```text
//! (1)  p < w                                p / w
//! (2)  afterwards: cosine                   alpha + (1 - alpha) (1 + cos(pi x)) / 2
//! (3)              linear                   alpha + (1 - alpha) (1 - x)
//! (4)              inverse square root      max(alpha, sqrt(w / p))
//! (5)              constant                 1
//! ```
//!
//! From p = 1 on, the factor is that of p = 1. The clock is whatever gives p: step n of N is p = n / N, a run that is stopped by
//! the wall clock takes elapsed over allowed seconds. In steps, with w = W / N, (1) is n / W, so the first step is 0, (2) and (3)
//! have (n - W) / (N - W), and (4) is sqrt(W / n), which does not depend on N.
//!
//! Sources: (2) is the recipe of Transformer-VQ (Lingle, arXiv 2309.16354), (4) that of the Transformer (Vaswani et al., arXiv
//! 1706.03762), as a factor.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

use crate::Error;

/// Linear warm-up, then a cosine or another curve down to a floor.
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
    /// The least factor after the warm-up, in [0, 1]: that of the end of the run, of a curve that ends there.
    pub alpha: f64,
    /// The curve after the warm-up.
    #[serde(default)]
    pub decay: Decay,
}

/// How the factor falls after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decay {
    /// Half a cosine: `alpha + (1 - alpha) (1 + cos(pi x)) / 2`, x the part of the time after the warm-up that is over.
    #[default]
    Cosine,
    /// A line: `alpha + (1 - alpha) (1 - x)`.
    Linear,
    /// As one over the square root of the step n, whatever the length of the run: `max(alpha, sqrt(W / n))` after W steps of
    /// warm-up. Needs a warm-up.
    InverseSquareRoot,
    /// Not at all.
    Constant,
}

impl Default for Schedule {
    /// The published recipe: 10,000 of 125,000 steps of warm-up, down to a tenth.
    fn default() -> Self {
        Schedule { warmup: 0.08, alpha: 0.1, decay: Decay::Cosine }
    }
}

impl Schedule {
    /// A cosine of these two numbers, checked.
    ///
    /// # Errors
    /// [`Error::Invalid`] if one of them is not in [0, 1].
    pub fn new(warmup: f64, alpha: f64) -> Result<Self, Error> {
        let schedule = Schedule { warmup, alpha, decay: Decay::Cosine };
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
    /// [`Error::Invalid`] if a number is not in [0, 1], or an inverse square root has no warm-up to start from.
    pub fn validate(&self) -> Result<(), Error> {
        for (what, value) in [("warmup", self.warmup), ("alpha", self.alpha)] {
            if !(0.0..=1.0).contains(&value) {
                return Err(Error::invalid(what, "in [0, 1]", value));
            }
        }
        if self.decay == Decay::InverseSquareRoot && self.warmup == 0.0 {
            return Err(Error::invalid("warmup", "above 0, for an inverse square root", 0));
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
        let &Schedule { warmup, alpha, decay } = self;
        let progress = if progress < 0.0 { 0.0 } else { progress };
        if progress < warmup {
            return progress / warmup; // (1)
        }
        let before_end = progress < 1.0;
        let rest = if before_end { (progress - warmup) / (1.0 - warmup) } else { 1.0 };
        match decay {
            Decay::Cosine if before_end => alpha + (1.0 - alpha) * (1.0 + (PI * rest).cos()) / 2.0, // (2)
            Decay::Linear if before_end => alpha + (1.0 - alpha) * (1.0 - rest),                    // (3)
            Decay::Cosine | Decay::Linear => alpha,
            Decay::InverseSquareRoot if before_end => alpha.max((warmup / progress).sqrt()), // (4)
            Decay::InverseSquareRoot => alpha.max(warmup.sqrt()),
            Decay::Constant => 1.0, // (5)
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
    fn every_curve_follows_its_formula() {
        for (warmup, steps) in [(1, 2), (3, 7), (10, 40), (6, 7), (999, 125_000)] {
            for alpha in [0.0, 0.1, 0.5, 1.0] {
                let with = |decay| Schedule { warmup: warmup as f64 / steps as f64, alpha, decay };
                for n in (0..steps).step_by(1 + steps as usize / 1000) {
                    let factor = |decay| with(decay).factor_at_step(n, steps);
                    let (n, w) = (n as f64, warmup as f64);
                    let part = (n - w) / (steps as f64 - w);
                    let expected = if n < w {
                        [n / w; 3]
                    } else {
                        [1.0 - part + alpha * part, (w.sqrt() / n.sqrt()).max(alpha), 1.0]
                    };
                    let got = [Decay::Linear, Decay::InverseSquareRoot, Decay::Constant].map(factor);
                    for (got, expected) in got.into_iter().zip(expected) {
                        assert!((got - expected).abs() < 1e-12, "{n} of {steps}: {got}, not {expected}");
                    }
                }
                let root = (warmup as f64 / steps as f64).sqrt().max(alpha);
                let ends = [(Decay::Linear, alpha), (Decay::InverseSquareRoot, root), (Decay::Constant, 1.0)];
                for (decay, end) in ends {
                    for progress in [1.0, 1.5, f64::INFINITY, f64::NAN] {
                        assert!((with(decay).factor_at_progress(progress) - end).abs() < 1e-15, "{decay:?}");
                    }
                }
            }
        }
        let rootless = Schedule { warmup: 0.0, alpha: 0.1, decay: Decay::InverseSquareRoot };
        assert!(matches!(rootless.validate(), Err(Error::Invalid { what: "warmup", .. })));
        // What was written before there was a choice.
        let old: Schedule = serde_json::from_str(r#"{"warmup": 0.25, "alpha": 0.5}"#).unwrap();
        assert_eq!(old, Schedule::new(0.25, 0.5).unwrap());
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
