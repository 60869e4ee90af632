//! Curves over a common axis, as the pictures of the examples have them.

use std::error::Error;
use std::ops::Range;

use plotters::coord::Shift;
use plotters::prelude::*;

pub const FONT: &str = "sans-serif";
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
/// Left of a chart's axis.
const LEFT: i32 = 62;

/// Part of a picture.
pub type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// A name, empty for none in the legend, and points; those that are not finite are left out.
pub struct Curve {
    pub name: String,
    pub points: Vec<(f64, f64)>,
}

/// A title with the legend, and axes for curves.
pub struct Chart<'a> {
    pub title: &'a str,
    pub x: Range<f64>,
    pub x_desc: &'a str,
    pub y: Range<f64>,
    /// What a number on the vertical axis is called.
    pub y_label: &'a dyn Fn(&f64) -> String,
}

/// A number on an axis, without zeros that say nothing.
pub fn number(x: &f64) -> String {
    format!("{x:.3}").trim_end_matches('0').trim_end_matches('.').to_string()
}

/// Paler each time round.
pub fn color(i: usize) -> RGBAColor {
    COLORS[i % COLORS.len()].mix(0.5f64.powi((i / COLORS.len()) as i32))
}

/// A title in bold, at the top of an area.
pub fn title(area: &Area<'_>, text: &str) -> Result<(), Box<dyn Error>> {
    let font = (FONT, 18).into_font().style(FontStyle::Bold);
    Ok(area.draw(&Text::new(text.to_string(), (LEFT, 14), font))?)
}

impl Chart<'_> {
    /// Draws the chart into an area.
    pub fn draw(&self, area: &Area<'_>, curves: &[Curve]) -> Result<(), Box<dyn Error>> {
        let body = self.head(area, curves)?;
        let mut chart = ChartBuilder::on(&body)
            .margin_right(24)
            .margin_bottom(8)
            .x_label_area_size(44)
            .y_label_area_size(60)
            .build_cartesian_2d(self.x.clone(), self.y.clone())?;
        chart
            .configure_mesh()
            .light_line_style(WHITE)
            .bold_line_style(BLACK.mix(0.12))
            .x_desc(self.x_desc)
            .x_labels(10)
            .y_labels(8)
            .x_label_formatter(&number)
            .y_label_formatter(&self.y_label)
            .label_style((FONT, 14))
            .axis_desc_style((FONT, 14))
            .draw()?;
        for (i, Curve { points, .. }) in curves.iter().enumerate() {
            let finite = |point: &&(f64, f64)| point.1.is_finite();
            let points = Vec::from_iter(points.iter().filter(finite).copied());
            // A single measurement is not a line yet.
            let dots = points.iter().map(|&point| Circle::new(point, 2, color(i).filled()));
            chart.draw_series(dots)?;
            chart.draw_series(LineSeries::new(points, color(i).stroke_width(2)))?;
        }
        Ok(())
    }

    /// Title and legend; what is left of the area. The legend stands beside the title if it fits, in rows below if not.
    fn head<'a>(&self, area: &Area<'a>, curves: &[Curve]) -> Result<Area<'a>, Box<dyn Error>> {
        let named = Vec::from_iter(curves.iter().enumerate().filter(|(_, curve)| !curve.name.is_empty()));
        let (right, entries) = (area.dim_in_pixel().0 as i32 - 24, named.len() as i32);
        let longest = curves.iter().map(|curve| curve.name.chars().count() as i32).max().unwrap_or(0);
        let width = longest * 7 + 46; // of an entry
        let beside = (right - LEFT - 10 * self.title.len() as i32) / width;
        let below = beside < entries;
        let columns = if below { ((right - LEFT) / width).max(1) } else { entries };
        let rows = if below { (entries + columns - 1) / columns } else { 0 };
        let (head, body) = area.split_vertically(38 + 20 * rows);
        title(&head, self.title)?;
        for (place, (i, Curve { name, .. })) in (0..).zip(named) {
            let (row, column) = (place / columns, place % columns);
            let (x, y) = match below {
                true => (LEFT + width * column, 46 + 20 * row),
                false => (right - width * (columns - column), 23),
            };
            head.draw(&PathElement::new([(x, y), (x + 22, y)], color(i).stroke_width(3)))?;
            head.draw(&Text::new(name.clone(), (x + 28, y - 7), (FONT, 14)))?;
        }
        Ok(body)
    }
}
