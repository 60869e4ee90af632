//! A text without end, about names and their digits.
//!
//! ```text
//! Q7Q         the digit of Q is 7; again each time that Q comes up
//! ```
//!
//! Lines follow each other without a pause. Which name comes up is drawn anew each time, some often, some seldom; digits are drawn
//! once per text. So a digit can be known where its name has come up before, from the text and from nothing else, and the further a
//! text gets, the less of it is new. A name is one byte, and so is a digit: the first Q asks, the second one, which has seen its
//! digit, is what is found when Q comes up again.

use rand::RngExt;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

/// Names that there are.
pub const N_NAMES: usize = 84;
const N_DIGITS: u8 = 10;

/// A text, written line by line.
pub struct Text {
    /// Names that come up, the most frequent first.
    names: Vec<u8>,
    /// Of each name: how probable it and those before it are, together.
    cumulative: Vec<f64>,
    /// By name.
    digits: [u8; 256],
    mentioned: [bool; 256],
    rng: ChaCha8Rng,
}

/// What a byte of a text is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Role {
    /// The digit of a name that has come up before.
    Answer,
    Other,
}

/// Written bytes, each with its role.
#[derive(Default)]
pub struct Written {
    pub bytes: Vec<u8>,
    pub roles: Vec<Role>,
}

impl Text {
    /// A text about `n_names` names at random, drawn with probabilities that fall as rank^-`power`; and the other names.
    pub fn new(n_names: usize, power: f64, mut rng: ChaCha8Rng) -> (Self, Vec<u8>) {
        let mut names = Vec::from_iter((b'A'..=b'Z').chain(b'a'..=b'z').chain(0xc0..=0xdf));
        debug_assert_eq!(names.len(), N_NAMES);
        names.shuffle(&mut rng);
        let others = names.split_off(n_names);
        let mut sum = 0.0;
        let cumulative = Vec::from_iter((1..=n_names).map(|rank| {
            sum += (rank as f64).powf(-power);
            sum
        }));
        let digits = [(); 256].map(|_| b'0' + rng.random_range(0..N_DIGITS));
        (Text { names, cumulative, digits, mentioned: [false; 256], rng }, others)
    }

    /// Writes a line about whatever name comes up.
    pub fn line(&mut self, out: &mut Written) {
        let drawn = self.rng.random_range(0.0..*self.cumulative.last().expect("some names"));
        let rank = self.cumulative.partition_point(|&sum| sum <= drawn);
        self.about(self.names[rank.min(self.names.len() - 1)], out);
    }

    /// Writes a line about this name.
    pub fn about(&mut self, name: u8, out: &mut Written) {
        let digit = self.digits[usize::from(name)];
        out.push(&[name]);
        out.bytes.push(digit);
        let known = std::mem::replace(&mut self.mentioned[usize::from(name)], true);
        out.roles.push(if known { Role::Answer } else { Role::Other });
        out.push(&[name]);
    }
}

impl Written {
    fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
        self.roles.extend(bytes.iter().map(|_| Role::Other));
    }
}
