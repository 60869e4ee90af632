//! Attention through a codebook against exact quadratic attention, in the same language model on the same text.
//!
//! Both have the same parameters (a codebook is learned beside them, by moving averages) and see the same batches of the same seeds.
//! First both train for as many steps: what do quantized keys cost, token for token? Then both train for as many seconds, on
//! sequences of 4,096 and of 8,192 bytes, each as one step: what does linear time gain? The text's last tenth is held out; up to
//! 64 KiB of it are read in pieces of the sequences' length, each from an empty state, by both alike. The clock of training
//! stands still meanwhile. Means over three seeds, with the least and the most, go into `--out` as a table (`table.md`) and a picture
//! (`vq_against_quadratic.svg`). About eleven minutes on two cores; others should leave these alone.
//!
//! ```sh
//! cargo run --release --example vq_against_quadratic
//! cargo run --release --example vq_against_quadratic -- --data FILE --steps 2000 --seconds 120
//! ```

#[path = "../support/budget.rs"]
mod budget;
#[path = "../support/chart.rs"]
mod chart;
mod contest;
#[path = "../support/exit.rs"]
mod exit;
#[path = "../support/options.rs"]
mod options;
#[path = "../support/out.rs"]
mod out;
mod picture;
#[path = "../support/say.rs"]
mod say;
#[path = "../support/statistics.rs"]
mod statistics;
mod table;
#[path = "../support/text.rs"]
mod text;

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;

use budget::PARTS;
use clap::Parser;
use contest::{Contest, KINDS};
use exit::exit;
use indicatif::{ProgressBar, ProgressStyle};
use options::{distinct, positive, within};
use out::Folder;
use say::say;
use table::HEAD;
use text::{name, read_text};
use transformer_vq::train::Budget;

/// Bytes that a second of training takes at equal tokens, mean of both, on two cores of an AMD EPYC (Zen 4, AVX-512): for the
/// announcement alone.
const BYTES_PER_SECOND: f64 = 30_000.0;
/// What reading the held-out text adds to training, likewise.
const JUDGING: f64 = 0.3;

/// Trains the same language model with a codebook and with exact quadratic attention.
#[derive(Debug, Parser)]
#[command(name = "vq_against_quadratic")]
struct Args {
    /// Text to learn; its last tenth is held out [default: this crate's sources and documentation]
    #[arg(long, value_name = "FILE")]
    data: Option<PathBuf>,

    /// Steps of training at equal tokens, 2,048 bytes each; 0: leave this part out
    #[arg(long, value_name = "N", default_value_t = 500, default_value_if("short", "true", "2"))]
    steps: u64,

    /// Seconds of training at equal time
    #[arg(long, value_name = "X", default_value_t = 25.0, default_value_if("short", "true", "0.2"))]
    #[arg(value_parser = positive)]
    seconds: f64,

    /// Lengths of the sequences at equal time
    #[arg(long, value_name = "T,...", value_delimiter = ',', default_value = "4096,8192")]
    #[arg(default_value_if("short", "true", "512"), value_parser = within(1..=1 << 20))]
    lengths: Vec<usize>,

    /// Seeds of weights and batches
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "1,2,3")]
    #[arg(default_value_if("short", "true", "1"))]
    seeds: Vec<u64>,

    /// A narrow model; an instant of each, one seed unless asked for: whether everything runs, not how well
    #[arg(long)]
    short: bool,

    /// Folder for the table and the picture
    #[arg(long, value_name = "DIR", default_value = "runs/vq_against_quadratic")]
    out: PathBuf,
}

fn main() -> ExitCode {
    exit(run(&Args::parse()))
}

fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    distinct("--lengths", &args.lengths)?;
    distinct("--seeds", &args.seeds)?;
    let text = read_text(args.data.as_deref())?;
    let mut contests = vec![];
    if args.steps > 0 {
        let (sequence_len, batch_size) = if args.short { (256, 8) } else { (1024, 2) };
        contests.push(Contest { sequence_len, batch_size, budget: Budget::Steps(args.steps) });
    }
    let timed = |&sequence_len: &usize| Contest {
        sequence_len,
        batch_size: 1,
        budget: Budget::Seconds(args.seconds),
    };
    contests.extend(args.lengths.iter().map(timed));
    contests.iter().try_for_each(|contest| contest.check(&text))?;
    let folder = Folder::create(&args.out)?;

    let (n_runs, n_seeds) = (contests.len() * args.seeds.len() * KINDS.len(), args.seeds.len());
    let seconds = contests.iter().map(|contest| match contest.budget {
        Budget::Steps(steps) => steps as f64 * contest.bytes_per_step() as f64 / BYTES_PER_SECOND,
        Budget::Seconds(seconds) => seconds,
    });
    let minutes = seconds.sum::<f64>() * (n_seeds * KINDS.len()) as f64 * (1.0 + JUDGING) / 60.0;
    say(format!(
        "{}; {n_runs} runs, about {:.0} minutes on two cores, {} threads",
        name(args.data.as_deref()),
        minutes.max(1.0),
        rayon::current_num_threads()
    ));
    for kind in KINDS {
        say(format!("{kind}: {} parameters", kind.config(&text, args.short).n_parameters()));
    }
    say(format!("\n{HEAD}"));
    let style = ProgressStyle::with_template("{prefix:28} {bar:24} {percent:>3}%  {msg}  {eta} left")?;
    let bar = ProgressBar::new(n_runs as u64 * PARTS).with_style(style);
    let (mut rows, mut verdicts, mut results) = (String::new(), String::new(), vec![]);
    for contest in contests {
        let result = contest.run(&text, &args.seeds, args.short, &bar)?;
        let of_contest = result.to_string();
        rows += &of_contest;
        verdicts += &result.verdict();
        results.push(result);
        // After each contest, for who stops before the last.
        folder.write("table.md", format!("{HEAD}\n{rows}\n{verdicts}"))?;
        folder.write("vq_against_quadratic.svg", picture::draw(&results)?)?;
        bar.suspend(|| say(of_contest.trim_end()));
    }
    bar.finish_and_clear();
    say(format!("\n{verdicts}\ninto {folder}"));
    Ok(())
}
