//! A codebook on its own, with all that moves it: statistics, an optimizer, new starts for idle codes.

use clap::ValueEnum;
use transformer_vq::Error;
use transformer_vq::codebook::revive::replacements;
use transformer_vq::codebook::{CodeStats, Codebook, Ema, Learning, Smoothing, codebook_loss, start};
use transformer_vq::ndarray::{Array2, Array3, Array4, ArrayView2, ArrayView4, Axis};

use crate::adam::Adam;

/// Part of the old state that an update of moving averages keeps.
const DECAY: f64 = 0.99;
/// Steps between two looks for idle codes.
const REVIVE_EVERY: u64 = 5;
/// What a plain step at a rate of 1 takes of the way to the mean of its keys, for the average code: as moving averages do.
const PLAIN_STEP: f32 = 0.01;

/// First codewords; a linear codebook begins as its authors have it.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Start {
    /// N(0, 1 / S), as published for moving averages
    Random,
    /// Keys of the first batch
    Sampled,
    /// k-means++ and ten steps of Lloyd on the first batch
    KMeans,
}

/// How codewords learn.
#[derive(Debug, Clone, Copy)]
pub enum Kind {
    Ema(Smoothing),
    /// By plain steps along the gradient, or by Adam.
    Gradient {
        adam: bool,
    },
    /// SimVQ, with a basis as wide as keys, or as the number of codes.
    Linear {
        wide: bool,
        learned: bool,
        bias: bool,
    },
    Frozen,
}

impl Kind {
    /// A codebook before its first step, given the first `keys` [1, 1, N, K].
    pub fn codebook(
        self,
        start: Start,
        keys: ArrayView4<'_, f32>,
        n_codes: usize,
        seed: u64,
    ) -> Result<Codebook<f32>, Error> {
        let d_k = keys.len_of(Axis(3));
        let codewords = || match start {
            Start::Random => start::random(1, n_codes, d_k, (n_codes as f64).sqrt().recip(), seed),
            Start::Sampled => start::sample(keys, n_codes, None, seed),
            Start::KMeans => start::k_means(keys, n_codes, None, 10, seed),
        };
        match self {
            Kind::Ema(smoothing) => {
                Ok(Codebook::ema(Ema::from_codewords(codewords()?, DECAY)?.with_smoothing(smoothing)?))
            }
            Kind::Gradient { .. } => Codebook::gradient(codewords()?),
            Kind::Frozen => Codebook::frozen(codewords()?),
            Kind::Linear { wide, learned, bias } => {
                // The published start: basis N(0, 1/f), matrix with a variance of 1 / (3 f).
                let width = if wide { n_codes } else { d_k };
                let deviation = (width as f64).sqrt().recip();
                let basis = start::random(1, n_codes, width, deviation, seed)?;
                let weight = start::random(1, d_k, width, deviation / 3f64.sqrt(), seed.wrapping_add(1))?;
                Codebook::linear(basis, weight, bias.then(|| Array2::zeros((1, d_k))), learned)
            }
        }
    }
}

/// A codebook of one head that learns.
pub struct Learner {
    pub codebook: Codebook<f32>,
    /// None: plain steps.
    adam: Option<(Adam, f32)>,
    /// Moving counts of keys [1, S].
    usage: Array2<f64>,
    revive: f64,
    seed: u64,
}

impl Learner {
    /// `first` [N, K] are keys to start from. Codes used less than `revive` times the average get a new start; `rate` is Adam's.
    pub fn new(
        (kind, start): (Kind, Start),
        first: ArrayView2<'_, f32>,
        n_codes: usize,
        revive: f64,
        rate: f32,
        seed: u64,
    ) -> Result<Self, Error> {
        let plain = matches!(kind, Kind::Gradient { adam: false });
        Ok(Learner {
            codebook: kind.codebook(start, one_head(first), n_codes, seed)?,
            adam: (!plain).then(|| (Adam::default(), rate)),
            usage: Array2::from_elem((1, n_codes), first.nrows() as f64 / n_codes as f64),
            revive,
            seed,
        })
    }

