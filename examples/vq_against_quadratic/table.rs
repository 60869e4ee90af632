//! The results as rows of a table, and what they say of the two claims.

use std::fmt;

use transformer_vq::train::Budget;

use crate::contest::{Point, Results, Runs};
use crate::statistics::mean;

pub const HEAD: &str = "| T | the same | attention | bits per byte | least to most | over quadratic | least to most | bytes seen | seconds |\n\
                        |---:|---|---|---:|---:|---:|---:|---:|---:|";

/// How much of quadratic attention's bits a codebook may cost at equal tokens, percent.
const ALLOWED: f64 = 1.5;

/// Mean, least and most.
struct Spread {
    mean: f64,
    least: f64,
    most: f64,
}

impl Spread {
    fn of(numbers: &[f64]) -> Spread {
        Spread {
            mean: mean(numbers),
            least: numbers.iter().copied().fold(f64::INFINITY, f64::min),
            most: numbers.iter().copied().fold(f64::NEG_INFINITY, f64::max),
        }
    }
}

fn bits(runs: &Runs) -> Vec<f64> {
    runs.last().map(|point| point.bits_per_byte).collect()
}

impl Results {
    /// The bits of the codebook over those of quadratic attention, in percent, seed by seed.
    fn over_quadratic(&self) -> Vec<f64> {
        let [codebook, quadratic] = &self.runs;
        let pairs = bits(codebook).into_iter().zip(bits(quadratic));
        pairs.map(|(codebook, quadratic)| 100.0 * (codebook / quadratic - 1.0)).collect()
    }

    /// Whether the claim holds with every seed.
    pub fn verdict(&self) -> String {
        let Spread { mean, least, most } = Spread::of(&self.over_quadratic());
        let (what, bound) = match self.contest.budget {
            Budget::Steps(_) => (format!("within {ALLOWED} % of quadratic at equal tokens"), ALLOWED),
            Budget::Seconds(seconds) => (format!("ahead of quadratic after {seconds} seconds"), 0.0),
        };
        let holds = match (most <= bound, mean <= bound, least <= bound) {
            (true, _, _) => "with every seed",
            (_, true, _) => "in the mean, not with every seed",
            (_, _, true) => "with some seed, not in the mean",
            _ => "with no seed",
        };
        format!("- T = {}, codebook {what}: {holds}.\n", self.contest.sequence_len)
    }
}

impl fmt::Display for Results {
    /// A row for each kind.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let same = match self.contest.budget {
            Budget::Steps(_) => "tokens",
            Budget::Seconds(_) => "time",
        };
        let over = Spread::of(&self.over_quadratic());
        for (runs, is_codebook) in self.runs.iter().zip([true, false]) {
            let Spread { mean: bits, least, most } = Spread::of(&bits(runs));
            write!(f, "| {} | {same} | {} ", self.contest.sequence_len, runs.kind)?;
            write!(f, "| {bits:.4} | {least:.4} to {most:.4} ")?;
            match is_codebook {
                true => write!(f, "| {:+.2} % | {:+.2} to {:+.2} % ", over.mean, over.least, over.most)?,
                false => f.write_str("| | ")?,
            }
            let mean = |of: fn(&Point) -> f64| mean(&Vec::from_iter(runs.last().map(of)));
            let (tokens, seconds) = (mean(|point| point.tokens), mean(|point| point.seconds));
            writeln!(f, "| {tokens:.0} | {seconds:.1} |")?;
        }
        Ok(())
    }
}
