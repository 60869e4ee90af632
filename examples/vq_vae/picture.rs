//! What the auto-encoder sees and paints, as an SVG picture.

use std::error::Error;

use plotters::prelude::*;
use transformer_vq::codebook::CodeStats;
use transformer_vq::ndarray::ArrayView2;

use crate::Point;
use crate::chart::{Area, Chart, Curve, number, title};
use crate::images::{PATCH, SIDE, pixel};

const WIDE: u32 = 900;
/// Images shown, and the size of their pixels.
const SHOWN: (usize, i32) = (6, 4);
/// Codes in a row, and the size of their pixels.
const CODES: (usize, i32) = (32, 6);
/// Codes shown at most.
const MOST_CODES: usize = 256;
const LEFT: i32 = 62;
/// Steps of a color that the picture tells apart: neighbours of one color are one rectangle.
const COLORS: f32 = 32.0;

/// `x` and `painted`: patches of some images; `codes` [S, WIDTH] what each code paints.
pub fn draw(
    x: ArrayView2<'_, f32>,
    painted: ArrayView2<'_, f32>,
    codes: ArrayView2<'_, f32>,
    stats: &CodeStats<f32>,
    points: &[Point],
) -> Result<String, Box<dyn Error>> {
    let counts = stats.counts().row(0).to_vec();
    let mut order = Vec::from_iter(0..counts.len());
    order.sort_by_key(|&code| std::cmp::Reverse(counts[code]));
    order.truncate(MOST_CODES);

    let images = 38 + 2 * (SIDE as i32 * SHOWN.1 + 8) + 12;
    let tiles = 38 + order.len().div_ceil(CODES.0) as i32 * (PATCH as i32 * CODES.1 + 2) + 12;
    let size = (WIDE, (images + tiles + 560) as u32);
    let mut svg = String::new();
    let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
    area.fill(&WHITE)?;
    let (top, rest) = area.split_vertically(images);
    let (middle, charts) = rest.split_vertically(tiles);

    title(&top, "Not learned from: originals, and painted from 64 codes each")?;
    for image in 0..SHOWN.0 {
        for (row, patches) in [x, painted].into_iter().enumerate() {
            let at = (
                LEFT + image as i32 * (SIDE as i32 * SHOWN.1 + 8),
                38 + row as i32 * (SIDE as i32 * SHOWN.1 + 8),
            );
            paint(&top, at, SHOWN.1, SIDE, |x, y| pixel(patches, image, x, y))?;
        }
    }

    let used = counts.iter().filter(|&&n| n > 0).count();
    title(
        &middle,
        &format!(
            "What each code paints by itself, the most frequent first: {used} of {} in use",
            counts.len()
        ),
    )?;
    for (i, &code) in order.iter().enumerate().filter(|(_, code)| counts[**code] > 0) {
        let (row, column) = ((i / CODES.0) as i32, (i % CODES.0) as i32);
        let step = PATCH as i32 * CODES.1 + 2;
        let patch = codes.row(code);
        let of_pixel = |x: usize, y: usize| [0, 1, 2].map(|i| patch[(y * PATCH + x) * 3 + i]);
        paint(&middle, (LEFT + column * step, 38 + row * step), CODES.1, PATCH, of_pixel)?;
    }

    let (above, below) = charts.split_vertically(280);
    let (left, right) = below.split_horizontally(WIDE / 2);
    let even = counts.len() as f64 / counts.iter().sum::<u64>().max(1) as f64;
    let mut uses = Vec::from_iter(counts.iter().map(|&n| n as f64 * even));
    uses.sort_by(|a, b| b.total_cmp(a));
    let ranks = (1..).map(f64::from).zip(uses.iter().copied());
    let of_codes = Curve { name: String::new(), points: ranks.collect() };
    let highest = 1.1 * uses[0];
    chart(
        &above,
        "Use of each code, over even use",
        "codes",
        (1.0, uses.len().max(2) as f64, highest),
        &[of_codes],
    )?;

    let curve = |name: &str, value: &dyn Fn(&Point) -> f64| Curve {
        name: name.into(),
        points: points.iter().map(|point| (point.step as f64, value(point))).collect(),
    };
    let steps = points.last().map_or(1, |point| point.step) as f64;
    let match_of = curve("", &|point| point.psnr);
    let highest = 1.1 * points.iter().map(|point| point.psnr).fold(1.0, f64::max);
    chart(&left, "Match, decibels", "steps", (0.0, steps, highest), &[match_of])?;
    let share = 100.0 / counts.len() as f64;
    let of_usage = [
        curve("in use", &|point| 100.0 * point.usage),
        curve("perplexity", &|point| share * point.perplexity),
    ];
    chart(&right, "Codes, percent", "steps", (0.0, steps, 105.0), &of_usage)?;
    area.present()?;
    drop((top, middle, rest, charts, above, below, left, right, area));
    Ok(svg)
}

/// Curves from `low` to `high` steps or codes, from 0 to `highest`.
fn chart(
    area: &Area<'_>,
    title: &str,
    x_desc: &str,
    (low, high, highest): (f64, f64, f64),
    curves: &[Curve],
) -> Result<(), Box<dyn Error>> {
    Chart { title, x: low..high, x_desc, y: 0.0..highest, y_label: &number }.draw(area, curves)
}

/// A square of `side` x `side` pixels, each `scale` wide, with its corner at `at`.
fn paint(
    area: &Area<'_>,
    at: (i32, i32),
    scale: i32,
    side: usize,
    color: impl Fn(usize, usize) -> [f32; 3],
) -> Result<(), Box<dyn Error>> {
    let rounded = |x, y| color(x, y).map(|value| (value.clamp(0.0, 1.0) * COLORS).round());
    for y in 0..side {
        let (mut x, top) = (0, at.1 + y as i32 * scale);
        while x < side {
            let color = rounded(x, y);
            let begin = x;
            while x < side && rounded(x, y) == color {
                x += 1;
            }
            let corner = |x: usize, y: i32| (at.0 + x as i32 * scale, y);
            let [r, g, b] = color.map(|value| (value * 255.0 / COLORS) as u8);
            let run =
                Rectangle::new([corner(begin, top), corner(x, top + scale)], RGBColor(r, g, b).filled());
            area.draw(&run)?;
        }
    }
    Ok(())
}
