//! What a run leaves to look at: a CSV file of its measurements and a picture of its curves.

use std::error::Error;
use std::path::{Path, PathBuf};

use plotters::coord::Shift;
use plotters::prelude::*;
use transformer_vq::model::write_atomically;

/// One measurement.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    pub step: u64,
    pub seconds: f64,
    pub tokens: u64,
    pub learning_rate: f64,
    pub tokens_per_second: f64,
    /// Mean over the steps since the last row, bits per byte.
    pub train_bits_per_byte: f64,
    /// On a part of the held-out text, bits per byte.
    pub val_bits_per_byte: f64,
    /// Of the last batch's codes, one per unit.
    pub perplexity: Vec<f64>,
}

/// All measurements of a run; the files are written anew with every row.
#[derive(Debug)]
pub struct Log {
    csv: PathBuf,
    picture: PathBuf,
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
    pub fn open(folder: &Path, step: u64) -> Result<Self, Box<dyn Error>> {
        let (csv, picture) = (folder.join("log.csv"), folder.join("curves.svg"));
        let mut rows = vec![];
        if step > 0 && csv.exists() {
            for record in csv::Reader::from_path(&csv)?.deserialize::<Vec<f64>>() {
                let record = record?;
                if record.len() < COLUMNS.len() {
                    return Err(format!("{}: {} columns", csv.display(), record.len()).into());
                }
                rows.push(Row {
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
            rows.retain(|row: &Row| row.step <= step);
        }
        Ok(Log { csv, picture, rows })
    }

    pub fn push(&mut self, row: Row) -> Result<(), Box<dyn Error>> {
        self.rows.push(row);
        self.write_csv()?;
        let mut svg = String::new();
        self.draw(SVGBackend::with_string(&mut svg, (900, 700)).into_drawing_area())?;
        write_atomically(&self.picture, |out| out.write_all(svg.as_bytes()))?;
        Ok(())
    }

    fn write_csv(&self) -> Result<(), Box<dyn Error>> {
        let mut writer = csv::Writer::from_writer(vec![]);
        let units = self.rows.first().map_or(0, |row| row.perplexity.len());
        let perplexities = (0..units).map(|unit| format!("perplexity_{unit}"));
        writer.write_record(COLUMNS.map(String::from).into_iter().chain(perplexities))?;
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

    /// Losses above, perplexities below, over millions of tokens.
    fn draw(&self, area: DrawingArea<SVGBackend<'_>, Shift>) -> Result<(), Box<dyn Error>> {
        area.fill(&WHITE)?;
        let (losses, perplexities) = area.split_vertically(370);
        let millions = |row: &Row| row.tokens as f64 / 1e6;
        let end = self.rows.last().map_or(1.0, millions);
        let curve = |value: &dyn Fn(&Row) -> f64| -> Vec<(f64, f64)> {
            self.rows.iter().map(|row| (millions(row), value(row))).collect()
        };
        let train = curve(&|row| row.train_bits_per_byte);
        let validation = curve(&|row| row.val_bits_per_byte);
        let top = train.iter().chain(&validation).map(|point| point.1).fold(1.0, f64::max).min(8.0);
        let mut chart = ChartBuilder::on(&losses)
            .caption("Loss", ("sans-serif", 20))
            .margin(12)
            .x_label_area_size(36)
            .y_label_area_size(52)
            .build_cartesian_2d(0.0..end, 1.0f64.min(top / 2.0)..top)?;
        chart
            .configure_mesh()
            .light_line_style(WHITE)
            .y_desc("bits per byte")
            .x_desc("million bytes")
            .draw()?;
        for (name, points, color) in [("training", train, BLUE), ("validation", validation, RED)] {
            chart
                .draw_series(LineSeries::new(points, color.stroke_width(2)))?
                .label(name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2)));
        }
        chart.configure_series_labels().background_style(WHITE).border_style(BLACK).draw()?;

        let units = self.rows.first().map_or(0, |row| row.perplexity.len());
        let top = self.rows.iter().flat_map(|row| &row.perplexity).fold(1.0, |top: f64, &p| top.max(p));
        let mut chart = ChartBuilder::on(&perplexities)
            .caption("Codebooks", ("sans-serif", 20))
            .margin(12)
            .x_label_area_size(36)
            .y_label_area_size(52)
            .build_cartesian_2d(0.0..end, 0.0..top * 1.05)?;
        chart.configure_mesh().light_line_style(WHITE).y_desc("perplexity").x_desc("million bytes").draw()?;
        for unit in 0..units {
            let color = Palette99::pick(unit).to_rgba();
            chart
                .draw_series(LineSeries::new(curve(&|row| row.perplexity[unit]), color.stroke_width(2)))?
                .label(format!("unit {unit}"))
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2)));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::LowerRight)
            .background_style(WHITE)
            .border_style(BLACK)
            .draw()?;
        area.present()?;
        Ok(())
    }
}
