//! Shows from which length on linear attention is the faster one: vector-quantized against quadratic attention, tokens per
//! second at doubling lengths, in a table and a picture.
//!
//! Runs for about 40 seconds on an idle core; `--quick` for about 10.
//!
//! ```sh
//! cargo run --release --example crossover
//! cargo run --release --example crossover -- --quick --memory
//! ```
//!
//! Both sides compute exact causal softmax attention in f32, the one over keys that it first replaces by their nearest
//! codewords (finding these is in its time), the other over the keys as they are. The quadratic side is this crate's
//! `attention::quadratic`: the same matrix product and exponential, tiles with a running softmax, the masked half skipped.
//! Neither has relative biases. Both run on one thread unless `--threads` says otherwise; heads are what threads share.
//!
//! A head has the published multi-head shape (K = V = 64, S = 256, L = M = 128). There are two of them: every head costs
//! the same, so their number changes neither speed-ups nor the crossover, only how long this runs.

#[path = "support/exit.rs"]
mod exit;
#[path = "support/options.rs"]
mod options;
#[path = "support/out.rs"]
mod out;
#[path = "support/process.rs"]
mod process;
#[path = "support/say.rs"]
mod say;
#[path = "support/statistics.rs"]
mod statistics;

use std::error::Error;
use std::hint::black_box;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use exit::exit;
use options::within;
use out::Folder;
use plotters::prelude::*;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use say::say;
use statistics::median;
use transformer_vq::attention::{BatchGradients, BatchInputs, BatchOutput, VqAttention, quadratic};
use transformer_vq::check::relative_rms;
use transformer_vq::codebook::{Codebook, Ema, Estimator, lookup};
use transformer_vq::ndarray::{Array, Array4, IntoDimension, s};
use transformer_vq::ops::aligned;

const SHORTEST: usize = 256;
/// Lengths whose tokens per second are compared.
const PAIR: (usize, usize) = (4096, 32768);

/// How far the linear side goes at least.
const LINEAR_TO: usize = 32768;
/// Short calls are timed together, this many tokens at a time.
const TOKENS_PER_SAMPLE: usize = 8192;
const MEMORY_LENGTH: usize = 131_072;

/// Vector-quantized against quadratic attention: which is faster at which length.
#[derive(Debug, Parser)]
struct Args {
    /// H
    #[arg(long, default_value_t = 2, value_parser = within(1..=256))]
    heads: usize,
    /// K, width of a key
    #[arg(long, default_value_t = 64, value_parser = within(1..=4096))]
    d_k: usize,
    /// V, width of a value
    #[arg(long, default_value_t = 64, value_parser = within(1..=4096))]
    d_v: usize,
    /// S, codewords per head
    #[arg(long, default_value_t = 256, value_parser = within(1..=65536))]
    n_codes: usize,
    /// L, queries that share one cache
    #[arg(long, default_value_t = 128, value_parser = within(1..=65536))]
    block_len: usize,
    /// M, keys before the block that are attended one by one
    #[arg(long, default_value_t = 128, value_parser = within(0..=65536))]
    window: usize,
    /// At most as many as heads
    #[arg(long, default_value_t = 1, value_parser = within(1..=256))]
    threads: usize,
    /// Both sides in turn, so many times; medians are reported
    #[arg(long, default_value_t = 5, value_parser = within(1..=1000))]
    repetitions: usize,
    /// Longest sequence for the quadratic side, tokens
    #[arg(long, default_value_t = 16384, value_parser = within(256..=1 << 20))]
    max_length: usize,
    /// At most 4096 tokens for the quadratic side, 3 repetitions
    #[arg(long)]
    quick: bool,
    /// Also the peak memory of one forward call on 131072 tokens
    #[arg(long)]
    memory: bool,
    /// Folder for crossover.svg
    #[arg(long, value_name = "DIR", default_value = "runs/crossover")]
    out: PathBuf,
}

fn main() -> ExitCode {
    exit(run(Args::parse()))
}

