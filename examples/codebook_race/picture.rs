//! The race as an SVG picture: error above, usage below, over steps.

use std::error::Error;
use std::ops::Range;

use plotters::coord::Shift;
use plotters::prelude::*;

use crate::Curve;

const SIZE: (u32, u32) = (900, 860);
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

/// Curves of errors relative to `best`, and of usage in percent.
pub fn draw(curves: &[Curve], best: f64) -> Result<String, Box<dyn Error>> {
    let mut svg = String::new();
    let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let (legend, charts) = area.split_vertically(30 + 20 * (curves.len().div_ceil(2) as i32));
    for (i, curve) in curves.iter().enumerate() {
        let (x, y) = (62 + 420 * (i as i32 % 2), 18 + 20 * (i as i32 / 2));
        legend.draw(&PathElement::new([(x, y), (x + 22, y)], stroke(i)))?;
        legend.draw(&Text::new(curve.name.trim().to_string(), (x + 28, y - 7), (FONT, 14)))?;
    }
    let (errors, usages) = charts.split_vertically(charts.dim_in_pixel().1 / 2);
    let steps = curves.iter().flat_map(|curve| &curve.points).map(|point| point.0).max().unwrap_or(1);
    // Each doubling as high as the one before.
    let relative = points(curves, |score| (score.error / best).log2());
    let highest = relative.iter().flatten().map(|point| point.1).fold(1.0, f64::max);
    let label = |y: &f64| format!("{:.2}", y.exp2());
    chart(
        &errors,
        "Error, relative to k-means++ with restarts",
        steps,
        -0.1..highest + 0.1,
        &label,
        &relative,
    )?;
    let usage = points(curves, |score| 100.0 * score.usage);
    chart(&usages, "Codes in use, percent", steps, 0.0..105.0, &|y| format!("{y:.0}"), &usage)?;
    area.present()?;
    drop((legend, charts, errors, usages, area));
    Ok(svg)
}

fn points(curves: &[Curve], value: impl Fn(&crate::Score) -> f64) -> Vec<Vec<(f64, f64)>> {
    let of = |curve: &Curve| curve.points.iter().map(|(step, score)| (*step as f64, value(score))).collect();
    curves.iter().map(of).collect()
}

/// Paler each time round.
fn stroke(i: usize) -> ShapeStyle {
    COLORS[i % COLORS.len()].mix(0.5f64.powi((i / COLORS.len()) as i32)).stroke_width(2)
}

/// A title, and the curves below.
fn chart(
    area: &DrawingArea<SVGBackend<'_>, Shift>,
    title: &str,
    steps: u64,
    y: Range<f64>,
    y_label: &dyn Fn(&f64) -> String,
    curves: &[Vec<(f64, f64)>],
) -> Result<(), Box<dyn Error>> {
    let (head, body) = area.split_vertically(30);
    head.draw(&Text::new(title.to_string(), (62, 8), (FONT, 18).into_font().style(FontStyle::Bold)))?;
    let mut chart = ChartBuilder::on(&body)
        .margin_right(24)
        .margin_bottom(8)
        .x_label_area_size(44)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..steps as f64, y)?;
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .bold_line_style(BLACK.mix(0.12))
        .x_desc("steps")
        .x_labels(10)
        .y_labels(8)
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&y_label)
        .label_style((FONT, 14))
        .axis_desc_style((FONT, 14))
        .draw()?;
    for (i, points) in curves.iter().enumerate() {
        chart.draw_series(LineSeries::new(points.iter().copied(), stroke(i)))?;
    }
    Ok(())
}
