//! The curves of a run as an SVG picture: losses above, perplexities below, over the bytes learned from.

use std::error::Error;
use std::ops::Range;

use plotters::coord::Shift;
use plotters::prelude::*;

use crate::log::Row;

const SIZE: (u32, u32) = (900, 720);
const FONT: &str = "sans-serif";
/// Readable on white and apart from each other, also for the colour-blind (Okabe and Ito).
const COLORS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
    BLACK,
];

/// A name and its points.
type Curve = (String, Vec<(f64, f64)>);

pub fn draw(rows: &[Row]) -> Result<String, Box<dyn Error>> {
    let mut svg = String::new();
    let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let (losses, perplexities) = area.split_vertically(SIZE.1 / 2);
    let end = rows.last().map_or(1, |row| row.tokens) as f64;
    let (unit, x_desc) = match end {
        end if end >= 2e6 => (1e6, "million bytes"),
        end if end >= 2e3 => (1e3, "thousand bytes"),
        _ => (1.0, "bytes"),
    };
    let curve = |name: String, value: &dyn Fn(&Row) -> f64| -> Curve {
        (name, rows.iter().map(|row| (row.tokens as f64 / unit, value(row))).collect())
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

/// A number on an axis, without zeros that say nothing.
fn label(x: &f64) -> String {
    format!("{x:.3}").trim_end_matches('0').trim_end_matches('.').to_string()
}

/// A title with the legend beside it, where no curve comes, and the curves below.
fn chart(
    area: &DrawingArea<SVGBackend<'_>, Shift>,
    title: &str,
    x: Range<f64>,
    x_desc: &str,
    curves: &[Curve],
) -> Result<(), Box<dyn Error>> {
    let (head, body) = area.split_vertically(38);
    head.draw(&Text::new(title.to_string(), (62, 14), (FONT, 18).into_font().style(FontStyle::Bold)))?;
    // Paler each time round.
    let color = |i: usize| COLORS[i % COLORS.len()].mix(0.5f64.powi((i / COLORS.len()) as i32));
    // Entries as wide as their names, or narrower if there are many.
    let longest = curves.iter().map(|(name, _)| name.len() as i32).max().unwrap_or(0);
    let width = (longest * 9 + 44).min(470 / curves.len().max(1) as i32);
    for (i, (name, _)) in curves.iter().enumerate() {
        let left = SIZE.0 as i32 - 24 - width * (curves.len() - i) as i32;
        let line = [(left, 23), (left + width.min(64) / 3, 23)];
        head.draw(&PathElement::new(line, color(i).stroke_width(3)))?;
        let at = (left + width.min(64) / 3 + 4, 16);
        head.draw(&Text::new(name.clone(), at, (FONT, 14)))?;
    }

    let values =
        || curves.iter().flat_map(|(_, points)| points).map(|point| point.1).filter(|y| y.is_finite());
    let (low, high) = (values().fold(f64::INFINITY, f64::min), values().fold(0.0, f64::max));
    let low = low.min(high);
    let margin = (0.08 * (high - low)).max(0.05 * high).max(1e-3);
    let mut chart = ChartBuilder::on(&body)
        .margin_right(24)
        .margin_bottom(8)
        .x_label_area_size(44)
        .y_label_area_size(60)
        .build_cartesian_2d(x, (low - margin).max(0.0)..high + margin)?;
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .bold_line_style(BLACK.mix(0.12))
        .x_desc(x_desc)
        .x_labels(10)
        .y_labels(8)
        .x_label_formatter(&label)
        .y_label_formatter(&label)
        .label_style((FONT, 14))
        .axis_desc_style((FONT, 14))
        .draw()?;
    for (i, (_, points)) in curves.iter().enumerate() {
        let points = || points.iter().copied().filter(|point| point.1.is_finite());
        chart.draw_series(LineSeries::new(points(), color(i).stroke_width(2)))?;
        // A single measurement is not a line yet.
        chart.draw_series(points().map(|point| Circle::new(point, 3, color(i).filled())))?;
    }
    Ok(())
}
