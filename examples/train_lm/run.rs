//! Beginning a run and finding one again: its text, its options in `run.json`, its checkpoint.

use std::error::Error;
use std::fs;
use std::io::ErrorKind;
use std::ops::Range;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use transformer_vq::model::{ModelConfig, Transformer, write_atomically};
use transformer_vq::train::{Batches, Budget, Corpus, Progress, Trainer};

use crate::args::Args;
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
fn open(
    data: Option<&std::path::Path>,
    images: bool,
    tokenizer: Option<&std::path::Path>,
) -> Result<Corpus, Box<dyn Error>> {
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
fn tokenized(text: Corpus, path: &std::path::Path) -> Result<Corpus, Box<dyn Error>> {
    Ok(text.with_tokenizer(transformer_vq::train::Tokenizer::open(path)?)?)
}

#[cfg(not(feature = "tokenizers"))]
fn tokenized(_: Corpus, _: &std::path::Path) -> Result<Corpus, Box<dyn Error>> {
    Err("--tokenizer needs `cargo run --release --features tokenizers --example train_lm`".into())
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Fingerprint {
    bytes: usize,
    fnv1a: u64,
}

impl Fingerprint {
    fn new(text: &Corpus) -> Result<Self, Box<dyn Error>> {
        let mix = |hash: u64, &byte: &u8| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        let (bytes, piece) = (text.n_bytes(), 1 << 20);
        let mut fnv1a = 0xcbf2_9ce4_8422_2325;
        for start in (0..bytes).step_by(piece) {
            fnv1a = text.read_bytes(start..bytes.min(start + piece))?.iter().fold(fnv1a, mix);
        }
        Ok(Fingerprint { bytes, fnv1a })
    }
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
        let fingerprint = Fingerprint::new(&text)?;
        let options = Options { data, images, tokenizer, enwik8, text: fingerprint, seed, sizes };
        let (training, held_out) = options.parts(&text, &progress)?;
        let batches = batches(&text, training.clone(), &progress)?;
        let mut trainer = options.sizes.trainer(Transformer::new(config, seed)?)?;

        fs::create_dir_all(&folder).map_err(|e| format!("cannot create {}: {e}", folder.display()))?;
        // The checkpoint of an earlier run goes first, so that it is never taken for one of this run.
        for name in ["checkpoint.json", "log.csv", "curves.svg"] {
            match fs::remove_file(folder.join(name)) {
                Err(e) if e.kind() != ErrorKind::NotFound => {
                    return Err(format!("cannot remove {}: {e}", folder.join(name).display()).into());
                }
                _ => {}
            }
        }
        write_atomically(folder.join("run.json"), |out| {
            serde_json::to_writer_pretty(&mut *out, &options)?;
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
        let (then, now) = (&options.text, Fingerprint::new(&text)?);
        if *then != now {
            let name = name(options.data.as_deref());
            let sizes = format!("{} bytes then, {} now", then.bytes, now.bytes);
            return Err(format!("{name} changed since the run was begun ({sizes}); begin a new one").into());
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
