//! What each part of linear-time attention is worth: one change at a time.
//!
//! Trains one small language model on the same batches for the same number of steps with 64 to 1,024 codes, with the compressive
//! cache and without it, with windows and blocks of several lengths, and prints a table: bits per byte on the held-out tenth of
//! the text, read as one stream; bytes per second of training and of reading; attention on cached codes. The unchanged model and
//! the one without the cache are trained from three seeds. The table (`table.md`) and a picture (`ablation.svg`) go into
//! `--out`. About nine minutes on two cores.
//!
//! ```sh
//! cargo run --release --example ablation
//! cargo run --release --example ablation -- --data PATH --steps 2000
//! ```

#[path = "../support/budget.rs"]
mod budget;
#[path = "../support/chart.rs"]
mod chart;
#[path = "../support/exit.rs"]
mod exit;
#[path = "../support/options.rs"]
mod options;
#[path = "../support/out.rs"]
mod out;
#[path = "../support/say.rs"]
mod say;
#[path = "../support/statistics.rs"]
mod statistics;
#[path = "../support/text.rs"]
mod text;

use std::error::Error;
use std::fmt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use budget::{PARTS, progress, train};
use chart::{Chart, Curve, number};
use clap::Parser;
use exit::exit;
use indicatif::{ProgressBar, ProgressStyle};
use options::distinct;
use out::Folder;
use plotters::prelude::*;
use say::say;
use statistics::{deviation, mean};
use text::{name, read_text, score, split};
use transformer_vq::attention::VqAttention;
use transformer_vq::model::ModelConfig;
use transformer_vq::train::{BatchConfig, Budget, Corpus};

/// Tokens of the held-out text that are read.
const JUDGED: usize = 96 * 1024;

/// Trains a language model once for each change.
#[derive(Debug, Parser)]
#[command(name = "ablation")]
struct Args {
    /// Text to learn, a file or a folder of files; its last tenth is held out [default: this crate's sources and documentation]
    #[arg(long, value_name = "PATH")]
    data: Option<PathBuf>,

    /// Steps of training, 2,048 bytes each
    #[arg(long, value_name = "N", default_value_t = 400, default_value_if("short", "true", "2"))]
    #[arg(value_parser = clap::value_parser!(u64).range(1..))]
    steps: u64,

    /// Seeds of weights and batches; all but the first for the comparison of the cache alone
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "1,2,3")]
    #[arg(default_value_if("short", "true", "1"))]
    seeds: Vec<u64>,

    /// A narrow model; two steps, one seed unless asked for: whether everything runs, not how well
    #[arg(long)]
    short: bool,

    /// Folder for the table and the picture
    #[arg(long, value_name = "DIR", default_value = "runs/ablation")]
    out: PathBuf,
}

/// One change.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Change {
    None,
    NoCache,
    Codes(usize),
    Window(usize),
    Block(usize),
}

use Change::{Block, Codes, NoCache, Window};

/// The unchanged model has 256 codes, and windows and blocks of 64.
const CHANGES: [Change; 13] = [
    Change::None,
    NoCache,
    Codes(64),
    Codes(128),
    Codes(512),
    Codes(1024),
    Window(0),
    Window(16),
    Window(128),
    Window(256),
    Block(32),
    Block(128),
    Block(256),
];

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Change::None => f.write_str("none"),
            NoCache => f.write_str("cache off"),
            Codes(n) => write!(f, "{n} codes"),
            Window(n) => write!(f, "window of {n}"),
            Block(n) => write!(f, "blocks of {n}"),
        }
    }
}

impl Change {
    fn config(self, text: &Corpus, short: bool) -> ModelConfig {
        let mut config = ModelConfig {
            vocab_size: text.vocab_size(),
            d_model: if short { 16 } else { 128 },
            n_layers: 2,
            d_v: 256,
            n_codes: 256,
            attention: VqAttention { block_len: 64, window: 64, ..VqAttention::default() },
            ..ModelConfig::default()
        };
        match self {
            Change::None => {}
            NoCache => config.attention.cache = false,
            Codes(n) => config.n_codes = n,
            Window(n) => config.attention.window = n,
            Block(n) => config.attention.block_len = n,
        }
        config
    }
}

/// What came of one change, over its seeds.
struct Row {
    change: Change,
    config: ModelConfig,
    bits_per_byte: Vec<f64>,
    /// Of the last seed.
    training_speed: f64,
    reading_speed: f64,
    cached_mass: f64,
}

const HEAD: &str = "| change | codes | window | block | cache | bits per byte | bytes/s, training | bytes/s, reading | cached |\n\
                    |---|---:|---:|---:|---|---:|---:|---:|---:|";

