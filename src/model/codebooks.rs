//! The codebooks of a model: what the optimizer does not move of them.
//!
//! A codebook's state is in two places, and in each once: what the optimizer moves is in the unit's parameters, the rest in a
//! [`Learning`]. Together they give the codewords.
//!
//! How codewords begin, if at random: moving averages as published, N(0, 1 / (Hk S)). Otherwise every number of a codeword is from
//! N(0, K^(-1/2)), which is the size of a key's numbers (normalised keys times K^(-1/4)): by itself, or as a basis from
//! N(0, 1/f) times a matrix from N(0, K^(-1/2)), without a bias.
//!
//! Starting from keys and reviving are calls of their own, with the keys of a step of training.

use ndarray::{Array3, Array4, ArrayView2};
use rand_chacha::ChaCha8Rng;

use super::parameters::{fill_normal, standard_normal};
use super::{LearningConfig, ModelConfig, Parameters, Transformer};
use crate::codebook::{Basis, Codebook, Ema, Learning, Smoothing, start};
use crate::compiled::compiled_here;
use crate::error::check_shape;
use crate::{Error, Scalar};

/// What no optimizer moves of one codebook, at its beginning.
pub(super) fn begin(config: &ModelConfig, rng: &mut ChaCha8Rng) -> Result<Learning<f32>, Error> {
    let (n_heads, &ModelConfig { n_codes, d_k, codebook_decay, .. }) = (config.key_heads(), config);
    let mut normal = |width: usize, deviation: f64| {
        let mut numbers = Array3::zeros((n_heads, n_codes, width));
        fill_normal(&mut numbers, deviation, rng);
        numbers
    };
    Ok(match config.learning {
        LearningConfig::Ema { smoothing } => {
            let ema = Ema::random(n_heads, n_codes, d_k, codebook_decay, || standard_normal(rng))?;
            Learning::Ema(ema.with_smoothing(smoothing)?)
        }
        LearningConfig::Gradient(_) => Learning::Gradient,
        LearningConfig::Linear { learned_basis: true, .. } => Learning::Linear(Basis::Learned),
        LearningConfig::Linear { d_basis, .. } => {
            Learning::Linear(Basis::Frozen(normal(d_basis, (d_basis as f64).sqrt().recip())))
        }
        LearningConfig::Frozen => Learning::Frozen(normal(d_k, config.key_scale())),
    })
}

