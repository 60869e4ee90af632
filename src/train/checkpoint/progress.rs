//! Where a training loop stands.

use serde::{Deserialize, Serialize};

use crate::Error;
use crate::train::{BatchConfig, Schedule};

/// Where a training loop stands, apart from the trainer itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progress {
    /// Which batches are drawn: sizes and seed.
    pub batches: BatchConfig,
    /// Batches handed out so far ([`Batches::position`](crate::train::Batches::position)).
    pub position: u64,
    /// Seconds of training so far, over all sittings.
    pub seconds: f64,
    /// The factor on the learning rate.
    pub schedule: Schedule,
    /// When the run is over.
    pub budget: Budget,
    /// What the next line of the log will tell of.
    pub recent: RecentLoss,
}

/// The mean loss of the steps since a loop last reported it, in a form that outlives the process.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecentLoss {
    /// Steps since then.
    pub steps: u64,
    /// Sum of their losses, nats per token.
    pub nats: f64,
}

impl RecentLoss {
    /// Adds the loss of one step, nats per token.
    pub fn add(&mut self, loss: f64) {
        self.steps = self.steps.saturating_add(1);
        self.nats += loss;
    }

    /// Nats per token; 0 before the first step.
    pub fn mean(&self) -> f64 {
        self.nats / self.steps.max(1) as f64
    }
}

/// When a run is over; its schedule follows the same clock.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Budget {
    /// After so many steps: the result depends on the seed alone.
    Steps(u64),
    /// After so many seconds of training.
    Seconds(f64),
}

impl Progress {
    /// Checks that a run can go on from here.
    ///
    /// # Errors
    /// [`Error::Invalid`] for seconds or a mean loss that are not finite, an empty budget, and as [`Schedule::validate`].
    pub fn validate(&self) -> Result<(), Error> {
        let positive = |x: f64| x.is_finite() && x > 0.0;
        if !(positive(self.seconds) || self.seconds == 0.0) {
            return Err(Error::invalid("seconds", "finite and not negative", self.seconds));
        }
        match self.budget {
            Budget::Steps(0) => return Err(Error::invalid("budget", "at least one step", 0)),
            Budget::Seconds(seconds) if !positive(seconds) => {
                return Err(Error::invalid("budget", "a positive number of seconds", seconds));
            }
            _ => {}
        }
        if !self.recent.nats.is_finite() {
            return Err(Error::invalid("recent.nats", "finite", self.recent.nats));
        }
        self.schedule.validate()
    }

    /// How much of the run is over, from 0 to 1, after `step` steps.
    pub fn fraction(&self, step: u64) -> f64 {
        let fraction = match self.budget {
            Budget::Steps(steps) => step as f64 / steps.max(1) as f64,
            Budget::Seconds(seconds) => self.seconds / seconds,
        };
        if fraction < 1.0 { fraction } else { 1.0 }
    }

    /// The factor on the learning rate after `step` steps.
    pub fn factor(&self, step: u64) -> f64 {
        match self.budget {
            Budget::Steps(steps) => self.schedule.factor_at_step(step, steps),
            Budget::Seconds(_) => self.schedule.factor_at_progress(self.fraction(step)),
        }
    }
}
