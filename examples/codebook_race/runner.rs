//! A racer on its way: one step of learning after the other.

use transformer_vq::Error;
use transformer_vq::codebook::{CodeStats, Estimator, commitment, lookup};
use transformer_vq::ndarray::{Array2, ArrayView2, Axis};
use transformer_vq::ops::linear;

use crate::Args;
use crate::adam::Adam;
use crate::learner::{Learner, one_head, rows};
use crate::racers::Racer;

/// Adam's rate for encoder and decoder, at the start.
const ENCODER_RATE: f32 = 0.001;
/// Weight of the commitment of keys to codewords.
const COMMIT_WEIGHT: f64 = 0.25;

pub struct Runner {
    learner: Learner,
    encoder: Option<Encoder>,
}

/// `keys = x a`, `x' = c b`.
struct Encoder {
    a: Array2<f32>, // [D, K]
    b: Array2<f32>, // [K, D]
    adam: Adam,
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
    pub fn new(racer: &Racer, first: ArrayView2<'_, f32>, args: &Args) -> Result<Self, Error> {
        let (kind, n_codes) = ((racer.learning, racer.start), args.codes as usize);
        let identity = || Array2::eye(first.ncols());
        let encoder =
            |(_, estimator)| Encoder { a: identity(), b: identity(), adam: Adam::default(), estimator };
        Ok(Runner {
            learner: Learner::new(kind, first, n_codes, racer.revive, args.rate, args.seed)?,
            encoder: racer.encoder.map(encoder),
        })
    }

    /// What is made of `x` [N, D].
    pub fn quantizer(&self, x: ArrayView2<'_, f32>) -> Result<Quantizer, Error> {
        let codewords = self.learner.codebook.codewords().index_axis_move(Axis(0), 0);
        let (keys, decoded) = match &self.encoder {
            None => (x.to_owned(), codewords.clone()),
            Some(Encoder { a, b, .. }) => {
                (linear::forward(x, a.view(), None)?, linear::forward(codewords.view(), b.view(), None)?)
            }
        };
        Ok(Quantizer { keys, codewords, decoded })
    }

    /// Learns from `x` [N, D]; `rate` goes from 1 to 0.
    pub fn step(&mut self, x: ArrayView2<'_, f32>, step: u64, rate: f32) -> Result<(), Error> {
        let keys = match &self.encoder {
            None => x.to_owned(),
            Some(Encoder { a, .. }) => linear::forward(x, a.view(), None)?,
        };
        let keys = one_head(keys.view());
        let codebook = &self.learner.codebook;
        let (codes, codewords) = (codebook.assign(keys)?, codebook.codewords());
        let stats = CodeStats::collect(keys, codes.view(), codebook.n_codes(), None)?;
        let mut d_task = None;
        if let Some(Encoder { a, b, adam, estimator }) = &mut self.encoder {
            let (codes, codewords) = (codes.view(), codewords.view());
            let quantized = lookup(codes, codewords)?;
            let quantized = rows(&quantized); // [N, K]
            let decoded = linear::forward(quantized, b.view(), None)?;
            let d_decoded = (decoded - x) * (2.0 / x.nrows() as f32);
            let (mut d_a, mut d_b) = (Array2::zeros(a.dim()), Array2::zeros(b.dim()));
            let d_quantized = linear::backward(quantized, b.view(), d_decoded.view(), d_b.view_mut(), None)?;
            let d_quantized = one_head(d_quantized.view());
            if self.learner.by_gradient() && *estimator == Estimator::Directional {
                d_task = Some(estimator.codeword_gradient(keys, codes, codewords, d_quantized)?);
            }
            let mut d_keys = estimator.key_gradient(keys, codes, codewords, d_quantized.to_owned())?;
            d_keys += &commitment::backward(keys, codes, codewords, None, COMMIT_WEIGHT)?;
            linear::backward(x, a.view(), rows(&d_keys), d_a.view_mut(), None)?;
            let pairs = [(a, &d_a), (b, &d_b)];
            let pairs = pairs.map(|(p, d)| (p.view_mut().into_dyn(), d.view().into_dyn()));
            adam.step(ENCODER_RATE * rate, pairs);
        }
        self.learner.step(keys, &stats, d_task, step, rate)
    }
}
