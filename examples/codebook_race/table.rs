//! The table of the race: one row per rule where keys are given, a column per estimator where they are learned.

use std::error::Error;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::racers::ESTIMATORS;
use crate::say::say;
use crate::{Curve, Score};

/// The table in Markdown, with the latest scores.
pub fn rows(best: &Score, curves: &[Curve]) -> Vec<String> {
    let row = |name: &str, score: &Score| {
        format!(
            "| {name:<36} | {:>7.4} | {:>6.3} | {:>5.1} % | {:>6.0} | {:>7.4} |",
            score.error,
            score.error / best.error,
            100.0 * score.usage,
            score.perplexity,
            score.nearest_pair,
        )
    };
    let last = |curve: &Curve| curve.points.last().map(|point| point.1);
    let mut rows = vec![
        format!(
            "| {:<36} | {:>7} | {:>6} | {:>7} | {:>6} | {:>7} |",
            "keys given", "error", "/best", "usage", "perpl.", "nearest"
        ),
        "|---|---:|---:|---:|---:|---:|".into(),
        row("k-means++, best of 3", best),
    ];
    let (alone, learned): (Vec<_>, Vec<_>) = curves.iter().partition(|curve| curve.racer.encoder.is_none());
    rows.extend(alone.iter().filter_map(|curve| Some(row(curve.racer.rule, &last(curve)?))));
    if learned.is_empty() {
        return rows;
    }
    rows.push(String::new());
    let names = ESTIMATORS.map(|(name, _)| format!("{name:>13}"));
    rows.push(format!("| {:<36} | {} |", "keys learned: error / best, usage", names.join(" | ")));
    rows.push(format!("|---|{}", "---:|".repeat(names.len())));
    for of_rule in learned.chunks(names.len()) {
        let cell = |curve: &&Curve| {
            let Some(score) = last(curve) else { return format!("{:13}", "") };
            format!("{:>6.3}, {:>3.0} %", score.error / best.error, 100.0 * score.usage)
        };
        let cells = Vec::from_iter(of_rule.iter().map(cell));
        rows.push(format!("| {:<36} | {} |", of_rule[0].racer.rule, cells.join(" | ")));
    }
    rows
}

/// The table on a terminal while the race is on; elsewhere a line now and then.
pub struct Live {
    bars: MultiProgress,
    rows: Vec<ProgressBar>,
    steps: ProgressBar,
}

impl Live {
    pub fn new(best: &Score, curves: &[Curve], steps: u64) -> Result<Self, Box<dyn Error>> {
        let bars = MultiProgress::new();
        let style = ProgressStyle::with_template("{msg}")?;
        let row = |_: &String| bars.add(ProgressBar::new_spinner().with_style(style.clone()));
        let rows = rows(best, curves).iter().map(row).collect();
        let style = ProgressStyle::with_template("{bar:40} {pos} of {len} steps, {eta} left")?;
        let steps = bars.add(ProgressBar::new(steps).with_style(style));
        Ok(Live { bars, rows, steps })
    }

    pub fn tick(&self, step: u64) {
        self.steps.set_position(step + 1);
    }

    pub fn show(&self, step: u64, best: &Score, curves: &[Curve]) {
        let error = |curve: &&Curve| curve.points.last().map_or(f64::INFINITY, |point| point.1.error);
        let racing = curves.iter().filter(|curve| curve.diverged.is_none());
        if self.bars.is_hidden()
            && let Some(first) = racing.min_by(|a, b| error(a).total_cmp(&error(b)))
        {
            let (steps, rule) = (self.steps.length().unwrap_or(0), first.racer.rule);
            let error = error(&first) / best.error;
            say(format!("step {step} of {steps}: {rule} leads, {error:.3} of k-means++"));
        }
        self.rows.iter().zip(rows(best, curves)).for_each(|(bar, row)| bar.set_message(row));
    }

    /// Leaves the terminal as it was.
    pub fn end(&self) {
        self.rows.iter().chain([&self.steps]).for_each(ProgressBar::finish_and_clear);
    }
}
