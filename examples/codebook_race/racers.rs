//! The racers: how each begins, learns and passes gradients.

use std::fmt;

use transformer_vq::codebook::{Estimator, Rotation, RotationScale, RotationVariant, Smoothing};

use crate::learner::{Kind, Start};

/// Ratio of its use to even use below which a code is given a new start.
const REVIVE: f64 = 0.3;

/// A way to learn a codebook.
#[derive(Debug, Clone)]
pub struct Racer {
    pub rule: &'static str,
    pub start: Start,
    pub learning: Kind,
    /// Codes used less than this times the average are given a new start; 0: none.
    pub revive: f64,
    /// Whether keys are learned as well, and how they get their gradient.
    pub encoder: Option<(&'static str, Estimator)>,
    /// Whether the picture shows it.
    pub drawn: bool,
}

impl fmt::Display for Racer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.rule)?;
        match self.encoder {
            Some((estimator, _)) => write!(f, ", keys learned, {estimator}"),
            None => Ok(()),
        }
    }
}

const EMA: Kind = Kind::Ema(Smoothing::CountClamp);
const PLAIN: Kind = Kind::Gradient { adam: false };
const ADAM: Kind = Kind::Gradient { adam: true };
const LAPLACE: Kind = Kind::Ema(Smoothing::Laplace { epsilon: 1e-5 });

const fn linear(wide: bool, learned: bool, bias: bool) -> Kind {
    Kind::Linear { wide, learned, bias }
}

type Line = (&'static str, Start, Kind, f64, bool);

/// Keys are given.
#[rustfmt::skip]
const ALONE: &[Line] = &[
    ("moving averages",                        Start::Random,  EMA,     0.0,    true),
    ("moving averages, from sampled keys",     Start::Sampled, EMA,     0.0,    false),
    ("moving averages, from k-means++",        Start::KMeans,  EMA,     0.0,    true),
    ("moving averages, revived below 0.1",     Start::Random,  EMA,     0.1,    false),
    ("moving averages, revived below 0.3",     Start::Random,  EMA,     REVIVE, true),
    ("moving averages, revived below 0.5",     Start::Random,  EMA,     0.5,    false),
    ("Laplace",                                Start::Random,  LAPLACE, 0.0,    false),
    ("Laplace, from k-means++",                Start::KMeans,  LAPLACE, 0.0,    false),
    ("Laplace, revived below 0.3",             Start::Random,  LAPLACE, REVIVE, false),
    ("gradient, plain",                        Start::Random,  PLAIN,   0.0,    true),
    ("gradient, plain, from k-means++",        Start::KMeans,  PLAIN,   0.0,    false),
    ("gradient, plain, revived below 0.3",     Start::Random,  PLAIN,   REVIVE, false),
    ("gradient, Adam",                         Start::Random,  ADAM,    0.0,    true),
    ("gradient, Adam, from sampled keys",      Start::Sampled, ADAM,    0.0,    false),
    ("gradient, Adam, from k-means++",         Start::KMeans,  ADAM,    0.0,    false),
    ("gradient, Adam, revived below 0.3",      Start::Random,  ADAM,    REVIVE, false),
    ("SimVQ",                                  Start::Random,  linear(false, false, false), 0.0, true),
    ("SimVQ, bias",                            Start::Random,  linear(false, false, true),  0.0, false),
    ("SimVQ, learned basis",                   Start::Random,  linear(false, true, false),  0.0, true),
    ("SimVQ, learned basis, bias",             Start::Random,  linear(false, true, true),   0.0, false),
    ("SimVQ, basis of width S",                Start::Random,  linear(true, false, false),  0.0, false),
    ("frozen, random",                         Start::Random,  Kind::Frozen, 0.0, false),
    ("frozen, sampled keys",                   Start::Sampled, Kind::Frozen, 0.0, false),
    ("frozen, k-means++",                      Start::KMeans,  Kind::Frozen, 0.0, false),
];

/// Keys are learned, by each of the estimators.
#[rustfmt::skip]
const LEARNED: &[Line] = &[
    ("moving averages",          Start::Random,  EMA,     0.0,    true),
    ("moving averages, revived", Start::Random,  EMA,     REVIVE, false),
    ("Laplace, revived",         Start::Random,  LAPLACE, REVIVE, false),
    ("gradient, plain",          Start::Random,  PLAIN,   0.0,    false),
    ("gradient, Adam",           Start::Random,  ADAM,    0.0,    false),
    ("gradient, Adam, revived",  Start::Random,  ADAM,    REVIVE, false),
    ("SimVQ",                    Start::Random,  linear(false, false, false), 0.0, false),
    ("SimVQ, learned basis",     Start::Random,  linear(false, true, false),  0.0, false),
    ("frozen, k-means++",        Start::KMeans,  Kind::Frozen, 0.0, false),
];

const fn rotation(variant: RotationVariant, scale: RotationScale) -> Estimator {
    Estimator::Rotation(Rotation { variant, scale })
}

/// Their names head the columns of a table.
pub const ESTIMATORS: [(&str, Estimator); 7] = [
    ("straight", Estimator::StraightThrough),
    ("rotation", rotation(RotationVariant::Paper, RotationScale::Ratio)),
    ("capped", rotation(RotationVariant::Paper, RotationScale::AtMost(1.0))),
    ("unscaled", rotation(RotationVariant::Paper, RotationScale::One)),
    ("normalized", rotation(RotationVariant::Normalized, RotationScale::Ratio)),
    ("directional", Estimator::Directional),
    ("none", Estimator::None),
];

/// All racers: those whose keys are given, then those with an encoder, rule by rule.
pub fn racers() -> Vec<Racer> {
    let racer = |&(rule, start, learning, revive, drawn): &Line, encoder| Racer {
        rule,
        start,
        learning,
        revive,
        encoder,
        drawn,
    };
    let alone = ALONE.iter().map(|line| racer(line, None));
    let learned = LEARNED.iter().flat_map(|line| ESTIMATORS.map(|estimator| racer(line, Some(estimator))));
    alone.chain(learned).collect()
}
