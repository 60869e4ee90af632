//! A contest: the same training with a codebook and without, from each seed, judged on the way.

use std::error::Error;
use std::fmt;
use std::ops::Range;

use indicatif::ProgressBar;
use transformer_vq::attention::VqAttention;
use transformer_vq::model::{ModelConfig, Transformer, UnitKind};
use transformer_vq::train::{BatchConfig, Budget, Corpus, Progress};

use crate::budget::{Trained, progress, train};
use crate::statistics::mean;
use crate::text::{batches, score, split};

/// Bytes of the held-out text that are read.
const JUDGED: usize = 64 * 1024;
/// The parts of a run after which the model is judged, besides its end.
const MARKS: [f64; 6] = [0.06, 0.12, 0.25, 0.4, 0.6, 0.8];

/// What the attention of all units is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Codebook,
    Quadratic,
}

pub const KINDS: [Kind; 2] = [Kind::Codebook, Kind::Quadratic];

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Codebook => "codebook",
            Kind::Quadratic => "quadratic",
        })
    }
}

impl Kind {
    /// The model, the same but for its attention.
    pub fn config(self, text: &Corpus, short: bool) -> ModelConfig {
        ModelConfig {
            vocab_size: text.vocab_size(),
            d_model: if short { 16 } else { 128 },
            n_layers: 2,
            d_v: 256,
            n_codes: 256,
            attention: VqAttention { block_len: 64, window: 64, ..VqAttention::default() },
            units: vec![match self {
                Kind::Codebook => UnitKind::Vq,
                Kind::Quadratic => UnitKind::Quadratic,
            }],
            ..ModelConfig::default()
        }
    }
}

/// The sequences that both learn from, each of them in one step, and when training is over.
#[derive(Debug, Clone, Copy)]
pub struct Contest {
    pub sequence_len: usize,
    pub batch_size: usize,
    pub budget: Budget,
}

/// How good a model is after some training.
#[derive(Debug, Clone, Copy, Default)]
pub struct Point {
    /// Tokens learned from.
    pub tokens: f64,
    /// Of training.
    pub seconds: f64,
    pub bits_per_byte: f64,
}

/// A run at each of [`MARKS`] and at its end.
type Points = [Point; MARKS.len() + 1];

/// One kind from all seeds.
pub struct Runs {
    pub kind: Kind,
    pub of_seeds: Vec<Points>,
}

impl Runs {
    /// The last point of each seed.
    pub fn last(&self) -> impl Iterator<Item = &Point> {
        self.of_seeds.iter().map(|points| &points[MARKS.len()])
    }

    /// The mean over seeds at each mark.
    pub fn mean(&self) -> Points {
        std::array::from_fn(|mark| {
            let of_seeds = |of: fn(&Point) -> f64| self.of_seeds.iter().map(move |points| of(&points[mark]));
            let mean = |of| mean(&Vec::from_iter(of_seeds(of)));
            Point {
                tokens: mean(|point| point.tokens),
                seconds: mean(|point| point.seconds),
                bits_per_byte: mean(|point| point.bits_per_byte),
            }
        })
    }
}

/// What came of a contest.
pub struct Results {
    pub contest: Contest,
    /// In the order of [`KINDS`].
    pub runs: [Runs; 2],
}

impl Contest {
    pub fn bytes_per_step(&self) -> usize {
        self.sequence_len * self.batch_size
    }

    /// A run at its beginning.
    fn progress(self, seed: u64) -> Result<Progress, Box<dyn Error>> {
        let Contest { sequence_len, batch_size, budget } = self;
        progress(BatchConfig { batch_size, sequence_len, update_len: sequence_len, seed }, budget)
    }

    /// Refuses a text that is too short, before anything is trained.
    pub fn check(&self, text: &Corpus) -> Result<(), Box<dyn Error>> {
        let progress = self.progress(0)?;
        batches(text, split(text, &progress)?.0, &progress)?;
        Ok(())
    }

    /// Seed by seed, both kinds in turn: what disturbs the machine for a while disturbs both.
    pub fn run(
        self,
        text: &Corpus,
        seeds: &[u64],
        short: bool,
        bar: &ProgressBar,
    ) -> Result<Results, Box<dyn Error>> {
        let mut runs = KINDS.map(|kind| Runs { kind, of_seeds: vec![] });
        for &seed in seeds {
            for Runs { kind, of_seeds } in &mut runs {
                bar.set_prefix(format!("T = {}, {kind}, seed {seed}", self.sequence_len));
                of_seeds.push(self.train(kind.config(text, short), text, seed, bar)?);
            }
        }
        Ok(Results { contest: self, runs })
    }

    fn train(
        self,
        config: ModelConfig,
        text: &Corpus,
        seed: u64,
        bar: &ProgressBar,
    ) -> Result<Points, Box<dyn Error>> {
        let (sequence_len, progress) = (self.sequence_len, self.progress(seed)?);
        let (_, held_out) = split(text, &progress)?;
        let held_out = held_out.start..held_out.end.min(held_out.start + JUDGED.max(sequence_len));
        let judge = |model: &Transformer| judge(model, text, held_out.clone(), sequence_len);
        let (mut points, mut next) = (Points::default(), 0);
        let trained = train(config, text, progress, bar, |model, progress, steps| {
            // One step can pass several marks.
            let passed = next + MARKS[next..].iter().filter(|&&m| m <= progress.fraction(steps)).count();
            if next < passed {
                let tokens = (steps as usize * self.bytes_per_step()) as f64;
                let (seconds, bits_per_byte) = (progress.seconds, judge(model)?);
                points[next..passed].fill(Point { tokens, seconds, bits_per_byte });
                next = passed;
            }
            Ok(())
        })?;
        let Trained { model, tokens, seconds } = trained;
        points[MARKS.len()] = Point { tokens, seconds, bits_per_byte: judge(&model)? };
        Ok(points)
    }
}

/// Bits per byte of a range in pieces of `piece_len`, each read from an empty state.
fn judge(
    model: &Transformer,
    text: &Corpus,
    range: Range<usize>,
    piece_len: usize,
) -> Result<f64, Box<dyn Error>> {
    let (mut nats, mut tokens) = (0.0, 0);
    for start in range.clone().step_by(piece_len) {
        let scorer = score(model, text, start..range.end.min(start + piece_len))?;
        nats += scorer.nats_per_token() * scorer.tokens() as f64;
        tokens += scorer.tokens();
    }
    Ok(text.size_of(range)?.bits_per_byte(nats / tokens as f64))
}
