//! The race as an SVG picture: error above, usage below, over steps; keys given on the left, learned on the right.

use std::error::Error;

use plotters::prelude::*;

use crate::chart::{self, Chart};
use crate::{Curve, Score};

const SIZE: (u32, u32) = (1360, 960);

/// Curves of errors relative to `best`, and of usage in percent.
pub fn draw(curves: &[Curve], best: f64) -> Result<String, Box<dyn Error>> {
    let mut svg = String::new();
    let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let steps = curves.iter().flat_map(|curve| &curve.points).map(|point| point.0).max().unwrap_or(1);
    let drawn = || curves.iter().filter(|curve| curve.racer.drawn);
    let error = |score: &Score| (score.error / best).log2(); // each doubling as high as the one before
    let highest = drawn().flat_map(|curve| &curve.points).map(|point| error(&point.1)).fold(1.0, f64::max);
    let (left, right) = area.split_horizontally(SIZE.0 / 2);
    for (area, learned) in [(&left, false), (&right, true)] {
        let of_side = Vec::from_iter(drawn().filter(|curve| curve.racer.encoder.is_some() == learned));
        let curves = |named: bool, value: &dyn Fn(&Score) -> f64| {
            let points =
                |curve: &Curve| curve.points.iter().map(|(step, s)| (*step as f64, value(s))).collect();
            let name = |curve: &Curve| match curve.racer.encoder {
                _ if !named => String::new(),
                Some((estimator, _)) => estimator.to_string(),
                None => curve.racer.rule.to_string(),
            };
            Vec::from_iter(
                of_side.iter().map(|curve| chart::Curve { name: name(curve), points: points(curve) }),
            )
        };
        let (errors, usages) = area.split_vertically(SIZE.1 / 2);
        let (x, x_desc) = (0.0..steps as f64, "steps");
        let title = if learned {
            "The same, keys learned, moving averages without revival"
        } else {
            "Error over that of k-means++"
        };
        let y_label = |y: &f64| format!("{:.2}", y.exp2());
        let y = -0.1..highest + 0.1;
        Chart { title, x: x.clone(), x_desc, y, y_label: &y_label }.draw(&errors, &curves(true, &error))?;
        let (title, y_label) = ("Codes in use, percent", |y: &f64| format!("{y:.0}"));
        Chart { title, x, x_desc, y: 0.0..105.0, y_label: &y_label }
            .draw(&usages, &curves(false, &|score| 100.0 * score.usage))?;
    }
    area.present()?;
    drop((left, right, area));
    Ok(svg)
}
