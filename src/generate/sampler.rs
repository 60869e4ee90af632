//! Choosing the next token from its logits.
//!
//! With logits x, temperature t, in this order:
//!
//! ```text
//! (1)  w_s = exp((x_s - max x) / t)                    t = 0: the largest x, at a tie the lowest s
//! (2)  top-k: the k tokens with the largest x          a tie goes to the lower s
//! (3)  nucleus: of those, in the order of (2), the first few whose w make up a part p of their sum, at least one
//! (4)  draw s with probability w_s / sum w: the first s whose running sum is above u sum w, u uniform in [0, 1)
//! ```
//!
//! All of it in `f64`. Cost: O(vocab_size), with a sort of what (2) leaves where (2) or (3) is asked for.

use ndarray::ArrayView1;
use rand::{Rng, RngExt};
use serde::{Deserialize, Serialize};

use crate::{Error, Scalar};

/// How a token is drawn. The default draws from the model's own distribution.
///
/// ```
/// use rand_chacha::ChaCha8Rng;
/// use rand_chacha::rand_core::SeedableRng;
/// use transformer_vq::{generate::Sampler, ndarray::array};
///
/// let mut rng = ChaCha8Rng::seed_from_u64(7);
/// let greedy = Sampler { temperature: 0.0, ..Sampler::default() };
/// assert_eq!(greedy.sample(array![0.5f32, 2.0, -1.0].view(), &mut rng)?, 1);
/// # Ok::<(), transformer_vq::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sampler {
    /// What logits are divided by; 0 takes the most probable token.
    pub temperature: f64,
    /// Keep only this many of the most probable tokens.
    pub top_k: Option<usize>,
    /// Keep only the fewest most probable tokens that together have at least this probability, in (0, 1].
    pub top_p: Option<f64>,
}

impl Default for Sampler {
    fn default() -> Self {
        Sampler { temperature: 1.0, top_k: None, top_p: None }
    }
}

/// A token that may be drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Candidate {
    token: u32,
    logit: f64,
    weight: f64,
}

impl Sampler {
    /// Checks the fields.
    ///
    /// # Errors
    /// [`Error::Invalid`] names the first field that cannot be.
    pub fn validate(&self) -> Result<(), Error> {
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return Err(Error::invalid("temperature", "finite and not negative", self.temperature));
        }
        if self.top_k == Some(0) {
            return Err(Error::invalid("top_k", "at least 1", 0));
        }
        match self.top_p {
            Some(p) if !(p > 0.0 && p <= 1.0) => Err(Error::invalid("top_p", "in (0, 1]", p)),
            _ => Ok(()),
        }
    }

    /// Draws a token. Takes one number from `rng`, any generator of [`rand`], or none at a temperature of 0.
    ///
    /// # Shapes
    /// `logits` `[vocab_size]`; minus infinity marks a token that is never drawn.
    ///
    /// # Errors
    /// [`Error::NotFinite`] for a NaN or plus infinity, [`Error::Empty`] without logits, [`Error::Invalid`] if all of
    /// them are minus infinity or a field of the sampler cannot be.
    pub fn sample<T: Scalar, R: Rng + ?Sized>(
        &self,
        logits: ArrayView1<'_, T>,
        rng: &mut R,
    ) -> Result<u32, Error> {
        self.validate()?;
        let best = argmax(logits)?;
        if self.temperature == 0.0 {
            return Ok(best.token);
        }
        let candidates = self.candidates(logits, best);
        let total: f64 = candidates.iter().map(|c| c.weight).sum();
        let threshold = rng.random::<f64>() * total;
        let mut sum = 0.0;
        let drawn = candidates.iter().find(|c| {
            sum += c.weight;
            sum > threshold
        });
        // Only rounding can leave the threshold at the total; then it is the last token's.
        let drawn = drawn.or(candidates.last());
        Ok(drawn.map_or(best.token, |c| c.token)) // (4)
    }

    /// The tokens that can be drawn: by id, or from the most to the least probable where some are left out.
    fn candidates<T: Scalar>(&self, logits: ArrayView1<'_, T>, best: Candidate) -> Vec<Candidate> {
        let weigh = |(token, &x): (usize, &T)| {
            let logit = x.as_f64();
            let weight = ((logit - best.logit) / self.temperature).exp(); // (1)
            Candidate { token: token as u32, logit, weight }
        };
        let mut kept: Vec<Candidate> =
            logits.iter().enumerate().map(weigh).filter(|c| c.weight > 0.0).collect();
        let order = |a: &Candidate, b: &Candidate| b.logit.total_cmp(&a.logit).then(a.token.cmp(&b.token));
        if let Some(k) = self.top_k
            && k < kept.len()
        {
            kept.select_nth_unstable_by(k, order);
            kept.truncate(k); // (2)
        }
        if self.top_k.is_some() || self.top_p.is_some() {
            kept.sort_unstable_by(order);
        }
        if let Some(p) = self.top_p {
            let total: f64 = kept.iter().map(|c| c.weight).sum();
            let mut sum = 0.0;
            let enough = kept.iter().position(|c| {
                sum += c.weight;
                sum >= p * total
            });
            kept.truncate(enough.map_or(kept.len(), |last| last + 1)); // (3)
        }
        kept
    }
}