fn run(mut args: Args) -> Result<(), Box<dyn Error>> {
    if args.threads > args.heads {
        let Args { threads, heads, .. } = args;
        return Err(format!("--threads {threads} share --heads {heads}: more threads than heads").into());
    }
    if args.quick {
        args.max_length = args.max_length.min(4096);
        args.repetitions = args.repetitions.min(3);
    }
    let folder = Folder::create(&args.out)?;
    rayon::ThreadPoolBuilder::new().num_threads(args.threads).build_global()?;
    let Args { heads, d_k, d_v, n_codes, block_len, window, threads, repetitions, .. } = args;
    say(format!("H = {heads}, K = {d_k}, V = {d_v}, S = {n_codes}, L = {block_len}, M = {window}, f32"));
    say(format!("threads: {threads}, medians of {repetitions} repetitions\n"));
    if args.memory {
        // First: the peak of a process never comes down again.
        report_memory(&args)?;
    }
    let longest = LINEAR_TO.max(PAIR.1).max(args.max_length);
    let problem = Problem::new(&args, longest)?;
    let difference = problem.difference(1024)?;
    say(format!("on the same quantized keys both agree to {difference:.0e} (relative RMS, f32)\n"));
    if difference.is_nan() || difference > 1e-5 {
        return Err("they do not compute the same: no times".into());
    }

    let lengths: Vec<usize> =
        std::iter::successors(Some(SHORTEST), |t| Some(2 * t)).take_while(|&t| t <= longest).collect();
    let mut samples = vec![(vec![], vec![]); lengths.len()]; // (linear, quadratic), all repetitions of a length
    let mut results = vec![Results::default(); lengths.len()];
    for _ in 0..repetitions {
        for ((&t, (linear, quadratic)), results) in lengths.iter().zip(&mut samples).zip(&mut results) {
            linear.push(seconds_per_call(t, || problem.linear(t, results))?);
            if t <= args.max_length {
                quadratic.push(seconds_per_call(t, || problem.quadratic(t))?);
            }
        }
    }
    let rows = |time: fn(&Seconds) -> f64| -> Vec<Row> {
        let samples = lengths.iter().zip(&samples);
        let rows = samples.map(|(&length, (linear, quadratic))| {
            let median = |samples: &[Seconds]| median(samples.iter().map(time));
            let quadratic = (!quadratic.is_empty()).then(|| median(quadratic));
            Row { length, linear: median(linear), quadratic }
        });
        rows.collect()
    };
    let tables =
        [("forward", rows(|s| s.forward)), ("forward and backward", rows(|s| s.forward + s.backward))];
    // A machine's speed drifts: lengths are compared in pairs of calls next to each other.
    let mut results = [Results::default(), Results::default()];
    let mut pair = || {
        let [short, long] = &mut results;
        let short = seconds_per_call(PAIR.0, || problem.linear(PAIR.0, short))?;
        Ok((short, problem.linear(PAIR.1, long)?))
    };
    let pairs = (0..3 * repetitions).map(|_| pair()).collect::<Result<Vec<_>, transformer_vq::Error>>()?;
    let flatness = [flatness(&pairs, |s| s.forward), flatness(&pairs, |s| s.forward + s.backward)];
    let path = folder.write("crossover.svg", draw(&tables)?)?;
    for ((name, rows), flatness) in tables.iter().zip(flatness) {
        report(name, rows);
        say(format!("tokens per second at 32k / at 4k: {flatness:.2}\n"));
    }
    say(format!("picture: {}", path.display()));
    Ok(())
}

/// One call: what forward took, and backward after it.
#[derive(Debug, Clone, Copy, Default)]
struct Seconds {
    forward: f64,
    backward: f64,
}

/// Medians of one length, seconds.
#[derive(Debug)]
struct Row {
    length: usize,
    linear: f64,
    /// None beyond `--max-length`.
    quadratic: Option<f64>,
}

/// Tokens per second at the second length over those at the first: the median of all pairs.
fn flatness(pairs: &[(Seconds, Seconds)], time: fn(&Seconds) -> f64) -> f64 {
    let ratio =
        |(short, long): &(Seconds, Seconds)| (PAIR.1 as f64 / time(long)) / (PAIR.0 as f64 / time(short));
    median(pairs.iter().map(ratio))
}

fn seconds_per_call(
    t: usize,
    mut call: impl FnMut() -> Result<Seconds, transformer_vq::Error>,
) -> Result<Seconds, transformer_vq::Error> {
    let calls = (TOKENS_PER_SAMPLE / t).max(1);
    let mut mean = Seconds::default();
    for _ in 0..calls {
        let seconds = call()?;
        mean.forward += seconds.forward / calls as f64;
        mean.backward += seconds.backward / calls as f64;
    }
    Ok(mean)
}

/// What the linear side computes, in memory that stays from call to call, as a training loop keeps it.
#[derive(Clone, Default)]
struct Results {
    output: BatchOutput<f32>,
    gradients: BatchGradients<f32>,
}

/// One sequence, as long as any length needs; shorter ones are its beginning.
struct Problem {
    attention: VqAttention,
    codebook: Codebook<f32>,
    q: Array4<f32>,
    k: Array4<f32>,
    /// Values, and at the same time the gradient of the outputs.
    v: Array4<f32>,
}

