//! Beginning a run and finding one again: its text, its options in `run.json`, its checkpoint.

use std::error::Error;
use std::fs;
use std::io::ErrorKind;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use transformer_vq::model::{ModelConfig, Transformer, write_atomically};
use transformer_vq::train::{Batches, Budget, Corpus, Progress, Trainer};

use crate::args::Args;
use crate::say::say;
use crate::sizes::Sizes;
use crate::text::{batches, name, read_text, split};

/// What a run was begun with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    /// None: the crate's own sources and documentation.
    pub data: Option<PathBuf>,
    #[serde(default)]
    pub images: bool,
    #[serde(default)]
    pub tokenizer: Option<PathBuf>,
    #[serde(default)]
    pub enwik8: bool,
    /// Tells whether the text is still the same.
    text: Fingerprint,
    /// And the tokenizer; none in runs of before 2026-11-28.
    #[serde(default)]
    tokenizer_file: Option<Fingerprint>,
    pub seed: u64,
    pub sizes: Sizes,
}

impl Options {
    /// The part of a text that is learned from, and the one that is held out.
    fn parts(
        &self,
        text: &Corpus,
        progress: &Progress,
    ) -> Result<(Range<usize>, Range<usize>), Box<dyn Error>> {
        if self.enwik8 {
            let [training, validation, _] = text.split_enwik8()?;
            return Ok((training, validation));
        }
        split(text, progress)
    }
}

/// What is learned.
fn open(data: Option<&Path>, images: bool, tokenizer: Option<&Path>) -> Result<Corpus, Box<dyn Error>> {
    let text = match data {
        Some(folder) if images => Corpus::images(folder)?,
        data => read_text(data)?,
    };
    match tokenizer {
        Some(path) => tokenized(text, path),
        None => Ok(text),
    }
}

#[cfg(feature = "tokenizers")]
fn tokenized(text: Corpus, path: &Path) -> Result<Corpus, Box<dyn Error>> {
    Ok(text.with_tokenizer(transformer_vq::train::Tokenizer::open(path)?)?)
}

#[cfg(not(feature = "tokenizers"))]
fn tokenized(_: Corpus, _: &Path) -> Result<Corpus, Box<dyn Error>> {
    Err("--tokenizer needs `cargo run --release --features tokenizers --example train_lm`".into())
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Fingerprint {
    bytes: usize,
    fnv1a: u64,
}

impl Fingerprint {
    const EMPTY: Self = Fingerprint { bytes: 0, fnv1a: 0xcbf2_9ce4_8422_2325 };

    fn of_text(text: &Corpus) -> Result<Self, Box<dyn Error>> {
        let (n_bytes, piece) = (text.n_bytes(), 1 << 20);
        let mut fingerprint = Fingerprint::EMPTY;
        for start in (0..n_bytes).step_by(piece) {
            fingerprint.add(&text.read_bytes(start..n_bytes.min(start + piece))?);
        }
        Ok(fingerprint)
    }

    fn of_file(path: &Path) -> Result<Self, Box<dyn Error>> {
        let mut fingerprint = Fingerprint::EMPTY;
        fingerprint.add(&fs::read(path).map_err(|e| format!("cannot read {}: {e}", path.display()))?);
        Ok(fingerprint)
    }

    fn add(&mut self, bytes: &[u8]) {
        let mix = |hash: u64, &byte: &u8| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        self.fnv1a = bytes.iter().fold(self.fnv1a, mix);
        self.bytes += bytes.len();
    }
}

/// What a run leaves in its folder, the checkpoint first: without it the rest is no run.
const FILES: [&str; 7] = [
    "checkpoint.json",
    "tensors-a.safetensors",
    "tensors-b.safetensors",
    "run.json",
    "log.csv",
    "curves.svg",
    "sample.png",
];

/// Checks that a run does not learn from what it writes.
fn check_apart(data: &Path, folder: &Path) -> Result<(), Box<dyn Error>> {
    if !data.is_dir() || !std::path::absolute(folder)?.starts_with(data) {
        return Ok(());
    }
    let (folder, data) = (folder.display(), data.display());
    Err(format!("--out {folder} lies in --data {data}: the run would read its own files").into())
}

/// Moves an earlier run, if there is one, into the folder `previous`, where it can be resumed; what was there goes.
fn set_aside(folder: &Path) -> Result<(), Box<dyn Error>> {
    let failed =
        |action: &str, path: &Path, e: std::io::Error| format!("cannot {action} {}: {e}", path.display());
    let remove = |path: PathBuf| match fs::remove_file(&path) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(failed("remove", &path, e)),
        _ => Ok(()),
    };
    let rename = |from: PathBuf, to: PathBuf| match fs::rename(&from, to) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(failed("move", &from, e)),
        _ => Ok(()),
    };
    let (checkpoint, previous) = (folder.join(FILES[0]), folder.join("previous"));
    if !checkpoint.exists() {
        // What is left of a run that was never saved.
        return Ok(FILES.iter().try_for_each(|name| remove(folder.join(name)))?);
    }
    fs::create_dir_all(&previous).map_err(|e| failed("create", &previous, e))?;
    FILES.iter().try_for_each(|name| remove(previous.join(name)))?;
    // The checkpoint leaves first and arrives last: it is never taken for one of the new run.
    let moving = previous.join("moving.json");
    rename(checkpoint, moving.clone())?;
    FILES[1..].iter().try_for_each(|name| rename(folder.join(name), previous.join(name)))?;
    rename(moving, previous.join(FILES[0]))?;
    say(format!("the run that was in {} is now in {}", folder.display(), previous.display()));
    Ok(())
}