/// The largest logit, at a tie the first.
fn argmax<T: Scalar>(logits: ArrayView1<'_, T>) -> Result<Candidate, Error> {
    if logits.is_empty() {
        return Err(Error::Empty { what: "logits" });
    }
    if u32::try_from(logits.len() - 1).is_err() {
        return Err(Error::TooLarge { what: "logits", shape: logits.shape().to_vec() });
    }
    let mut best = Candidate { token: 0, logit: f64::NEG_INFINITY, weight: 1.0 };
    for (token, &x) in logits.iter().enumerate() {
        let logit = x.as_f64();
        if logit.is_nan() || logit == f64::INFINITY {
            return Err(Error::NotFinite { what: "logits", index: vec![token], value: logit.to_string() });
        }
        if logit > best.logit {
            best = Candidate { token: token as u32, logit, ..best };
        }
    }
    if best.logit == f64::NEG_INFINITY {
        return Err(Error::invalid("logits", "above minus infinity for at least one token", best.logit));
    }
    Ok(best)
}

#[cfg(test)]
mod tests {
    use ndarray::{Array1, array, s};
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::SeedableRng;

    use super::*;

    fn kept(sampler: &Sampler, logits: &Array1<f64>) -> Vec<u32> {
        let best = argmax(logits.view()).unwrap();
        sampler.candidates(logits.view(), best).iter().map(|c| c.token).collect()
    }

    fn sampler(temperature: f64, top_k: Option<usize>, top_p: Option<f64>) -> Sampler {
        Sampler { temperature, top_k, top_p }
    }

    /// Draws 40,000 tokens and compares their counts with probabilities: Pearson's statistic has mean n - 1 and
    /// variance 2 (n - 1), and a token of probability 0 must not come at all.
    fn check_distribution(sampler: &Sampler, logits: &Array1<f64>, weights: &[f64]) {
        const DRAWS: usize = 40_000;
        let mut rng = ChaCha8Rng::seed_from_u64(11);
        let mut counts = vec![0usize; weights.len()];
        for _ in 0..DRAWS {
            counts[sampler.sample(logits.view(), &mut rng).unwrap() as usize] += 1;
        }
        let total: f64 = weights.iter().sum();
        let mut statistic = 0.0;
        for (&count, weight) in counts.iter().zip(weights) {
            let expected = DRAWS as f64 * weight / total;
            if expected == 0.0 {
                assert_eq!(count, 0, "{sampler:?} drew an excluded token: {counts:?}");
            } else {
                statistic += (count as f64 - expected).powi(2) / expected;
            }
        }
        let freedom = weights.iter().filter(|&&w| w > 0.0).count() as f64 - 1.0;
        assert!(statistic <= freedom + 5.0 * (2.0 * freedom).sqrt(), "{sampler:?}: {counts:?}, {statistic}");
    }