impl Problem {
    fn new(args: &Args, t: usize) -> Result<Self, Box<dyn Error>> {
        let Args { heads, d_k, d_v, n_codes, block_len, window, .. } = *args;
        let attention = VqAttention { block_len, window, ..VqAttention::default() };
        attention.validate()?;
        // Inputs, results and gradients at once, given back untouched: better refused here than halfway.
        let all = aligned::zeros::<f32, _>((heads, t, 4 * (d_k + d_v)));
        all.map_err(|_| format!("{t} tokens do not fit into memory: less of --heads, --d-k or --d-v"))?;
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        // Queries and keys as a unit of the model has them: of RMS 1, times K^(-1/4).
        let of_keys = (d_k as f32).powf(-0.25);
        let codewords = random(&mut rng, (heads, n_codes, d_k), of_keys)?;
        Ok(Problem {
            attention,
            codebook: Codebook::ema(Ema::from_codewords(codewords, 0.99)?),
            q: random(&mut rng, (1, heads, t, d_k), of_keys)?,
            k: random(&mut rng, (1, heads, t, d_k), of_keys)?,
            v: random(&mut rng, (1, heads, t, d_v), 1.0)?,
        })
    }

    fn inputs(&self, t: usize) -> BatchInputs<'_, f32> {
        let [q, k, v] = [&self.q, &self.k, &self.v].map(|x| x.slice(s![.., .., ..t, ..]));
        BatchInputs::new(q, k, v)
    }

    fn linear(&self, t: usize, results: &mut Results) -> Result<Seconds, transformer_vq::Error> {
        let (inputs, Results { output, gradients }) = (self.inputs(t), results);
        let begun = Instant::now();
        let mut states = self.attention.new_states(1, &self.codebook, self.v.shape()[3])?;
        let saved = self.attention.forward_into(&inputs, &self.codebook, &mut states, output)?;
        let forward = begun.elapsed().as_secs_f64();
        let d_out = inputs.v.view();
        self.attention.backward_into(&inputs, saved, d_out, Estimator::StraightThrough, 1e-4, gradients)?;
        let backward = begun.elapsed().as_secs_f64() - forward;
        Ok(Seconds { forward, backward })
    }

    fn quadratic(&self, t: usize) -> Result<Seconds, transformer_vq::Error> {
        let heads = self.q.shape()[1];
        let of_head = |h: usize| [&self.q, &self.k, &self.v].map(|x| x.slice(s![0, h, ..t, ..]));
        let begun = Instant::now();
        let outputs = (0..heads).into_par_iter().map(|h| {
            let [q, k, v] = of_head(h);
            quadratic::forward(q, k, v)
        });
        let outputs: Vec<_> = outputs.collect::<Result<_, _>>()?;
        let forward = begun.elapsed().as_secs_f64();
        let gradients = outputs.par_iter().enumerate().map(|(h, (out, lse))| {
            let [q, k, v] = of_head(h);
            quadratic::backward(q, k, v, out.view(), lse.view(), v)
        });
        let gradients: Vec<_> = gradients.collect::<Result<_, _>>()?;
        let backward = begun.elapsed().as_secs_f64() - forward;
        black_box((outputs, gradients));
        Ok(Seconds { forward, backward })
    }

    /// How far the two are apart where they must agree: quadratic attention over the quantized keys.
    fn difference(&self, t: usize) -> Result<f64, transformer_vq::Error> {
        let inputs = self.inputs(t);
        let mut states = self.attention.new_states(1, &self.codebook, self.v.shape()[3])?;
        let output = self.attention.push(&inputs, &self.codebook, &mut states)?;
        let k_hat = lookup(output.codes.view(), self.codebook.codewords().view())?;
        let mut worst = 0.0f64;
        for h in 0..self.q.shape()[1] {
            let head = |x: &Array4<f32>| x.slice(s![0, h, ..t, ..]).to_owned();
            let (out, _) =
                quadratic::forward(head(&self.q).view(), head(&k_hat).view(), head(&self.v).view())?;
            worst = worst.max(relative_rms(&head(&output.out), &out));
        }
        Ok(worst)
    }
}

/// Uniform, mean 0.
fn random<Sh: IntoDimension>(
    rng: &mut ChaCha8Rng,
    shape: Sh,
    rms: f32,
) -> Result<Array<f32, Sh::Dim>, transformer_vq::Error> {
    let bound = rms * 3f32.sqrt();
    let mut array = aligned::zeros(shape)?;
    array.map_inplace(|x| *x = rng.random_range(-bound..bound));
    Ok(array)
}

