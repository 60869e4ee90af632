//! The curves of a run as an SVG picture: losses above, perplexities below, over the tokens learned from.

use std::error::Error;
use std::ops::Range;

use plotters::prelude::*;

use crate::chart::{Area, Chart, Curve, number};
use crate::log::Row;

const SIZE: (u32, u32) = (900, 720);

pub fn draw(rows: &[Row]) -> Result<String, Box<dyn Error>> {
    let mut svg = String::new();
    let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let (losses, perplexities) = area.split_vertically(SIZE.1 / 2);
    let end = rows.last().map_or(1, |row| row.tokens) as f64;
    let (unit, x_desc) = match end {
        end if end >= 2e6 => (1e6, "million tokens"),
        end if end >= 2e3 => (1e3, "thousand tokens"),
        _ => (1.0, "tokens"),
    };
    let curve = |name: String, value: &dyn Fn(&Row) -> f64| Curve {
        name,
        points: rows.iter().map(|row| (row.tokens as f64 / unit, value(row))).collect(),
    };
    let x = 0.0..end / unit;
    let curves = [
        curve("training".into(), &|row| row.train_bits_per_byte),
        curve("validation".into(), &|row| row.val_bits_per_byte),
    ];
    chart(&losses, "Loss, bits per byte", x.clone(), x_desc, &curves)?;
    let units = rows.first().map_or(0, |row| row.perplexity.len());
    let curves: Vec<Curve> =
        (0..units).map(|unit| curve(unit.to_string(), &|row| row.perplexity[unit])).collect();
    chart(&perplexities, "Codes in use (perplexity), by unit", x, x_desc, &curves)?;
    area.present()?;
    drop((losses, perplexities, area));
    Ok(svg)
}

/// Curves with room above and below.
fn chart(
    area: &Area<'_>,
    title: &str,
    x: Range<f64>,
    x_desc: &str,
    curves: &[Curve],
) -> Result<(), Box<dyn Error>> {
    let points = curves.iter().flat_map(|curve| &curve.points);
    let values = Vec::from_iter(points.map(|point| point.1).filter(|y| y.is_finite()));
    let high = values.iter().copied().fold(0.0, f64::max);
    let low = values.into_iter().fold(high, f64::min);
    let margin = (0.08 * (high - low)).max(0.05 * high).max(1e-3);
    let y = (low - margin).max(0.0)..high + margin;
    Chart { title, x, x_desc, y, y_label: &number }.draw(area, curves)
}
