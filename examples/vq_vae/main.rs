//! A VQ-VAE: an auto-encoder whose middle is a codebook, on pictures that it draws itself.
//!
//! One to two minutes on two cores. A picture of 32 x 32 pixels becomes 64 codes, one per patch of 4 x 4, and is painted from
//! these alone: with 256 codes 64 bytes instead of 3072. The codebook is the crate's, on its own; the network around it is made
//! of `ops`, with its gradient written by hand. Nothing here needs the crate's `model`.
//!
//! Prints how far pictures that were not learned from are matched; into `--out` goes `vq_vae.svg`: originals and
//! reconstructions, what each code paints and how often it is used, and both over the steps.
//!
//! ```sh
//! cargo run --release --example vq_vae
//! cargo run --release --example vq_vae -- --learning sim-vq --estimator rotation
//! cargo run --release --example vq_vae -- --revive 0 --start random
//! ```

#[path = "../support/adam.rs"]
mod adam;
mod autoencoder;
#[path = "../support/chart.rs"]
mod chart;
#[path = "../support/exit.rs"]
mod exit;
mod images;
#[path = "../support/learner.rs"]
mod learner;
mod network;
#[path = "../support/out.rs"]
mod out;
mod picture;
#[path = "../support/say.rs"]
mod say;

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use autoencoder::Autoencoder;
use clap::{Parser, ValueEnum};
use exit::exit;
use indicatif::{ProgressBar, ProgressStyle};
use learner::{Kind, Start};
use out::Folder;
use say::say;
use transformer_vq::codebook::{Estimator, Rotation, RotationScale, RotationVariant, Smoothing};
use transformer_vq::ndarray::{Array2, ArrayView2};

/// Pictures of a batch, and those by which it is judged.
const BATCH: usize = 32;
const JUDGED: usize = 128;
/// Measurements of a run.
const POINTS: u64 = 20;

/// Trains an auto-encoder with a codebook on pictures that it draws itself.
#[derive(Debug, Parser)]
#[command(name = "vq_vae")]
pub struct Args {
    /// Codewords
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=1 << 16))]
    codes: u32,
    /// Width of a codeword
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=1024))]
    width: u32,
    /// Batches of 32 pictures
    #[arg(long, default_value_t = 5000, value_parser = clap::value_parser!(u64).range(1..))]
    steps: u64,
    /// How the codebook learns
    #[arg(long, value_enum, default_value_t = Learning::MovingAverages)]
    learning: Learning,
    /// Its first codewords, where it does not learn by SimVQ
    #[arg(long, value_enum, default_value_t = Start::KMeans)]
    start: Start,
    /// How gradients pass from codewords to keys
    #[arg(long, value_enum, default_value_t = KeyGradient::StraightThrough)]
    estimator: KeyGradient,
    /// Codes used less than this times the average get a new start, where codewords are free
    #[arg(long, default_value_t = 0.1, value_parser = ratio)]
    revive: f64,
    /// Highest rate of Adam, for the network and for codewords that learn by gradient
    #[arg(long, default_value_t = 0.002, value_parser = learner::rate)]
    rate: f32,
    /// Seed of pictures, weights and codewords
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Folder for the picture
    #[arg(long, default_value = "runs/vq_vae")]
    out: PathBuf,
}