impl Row {
    fn mean(&self) -> f64 {
        mean(&self.bits_per_byte)
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let VqAttention { block_len, window, cache, .. } = self.config.attention;
        let cache = if cache { "on" } else { "off" };
        let (n_codes, mean) = (self.config.n_codes, self.mean());
        write!(f, "| {} | {n_codes} | {window} | {block_len} | {cache} | {mean:.4}", self.change)?;
        if let Some(deviation) = deviation(&self.bits_per_byte) {
            write!(f, " ± {deviation:.4}")?;
        }
        let Row { training_speed, reading_speed, cached_mass, .. } = self;
        write!(f, " | {training_speed:.0} | {reading_speed:.0} | {:.0} % |", 100.0 * cached_mass)
    }
}

fn main() -> ExitCode {
    exit(run(&Args::parse()))
}

fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    distinct("--seeds", &args.seeds)?;
    let text = read_text(args.data.as_deref())?;
    let folder = Folder::create(&args.out)?;
    let (name, threads) = (name(args.data.as_deref()), rayon::current_num_threads());
    say(format!("{name}; {} steps, {threads} threads\n", args.steps));
    say(HEAD);
    let seeds_of = |change| match change {
        Change::None | NoCache => &args.seeds[..],
        _ => &args.seeds[..1.min(args.seeds.len())],
    };
    let n_runs = CHANGES.iter().map(|&change| seeds_of(change).len()).sum::<usize>() as u64;
    let style = ProgressStyle::with_template("{prefix:14} {bar:24} {percent:>3}%  {msg}  {eta} left")?;
    let bar = ProgressBar::new(n_runs * PARTS).with_style(style);
    let (mut table, mut rows) = (format!("{HEAD}\n"), vec![]);
    for change in CHANGES {
        bar.set_prefix(change.to_string());
        let row = row(change, seeds_of(change), &text, args, &bar)?;
        table += &format!("{row}\n");
        // After each row, for who stops before the last.
        folder.write("table.md", &table)?;
        bar.suspend(|| say(&row));
        rows.push(row);
    }
    bar.finish_and_clear();
    folder.write("ablation.svg", draw(&rows)?)?;
    say(format!("\ninto {folder}"));
    Ok(())
}

fn row(
    change: Change,
    seeds: &[u64],
    text: &Corpus,
    args: &Args,
    bar: &ProgressBar,
) -> Result<Row, Box<dyn Error>> {
    let config = change.config(text, args.short);
    let mut row = Row {
        change,
        config: config.clone(),
        bits_per_byte: vec![],
        training_speed: 0.0,
        reading_speed: 0.0,
        cached_mass: 0.0,
    };
    for &seed in seeds {
        let batches = BatchConfig { batch_size: 4, sequence_len: 2048, update_len: 512, seed };
        let progress = progress(batches, Budget::Steps(args.steps))?;
        let (_, held_out) = split(text, &progress)?;
        let trained = train(config.clone(), text, progress, bar, |_, _, _| Ok(()))?;
        let most = if args.short { 4096 } else { JUDGED };
        let begun = Instant::now();
        let judged = held_out.start..held_out.end.min(held_out.start + most);
        let scorer = score(&trained.model, text, judged.clone())?;
        row.bits_per_byte.push(text.size_of(judged)?.bits_per_byte(scorer.nats_per_token()));
        row.training_speed = trained.tokens / trained.seconds;
        row.reading_speed = scorer.tokens() as f64 / begun.elapsed().as_secs_f64();
        row.cached_mass = scorer.cached_mass();
    }
    Ok(row)
}

/// Bits per byte over codes, windows and blocks.
fn draw(rows: &[Row]) -> Result<String, Box<dyn Error>> {
    type Place = fn(&Row) -> Option<usize>;
    let axes: [(&str, Place); 3] = [
        ("codes", |row| matches!(row.change, Change::None | Codes(_)).then_some(row.config.n_codes)),
        ("window", |row| {
            matches!(row.change, Change::None | Window(_)).then_some(row.config.attention.window)
        }),
        ("block length", |row| {
            matches!(row.change, Change::None | Block(_)).then_some(row.config.attention.block_len)
        }),
    ];
    let all = rows.iter().map(Row::mean);
    let low = all.clone().fold(f64::INFINITY, f64::min);
    let high = all.fold(low, f64::max);
    let margin = 0.1 * (high - low) + 1e-3;
    let off = rows.iter().find(|row| row.change == NoCache).map_or(f64::NAN, Row::mean);
    let mut svg = String::new();
    let area = SVGBackend::with_string(&mut svg, (800, 840)).into_drawing_area();
    area.fill(&WHITE)?;
    for (part, (x_desc, place)) in area.split_evenly((3, 1)).iter().zip(axes) {
        let mut points = Vec::from_iter(rows.iter().filter_map(|row| Some((place(row)? as f64, row.mean()))));
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        let (first, last) = (points[0].0, points[points.len() - 1].0);
        let level = Curve { name: "cache off, as it is".into(), points: vec![(first, off), (last, off)] };
        let curves = [Curve { name: "cache on".into(), points }, level];
        let y = low - margin..high + margin;
        let chart = Chart { title: "Bits per byte", x: first..last, x_desc, y, y_label: &number };
        chart.draw(part, &curves)?;
    }
    area.present()?;
    drop(area);
    Ok(svg)
}