/// A run, ready to go on.
pub struct Run {
    pub folder: PathBuf,
    pub options: Options,
    pub text: Corpus,
    pub training: Range<usize>,
    pub held_out: Range<usize>,
    pub batches: Batches,
    pub trainer: Trainer,
    pub progress: Progress,
}

impl Run {
    /// A model with random weights, in a folder that is touched only when all else has been checked.
    pub fn begin(args: &Args, folder: PathBuf) -> Result<Self, Box<dyn Error>> {
        // Absolute, so that the run can be resumed from elsewhere.
        let data = args.data.as_ref().map(std::path::absolute).transpose()?;
        let tokenizer = args.tokenizer.as_ref().map(std::path::absolute).transpose()?;
        let (images, enwik8) = (args.images, args.enwik8);
        if let Some(data) = &data {
            check_apart(data, &folder)?;
        }
        let text = open(data.as_deref(), images, tokenizer.as_deref())?;
        let seed = args.seed.unwrap_or(1);
        let sizes = args.sizes.clone();
        let budget = match (args.steps, args.minutes) {
            (Some(steps), _) => Budget::Steps(steps),
            (None, minutes) => Budget::Seconds(60.0 * minutes.unwrap_or(2.0)),
        };
        let progress = sizes.progress(budget, seed)?;
        let config = ModelConfig { vocab_size: text.vocab_size(), ..sizes.model() };
        config.validate()?;
        // Weights, their gradients and two moments: better refused here than in the middle of it.
        let bytes = usize::try_from(4 * size_of::<f32>() as u128 * config.n_parameters());
        if bytes.map_or(true, |bytes| Vec::<u8>::new().try_reserve_exact(bytes).is_err()) {
            return Err(format!("{} parameters do not fit into memory", config.n_parameters()).into());
        }
        let fingerprint = Fingerprint::of_text(&text)?;
        let tokenizer_file = tokenizer.as_deref().map(Fingerprint::of_file).transpose()?;
        let options =
            Options { data, images, tokenizer, enwik8, text: fingerprint, tokenizer_file, seed, sizes };
        let (training, held_out) = options.parts(&text, &progress)?;
        let batches = batches(&text, training.clone(), &progress)?;
        let mut trainer = options.sizes.trainer(Transformer::new(config, seed)?)?;

        fs::create_dir_all(&folder).map_err(|e| format!("cannot create {}: {e}", folder.display()))?;
        let json = serde_json::to_vec_pretty(&options)?;
        set_aside(&folder)?;
        write_atomically(folder.join("run.json"), |out| {
            out.write_all(&json)?;
            out.write_all(b"\n")
        })?;
        trainer.save(&folder, &progress)?;
        Ok(Run { folder, options, text, training, held_out, batches, trainer, progress })
    }

    /// The run in this folder, where its last checkpoint was written.
    pub fn resume(folder: PathBuf) -> Result<Self, Box<dyn Error>> {
        let path = folder.join("run.json");
        let json = fs::read(&path)
            .map_err(|e| format!("no run to resume in {}: run.json: {e}", folder.display()))?;
        let options: Options =
            serde_json::from_slice(&json).map_err(|e| format!("{}: {e}", path.display()))?;
        let (trainer, progress) = Trainer::load(&folder)?;
        let text = open(options.data.as_deref(), options.images, options.tokenizer.as_deref())?;
        let (then, now) = (&options.text, Fingerprint::of_text(&text)?);
        if *then != now {
            let name = name(options.data.as_deref());
            let sizes = format!("{} bytes then, {} now", then.bytes, now.bytes);
            return Err(format!("{name} changed since the run was begun ({sizes}); begin a new one").into());
        }
        if let (Some(path), Some(then)) = (&options.tokenizer, &options.tokenizer_file)
            && *then != Fingerprint::of_file(path)?
        {
            let path = path.display();
            return Err(format!("{path} changed since the run was begun; begin a new one").into());
        }
        let (known, needed) = (trainer.model().config().vocab_size, text.vocab_size());
        if known != needed {
            let problem = format!("the model knows {known} tokens, the text now has {needed}");
            return Err(format!("{problem}; begin a new run").into());
        }
        let (training, held_out) = options.parts(&text, &progress)?;
        let batches = batches(&text, training.clone(), &progress)?;
        Ok(Run { folder, options, text, training, held_out, batches, trainer, progress })
    }

    /// What is learned, in words.
    pub fn text_name(&self) -> String {
        name(self.options.data.as_deref())
    }

    pub fn is_over(&self) -> bool {
        self.progress.fraction(self.trainer.steps()) >= 1.0
    }
}
