//! Reading a text that is much longer than any that was learned from.

use std::f64::consts::LN_2;
use std::ops::Range;
use std::time::Instant;

use indicatif::ProgressBar;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use transformer_vq::Error;
use transformer_vq::model::{ModelState, Prepared, Transformer};
use transformer_vq::ndarray::{ArrayView1, Axis};
use transformer_vq::ops::cross_entropy;

use crate::learn::POWER;
use crate::process::resident;
use crate::statistics::{mean, median};
use crate::text::{N_NAMES, Role, Text, Written};

/// Facts told at the beginning that are asked about at each distance.
pub const KEPT_PER_PLACE: usize = 12;
/// Bytes that are read at once.
const PIECE: usize = 250;
/// Bytes that are read one by one at each of so many places.
const SINGLE: usize = 200;
const N_PLACES: usize = 10;

/// What came of one stream.
#[derive(Default)]
pub struct Streamed {
    /// Of every piece: position of its end, bits per byte.
    pub bits: Vec<(usize, f64)>,
    /// Of digits of names that come up again and again: position, bits.
    pub answers: Vec<(usize, f64)>,
    /// Of each distance: how many of the kept facts were answered with a probability above one half, and mean bits.
    pub kept: Vec<Kept>,
    pub places: Vec<Place>,
}

/// Questions about facts told at the beginning, asked for the first time.
pub struct Kept {
    pub distance: usize,
    pub right: usize,
    pub bits: f64,
}

/// Time and memory at one position.
pub struct Place {
    pub position: usize,
    /// Of a byte read by itself, median, microseconds.
    pub single: f64,
    /// Bytes per second, read in pieces, since the last place.
    pub per_second: f64,
    /// Bytes of the state.
    pub state: usize,
    /// Bytes of the process, where the system tells.
    pub resident: Option<usize>,
}

/// A text in which `distances.len()` groups of facts are told first, and asked about at these distances.
pub fn text(distances: &[usize], len: usize, seed: u64) -> (Written, Vec<(usize, Range<usize>)>) {
    let n_kept = KEPT_PER_PLACE * distances.len();
    let rng = ChaCha8Rng::seed_from_u64(seed.wrapping_add(1 << 40));
    let (mut text, kept) = Text::new(N_NAMES - n_kept, POWER, rng);
    let (mut written, mut asked) = (Written::default(), vec![]);
    kept.iter().for_each(|&name| text.about(name, &mut written));
    for (&distance, names) in distances.iter().zip(kept.chunks(KEPT_PER_PLACE)) {
        while written.bytes.len() < distance {
            text.line(&mut written);
        }
        let begin = written.bytes.len();
        names.iter().for_each(|&name| text.about(name, &mut written));
        asked.push((distance, begin..written.bytes.len()));
    }
    while written.bytes.len() <= len {
        text.line(&mut written);
    }
    (written, asked)
}

/// Reads a text as one stream, and measures on the way.
pub fn read(
    model: &Transformer,
    (written, asked): &(Written, Vec<(usize, Range<usize>)>),
    bar: &ProgressBar,
) -> Result<Streamed, Error> {
    let mut reader = Reader::new(model, written)?;
    let mut streamed = Streamed::default();
    let len = written.bytes.len() - 1;
    for place in 1..=N_PLACES {
        let position = len * place / N_PLACES;
        let (begin, begun) = (reader.position, Instant::now());
        while reader.position + SINGLE < position {
            let first = reader.position;
            reader.read(PIECE.min(position - SINGLE - first))?;
            let bits = &reader.bits[first + 1..=reader.position];
            streamed.bits.push((reader.position, mean(bits)));
            bar.inc(bits.len() as u64);
            bar.set_message(format!("reading, at byte {}", reader.position));
        }
        let per_second = (reader.position - begin) as f64 / begun.elapsed().as_secs_f64();
        let mut times = vec![];
        while reader.position < position {
            let begun = Instant::now();
            reader.read(1)?;
            times.push(1e6 * begun.elapsed().as_secs_f64());
        }
        bar.inc(times.len() as u64);
        let single = median(times);
        let state = reader.state.size_in_bytes();
        streamed.places.push(Place { position, single, per_second, state, resident: resident() });
    }
    let answers = |range: Range<usize>| range.filter(|&i| written.roles[i] == Role::Answer);
    for (distance, range) in asked {
        let bits = Vec::from_iter(answers(range.clone()).map(|i| reader.bits[i]));
        let right = bits.iter().filter(|&&bits| bits < 1.0).count();
        streamed.kept.push(Kept { distance: *distance, right, bits: mean(&bits) });
    }
    let ordinary = answers(0..len).filter(|i| asked.iter().all(|(_, range)| !range.contains(i)));
    streamed.answers = ordinary.map(|i| (i, reader.bits[i])).collect();
    Ok(streamed)
}

struct Reader<'m> {
    model: Prepared<'m>,
    state: ModelState<f32>,
    tokens: Vec<u32>,
    /// Of every byte read but the first.
    bits: Vec<f64>,
    position: usize,
}

impl<'m> Reader<'m> {
    fn new(model: &'m Transformer, written: &Written) -> Result<Self, Error> {
        let tokens = written.bytes.iter().map(|&byte| u32::from(byte)).collect();
        Ok(Reader {
            model: model.prepare()?,
            state: model.new_state(1)?,
            tokens,
            bits: vec![0.0],
            position: 0,
        })
    }

    /// Reads so many bytes at once, and predicts the byte after each.
    fn read(&mut self, n: usize) -> Result<(), Error> {
        let row = |tokens| ArrayView1::<u32>::from(tokens);
        let (tokens, targets) = (&self.tokens[self.position..][..n], &self.tokens[self.position + 1..][..n]);
        let (logits, _) = self.model.push(row(tokens).insert_axis(Axis(0)), &mut self.state)?;
        let log_p = cross_entropy::log_probabilities(logits.index_axis(Axis(0), 0), row(targets))?;
        self.bits.extend(log_p.iter().map(|&log_p| -f64::from(log_p) / LN_2));
        self.position += n;
        Ok(())
    }
}
