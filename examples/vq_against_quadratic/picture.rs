//! The curves: bits per byte over tokens, and over seconds.

use std::error::Error;

use plotters::prelude::*;
use transformer_vq::train::Budget;

use crate::chart::{Area, Chart, Curve, number};
use crate::contest::{Point, Results};

/// A chart for the contest at equal tokens, if there was one, and one for all those at equal time.
pub fn draw(results: &[Results]) -> Result<String, Box<dyn Error>> {
    let timed = |results: &&Results| matches!(results.contest.budget, Budget::Seconds(_));
    let (by_time, by_tokens): (Vec<_>, Vec<_>) = results.iter().partition(timed);
    let parts = Vec::from_iter([by_tokens, by_time].into_iter().filter(|results| !results.is_empty()));
    let mut svg = String::new();
    let area = SVGBackend::with_string(&mut svg, (800, 360 * parts.len() as u32)).into_drawing_area();
    area.fill(&WHITE)?;
    for (part, results) in area.split_evenly((parts.len(), 1)).iter().zip(parts) {
        chart(part, &results)?;
    }
    area.present()?;
    drop(area);
    Ok(svg)
}

fn chart(part: &Area<'_>, results: &[&Results]) -> Result<(), Box<dyn Error>> {
    let (title, x_desc, x): (_, _, fn(&Point) -> f64) = match results[0].contest.budget {
        Budget::Steps(_) => ("Equal tokens: bits per byte", "million bytes learned from", |p| p.tokens / 1e6),
        Budget::Seconds(_) => ("Equal time: bits per byte", "seconds of training", |p| p.seconds),
    };
    let mut curves = vec![];
    for result in results {
        for runs in &result.runs {
            let points = runs.mean().iter().map(|point| (x(point), point.bits_per_byte)).collect();
            let name = format!("{}, T = {}", runs.kind, result.contest.sequence_len);
            curves.push(Curve { name, points });
        }
    }
    let all = || curves.iter().flat_map(|curve| &curve.points);
    let end = all().map(|point| point.0).fold(0.0, f64::max);
    let low = all().map(|point| point.1).fold(f64::INFINITY, f64::min);
    let high = all().map(|point| point.1).fold(low, f64::max);
    let margin = 0.05 * (high - low) + 1e-3;
    let y = low - margin..high + margin;
    Chart { title, x: 0.0..end, x_desc, y, y_label: &number }.draw(part, &curves)
}
