//! Pictures as sequences: a model reads and writes them pixel by pixel, row after row.
//!
//! Draws pictures of 16 x 16 pixels in four greys (see `pictures.rs`), trains a model on them, each picture 256 tokens behind a token
//! that begins it, and writes one grid of pictures from the data and pictures from the model (`images.png`). A row above is 16
//! tokens away: the window holds two of them, everything further up is read through the codebook. Prints bits per pixel on
//! pictures that training has not seen, with the cache and without it, into `table.md` too. About a minute on two cores.
//!
//! ```sh
//! cargo run --release --example images
//! ```

#[path = "../support/exit.rs"]
mod exit;
#[path = "../support/out.rs"]
mod out;
mod pictures;
mod png;
#[path = "../support/say.rs"]
mod say;

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use exit::exit;
use indicatif::{ProgressBar, ProgressStyle};
use out::Folder;
use pictures::{LEVELS, PIXELS, Picture, SIDE, draw};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use say::say;
use transformer_vq::attention::VqAttention;
use transformer_vq::generate::Sampler;
use transformer_vq::model::{CodebookStart, ModelConfig, Transformer};
use transformer_vq::ndarray::{Array2, s};
use transformer_vq::ops::cross_entropy;
use transformer_vq::train::{AdamW, Batch, Schedule, Trainer};

/// The token before a picture.
const BEGIN: u32 = LEVELS as u32;
/// Pictures of a step.
const BATCH: usize = 8;
/// Pictures that are judged.
const JUDGED: usize = 128;
/// Pictures of a row of the grid, rows of each half, and the size of a pixel.
const GRID: (usize, usize, usize) = (12, 4, 3);
/// Pixels between pictures.
const GAP: usize = 4;

/// Learns small pictures and draws new ones.
#[derive(Debug, Parser)]
#[command(name = "images")]
struct Args {
    /// Steps of training, eight pictures each
    #[arg(long, value_name = "N", default_value_t = 1000, default_value_if("short", "true", "3"))]
    #[arg(value_parser = clap::value_parser!(u64).range(1..))]
    steps: u64,

    /// Seed of weights and pictures
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,

    /// Few steps unless asked for: whether everything runs, not how well
    #[arg(long)]
    short: bool,

    /// Folder for the picture and the table
    #[arg(long, value_name = "DIR", default_value = "runs/images")]
    out: PathBuf,
}

fn main() -> ExitCode {
    exit(run(&Args::parse()))
}

fn config() -> ModelConfig {
    ModelConfig {
        vocab_size: usize::from(LEVELS) + 1,
        d_model: 96,
        n_layers: 4,
        d_k: 64,
        d_v: 128,
        n_codes: 64,
        attention: VqAttention { block_len: 32, window: 32, ..VqAttention::default() },
        start: CodebookStart::KMeans { steps: 10 },
        ..ModelConfig::default()
    }
}

fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    let model = Transformer::new(config(), args.seed)?;
    let folder = Folder::create(&args.out)?;
    say(format!("{} parameters, {} steps of {BATCH} pictures\n", model.config().n_parameters(), args.steps));
    let mut trainer =
        Trainer::new(model, AdamW { learning_rate: 3e-3, clip: Some(1.0), ..AdamW::default() })?;
    let (mut rng, schedule) = (ChaCha8Rng::seed_from_u64(args.seed), Schedule::new(0.05, 0.1)?);
    let style = ProgressStyle::with_template("{bar:24} {percent:>3}%  {msg}  {eta} left")?;
    let bar = ProgressBar::new(args.steps).with_style(style);
    for step in 0..args.steps {
        let pictures = Vec::from_iter((0..BATCH).map(|_| draw(&mut rng)));
        let (tokens, targets) = sequences(&pictures);
        let batch = Batch { tokens, targets, first: true };
        let report = trainer.step(&batch, schedule.factor_at_step(step, args.steps))?;
        bar.set_message(format!("{:.3} bits per pixel", report.loss / std::f64::consts::LN_2));
        bar.inc(1);
    }
    bar.set_message("judging and drawing");
    let model = trainer.into_model();
    let (columns, rows, _) = GRID;
    let written = write_pictures(&model, columns * rows, args.seed)?;
    // What training has not seen.
    let mut rng = ChaCha8Rng::seed_from_u64(args.seed.wrapping_add(1 << 32));
    let unseen = Vec::from_iter((0..JUDGED).map(|_| draw(&mut rng)));
    let mut table = "| | bits per pixel |\n|---|---:|\n".to_string();
    let on = judge(&model, &unseen)?;
    let off = judge(&model.with_cache(false), &unseen)?;
    for (name, bits) in [("cache on", on), ("cache off", off), ("greys by themselves", grey_entropy(&unseen))]
    {
        table += &format!("| {name} | {bits:.4} |\n");
    }
    bar.finish_and_clear();
    folder.write("table.md", &table)?;
    folder.write("images.png", grid(&[&unseen[..columns * rows], &written]))?;
    say(format!("{table}\ninto {folder}"));
    Ok(())
}

