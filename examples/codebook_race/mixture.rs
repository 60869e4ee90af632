//! Keys from a mixture of clusters, some of them much rarer than others.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use transformer_vq::Error;
use transformer_vq::codebook::start;
use transformer_vq::ndarray::{Array2, Axis};

/// Width of a key.
pub const WIDTH: usize = 16;
/// Distance of a key from its centre, per dimension, where centres are 1 apart.
const NOISE: f64 = 0.15;

pub struct Mixture {
    centres: Array2<f32>, // [clusters, K]
    /// Running sums of the clusters' probabilities, which fall as 1 / sqrt(rank).
    running: Vec<f64>,
    seed: u64,
}

impl Mixture {
    pub fn new(n_clusters: usize, seed: u64) -> Result<Self, Error> {
        let centres = start::random(1, n_clusters, WIDTH, 1.0, seed)?.index_axis_move(Axis(0), 0);
        let add = |sum: &mut f64, rank: usize| {
            *sum += 1.0 / (rank as f64).sqrt();
            Some(*sum)
        };
        Ok(Mixture { centres, running: (1..=n_clusters).scan(0.0, add).collect(), seed })
    }

    /// Fresh keys [n, K]: the same for the same number of the batch.
    pub fn keys(&self, n: usize, batch: u64) -> Result<Array2<f32>, Error> {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(batch);
        let mut keys = start::random(1, n, WIDTH, NOISE, rng.random())?.index_axis_move(Axis(0), 0);
        let total = self.running[self.running.len() - 1];
        for mut key in keys.outer_iter_mut() {
            let at = rng.random::<f64>() * total;
            let cluster = self.running.partition_point(|&sum| sum <= at).min(self.running.len() - 1);
            key += &self.centres.row(cluster);
        }
        Ok(keys)
    }
}
