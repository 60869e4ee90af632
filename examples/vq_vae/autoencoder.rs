//! Network and codebook, and their step of training.
//!
//! ```text
//! loss = sum over a patch of (x' - x)^2 + 0.25 |k - sg(c_z)|^2 (+ |sg(k) - c_z|^2),   mean over patches
//! ```
//!
//! The last term is for codewords that learn by gradient.

use transformer_vq::Error;
use transformer_vq::codebook::{CodeStats, Estimator, commitment, lookup};
use transformer_vq::ndarray::{Array2, Array3, ArrayView2, Axis};

use crate::Args;
use crate::adam::Adam;
use crate::images::{GRID, PATCHES, WIDTH};
use crate::learner::{Learner, one_head, rows};
use crate::network::Network;

const COMMIT_WEIGHT: f64 = 0.25;

pub struct Autoencoder {
    network: Network<f32>,
    adam: Adam,
    rate: f32,
    learner: Learner,
    estimator: Estimator,
}

impl Autoencoder {
    /// `first` [N, WIDTH]: patches whose keys the codebook may start from.
    pub fn new(args: &Args, first: ArrayView2<'_, f32>) -> Result<Self, Error> {
        let network = Network::new(args.width as usize, args.seed)?;
        let (keys, _) = network.encode(first)?;
        let kind = (args.learning.kind(), args.start);
        let learner =
            Learner::new(kind, keys.view(), args.codes as usize, args.revive, args.rate, args.seed)?;
        let estimator = args.estimator.estimator();
        Ok(Autoencoder { network, adam: Adam::default(), rate: args.rate, learner, estimator })
    }

    /// Learns from patches [N, WIDTH]; `rate` goes from 1 to 0.
    pub fn step(&mut self, x: ArrayView2<'_, f32>, step: u64, rate: f32) -> Result<(), Error> {
        // Forward.
        let (keys, encoded) = self.network.encode(x)?;
        let (keys, codewords) = (one_head(keys.view()), self.learner.codebook.codewords());
        let (codes, codewords) = (self.learner.codebook.assign(keys)?, codewords.view());
        let quantized = lookup(codes.view(), codewords)?;
        let (painted, decoded) = self.network.decode(rows(&quantized))?;
        // Backward.
        let mut d = self.network.zeros_like();
        let d_painted = (painted - x) * (2.0 / x.nrows() as f32);
        let d_quantized = self.network.decode_backward(&decoded, d_painted.view(), &mut d)?;
        let d_quantized = one_head(d_quantized.view());
        let directional = self.learner.by_gradient() && self.estimator == Estimator::Directional;
        let of_codewords = || self.estimator.codeword_gradient(keys, codes.view(), codewords, d_quantized);
        let d_task: Option<Array3<f32>> = directional.then(of_codewords).transpose()?;
        let mut d_keys =
            self.estimator.key_gradient(keys, codes.view(), codewords, d_quantized.to_owned())?;
        d_keys += &commitment::backward(keys, codes.view(), codewords, None, COMMIT_WEIGHT)?;
        self.network.encode_backward(&encoded, rows(&d_keys), &mut d)?;
        // Steps.
        self.adam.step(self.rate * rate, self.network.pairs(&d));
        let stats = CodeStats::collect(keys, codes.view(), self.learner.codebook.n_codes(), None)?;
        self.learner.step(keys, &stats, d_task, step, rate)
    }

    /// Patches [N, WIDTH] as they come back, and what was counted of their codes.
    pub fn reconstruct(&self, x: ArrayView2<'_, f32>) -> Result<(Array2<f32>, CodeStats<f32>), Error> {
        let (keys, _) = self.network.encode(x)?;
        let (keys, codebook) = (one_head(keys.view()), &self.learner.codebook);
        let codes = codebook.assign(keys)?;
        let stats = CodeStats::collect(keys, codes.view(), codebook.n_codes(), None)?;
        let quantized = lookup(codes.view(), codebook.codewords().view())?;
        Ok((self.network.decode(rows(&quantized))?.0, stats))
    }

    /// The squared distance of keys of patches [N, WIDTH] from their codewords, over their squared length.
    pub fn relative_error(&self, x: ArrayView2<'_, f32>) -> Result<f64, Error> {
        let (keys, _) = self.network.encode(x)?;
        let (keys, codebook) = (one_head(keys.view()), &self.learner.codebook);
        let codes = codebook.assign(keys)?;
        Ok(commitment::relative_error(keys, codes.view(), codebook.codewords().view(), None)?[0])
    }

    /// What each code paints in the middle of a picture of itself [S, WIDTH].
    pub fn paint_codes(&self) -> Result<Array2<f32>, Error> {
        let codewords = self.learner.codebook.codewords().index_axis_move(Axis(0), 0);
        let mut patches = Array2::zeros((codewords.nrows(), WIDTH));
        for (mut patch, codeword) in patches.outer_iter_mut().zip(codewords.outer_iter()) {
            let everywhere = codeword.broadcast((PATCHES, codeword.len())).expect("one row for all");
            let (picture, _) = self.network.decode(everywhere)?;
            patch.assign(&picture.row(PATCHES / 2 + GRID / 2));
        }
        Ok(patches)
    }
}