    #[test]
    fn draws_follow_the_distribution() {
        let p = [0.1, 0.02, 0.3, 0.08, 0.0, 0.25, 0.25];
        let logits: Array1<f64> = p.iter().map(|p: &f64| p.ln() + 3.0).collect();
        check_distribution(&sampler(1.0, None, None), &logits, &p);
        check_distribution(&sampler(0.5, None, None), &logits, &p.map(|p| p * p));
        check_distribution(&sampler(2.0, None, None), &logits, &p.map(f64::sqrt));
        check_distribution(&sampler(1.0, Some(3), None), &logits, &[0.0, 0.0, 0.3, 0.0, 0.0, 0.25, 0.25]);
        check_distribution(&sampler(1.0, None, Some(0.82)), &logits, &[0.1, 0.0, 0.3, 0.0, 0.0, 0.25, 0.25]);
        // 0.3 / 0.8 and 0.55 / 0.8 of what top-k leaves: the nucleus is measured after it.
        check_distribution(&sampler(1.0, Some(3), Some(0.6)), &logits, &[0.0, 0.0, 0.3, 0.0, 0.0, 0.25, 0.0]);
        // Squared, 0.3 has 0.09 / 0.2318 of the mass: the nucleus is measured after the temperature.
        check_distribution(&sampler(0.5, None, Some(0.38)), &logits, &[0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]);
        check_distribution(&sampler(1.0, Some(1), None), &logits, &[0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn sets_are_exact() {
        let equal = Array1::zeros(8);
        for k in 1..10 {
            let expected: Vec<u32> = (0..k.min(8) as u32).collect();
            assert_eq!(kept(&sampler(0.7, Some(k), None), &equal), expected, "ties go to the lower id");
        }
        for (p, n) in
            [(1e-9, 1), (0.125, 1), (0.126, 2), (0.25, 2), (0.5, 4), (0.874, 7), (0.876, 8), (1.0, 8)]
        {
            let expected: Vec<u32> = (0..n).collect();
            assert_eq!(kept(&sampler(1.0, None, Some(p)), &equal), expected, "p = {p}");
        }
        let logits = array![1.0, 4.0, f64::NEG_INFINITY, 3.0, 4.0, -2.0];
        assert_eq!(kept(&sampler(1.0, None, None), &logits), [0, 1, 3, 4, 5]);
        assert_eq!(kept(&sampler(1.0, None, Some(1.0)), &logits), [1, 4, 3, 0, 5]);
        assert_eq!(kept(&sampler(1.0, Some(9), None), &logits), [1, 4, 3, 0, 5]);
        assert_eq!(kept(&sampler(1.0, Some(1), None), &logits), [1]);
        assert_eq!(kept(&sampler(1.0, Some(3), None), &logits), [1, 4, 3]);
        assert_eq!(kept(&sampler(1.0, Some(3), Some(0.5)), &logits), [1, 4]);
        assert_eq!(kept(&sampler(1.0, None, Some(0.1)), &logits), [1]);
    }

    #[test]
    fn temperature_zero_is_the_first_maximum() {
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        let logits = array![1.0f32, 5.0, f32::NEG_INFINITY, 5.0];
        for (top_k, top_p) in [(None, None), (Some(2), Some(0.5))] {
            let greedy = sampler(0.0, top_k, top_p);
            assert_eq!(greedy.sample(logits.view(), &mut rng), Ok(1));
            assert_eq!(greedy.sample(logits.slice(s![..;-1]), &mut rng), Ok(0));
        }
        assert_eq!(rng, ChaCha8Rng::seed_from_u64(0), "no random number is used");
    }

    #[test]
    fn extreme_numbers_draw_something_possible() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let logits = array![-f64::MAX, f64::NEG_INFINITY, f64::MAX, f64::MAX, 1.0];
        for temperature in [5e-324, 1e-30, 1.0, 1e30] {
            let token = sampler(temperature, None, None).sample(logits.view(), &mut rng).unwrap();
            assert!(token == 2 || token == 3, "{token} at {temperature}");
        }
        let hot = sampler(f64::MAX, Some(4), Some(0.99));
        assert_ne!(hot.sample(logits.view(), &mut rng), Ok(1));
        assert_eq!(Sampler::default().sample(array![-1e30f32].view(), &mut rng), Ok(0));
    }

    #[test]
    fn bad_input_is_refused() {
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        let mut sample = |sampler: Sampler, logits: Array1<f32>| sampler.sample(logits.view(), &mut rng);
        for temperature in [0.0, 1.0] {
            let plain = sampler(temperature, None, None);
            for bad in [f32::NAN, f32::INFINITY] {
                let error = sample(plain, array![f32::NEG_INFINITY, bad, 1.0]).unwrap_err();
                assert!(matches!(error, Error::NotFinite { index, .. } if index == [1]));
            }
            let error = sample(plain, Array1::from_elem(3, f32::NEG_INFINITY)).unwrap_err();
            assert!(matches!(error, Error::Invalid { what: "logits", .. }));
            assert_eq!(sample(plain, array![]), Err(Error::Empty { what: "logits" }));
        }
        let refused = [
            ("temperature", sampler(-1.0, None, None)),
            ("temperature", sampler(f64::NAN, None, None)),
            ("temperature", sampler(f64::INFINITY, None, None)),
            ("top_k", sampler(1.0, Some(0), None)),
            ("top_p", sampler(1.0, None, Some(0.0))),
            ("top_p", sampler(1.0, None, Some(1.1))),
            ("top_p", sampler(1.0, None, Some(f64::NAN))),
        ];
        for (name, sampler) in refused {
            let error = sample(sampler, array![1.0]).unwrap_err();
            assert!(matches!(error, Error::Invalid { what, .. } if what == name), "{error}");
        }
    }
}
