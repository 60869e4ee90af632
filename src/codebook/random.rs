//! Random draws that are the same on every machine, for starting and reviving codes.
//!
//! Numbers come from ChaCha with 8 rounds: one stream per head, so that a head's draws do not depend on how many heads there
//! are, nor on the thread that makes them. Integers and weighted draws are made of its bits by exact arithmetic here, so that
//! no release of another crate can change them.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// A stream of random numbers.
pub(super) struct Random(ChaCha8Rng);

impl Random {
    /// The stream of one head.
    pub(super) fn new(seed: u64, head: usize) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(head as u64);
        Random(rng)
    }

    /// Uniform in [0, 1): a multiple of 2^-53.
    pub(super) fn uniform(&mut self) -> f64 {
        (self.0.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform in 0 .. n, for n > 0; off by less than n / 2^64.
    pub(super) fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.0.next_u64()) * n as u128) >> 64) as usize
    }

    /// From N(0, 1) (Box and Muller); the same everywhere but for the last bits of the system's `ln` and `cos`.
    pub(super) fn normal(&mut self) -> f64 {
        let (a, b) = (self.uniform(), self.uniform());
        (-2.0 * (1.0 - a).ln()).sqrt() * (std::f64::consts::TAU * b).cos()
    }

    /// An index j with probability w_j / sum w, given the running sums of the weights; nothing if they add up to 0.
    pub(super) fn weighted(&mut self, running: &[f64]) -> Option<usize> {
        let total = running.last().copied().unwrap_or(0.0);
        let at = self.uniform() * total;
        // The first whose running sum is above: never one without weight, which adds nothing to the sum before it.
        let j = running.partition_point(|&sum| sum <= at);
        // The product may round up to the total: the last with weight then.
        if j < running.len() {
            Some(j)
        } else {
            (total > 0.0).then(|| running.partition_point(|&sum| sum < total))
        }
    }

    /// Up to n different indices, one after the other, each with probability w_j / sum w among those not yet drawn; fewer
    /// than n if no other has weight.
    pub(super) fn distinct(&mut self, mut weights: Vec<f64>, n: usize) -> Vec<usize> {
        let mut drawn = Vec::with_capacity(n.min(weights.len()));
        while drawn.len() < n {
            let running = running_sums(&weights);
            for _ in drawn.len()..n {
                match self.weighted(&running) {
                    None => return drawn,
                    // Passing over what has been drawn leaves the others' odds as they are.
                    Some(j) if weights[j] == 0.0 => {}
                    Some(j) => {
                        weights[j] = 0.0;
                        drawn.push(j);
                    }
                }
            }
        }
        drawn
    }
}

/// `w_0, w_0 + w_1, ...`
pub(super) fn running_sums(weights: &[f64]) -> Vec<f64> {
    let add = |sum: &mut f64, &weight: &f64| {
        *sum += weight;
        Some(*sum)
    };
    weights.iter().scan(0.0, add).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stream_is_pinned() {
        let mut random = Random::new(1, 2);
        let drawn: Vec<usize> = (0..6).map(|_| random.below(1000)).collect();
        assert_eq!(drawn, PINNED);
        let mut same = Random::new(1, 2);
        assert_eq!((0..6).map(|_| (same.uniform() * 1000.0) as usize).collect::<Vec<_>>(), drawn);
        assert_ne!(Random::new(1, 3).uniform(), Random::new(1, 2).uniform());
        assert_ne!(Random::new(2, 2).uniform(), Random::new(1, 2).uniform());
    }

    const PINNED: [usize; 6] = [876, 682, 336, 511, 961, 444];

    #[test]
    fn normal_numbers_have_mean_0_and_variance_1() {
        let mut random = Random::new(3, 0);
        let numbers: Vec<f64> = (0..20_000).map(|_| random.normal()).collect();
        let mean = |f: &dyn Fn(f64) -> f64| numbers.iter().map(|&x| f(x)).sum::<f64>() / 20_000.0;
        assert!(mean(&|x| x).abs() < 0.03 && (mean(&|x| x * x) - 1.0).abs() < 0.05);
        assert!((mean(&|x| x.powi(4)) - 3.0).abs() < 0.3);
    }

    #[test]
    fn draws_follow_their_weights() {
        let mut random = Random::new(5, 0);
        let running = running_sums(&[0.0, 1.0, 0.0, 3.0, 0.0]);
        let mut counts = [0; 5];
        (0..8000).for_each(|_| counts[random.weighted(&running).unwrap()] += 1);
        assert_eq!((counts[0], counts[2], counts[4]), (0, 0, 0));
        assert!((1800..2200).contains(&counts[1]), "{counts:?}");
        assert_eq!(random.weighted(&[]), None);
        assert_eq!(random.weighted(&[0.0, 0.0]), None);
        // So small that products round to the total: still an index with weight.
        let least = f64::from_bits(1);
        (0..100).for_each(|_| assert_eq!(random.weighted(&[0.0, least, least]), Some(1)));
    }

    #[test]
    fn distinct_draws_are_distinct_and_have_weight() {
        let mut random = Random::new(7, 0);
        let weights: Vec<f64> = (0..100).map(|j| (j % 3) as f64 * 10f64.powi(j % 7)).collect();
        for n in [0, 1, 5, 66, 67, 200] {
            let mut drawn = random.distinct(weights.clone(), n);
            assert_eq!(drawn.len(), n.min(66));
            assert!(drawn.iter().all(|j| j % 3 > 0));
            drawn.sort_unstable();
            drawn.dedup();
            assert_eq!(drawn.len(), n.min(66));
        }
        assert!(random.distinct(vec![], 3).is_empty());
        // The second draw follows the weights of what the first has left: 2 comes after 1 in 10 of 11 cases.
        let after_1 = (0..4000)
            .map(|_| random.distinct(vec![1.0, 1e6, 10.0], 2))
            .filter(|drawn| drawn[..] == [1, 2])
            .count();
        assert!((3550..3720).contains(&after_1), "{after_1}");
    }
}