/// Tokens and targets [B, PIXELS].
fn sequences(pictures: &[Picture]) -> (Array2<u32>, Array2<u32>) {
    let targets = Array2::from_shape_fn((pictures.len(), PIXELS), |(b, i)| u32::from(pictures[b][i]));
    let mut tokens = Array2::from_elem(targets.raw_dim(), BEGIN);
    tokens.slice_mut(s![.., 1..]).assign(&targets.slice(s![.., ..-1]));
    (tokens, targets)
}

/// Bits per pixel.
fn judge(model: &Transformer, pictures: &[Picture]) -> Result<f64, transformer_vq::Error> {
    let (tokens, targets) = sequences(pictures);
    let logits = model.push(tokens.view(), &mut model.new_state(pictures.len())?)?;
    let mut bits = 0.0;
    for (logits, targets) in logits.outer_iter().zip(targets.outer_iter()) {
        bits += cross_entropy::loss(logits, targets, None)? / std::f64::consts::LN_2;
    }
    Ok(bits / pictures.len() as f64)
}

/// Bits per pixel of who knows how frequent each grey is, and nothing else.
fn grey_entropy(pictures: &[Picture]) -> f64 {
    let mut counts = [0.0; LEVELS as usize];
    pictures.iter().flatten().for_each(|&grey| counts[usize::from(grey)] += 1.0);
    let n = counts.iter().sum::<f64>();
    counts.iter().filter(|&&count| count > 0.0).map(|count| -count / n * (count / n).log2()).sum()
}

/// New pictures, drawn side by side.
fn write_pictures(model: &Transformer, n: usize, seed: u64) -> Result<Vec<Picture>, transformer_vq::Error> {
    let (prepared, mut state) = (model.prepare()?, model.new_state(n)?);
    let (sampler, mut rng) = (Sampler::default(), ChaCha8Rng::seed_from_u64(seed));
    let mut pictures = vec![vec![]; n];
    let mut tokens = Array2::from_elem((n, 1), BEGIN);
    for _ in 0..PIXELS {
        let (logits, _) = prepared.push(tokens.view(), &mut state)?;
        for (b, picture) in pictures.iter_mut().enumerate() {
            let greys = logits.slice(s![b, 0, ..usize::from(LEVELS)]);
            let grey = sampler.sample(greys, &mut rng)?;
            tokens[[b, 0]] = grey;
            picture.push(grey as u8);
        }
    }
    Ok(pictures)
}

/// Halves of pictures, one above the other, as a file.
fn grid(halves: &[&[Picture]; 2]) -> Vec<u8> {
    let (columns, rows, scale) = GRID;
    let step = SIDE * scale + GAP;
    // A wider gap between the halves.
    let (width, half) = (columns * step + GAP, rows * step + 2 * GAP);
    png::encode(width, 2 * half, |x, y| {
        let white = LEVELS - 1;
        let (Some(x), Some(y_in)) = (x.checked_sub(GAP), (y % half).checked_sub(GAP)) else { return white };
        let (column, row) = (x / step, y_in / step);
        let (x, y_in) = (x % step / scale, y_in % step / scale);
        match halves[y / half].get(row * columns + column) {
            Some(picture) if x < SIDE && y_in < SIDE && row < rows => picture[y_in * SIDE + x],
            _ => white,
        }
    })
}
