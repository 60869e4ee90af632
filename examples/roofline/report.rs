//! Tables: aligned on the screen, and as Markdown in a file.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::Result;
use crate::say::say;

/// Where lines go as they come, so that a run which is stopped leaves what it measured.
pub struct Report {
    file: Option<File>,
    widths: Vec<usize>,
}

impl Report {
    /// The file begins with date, processor and command line.
    pub fn new(path: Option<&Path>) -> Result<Self> {
        let create =
            |path: &Path| File::create(path).map_err(|e| format!("cannot write {}: {e}", path.display()));
        let mut report = Report { file: path.map(create).transpose()?, widths: vec![] };
        let command = std::env::args().skip(1).collect::<Vec<_>>().join(" ");
        report.paragraph(&format!(
            "{}, {}, transformer-vq {}: `cargo run --release --example roofline -- {command}`",
            today(),
            processor(),
            env!("CARGO_PKG_VERSION"),
        ))?;
        Ok(report)
    }

    /// A title.
    pub fn heading(&mut self, text: &str) -> Result {
        self.both(&format!("## {text}\n"))
    }

    /// A line of text.
    pub fn paragraph(&mut self, text: &str) -> Result {
        self.both(&format!("{text}\n"))
    }

    /// Begins a table; a column is as wide as its title, and at least 7.
    pub fn table(&mut self, columns: &[&str]) -> Result {
        self.widths = columns.iter().map(|title| title.chars().count().max(7)).collect();
        self.widths[0] = self.widths[0].max(26);
        self.row(columns)?;
        let lines = columns.iter().enumerate().map(|(i, _)| if i == 0 { "---" } else { "---:" });
        self.markdown(&format!("|{}|", lines.collect::<Vec<_>>().join("|")))
    }

    /// A row of the table.
    pub fn row<C: AsRef<str>>(&mut self, cells: &[C]) -> Result {
        let cells: Vec<&str> = cells.iter().map(AsRef::as_ref).collect();
        let aligned = cells.iter().zip(&self.widths).enumerate().map(|(i, (cell, &width))| match i {
            0 => format!("{cell:width$}"),
            _ => format!("{cell:>width$}"),
        });
        say(aligned.collect::<Vec<_>>().join("  "));
        self.markdown(&format!("| {} |", cells.join(" | ")))
    }

    /// Ends a table.
    pub fn end(&mut self) -> Result {
        self.both("")
    }

    fn both(&mut self, text: &str) -> Result {
        say(text);
        self.markdown(text)
    }

    fn markdown(&mut self, text: &str) -> Result {
        match &mut self.file {
            Some(file) => Ok(writeln!(file, "{text}")?),
            None => Ok(()),
        }
    }
}

/// As Linux names it, otherwise the architecture.
fn processor() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name =
        text.lines().find(|line| line.starts_with("model name")).and_then(|line| line.split(": ").nth(1));
    name.unwrap_or(std::env::consts::ARCH).trim().to_string()
}

/// Year, month and day, UTC. Years are counted from March, so that the odd day of a leap year is the last.
fn today() -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let days = seconds / 86_400 + 719_468; // since March 1 of the year 0
    let (era, day) = (days / 146_097, days % 146_097); // 400 years
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153; // from March
    let day = day - (153 * month + 2) / 5 + 1;
    let (year, month) = (400 * era + year, if month < 10 { month + 3 } else { month - 9 });
    format!("{:04}-{month:02}-{day:02}", if month <= 2 { year + 1 } else { year })
}