    /// Whether gradients move it.
    pub fn by_gradient(&self) -> bool {
        !self.codebook.parameters().views().is_empty()
    }

    /// Learns from `keys` [1, 1, N, K] and what was counted of them.
    ///
    /// Codewords that learn by gradient learn from the codebook loss and, if there is one, the gradient `d_task` [1, S, K] of
    /// what the codebook is there for. `rate` goes from 1 to 0.
    pub fn step(
        &mut self,
        keys: ArrayView4<'_, f32>,
        stats: &CodeStats<f32>,
        d_task: Option<Array3<f32>>,
        step: u64,
        rate: f32,
    ) -> Result<(), Error> {
        self.codebook.update(stats)?;
        if self.by_gradient() {
            let codewords = self.codebook.codewords();
            let mut d_codewords = codebook_loss::backward(stats, codewords.view(), 1.0)?;
            d_task.iter().for_each(|d| d_codewords += d);
            let mut gradients = self.codebook.parameters().zeros_like();
            self.codebook.backward(d_codewords.view(), &mut gradients)?;
            let mut parameters = self.codebook.parameters().clone();
            let pairs = parameters.views_mut().into_iter().zip(gradients.views());
            let pairs = pairs.map(|((_, p), (_, d))| (p, d));
            match &mut self.adam {
                Some((adam, highest)) => adam.step(*highest * rate, pairs),
                None => {
                    // The gradient is 2 n_s / N times the way from the codeword to the mean of its n_s keys.
                    let rate = PLAIN_STEP * rate * self.codebook.n_codes() as f32 / 2.0;
                    pairs.for_each(|(mut p, d)| p.scaled_add(-rate, &d));
                }
            }
            self.codebook.set_parameters(parameters)?;
        }
        self.usage.zip_mut_with(&stats.counts(), |usage, &n| *usage += (1.0 - DECAY) * (n as f64 - *usage));
        if self.revive > 0.0 && step.is_multiple_of(REVIVE_EVERY) {
            self.revive(keys, self.seed.wrapping_add(step))?;
        }
        Ok(())
    }

    fn revive(&mut self, keys: ArrayView4<'_, f32>, seed: u64) -> Result<(), Error> {
        if let Learning::Ema(_) = self.codebook.learning() {
            self.codebook.revive(keys, None, self.revive, seed)?;
            return Ok(());
        }
        // Others do not count their keys: their codewords are written.
        let codewords = self.codebook.codewords();
        let mut parameters = self.codebook.parameters().clone();
        let Some(written) = &mut parameters.codewords else { return Ok(()) };
        let mean = self.usage.sum() / self.usage.len() as f64;
        for new in replacements(self.usage.view(), keys, codewords.view(), None, self.revive, seed)? {
            written.index_axis_mut(Axis(0), new.head).row_mut(new.code).assign(&new.codeword);
            self.usage[[new.head, new.code]] = mean;
        }
        self.codebook.set_parameters(parameters)
    }
}

/// Rows as keys of one sequence and one head [1, 1, N, K].
pub fn one_head(rows: ArrayView2<'_, f32>) -> ArrayView4<'_, f32> {
    rows.insert_axis(Axis(0)).insert_axis(Axis(0))
}

/// The rows of one sequence and one head [1, 1, N, K].
pub fn rows(array: &Array4<f32>) -> ArrayView2<'_, f32> {
    array.index_axis(Axis(0), 0).index_axis_move(Axis(0), 0)
}

/// A rate of a command line.
pub fn rate(text: &str) -> Result<f32, String> {
    let rate = text.parse().ok().filter(|&rate| f32::is_finite(rate) && rate > 0.0);
    rate.ok_or("expected a positive number".into())
}
