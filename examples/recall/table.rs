//! The results: means and spreads over seeds, as a table and as a picture.

use std::error::Error;
use std::fmt;

use plotters::prelude::*;

use crate::Outcome;
use crate::chart::{Chart, Curve, number};
use crate::model::Kind;
use crate::out::Folder;
use crate::say::say;
use crate::statistics::{deviation, mean};

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Kind::Vq { cache: true, .. } => f.write_str("codebook, cache on"),
            Kind::Vq { cache: false, .. } => f.write_str("codebook, cache off"),
            Kind::Quadratic => f.write_str("quadratic"),
            Kind::Linear { d_k } => write!(f, "linear, keys of {d_k}"),
        }
    }
}

/// One setting over all seeds.
pub struct Row {
    n_pairs: usize,
    kind: Kind,
    /// Of the codebook, or of the one whose bytes linear attention has.
    n_codes: Option<usize>,
    accuracies: Vec<f64>,
    bytes: Option<usize>,
    /// Means of the share of codes in use and of the relative error.
    codebook: Option<(f64, f64)>,
}

impl Row {
    pub fn all(outcomes: &[Outcome]) -> Vec<Row> {
        let mut rows: Vec<Row> = vec![];
        for outcome in outcomes {
            let run = outcome.run;
            let n_codes = match run.kind {
                Kind::Vq { n_codes, .. } => Some(n_codes),
                _ => run.codes_of_state,
            };
            let same =
                |row: &&mut Row| (row.n_pairs, row.kind, row.n_codes) == (run.n_pairs, run.kind, n_codes);
            let row = match rows.iter_mut().find(same) {
                Some(row) => row,
                None => {
                    let (n_pairs, kind, bytes) = (run.n_pairs, run.kind, outcome.bytes);
                    let codebook = outcome.codebook.map(|_| (0.0, 0.0));
                    rows.push(Row { n_pairs, kind, n_codes, accuracies: vec![], bytes, codebook });
                    rows.last_mut().expect("just pushed")
                }
            };
            row.accuracies.push(100.0 * outcome.accuracy);
            if let (Some(sum), Some(of_run)) = (&mut row.codebook, outcome.codebook) {
                *sum = (sum.0 + of_run.0, sum.1 + of_run.1);
            }
        }
        let order = |kind: Kind| match kind {
            Kind::Vq { cache: true, .. } => 0,
            Kind::Vq { .. } => 1,
            Kind::Quadratic => 2,
            Kind::Linear { .. } => 3,
        };
        rows.sort_by_key(|row| (row.n_pairs, order(row.kind), row.n_codes));
        rows
    }

    fn mean(&self) -> f64 {
        mean(&self.accuracies)
    }
}

const HEAD: &str = "| pairs | attention | codes | accuracy, % | state, bytes | codes in use | relative error |\n\
                    |---:|---|---:|---:|---:|---:|---:|";

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let codes = match (self.kind, self.n_codes) {
            (Kind::Vq { .. }, Some(n)) => n.to_string(),
            (_, Some(n)) => format!("state of {n}"),
            (_, None) => String::new(),
        };
        write!(f, "| {} | {} | {codes} | {:.1}", self.n_pairs, self.kind, self.mean())?;
        if let Some(deviation) = deviation(&self.accuracies) {
            write!(f, " ± {deviation:.1}")?;
        }
        match self.bytes {
            Some(bytes) => write!(f, " | {bytes}")?,
            None => write!(f, " | grows")?,
        }
        match self.codebook {
            Some((usage, error)) => {
                let n = self.accuracies.len() as f64;
                write!(f, " | {:.0} % | {:.3} |", 100.0 * usage / n, error / n)
            }
            None => write!(f, " | | |"),
        }
    }
}

/// Writes the table, with its picture, into a folder, and prints it.
pub fn write(rows: &[Row], steps: u64, folder: &Folder) -> Result<(), Box<dyn Error>> {
    let mut table = format!("{HEAD}\n");
    rows.iter().for_each(|row| table += &format!("{row}\n"));
    folder.write("table.md", &table)?;
    folder.write("recall.svg", draw(rows, steps)?)?;
    say(format!("{table}\ninto {folder}"));
    Ok(())
}

/// A chart per number of pairs: accuracy over codes. What has no codes is a level line.
fn draw(rows: &[Row], steps: u64) -> Result<String, Box<dyn Error>> {
    let mut pairs = Vec::from_iter(rows.iter().map(|row| row.n_pairs));
    pairs.dedup();
    let codes = Vec::from_iter(rows.iter().filter_map(|row| row.n_codes).map(|n| n as f64));
    let low = codes.iter().copied().fold(f64::INFINITY, f64::min);
    let high = codes.iter().copied().fold(low + 1.0, f64::max);
    let mut svg = String::new();
    let area = SVGBackend::with_string(&mut svg, (800, 320 * pairs.len() as u32)).into_drawing_area();
    area.fill(&WHITE)?;
    for (part, &n_pairs) in area.split_evenly((pairs.len(), 1)).iter().zip(&pairs) {
        let of = |wanted: &dyn Fn(&&Row) -> bool| {
            Vec::from_iter(rows.iter().filter(|row| row.n_pairs == n_pairs).filter(wanted))
        };
        let over_codes = |name: &str, rows: Vec<&Row>| {
            let points = rows.iter().filter_map(|row| Some((row.n_codes? as f64, row.mean()))).collect();
            Curve { name: name.into(), points }
        };
        let level = |name: &str, rows: Vec<&Row>| {
            let points = rows.iter().flat_map(|row| [(low, row.mean()), (high, row.mean())]).collect();
            Curve { name: name.into(), points }
        };
        let is_linear = |row: &&Row| matches!(row.kind, Kind::Linear { .. });
        let curves = [
            over_codes("cache on", of(&|row| matches!(row.kind, Kind::Vq { cache: true, .. }))),
            level("cache off", of(&|row| matches!(row.kind, Kind::Vq { cache: false, .. }))),
            level("quadratic", of(&|row| row.kind == Kind::Quadratic)),
            level("linear, same keys", of(&|row| is_linear(row) && row.n_codes.is_none())),
            level("linear, same bytes", of(&|row| is_linear(row) && row.n_codes.is_some())),
        ];
        let title = format!("{n_pairs} pairs: answers right, percent, after {steps} steps");
        let chart = Chart { title: &title, x: low..high, x_desc: "codes", y: 0.0..105.0, y_label: &number };
        chart.draw(part, &curves)?;
    }
    area.present()?;
    drop(area);
    Ok(svg)
}
