//! Multi-query associative recall: many pairs, a long pause, then questions.
//!
//! ```text
//! token    v1 k1 v2 k2 ... vP kP   . . . . . . . . .   . k7 . k2 . k9 ...
//! answer                           pause                 v7   v2   v9
//! ```
//!
//! Every key comes once, in random order, with a value at random: nothing but the sequence itself tells the answer. The value
//! stands before its key, so that a key's token has seen its value when it is looked up.

use rand::RngExt;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use transformer_vq::ndarray::{Array1, Array2};

/// Different values; who guesses is right once in so many times.
pub const N_VALUES: usize = 16;
/// Questions of a sequence, at most.
const MOST_QUESTIONS: usize = 64;

/// Sizes of the task.
#[derive(Debug, Clone, Copy)]
pub struct Task {
    /// Keys that exist.
    pub n_keys: usize,
    /// Pairs of a sequence.
    pub n_pairs: usize,
    /// Tokens between the last pair and the first question, at least; half of it more at most.
    pub pause: usize,
}

/// Sequences side by side.
pub struct Batch {
    /// [B, T].
    pub tokens: Array2<u32>,
    /// The value to answer at every token, sequence after sequence [B T]; 0 where nothing is asked.
    pub answers: Array1<u32>,
    /// Where something is asked [B T].
    pub asked: Array1<bool>,
}

impl Task {
    /// Values, then keys, then the pause.
    pub fn vocab_size(&self) -> usize {
        N_VALUES + self.n_keys + 1
    }

    pub fn batch(&self, size: usize, rng: &mut ChaCha8Rng) -> Batch {
        let silence = (self.vocab_size() - 1) as u32;
        let pause = self.pause + rng.random_range(0..=self.pause / 2);
        let questions = self.n_pairs.min(MOST_QUESTIONS);
        let len = 2 * self.n_pairs + pause + 2 * questions;
        let mut tokens = Array2::from_elem((size, len), silence);
        let (mut answers, mut asked) = (Array1::zeros(size * len), Array1::from_elem(size * len, false));
        let mut keys = Vec::from_iter(0..self.n_keys);
        for (b, mut row) in tokens.outer_iter_mut().enumerate() {
            keys.shuffle(rng);
            let pairs = &mut keys[..self.n_pairs];
            let values = Vec::from_iter((0..self.n_keys).map(|_| rng.random_range(0..N_VALUES as u32)));
            let token_of = |key: usize| (N_VALUES + key) as u32;
            for (i, &key) in pairs.iter().enumerate() {
                row[2 * i] = values[key];
                row[2 * i + 1] = token_of(key);
            }
            pairs.shuffle(rng);
            for (i, &key) in pairs[..questions].iter().enumerate() {
                let at = 2 * self.n_pairs + pause + 2 * i + 1;
                row[at] = token_of(key);
                answers[b * len + at] = values[key];
                asked[b * len + at] = true;
            }
        }
        Batch { tokens, answers, asked }
    }
}
