//! A text to learn: where it comes from, how it is cut, and how a model is judged on what was held out.

use std::error::Error;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use transformer_vq::generate::Scorer;
use transformer_vq::model::Transformer;
use transformer_vq::train::{Batches, Corpus, Progress};

/// Tokens that evaluation reads at once.
const PIECE_LEN: usize = 2048;

/// What is learned, in words.
pub fn name(data: Option<&Path>) -> String {
    data.map_or("this crate's sources and documentation".into(), |path| path.display().to_string())
}

/// The part to learn from and the last tenth, which is held out.
pub fn split(text: &Corpus, progress: &Progress) -> Result<(Range<usize>, Range<usize>), Box<dyn Error>> {
    text.split(Corpus::VALIDATION_FRACTION).map_err(|_| too_short(text.len(), progress))
}

/// The batches of the part to learn from.
pub fn batches(
    text: &Corpus,
    training: Range<usize>,
    progress: &Progress,
) -> Result<Batches, Box<dyn Error>> {
    if training.len() <= progress.batches.sequence_len {
        return Err(too_short(text.len(), progress));
    }
    let mut batches = Batches::new(text.clone(), training, progress.batches)?;
    batches.seek(progress.position);
    Ok(batches)
}

fn too_short(tokens: usize, progress: &Progress) -> Box<dyn Error> {
    let sequence_len = progress.batches.sequence_len;
    format!("the text is too short: {tokens} tokens, and what is not held out of it must be more than the {sequence_len} of a training sequence").into()
}

/// The text to learn, a file or a folder of files. Without one: README, documentation and sources of this crate, in the order of
/// their names.
pub fn read_text(data: Option<&Path>) -> Result<Corpus, Box<dyn Error>> {
    if let Some(path) = data {
        return Ok(Corpus::open(path)?);
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = vec![root.join("README.md")];
    let mut folders: Vec<PathBuf> =
        ["src", "docs", "examples", "tests", "benches"].map(|name| root.join(name)).into();
    files.retain(|file| file.is_file());
    folders.retain(|folder| folder.is_dir());
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).map_err(|e| format!("cannot read {}: {e}", folder.display()))? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs" || extension == "md") {
                files.push(path);
            }
        }
    }
    files.sort();
    let mut bytes = vec![];
    for path in files {
        bytes.extend(fs::read(&path).map_err(|e| format!("cannot read {}: {e}", path.display()))?);
    }
    Ok(Corpus::from_bytes(bytes).map_err(|_| "this crate's sources are not here: name a text with --data")?)
}

/// Nats in bits.
pub fn bits(nats: f64) -> f64 {
    nats / std::f64::consts::LN_2
}

/// Reads a range of the text as one stream with carried state.
pub fn score<'m>(
    model: &'m Transformer,
    text: &Corpus,
    range: Range<usize>,
) -> Result<Scorer<'m>, Box<dyn Error>> {
    let mut scorer = Scorer::new(model)?;
    for piece in text.pieces(range, PIECE_LEN)? {
        let (tokens, targets) = piece?;
        scorer.push(tokens.row(0), targets.row(0))?;
    }
    Ok(scorer)
}
