//! What a run leaves to look at: a CSV file of its measurements and a picture of its curves.
//!
//! | column of `log.csv` | |
//! |---|---|
//! | `step` | steps taken |
//! | `seconds` | of training so far, over all sittings |
//! | `tokens` | learned from, each as often as it was read |
//! | `learning_rate` | of this step |
//! | `tokens_per_second` | since the last row |
//! | `train_bits_per_byte` | mean over the steps since the last row |
//! | `val_bits_per_byte` | on the first 16,384 tokens of what is held out |
//! | `perplexity_0`, ... | of the codes of this step's batch, one per unit |

use std::error::Error;
use std::fmt;
use std::path::{Path, PathBuf};

use transformer_vq::model::write_atomically;

use crate::picture;

/// One measurement.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    pub step: u64,
    pub seconds: f64,
    pub tokens: u64,
    pub learning_rate: f64,
    pub tokens_per_second: f64,
    pub train_bits_per_byte: f64,
    pub val_bits_per_byte: f64,
    pub perplexity: Vec<f64>,
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "step {:6}   train {:.3}   validation {:.3} bits per byte   {:6.0} tokens/s   perplexity of codes {:.0?}",
            self.step,
            self.train_bits_per_byte,
            self.val_bits_per_byte,
            self.tokens_per_second,
            self.perplexity,
        )
    }
}

/// All measurements of a run; the files are written anew with every row.
#[derive(Debug)]
pub struct Log {
    csv: PathBuf,
    picture: PathBuf,
    columns: Vec<String>,
    rows: Vec<Row>,
}

const COLUMNS: [&str; 7] = [
    "step",
    "seconds",
    "tokens",
    "learning_rate",
    "tokens_per_second",
    "train_bits_per_byte",
    "val_bits_per_byte",
];

impl Log {
    /// The log of a run in `folder`, with the rows of up to `step` that an earlier sitting has written.
    pub fn open(folder: &Path, step: u64, n_units: usize) -> Result<Self, Box<dyn Error>> {
        let perplexities = (0..n_units).map(|unit| format!("perplexity_{unit}"));
        let columns = COLUMNS.map(String::from).into_iter().chain(perplexities).collect();
        let mut log =
            Log { csv: folder.join("log.csv"), picture: folder.join("curves.svg"), columns, rows: vec![] };
        if step > 0 && log.csv.exists() {
            log.read().map_err(|e| format!("{}: {e}", log.csv.display()))?;
            log.rows.retain(|row| row.step <= step);
        }
        Ok(log)
    }

    fn read(&mut self) -> Result<(), Box<dyn Error>> {
        let mut reader = csv::Reader::from_path(&self.csv)?;
        if !reader.headers()?.iter().eq(&self.columns) {
            return Err("not the columns of this run".into());
        }
        for record in reader.deserialize::<Vec<f64>>() {
            let record = record?;
            self.rows.push(Row {
                step: record[0] as u64,
                seconds: record[1],
                tokens: record[2] as u64,
                learning_rate: record[3],
                tokens_per_second: record[4],
                train_bits_per_byte: record[5],
                val_bits_per_byte: record[6],
                perplexity: record[COLUMNS.len()..].to_vec(),
            });
        }
        Ok(())
    }

    pub fn push(&mut self, row: Row) -> Result<(), Box<dyn Error>> {
        self.rows.push(row);
        self.write_csv()?;
        let svg = picture::draw(&self.rows)?;
        write_atomically(&self.picture, |out| out.write_all(svg.as_bytes()))?;
        Ok(())
    }

    fn write_csv(&self) -> Result<(), Box<dyn Error>> {
        let mut writer = csv::Writer::from_writer(vec![]);
        writer.write_record(&self.columns)?;
        for row in &self.rows {
            let numbers = [
                row.step as f64,
                row.seconds,
                row.tokens as f64,
                row.learning_rate,
                row.tokens_per_second,
                row.train_bits_per_byte,
                row.val_bits_per_byte,
            ];
            writer.write_record(numbers.iter().chain(&row.perplexity).map(f64::to_string))?;
        }
        let bytes = writer.into_inner()?;
        write_atomically(&self.csv, |out| out.write_all(&bytes))?;
        Ok(())
    }
}
