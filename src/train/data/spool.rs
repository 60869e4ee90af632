//! Reading a range of a file, and temporary files to read ranges from.

use std::fs::File;
use std::io::{BufWriter, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tempfile::NamedTempFile;

use crate::Error;

pub(super) fn io_error(path: &Path, action: &'static str, e: &std::io::Error) -> Error {
    Error::Io { path: path.to_path_buf(), action, message: e.to_string() }
}

/// Fills `buffer` with what stands in the file from here on.
pub(super) fn read_at(path: &Path, at: u64, buffer: &mut [u8]) -> Result<(), Error> {
    let read = |buffer: &mut [u8]| {
        let mut file = File::open(path)?;
        file.seek(SeekFrom::Start(at))?;
        file.read_exact(buffer)
    };
    read(buffer).map_err(|e| match e.kind() {
        ErrorKind::UnexpectedEof => {
            Error::File { path: path.to_path_buf(), problem: "is shorter than when it was opened".into() }
        }
        _ => io_error(path, "read", &e),
    })
}

/// A temporary file, removed when the last clone goes.
#[derive(Debug, Clone)]
pub(super) struct Spool {
    file: Arc<NamedTempFile>,
}

/// A temporary file that is being written.
pub(super) struct SpoolWriter {
    path: PathBuf,
    out: BufWriter<NamedTempFile>,
}

impl SpoolWriter {
    pub fn new() -> Result<Self, Error> {
        let file = NamedTempFile::new().map_err(|e| io_error(&std::env::temp_dir(), "write", &e))?;
        Ok(SpoolWriter { path: file.path().to_path_buf(), out: BufWriter::with_capacity(1 << 16, file) })
    }

    pub fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.out.write_all(bytes).map_err(|e| io_error(&self.path, "write", &e))
    }

    pub fn finish(self) -> Result<Spool, Error> {
        let file = self.out.into_inner().map_err(|e| io_error(&self.path, "write", e.error()))?;
        Ok(Spool { file: Arc::new(file) })
    }
}

impl Spool {
    pub fn read(&self, at: u64, buffer: &mut [u8]) -> Result<(), Error> {
        read_at(self.file.path(), at, buffer)
    }
}
