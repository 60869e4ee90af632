//! The racers: one line each, and what they have in common.

use transformer_vq::Error;
use transformer_vq::codebook::{Codebook, Ema, Estimator, Residual, start};
use transformer_vq::ndarray::{Array2, Array3, ArrayView2, ArrayView4, Axis};
use transformer_vq::ops::linear;

/// Part of the old state that an update of moving averages keeps.
const DECAY: f64 = 0.99;
/// Steps between two looks for idle codes.
const REVIVE_EVERY: u64 = 5;
/// Step length of encoder and decoder, and the weight of the commitment of keys to codewords.
const LEARNING_RATE: f32 = 0.01;
const COMMIT_WEIGHT: f64 = 0.25;

/// A way to learn a codebook.
pub struct Racer {
    pub name: &'static str,
    start: Start,
    learn: fn(Array3<f32>) -> Result<Codebook<f32>, Error>,
    /// Codes used less than this times the average are given a new start.
    revive: f64,
    /// Whether keys are learned as well, and how they get their gradient.
    encoder: Option<Estimator>,
}

type Start = fn(ArrayView4<'_, f32>, usize, u64) -> Result<Array3<f32>, Error>;

const RANDOM: Start = |keys, n_codes, seed| {
    let deviation = 1.0 / (n_codes as f64).sqrt(); // the published start
    start::random(1, n_codes, keys.len_of(Axis(3)), deviation, seed)
};
const SAMPLED: Start = |keys, n_codes, seed| start::sample(keys, n_codes, None, seed);
const K_MEANS: Start = |keys, n_codes, seed| start::k_means(keys, n_codes, None, 10, seed);

const EMA: fn(Array3<f32>) -> Result<Codebook<f32>, Error> =
    |codewords| Ok(Codebook::ema(Ema::from_codewords(codewords, DECAY)?));

const STRAIGHT: Option<Estimator> = Some(Estimator::StraightThrough);

#[rustfmt::skip]
pub const RACERS: &[Racer] = &[
    Racer { name: "moving averages",                     start: RANDOM,  learn: EMA, revive: 0.0, encoder: None },
    Racer { name: "  from sampled keys",                 start: SAMPLED, learn: EMA, revive: 0.0, encoder: None },
    Racer { name: "  from k-means++ of a batch",         start: K_MEANS, learn: EMA, revive: 0.0, encoder: None },
    Racer { name: "  revived below 0.1",                 start: RANDOM,  learn: EMA, revive: 0.1, encoder: None },
    Racer { name: "  revived below 0.3",                 start: RANDOM,  learn: EMA, revive: 0.3, encoder: None },
    Racer { name: "  revived below 0.5",                 start: RANDOM,  learn: EMA, revive: 0.5, encoder: None },
    Racer { name: "  encoder, straight-through",         start: RANDOM,  learn: EMA, revive: 0.0, encoder: STRAIGHT },
    Racer { name: "  encoder, straight-through, revived", start: RANDOM, learn: EMA, revive: 0.3, encoder: STRAIGHT },
];

/// A racer on its way.
pub struct Runner {
    codebook: Residual<f32>,
    revive: f64,
    encoder: Option<Encoder>,
    seed: u64,
}

/// `keys = x a`, `x' = c b`.
struct Encoder {
    a: Array2<f32>, // [D, K]
    b: Array2<f32>, // [K, D]
    estimator: Estimator,
}

/// A quantizer, and the keys it is given.
pub struct Quantizer {
    pub keys: Array2<f32>,      // [N, K]
    pub codewords: Array2<f32>, // [S, K]
    /// What codewords stand for.
    pub decoded: Array2<f32>, // [S, D]
}

impl Runner {
    /// `first` [N, D]: keys to start from.
    pub fn new(racer: &Racer, first: ArrayView2<'_, f32>, n_codes: usize, seed: u64) -> Result<Self, Error> {
        let codewords = (racer.start)(batch(first), n_codes, seed)?;
        let encoder =
            |estimator| Encoder { a: Array2::eye(first.ncols()), b: Array2::eye(first.ncols()), estimator };
        Ok(Runner {
            codebook: Residual::new(vec![(racer.learn)(codewords)?])?,
            revive: racer.revive,
            encoder: racer.encoder.map(encoder),
            seed,
        })
    }

    /// What is made of `x` [N, D].
    pub fn quantizer(&self, x: ArrayView2<'_, f32>) -> Result<Quantizer, Error> {
        let codewords = self.codebook.levels()[0].codewords().index_axis_move(Axis(0), 0);
        let (keys, decoded) = match &self.encoder {
            None => (x.to_owned(), codewords.clone()),
            Some(Encoder { a, b, .. }) => {
                (linear::forward(x, a.view(), None)?, linear::forward(codewords.view(), b.view(), None)?)
            }
        };
        Ok(Quantizer { keys, codewords, decoded })
    }

    /// Learns from `x` [N, D].
    pub fn step(&mut self, x: ArrayView2<'_, f32>, step: u64) -> Result<(), Error> {
        let keys = match &self.encoder {
            None => x.to_owned(),
            Some(Encoder { a, .. }) => linear::forward(x, a.view(), None)?,
        };
        let (output, saved) = self.codebook.forward(batch(keys.view()), None)?;
        if let Some(Encoder { a, b, estimator }) = &mut self.encoder {
            let quantized = output.quantized.index_axis(Axis(0), 0).index_axis_move(Axis(0), 0); // [N, K]
            let decoded = linear::forward(quantized, b.view(), None)?;
            let d_decoded = (decoded - x) * (2.0 / x.nrows() as f32);
            let (mut d_a, mut d_b) = (Array2::zeros(a.dim()), Array2::zeros(b.dim()));
            let d_quantized = linear::backward(quantized, b.view(), d_decoded.view(), d_b.view_mut(), None)?;
            let d_quantized = batch(d_quantized.view());
            let d_keys = saved.backward(batch(keys.view()), None, d_quantized, *estimator, COMMIT_WEIGHT)?;
            let d_keys = d_keys.index_axis(Axis(0), 0).index_axis_move(Axis(0), 0);
            linear::backward(x, a.view(), d_keys, d_a.view_mut(), None)?;
            a.scaled_add(-LEARNING_RATE, &d_a);
            b.scaled_add(-LEARNING_RATE, &d_b);
        }
        self.codebook.update(&output.stats)?;
        if self.revive > 0.0 && step.is_multiple_of(REVIVE_EVERY) {
            self.codebook.revive(batch(keys.view()), None, self.revive, self.seed.wrapping_add(step))?;
        }
        Ok(())
    }
}

/// Rows as keys of one sequence and one head [1, 1, N, K].
fn batch(rows: ArrayView2<'_, f32>) -> ArrayView4<'_, f32> {
    rows.insert_axis(Axis(0)).insert_axis(Axis(0))
}