impl<T: Scalar> Transformer<T> {
    /// Starts every codebook at the centres of the keys of a piece, which begins its sequences: k-means++ and at most `steps`
    /// steps of Lloyd, unit by unit, each with the codebooks before it started.
    ///
    /// [`Trainer`](crate::train::Trainer) does this with its first batch if the configuration says so.
    ///
    /// # Shapes
    /// `tokens` [B, T].
    ///
    /// # Errors
    /// [`Error::Empty`] without a token, [`Error::OutOfRange`] for one outside the vocabulary, [`Error::Invalid`] for codewords
    /// that are a basis times a matrix, [`Error::NotFinite`] for keys. The codebooks are then as they were.
    pub fn start_codebooks(
        &mut self,
        tokens: ArrayView2<'_, u32>,
        steps: usize,
        seed: u64,
    ) -> Result<(), Error> {
        compiled_here!(
            T,
            Transformer::<T>::start_codebooks_here,
            fn(&mut Transformer<T>, ArrayView2<'_, u32>, usize, u64) -> Result<(), Error>
        )(self, tokens, steps, seed)
    }

    fn start_codebooks_here(
        &mut self,
        tokens: ArrayView2<'_, u32>,
        steps: usize,
        seed: u64,
    ) -> Result<(), Error> {
        let mut started = self.clone();
        let mut state = self.new_state(tokens.nrows())?;
        self.check(tokens, &state)?;
        let mut x = self.embed(tokens, 0)?;
        let distances = self.distances()?;
        let mut codebooks = 0;
        for (i, states) in state.layers.iter_mut().enumerate() {
            if self.config().unit(i).has_codebook() {
                let prepared = started.prepare_layer(i, distances.view())?;
                let keys = started.layer(i, &prepared).keys(&x, tokens.nrows())?;
                let seed = seed.wrapping_add(i as u64);
                let codewords = start::k_means(keys.view(), self.config().n_codes, None, steps, seed)?;
                started.set_codewords(i, codebooks, codewords)?;
                codebooks += 1;
            }
            let prepared = started.prepare_layer(i, distances.view())?;
            x = started.layer(i, &prepared).push(x, states)?.0;
        }
        *self = started;
        Ok(())
    }

    /// Gives idle codes of every codebook a new start at keys of this step, those of its unit's
    /// [`LayerReport`](super::LayerReport); how many of each.
    ///
    /// To be called after [`update_codebooks`](Self::update_codebooks). [`Trainer`](crate::train::Trainer) does this as the
    /// configuration says.
    ///
    /// # Shapes
    /// `keys` [B, Hk, T, K], one per unit that has a codebook; `mask` [B, T], true where a key counts, without it all do.
    ///
    /// # Errors
    /// Those of [`Codebook::revive`], and [`Error::Shape`] if there are not as many as codebooks. The codebooks are then as they
    /// were.
    pub fn revive_codebooks(
        &mut self,
        keys: &[Array4<T>],
        mask: Option<ArrayView2<'_, bool>>,
        ratio: f64,
        seed: u64,
    ) -> Result<Vec<usize>, Error> {
        compiled_here!(
            T,
            Transformer::<T>::revive_codebooks_here,
            fn(
                &mut Transformer<T>,
                &[Array4<T>],
                Option<ArrayView2<'_, bool>>,
                f64,
                u64,
            ) -> Result<Vec<usize>, Error>
        )(self, keys, mask, ratio, seed)
    }

    fn revive_codebooks_here(
        &mut self,
        keys: &[Array4<T>],
        mask: Option<ArrayView2<'_, bool>>,
        ratio: f64,
        seed: u64,
    ) -> Result<Vec<usize>, Error> {
        let mut codebooks = self.codebooks();
        check_shape("keys", &[codebooks.len()], &[keys.len()])?;
        let revive = |(i, (codebook, keys)): (u64, (&mut Codebook<T>, &Array4<T>))| {
            codebook.revive(keys.view(), mask, ratio, seed.wrapping_add(i))
        };
        let revived = (0..).zip(codebooks.iter_mut().zip(keys)).map(revive).collect::<Result<_, _>>()?;
        self.learning = codebooks.iter().map(|codebook| codebook.learning().clone()).collect();
        Ok(revived)
    }

    /// Writes the codewords of one unit, whose codebook is the n-th.
    fn set_codewords(&mut self, unit: usize, n: usize, codewords: Array3<T>) -> Result<(), Error> {
        match &mut self.learning[n] {
            Learning::Ema(ema) => {
                *ema = Ema::from_codewords(codewords, ema.decay())?.with_smoothing(ema.smoothing())?;
            }
            Learning::Gradient => self.parameters.layers[unit].codebook.codewords = Some(codewords),
            Learning::Frozen(frozen) => *frozen = codewords,
            linear @ Learning::Linear(_) => {
                return Err(Error::invalid("codebooks", "codewords that can be written", kind(linear)));
            }
        }
        Ok(())
    }
}

/// Checks that these codebooks, one per unit that has one, are those of the configuration.
pub(super) fn check<T: Scalar>(
    config: &ModelConfig,
    parameters: &Parameters<T>,
    learning: &[Learning<T>],
) -> Result<(), Error> {
    check_shape("codebooks", &[config.codebook_units().count()], &[learning.len()])?;
    for (unit, learning) in config.codebook_units().zip(learning) {
        let layer = &parameters.layers[unit];
        let fits = match (&config.learning, learning) {
            (LearningConfig::Ema { smoothing }, Learning::Ema(ema)) => {
                ema.smoothing() == *smoothing && ema.decay() == config.codebook_decay
            }
            (LearningConfig::Gradient(_), Learning::Gradient) => true,
            (LearningConfig::Linear { learned_basis, .. }, Learning::Linear(basis)) => {
                *learned_basis == (*basis == Basis::Learned)
            }
            (LearningConfig::Frozen, Learning::Frozen(_)) => true,
            _ => false,
        };
        if !fits {
            let expected = match &config.learning {
                LearningConfig::Ema { smoothing } => averages(*smoothing, config.codebook_decay),
                other => format!("learning by {other:?}"),
            };
            return Err(Error::invalid("codebooks", expected, kind(learning)));
        }
        let (n_heads, n_codes, d_k) = learning.check(&layer.codebook)?;
        let expected = [config.key_heads(), config.n_codes, config.d_k];
        check_shape("codebooks", &expected, &[n_heads, n_codes, d_k])?;
    }
    Ok(())
}

fn averages(smoothing: Smoothing, decay: f64) -> String {
    format!("moving averages with {smoothing:?} and decay {decay}")
}

fn kind<T: Scalar>(learning: &Learning<T>) -> String {
    match learning {
        Learning::Ema(ema) => averages(ema.smoothing(), ema.decay()),
        Learning::Gradient => "by gradient".into(),
        Learning::Linear(Basis::Learned) => "a learned basis".into(),
        Learning::Linear(Basis::Frozen(_)) => "a frozen basis".into(),
        Learning::Frozen(_) => "frozen codewords".into(),
    }
}