fn ratio(text: &str) -> Result<f64, String> {
    let ratio = text.parse().ok().filter(|ratio| (0.0..1.0).contains(ratio));
    ratio.ok_or("expected a number from 0 to below 1".into())
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Learning {
    /// Moving averages of keys, counts clamped
    MovingAverages,
    /// Moving averages of keys, counts smoothed
    Laplace,
    /// Plain steps along the gradient
    Plain,
    /// The gradient, by Adam
    Gradient,
    /// A frozen basis times a matrix that learns
    SimVq,
    /// A basis and a matrix that both learn
    SimVqLearned,
    /// Codewords stay as they began
    Frozen,
}

impl Learning {
    fn kind(self) -> Kind {
        match self {
            Learning::MovingAverages => Kind::Ema(Smoothing::CountClamp),
            Learning::Laplace => Kind::Ema(Smoothing::Laplace { epsilon: 1e-5 }),
            Learning::Plain => Kind::Gradient { adam: false },
            Learning::Gradient => Kind::Gradient { adam: true },
            Learning::SimVq => Kind::Linear { wide: false, learned: false, bias: true },
            Learning::SimVqLearned => Kind::Linear { wide: false, learned: true, bias: true },
            Learning::Frozen => Kind::Frozen,
        }
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum KeyGradient {
    StraightThrough,
    /// The rotation trick, as in the paper
    Rotation,
    /// The same, its scale at most 1
    RotationCapped,
    /// The same, its scale 1
    RotationUnscaled,
    /// The normalized variant
    RotationNormalized,
    Directional,
    None,
}

impl KeyGradient {
    fn estimator(self) -> Estimator {
        let rotation = |variant, scale| Estimator::Rotation(Rotation { variant, scale });
        match self {
            KeyGradient::StraightThrough => Estimator::StraightThrough,
            KeyGradient::Rotation => rotation(RotationVariant::Paper, RotationScale::Ratio),
            KeyGradient::RotationCapped => rotation(RotationVariant::Paper, RotationScale::AtMost(1.0)),
            KeyGradient::RotationUnscaled => rotation(RotationVariant::Paper, RotationScale::One),
            KeyGradient::RotationNormalized => rotation(RotationVariant::Normalized, RotationScale::Ratio),
            KeyGradient::Directional => Estimator::Directional,
            KeyGradient::None => Estimator::None,
        }
    }
}

/// How well pictures are matched.
#[derive(Debug, Clone, Copy)]
pub struct Point {
    step: u64,
    /// Peak signal-to-noise ratio, decibels.
    psnr: f64,
    /// Part of the codes in use.
    usage: f64,
    perplexity: f64,
}

fn main() -> ExitCode {
    exit(run(&Args::parse()))
}

fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    let begin = Instant::now();
    let folder = Folder::create(&args.out)?;
    let judged = images::batch(JUDGED, args.seed, u64::MAX);
    let first = images::batch(BATCH, args.seed, 0);
    let of_means = psnr(&judged, &means(judged.view()));
    say(format!("mean color of each patch, 3 numbers instead of a code: {of_means:.2} dB"));
    let mut model = Autoencoder::new(args, first.view())?;
    let style = ProgressStyle::with_template("{bar:24} {pos} of {len} steps, {eta} left")?;
    let bar = ProgressBar::new(args.steps).with_style(style);
    let mut points = vec![];
    for step in 0..=args.steps {
        if step % args.steps.div_ceil(POINTS) == 0 || step == args.steps {
            let (painted, stats) = model.reconstruct(judged.view()).map_err(|e| explained(e, step))?;
            let (psnr, usage, perplexity) =
                (psnr(&judged, &painted), stats.usage()[0], stats.perplexity()[0]);
            if !psnr.is_finite() {
                return Err(diverged(step).into());
            }
            points.push(Point { step, psnr, usage, perplexity });
            let usage = 100.0 * usage;
            let line = format!(
                "step {step:5}   {psnr:.2} dB   codes in use {usage:5.1} %, perplexity {perplexity:.0}"
            );
            bar.suspend(|| say(line));
        }
        if step < args.steps {
            let x = images::batch(BATCH, args.seed, step);
            let rate = 1.0 - step as f32 / args.steps as f32;
            model.step(x.view(), step, rate).map_err(|e| explained(e, step))?;
            bar.inc(1);
        }
    }
    bar.finish_and_clear();

    let (painted, stats) = model.reconstruct(judged.view())?;
    let codes = model.paint_codes()?;
    let svg = picture::draw(judged.view(), painted.view(), codes.view(), &stats, &points)?;
    let path = folder.write("vq_vae.svg", svg)?;
    let error = model.relative_error(judged.view())?;
    say(format!("squared distance of keys from codewords, over squared length: {error:.3}"));
    say(format!("{:.0} s; picture: {}", begin.elapsed().as_secs_f64(), path.display()));
    Ok(())
}

fn diverged(step: u64) -> String {
    format!("not a number after {step} steps; try a lower --rate")
}

/// What to do about an error.
fn explained(error: transformer_vq::Error, step: u64) -> String {
    match error {
        transformer_vq::Error::NotFinite { .. } => diverged(step),
        error => error.to_string(),
    }
}

/// Decibels; colors go from 0 to 1.
fn psnr(x: &Array2<f32>, y: &Array2<f32>) -> f64 {
    let squares = x.iter().zip(y).map(|(&x, &y)| f64::from(x - y).powi(2));
    -10.0 * (squares.sum::<f64>() / x.len() as f64).log10()
}

/// Every patch in its mean color.
fn means(x: ArrayView2<'_, f32>) -> Array2<f32> {
    let mut means = x.to_owned();
    for mut row in means.rows_mut() {
        for color in 0..3 {
            let mut numbers = row.slice_mut(transformer_vq::ndarray::s![color..;3]);
            let mean = numbers.mean().unwrap_or_default();
            numbers.fill(mean);
        }
    }
    means
}
