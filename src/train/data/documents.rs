//! The bytes of documents, one after the other, wherever they lie; read by ranges.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::spool::{Spool, io_error, read_at};
use crate::Error;

/// Bytes that a pass over documents reads at once.
const PIECE: usize = 1 << 16;

/// At least one document.
#[derive(Debug)]
pub(super) struct Documents {
    documents: Vec<Document>,
    len: usize,
}

/// Some bytes.
#[derive(Debug)]
pub(super) struct Document {
    /// Bytes of the documents before it.
    pub start: usize,
    pub len: usize,
    store: Store,
}

#[derive(Debug)]
pub(super) enum Store {
    Memory(Vec<u8>),
    File(PathBuf),
    /// From this place of a temporary file on.
    Spool(Spool, u64),
}

impl Documents {
    /// The documents with these lengths, none of which is 0.
    pub fn new(stores: Vec<(usize, Store)>) -> Self {
        let mut len = 0;
        let documents = stores.into_iter().map(|(own, store)| {
            len += own;
            Document { start: len - own, len: own, store }
        });
        Documents { documents: documents.collect(), len }
    }

    /// Files with something in them.
    pub fn of_files(paths: Vec<PathBuf>) -> Result<Self, Error> {
        let store = |path: PathBuf| Ok((file_len(&path)?, Store::File(path)));
        Ok(Documents::new(paths.into_iter().map(store).collect::<Result<_, Error>>()?))
    }

    /// Bytes of all documents.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn all(&self) -> &[Document] {
        &self.documents
    }

    /// The number of the last document that `starts_after` does not say to be later.
    pub fn find(&self, starts_after: impl Fn(usize, &Document) -> bool) -> usize {
        let (mut low, mut high) = (0, self.documents.len());
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if starts_after(middle, &self.documents[middle]) { high = middle } else { low = middle }
        }
        low
    }

    /// A range of the bytes of all documents.
    pub fn read(&self, range: Range<usize>) -> Result<Vec<u8>, Error> {
        let mut bytes = vec![0; range.len()];
        let mut at = range.start;
        while at < range.end {
            let document = &self.documents[self.find(|_, document| document.start > at)];
            let until = range.end.min(document.start + document.len);
            document.read(at - document.start, &mut bytes[at - range.start..until - range.start])?;
            at = until;
        }
        Ok(bytes)
    }

    /// Words, separated by ASCII white space, that begin in this range. The first byte of a document begins a word.
    pub fn words(&self, range: Range<usize>) -> Result<u64, Error> {
        let mut words = 0;
        for document in &self.documents {
            let (start, end) = (document.start, document.start + document.len);
            let (from, to) = (range.start.max(start), range.end.min(end));
            if from >= to {
                continue;
            }
            let mut space = from == start || self.read(from - 1..from)?[0].is_ascii_whitespace();
            for at in (from..to).step_by(PIECE) {
                for byte in self.read(at..to.min(at + PIECE))? {
                    let is_space = byte.is_ascii_whitespace();
                    words += u64::from(space && !is_space);
                    space = is_space;
                }
            }
        }
        Ok(words)
    }
}

impl Document {
    /// Fills `buffer` with its bytes from here on.
    pub fn read(&self, at: usize, buffer: &mut [u8]) -> Result<(), Error> {
        match &self.store {
            Store::Memory(bytes) => {
                buffer.copy_from_slice(&bytes[at..at + buffer.len()]);
                Ok(())
            }
            Store::File(path) => read_at(path, at as u64, buffer),
            Store::Spool(spool, start) => spool.read(start + at as u64, buffer),
        }
    }

    /// For messages.
    #[cfg(feature = "tokenizers")]
    pub fn path(&self) -> PathBuf {
        match &self.store {
            Store::File(path) => path.clone(),
            Store::Memory(_) | Store::Spool(..) => "(memory)".into(),
        }
    }
}

/// The length of a file that can be read and has something in it.
fn file_len(path: &Path) -> Result<usize, Error> {
    let metadata = File::open(path).and_then(|file| file.metadata());
    let metadata = metadata.map_err(|e| io_error(path, "read", &e))?;
    match metadata.len() {
        0 => Err(Error::File { path: path.to_path_buf(), problem: "the text is empty".into() }),
        len => usize::try_from(len).map_err(|_| Error::TooLarge { what: "text", shape: vec![] }),
    }
}

/// The files below a folder in the order of their paths, without those whose name or folder begins with a dot; with an
/// extension, only such files. A link to a folder that it lies in is not followed.
pub(super) fn files_of(folder: &Path, extension: Option<&str>) -> Result<Vec<PathBuf>, Error> {
    let mut files = vec![];
    add_files(folder, extension, &mut vec![], &mut files)?;
    files.sort();
    if files.is_empty() {
        let problem = match extension {
            Some(extension) => format!("there is no .{extension} file in this folder"),
            None => "there is no file in this folder".to_string(),
        };
        return Err(Error::File { path: folder.to_path_buf(), problem });
    }
    Ok(files)
}

/// Adds the files below a folder that is reached through the folders `above` it, which have no links in their paths.
fn add_files(
    folder: &Path,
    extension: Option<&str>,
    above: &mut Vec<PathBuf>,
    files: &mut Vec<PathBuf>,
) -> Result<(), Error> {
    let refused = |e: std::io::Error| io_error(folder, "read", &e);
    let own = folder.canonicalize().map_err(refused)?;
    if above.contains(&own) {
        return Ok(());
    }
    above.push(own);
    for entry in std::fs::read_dir(folder).map_err(refused)? {
        let path = entry.map_err(refused)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with('.') {
            continue;
        }
        let is = |wanted: &str| path.extension().is_some_and(|e| e.eq_ignore_ascii_case(wanted));
        if path.is_dir() {
            add_files(&path, extension, above, files)?;
        } else if extension.is_none_or(is) {
            files.push(path);
        }
    }
    above.pop();
    Ok(())
}
