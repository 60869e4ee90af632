//! Continues a prompt with a trained model, byte by byte as they come; tokens per second at the end. With `--samples`, several
//! times at once, which takes less time than one after the other.
//!
//! Needs a folder that `train_lm` has written, with a model of bytes. Runs until `--tokens` bytes are out, or until nobody reads
//! them any more. Memory does not grow with them, but for a model with units of exact attention, which remember every key; and
//! `--samples` keeps its texts until all are complete.
//!
//! ```sh
//! cargo run --release --example generate -- --model runs/train_lm --prompt "pub fn "
//! ```

#[path = "support/exit.rs"]
mod exit;

use std::error::Error;
use std::fs;
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use exit::exit;
use serde::Deserialize;
use transformer_vq::generate::{Generator, Sampler};
use transformer_vq::model::Transformer;
use transformer_vq::ndarray::Array1;

/// Continues a prompt with a trained model.
#[derive(Debug, Parser)]
struct Args {
    /// Folder with the model's checkpoint
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Text to continue
    #[arg(long, default_value = "\n")]
    prompt: String,
    /// Bytes to write
    #[arg(long, default_value_t = 500)]
    tokens: usize,
    /// 0: always the most probable byte
    #[arg(long, default_value_t = 0.8)]
    temperature: f64,
    /// Draw from this many most probable bytes only
    #[arg(long)]
    top_k: Option<usize>,
    /// Draw from the most probable bytes that have this much probability together
    #[arg(long)]
    top_p: Option<f64>,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Continuations, side by side, with seeds that count up from --seed
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=4096))]
    samples: u64,
}

fn main() -> ExitCode {
    let result = run(&Args::parse());
    match &result {
        // Whoever reads has had enough.
        Err(error) if is_broken_pipe(&**error) => ExitCode::SUCCESS,
        _ => exit(result),
    }
}

fn is_broken_pipe(error: &(dyn Error + 'static)) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == ErrorKind::BrokenPipe)
}

/// What a model was trained on, as `train_lm` writes it into `run.json`.
#[derive(Deserialize)]
struct Trained {
    #[serde(default)]
    images: bool,
    #[serde(default)]
    tokenizer: Option<PathBuf>,
}

/// Refuses a model of something else than text in bytes. Where nothing tells, the size of the vocabulary has to.
fn check_text(folder: &Path) -> Result<(), Box<dyn Error>> {
    let path = folder.join("run.json");
    let json = match fs::read(&path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        json => json.map_err(|e| format!("cannot read {}: {e}", path.display()))?,
    };
    let trained: Trained = serde_json::from_slice(&json).map_err(|e| format!("{}: {e}", path.display()))?;
    match trained {
        Trained { images: true, .. } => Err("the model has learned images, which no text begins".into()),
        Trained { tokenizer: Some(tokenizer), .. } => {
            let tokenizer = tokenizer.display();
            Err(format!("the model knows the tokens of {tokenizer}, which are no bytes").into())
        }
        _ => Ok(()),
    }
}

fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    let model = Transformer::<f32>::load(&args.model)?;
    check_text(&args.model)?;
    let vocab_size = model.config().vocab_size;
    if !(256..=257).contains(&vocab_size) {
        return Err(format!("the model knows {vocab_size} tokens, which are no bytes").into());
    }
    let sampler = Sampler { temperature: args.temperature, top_k: args.top_k, top_p: args.top_p };
    let mut generator = Generator::new(&model, sampler, args.seed)?;
    let prompt: Array1<u32> = args.prompt.bytes().map(u32::from).collect();
    generator.read(prompt.view())?;
    if args.samples > 1 {
        return continue_often(args, &generator);
    }
    let mut out = std::io::stdout().lock();
    out.write_all(args.prompt.as_bytes())?;
    let begun = Instant::now();
    for _ in 0..args.tokens {
        out.write_all(&[byte(generator.next_token()?)])?;
        out.flush()?;
    }
    let seconds = begun.elapsed().as_secs_f64();
    let constant = generator.state().layers().iter().all(|unit| unit.quantized().is_some());
    let of_length = if constant { "at any length" } else { "by now, and it grows" };
    // Beside the text: only prompt and tokens go to the standard output.
    eprintln!(
        "\n{} tokens, {:.0} per second; state: {} bytes {of_length}",
        args.tokens,
        args.tokens as f64 / seconds,
        generator.state().size_in_bytes(),
    );
    Ok(())
}

/// What is no byte is the end of a document.
fn byte(token: u32) -> u8 {
    u8::try_from(token).unwrap_or(b'\n')
}

/// All continuations of what has been read, one after the other when they are complete.
fn continue_often(args: &Args, generator: &Generator<'_>) -> Result<(), Box<dyn Error>> {
    let seeds: Vec<u64> = (0..args.samples).map(|i| args.seed.wrapping_add(i)).collect();
    let mut streams = generator.branch(&seeds)?;
    let mut texts = vec![args.prompt.as_bytes().to_vec(); seeds.len()];
    let begun = Instant::now();
    for _ in 0..args.tokens {
        for (text, token) in texts.iter_mut().zip(streams.next_tokens()?) {
            text.push(byte(token));
        }
    }
    let seconds = begun.elapsed().as_secs_f64();
    let mut out = std::io::stdout().lock();
    for (seed, text) in seeds.iter().zip(texts) {
        writeln!(out, "--- seed {seed}")?;
        out.write_all(&text)?;
        writeln!(out)?;
    }
    let tokens = args.tokens as f64 * seeds.len() as f64;
    eprintln!("\n{} streams, {:.0} tokens per second", seeds.len(), tokens / seconds);
    Ok(())
}