fn report(name: &str, rows: &[Row]) {
    say(name);
    say(format!(
        "{:>9} {:>10} {:>13} {:>9} {:>13}",
        "length", "VQ ms", "quadratic ms", "speed-up", "VQ tokens/s"
    ));
    for Row { length, linear, quadratic } in rows {
        let cell = |x: Option<f64>, decimals| x.map_or("-".to_string(), |x| format!("{x:.decimals$}"));
        say(format!(
            "{length:9} {:10.2} {:>13} {:>9} {:13.0}",
            1e3 * linear,
            cell(quadratic.map(|quadratic| 1e3 * quadratic), 2),
            cell(quadratic.map(|quadratic| quadratic / linear), 2),
            *length as f64 / linear
        ));
    }
    match crossover(rows) {
        Some(length) => say(format!("linear wins from T = {length}")),
        None => say("linear does not win yet"),
    }
}

/// The measured length from which on quadratic attention is nowhere faster.
fn crossover(rows: &[Row]) -> Option<usize> {
    let compared = rows.iter().rev().filter_map(|row| Some((row.length, row.linear, row.quadratic?)));
    compared.take_while(|(_, linear, quadratic)| linear < quadratic).map(|(length, ..)| length).last()
}

/// Peak memory of one forward call beyond inputs and outputs.
fn report_memory(args: &Args) -> Result<(), Box<dyn Error>> {
    let problem = Problem::new(args, MEMORY_LENGTH)?;
    // Threads and their buffers come to life before memory is counted.
    problem.difference(256)?;
    let inputs = problem.inputs(MEMORY_LENGTH);
    let mut states = problem.attention.new_states(1, &problem.codebook, args.d_v)?;
    let before = process::resident();
    let (output, saved) = problem.attention.forward(&inputs, &problem.codebook, &mut states)?;
    let peak = process::peak();
    let of_inputs = 4 * (inputs.q.len() + inputs.k.len() + inputs.v.len());
    let of_outputs =
        4 * (output.out.len() + output.codes.len() + output.lse.len() + output.cached_mass.len());
    black_box(saved);
    let mib = |bytes: usize| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
    let beyond = before.zip(peak).map(|(before, peak)| mib(peak.saturating_sub(before + of_outputs)));
    let beyond = beyond.unwrap_or("unknown on this system".to_string());
    let (inputs, outputs) = (mib(of_inputs), mib(of_outputs));
    say(format!("forward on {MEMORY_LENGTH} tokens: inputs {inputs}, outputs {outputs}"));
    say(format!("peak memory beyond these: {beyond}\n"));
    Ok(())
}

/// Milliseconds over length, one panel for each table, both axes logarithmic.
fn draw(tables: &[(&str, Vec<Row>)]) -> Result<String, Box<dyn Error>> {
    let mut svg = String::new();
    let root = SVGBackend::with_string(&mut svg, (1000, 450)).into_drawing_area();
    root.fill(&WHITE)?;
    let rows = || tables.iter().flat_map(|(_, rows)| rows);
    let times = || rows().flat_map(|row| [Some(row.linear), row.quadratic]).flatten().map(|time| 1e3 * time);
    let (least, most) = (times().fold(f64::INFINITY, f64::min), times().fold(0.0, f64::max));
    let longest = rows().map(|row| row.length).max().unwrap_or(SHORTEST);
    for ((name, rows), area) in tables.iter().zip(root.split_evenly((1, tables.len()))) {
        let lengths = (SHORTEST as f64..longest as f64).log_scale().base(2.0);
        let mut chart = ChartBuilder::on(&area)
            .caption(*name, ("sans-serif", 18))
            .margin(12)
            .margin_right(28)
            .x_label_area_size(40)
            .y_label_area_size(64)
            .build_cartesian_2d(lengths, (least / 1.5..most * 1.5).log_scale())?;
        chart
            .configure_mesh()
            .x_desc("length, tokens")
            .y_desc("milliseconds")
            .x_label_formatter(&|length| format!("{length:.0}"))
            .y_label_formatter(&|time| format!("{time}"))
            .light_line_style(WHITE)
            .draw()?;
        let point = |row: &Row, seconds: f64| (row.length as f64, 1e3 * seconds);
        let linear: Vec<_> = rows.iter().map(|row| point(row, row.linear)).collect();
        let quadratic = rows.iter().filter_map(|row| Some(point(row, row.quadratic?))).collect();
        let curves = [("vector-quantized", BLUE, linear), ("quadratic", RED, quadratic)];
        for (label, colour, points) in curves {
            chart
                .draw_series(LineSeries::new(points, colour.stroke_width(2)).point_size(3))?
                .label(label)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], colour.stroke_width(2)));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .border_style(BLACK)
            .draw()?;
    }
    root.present()?;
    drop(root);
    Ok(svg)
}
