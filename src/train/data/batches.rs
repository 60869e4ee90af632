//! Long training sequences from random places of a corpus, fed in consecutive updates.
//!
//! ```text
//! text      ....[start_b ............................................ start_b + sequence_len].....
//! update    first |  update_len tokens   |  update_len tokens   |  update_len tokens   |
//! targets          one token later, so a sequence touches sequence_len + 1 tokens
//! ```
//!
//! The places come from a stream of random numbers that can be entered anywhere, so that nothing but the number of
//! updates has to be kept to continue a run.

use std::ops::Range;

use ndarray::Array2;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::Corpus;
use crate::Error;
use crate::error::checked_len;

/// How training sequences are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BatchConfig {
    /// Sequences side by side.
    pub batch_size: usize,
    /// Tokens of a sequence, a multiple of `update_len`.
    pub sequence_len: usize,
    /// Tokens of a sequence that one update takes.
    pub update_len: usize,
    /// Decides, alone, which sequences are drawn.
    pub seed: u64,
}

/// What one update learns from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// What is fed, [B, update_len].
    pub tokens: Array2<u32>,
    /// The tokens after them, [B, update_len].
    pub targets: Array2<u32>,
    /// Whether new sequences begin here, so that the state carried over must be forgotten.
    pub first: bool,
}

/// An endless supply of training batches. Where it stands is one number, so a run that was cut off continues from
/// `(seed, position)` with the very same batches.
#[derive(Debug, Clone)]
pub struct Batches {
    corpus: Corpus,
    range: Range<usize>,
    config: BatchConfig,
    position: u64,
}

/// The random stream of the sequences' places, apart from every other use of the same seed.
const STREAM: u64 = u64::from_be_bytes(*b"sequence");

impl Batches {
    /// Draws sequences from this range of the corpus.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a size is 0, the sequence is not a multiple of the update, or the range is not inside the
    /// text or is shorter than `sequence_len + 1` tokens. [`Error::TooLarge`] if no machine could hold a batch.
    pub fn new(corpus: Corpus, range: Range<usize>, config: BatchConfig) -> Result<Self, Error> {
        let BatchConfig { batch_size, sequence_len, update_len, .. } = config;
        for (what, size) in
            [("batch_size", batch_size), ("update_len", update_len), ("sequence_len", sequence_len)]
        {
            if size == 0 {
                return Err(Error::invalid(what, "at least 1", size));
            }
        }
        if sequence_len % update_len != 0 {
            let expected = format!("a multiple of update_len = {update_len}");
            return Err(Error::invalid("sequence_len", expected, sequence_len));
        }
        checked_len("tokens", &[batch_size, update_len])?;
        corpus.check_range(&range)?;
        if range.len() <= sequence_len {
            let expected = format!("longer than the {sequence_len} tokens of sequence_len");
            let got = format!("{range:?}, which is {} tokens", range.len());
            return Err(Error::invalid("range", expected, got));
        }
        Ok(Batches { corpus, range, config, position: 0 })
    }

    /// Updates handed out so far.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Goes to where this many updates have been handed out, at no cost. In the middle of a sequence, the next batch is
    /// not a `first` one: it wants the state that was carried there.
    pub fn seek(&mut self, position: u64) {
        self.position = position;
    }

    /// The next batch.
    ///
    /// # Errors
    /// Those of [`Corpus::read`]: a file that is no longer what it was. The batch is then still the next.
    pub fn next_batch(&mut self) -> Result<Batch, Error> {
        let BatchConfig { batch_size, sequence_len, update_len, .. } = self.config;
        let updates_per_sequence = (sequence_len / update_len) as u64;
        let sequence = self.position / updates_per_sequence;
        let update = self.position % updates_per_sequence;
        let rows = self.starts(sequence).map(|start| {
            let start = start + update as usize * update_len;
            self.corpus.read(start..start + update_len + 1)
        });
        let rows: Vec<Vec<u32>> = rows.collect::<Result<_, Error>>()?;
        self.position = self.position.wrapping_add(1);
        let read =
            |later: usize| Array2::from_shape_fn((batch_size, update_len), |(row, i)| rows[row][i + later]);
        Ok(Batch { tokens: read(0), targets: read(1), first: update == 0 })
    }

