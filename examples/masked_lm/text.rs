//! Windows of a text in which bytes are hidden.

use std::error::Error;
use std::ops::Range;
use std::path::Path;

#[allow(dead_code)] // what reads tokens one after the other
#[path = "../support/text.rs"]
mod support;

pub use support::bits;

use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use transformer_vq::model::EncoderBatch;
use transformer_vq::ndarray::{Array2, s};
use transformer_vq::train::Corpus;

/// The token behind which a byte is hidden.
pub const MASK: u32 = 256;
/// Bytes of a window.
pub const LEN: usize = 32;
/// The part of the bytes that is hidden.
const HIDDEN: f64 = 0.15;

/// The part to learn from, and the last tenth.
pub struct Text {
    pub training: Vec<u8>,
    pub held_out: Vec<u8>,
}

impl Text {
    pub fn read(data: Option<&Path>) -> Result<Self, Box<dyn Error>> {
        let corpus = support::read_text(data)?;
        let mut training = corpus.read_bytes(0..corpus.n_bytes())?;
        let held_out = (training.len() as f64 * Corpus::VALIDATION_FRACTION) as usize;
        if held_out < LEN {
            return Err(format!("the text is too short: a tenth of it must be {LEN} bytes or more").into());
        }
        let held_out = training.split_off(training.len() - held_out);
        Ok(Text { training, held_out })
    }
}

/// Windows [B, LEN].
pub struct Windows {
    /// As the encoder reads them.
    pub tokens: Array2<u32>,
    /// The bytes.
    pub targets: Array2<u32>,
    /// Which are hidden.
    pub hidden: Array2<bool>,
}

impl Windows {
    /// Windows from anywhere.
    pub fn draw(text: &[u8], n: usize, rng: &mut ChaCha8Rng) -> Self {
        let starts = Vec::from_iter((0..n).map(|_| rng.random_range(0..=text.len() - LEN)));
        let targets = Array2::from_shape_fn((n, LEN), |(b, t)| u32::from(text[starts[b] + t]));
        let hidden = Array2::from_shape_simple_fn((n, LEN), || rng.random_bool(HIDDEN));
        let tokens = Array2::from_shape_fn((n, LEN), |at| if hidden[at] { MASK } else { targets[at] });
        Windows { tokens, targets, hidden }
    }

    /// All of them, and what is hidden to be found.
    pub fn batch(&self) -> EncoderBatch<'_> {
        let (tokens, targets) = (self.tokens.view(), self.targets.view());
        EncoderBatch { tokens, exists: None, targets, counted: Some(self.hidden.view()) }
    }

    /// Some of them.
    pub fn part(&self, windows: Range<usize>) -> Self {
        Windows {
            tokens: self.tokens.slice(s![windows.clone(), ..]).to_owned(),
            targets: self.targets.slice(s![windows.clone(), ..]).to_owned(),
            hidden: self.hidden.slice(s![windows, ..]).to_owned(),
        }
    }

    /// All of them, at most so many at a time.
    pub fn parts(&self, n: usize) -> impl Iterator<Item = Self> + '_ {
        let all = self.tokens.nrows();
        (0..all).step_by(n).map(move |from| self.part(from..all.min(from + n)))
    }

    /// The part of the hidden bytes that are the most frequent byte of `text`, and their mean loss in nats by its frequencies.
    pub fn by_frequency(&self, text: &[u8]) -> (f64, f64) {
        // One more of each, so that none is impossible.
        let mut counts = [1.0; 256];
        text.iter().for_each(|&byte| counts[usize::from(byte)] += 1.0);
        let total: f64 = counts.iter().sum();
        let best = (0..256).max_by(|&a, &b| counts[a].total_cmp(&counts[b])).unwrap_or(0);
        let pairs = self.targets.iter().zip(&self.hidden).filter(|&(_, &hidden)| hidden);
        let (mut right, mut nats, mut n) = (0.0, 0.0, 0.0);
        for (&byte, _) in pairs {
            let byte = byte as usize;
            right += f64::from(u8::from(byte == best));
            nats -= f64::ln(counts[byte] / total);
            n += 1.0;
        }
        (right / f64::max(n, 1.0), nats / f64::max(n, 1.0))
    }
}
