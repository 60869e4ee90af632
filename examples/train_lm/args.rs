//! The options of a run, written into its folder so that it can be resumed.

use std::path::PathBuf;

use clap::Parser;

use crate::sizes::{self, Sizes};

/// Trains a Transformer-VQ on text or images, then writes a sample of what it has learned.
///
/// Without arguments: a small model on this crate's own sources and documentation, about two minutes on two cores.
/// Ctrl-C stops a run with a checkpoint; --resume continues it.
#[derive(Debug, Clone, Parser)]
#[command(name = "train_lm")]
pub struct Args {
    /// Text to learn, a file or a folder of documents; the last tenth is held out [default: this crate's sources and
    /// documentation]
    #[arg(long, value_name = "PATH")]
    pub data: Option<PathBuf>,

    /// The folder of --data holds PNG images of one size: learn their bytes, row by row
    #[arg(long, requires = "data", conflicts_with_all = ["tokenizer", "enwik8"])]
    pub images: bool,

    /// Learn the tokens of this tokenizer.json instead of bytes; needs the feature `tokenizers`
    #[arg(long, value_name = "FILE", requires = "data", conflicts_with = "enwik8")]
    pub tokenizer: Option<PathBuf>,

    /// The file of --data is enwik8: 90 million bytes to learn from, 5 million held out, 5 million untouched
    #[arg(long, requires = "data")]
    pub enwik8: bool,

    /// Train for this many steps; the result then depends on the seed alone
    #[arg(long, value_name = "N", conflicts_with = "minutes", value_parser = clap::value_parser!(u64).range(1..))]
    pub steps: Option<u64>,

    /// Train for this long by the wall clock; the schedule follows elapsed time [default: 2]
    #[arg(long, value_name = "X", value_parser = sizes::positive)]
    pub minutes: Option<f64>,

    /// Folder for checkpoints, the log and the picture [default: runs/train_lm]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,

    /// Continue the run in this folder, with the options it was begun with
    #[arg(long, value_name = "DIR", conflicts_with_all = ["data", "images", "tokenizer", "enwik8", "steps", "minutes", "out", "seed", "Sizes"])]
    pub resume: Option<PathBuf>,

    /// Stop as Ctrl-C does, after this many steps in all
    #[arg(long, value_name = "N")]
    pub stop_after: Option<u64>,

    /// Seed of weights, batches and the sample [default: 1]
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,

    /// Threads; results are the same bits with any number [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,

    #[command(flatten)]
    pub sizes: Sizes,
}