    /// Where the rows of this sequence begin: the random numbers of row b of sequence n are number n B + b of the
    /// stream, so that no sequence depends on those before it.
    fn starts(&self, sequence: u64) -> impl Iterator<Item = usize> {
        let BatchConfig { batch_size, sequence_len, seed, .. } = self.config;
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(STREAM);
        const WORDS: u128 = 2; // u32 words in the u64 that each row takes
        rng.set_word_pos(u128::from(sequence) * batch_size as u128 * WORDS);
        let places = (self.range.len() - sequence_len) as u128;
        let first = self.range.start;
        // The high half of the product is uniform up to places / 2^64, and takes the same amount of the stream always.
        (0..batch_size).map(move |_| first + ((u128::from(rng.next_u64()) * places) >> 64) as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A text whose bytes tell where they are, up to 251.
    fn text(len: usize) -> Corpus {
        Corpus::from_bytes((0..len).map(|i| (i % 251) as u8).collect()).unwrap()
    }

    fn config(batch_size: usize, sequence_len: usize, update_len: usize) -> BatchConfig {
        BatchConfig { batch_size, sequence_len, update_len, seed: 5 }
    }

    fn batches(n: usize, batches: &mut Batches) -> Vec<Batch> {
        (0..n).map(|_| batches.next_batch().unwrap()).collect()
    }

    #[test]
    fn sequences_continue_from_update_to_update_and_stay_in_range() {
        for (range, batch_size, sequence_len, update_len) in
            [(10..40, 3, 12, 4), (0..250, 2, 8, 8), (7..9, 1, 1, 1), (20..25, 4, 4, 1), (100..109, 2, 8, 2)]
        {
            let config = config(batch_size, sequence_len, update_len);
            let mut all = Batches::new(text(250), range.clone(), config).unwrap();
            let mut seen = [false; 250];
            for _ in 0..400 {
                let sequence = batches(sequence_len / update_len, &mut all);
                for (n, batch) in sequence.iter().enumerate() {
                    assert_eq!(batch.first, n == 0);
                    assert_eq!(batch.tokens.dim(), (batch_size, update_len));
                    assert_eq!(batch.targets, &batch.tokens + 1, "one byte later");
                    for (row, tokens) in batch.tokens.outer_iter().enumerate() {
                        let start = sequence[0].tokens[[row, 0]] as usize + n * update_len;
                        assert!(tokens.iter().copied().eq(start as u32..(start + update_len) as u32));
                        seen[start] |= n == 0;
                        assert!(range.contains(&start) && range.contains(&(start + update_len)));
                    }
                }
            }
            let places = range.start..range.end - sequence_len;
            for (place, &seen) in seen.iter().enumerate() {
                assert!(seen || !places.contains(&place) || places.len() > 100, "never began at {place}");
                assert!(!seen || places.contains(&place));
            }
        }
    }

    #[test]
    fn seeking_gives_the_same_batches_as_running_through() {
        let mut all = Batches::new(text(1000), 0..900, config(3, 12, 4)).unwrap();
        let run = batches(20, &mut all);
        assert_eq!(all.position(), 20);
        for k in (0..20).rev() {
            all.seek(k as u64);
            assert_eq!(batches(20 - k, &mut all), run[k..]);
            let mut fresh = Batches::new(text(1000), 0..900, config(3, 12, 4)).unwrap();
            fresh.seek(k as u64);
            assert_eq!(fresh.next_batch().as_ref(), Ok(&run[k]));
        }
        let other = BatchConfig { seed: 6, ..config(3, 12, 4) };
        assert_ne!(batches(20, &mut Batches::new(text(1000), 0..900, other).unwrap()), run);
        all.seek(u64::MAX);
        all.next_batch().unwrap();
        assert_eq!(all.position(), 0);
    }

    #[test]
    fn places_are_pinned_distinct_and_uniform() {
        let all = Batches::new(text(100_000), 0..100_000, config(4, 100, 10)).unwrap();
        let starts: Vec<usize> = (0..5_000).flat_map(|n| all.starts(n)).collect();
        assert_eq!(starts[..4], [32_609, 46_722, 62_751, 69_886]);
        let mut tenths = [0f64; 10];
        starts.iter().for_each(|start| tenths[start / 9_990] += 1.0);
        let statistic: f64 = tenths.iter().map(|n| (n - 2000.0).powi(2) / 2000.0).sum();
        assert!(statistic < 9.0 + 5.0 * 18f64.sqrt(), "{tenths:?}");
        let mut distinct = starts.clone();
        distinct.sort_unstable();
        distinct.dedup();
        assert!(distinct.len() > 17_500, "{} of 20,000 places, expected 18,100", distinct.len());
    }

    #[test]
    fn impossible_sizes_are_refused() {
        let refused = |range: Range<usize>, config: BatchConfig, name: &str| {
            let error = Batches::new(text(50), range, config).unwrap_err();
            assert!(matches!(&error, Error::Invalid { what, .. } if *what == name), "{error}");
            error.to_string()
        };
        refused(0..50, config(0, 8, 4), "batch_size");
        refused(0..50, config(1, 0, 4), "sequence_len");
        refused(0..50, config(1, 8, 0), "update_len");
        refused(0..50, config(1, 9, 4), "sequence_len");
        refused(0..51, config(1, 8, 4), "range");
        #[allow(clippy::reversed_empty_ranges)] // the mistake under test
        refused(9..3, config(1, 8, 4), "range");
        refused(0..0, config(1, 8, 4), "range");
        refused(0..50, config(1, usize::MAX, usize::MAX / 16), "sequence_len");
        let message = refused(10..18, config(1, 8, 4), "range");
        assert!(message.contains("8 tokens") && message.contains("10..18"), "{message}");
        assert!(Batches::new(text(50), 10..19, config(1, 8, 4)).is_ok());
        let error = Batches::new(text(50), 0..50, config(usize::MAX, 8, 4)).unwrap_err();
        assert!(matches!(error, Error::TooLarge { .. }));
    }
}
