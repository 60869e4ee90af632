//! Reading a range of a file, and temporary files to read ranges from.

use std::fs::File;
use std::io::{BufWriter, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use crate::Error;

pub(super) fn io_error(path: &Path, action: &'static str, e: &std::io::Error) -> Error {
    Error::Io { path: path.to_path_buf(), action, message: e.to_string() }
}

/// Fills `buffer` with what stands in the file from here on.
pub(super) fn read_at(path: &Path, at: u64, buffer: &mut [u8]) -> Result<(), Error> {
    let read = File::open(path).and_then(|mut file| fill(&mut file, at, buffer));
    read.map_err(|e| match e.kind() {
        ErrorKind::UnexpectedEof => {
            Error::File { path: path.to_path_buf(), problem: "is shorter than when it was opened".into() }
        }
        _ => io_error(path, "read", &e),
    })
}

fn fill(file: &mut File, at: u64, buffer: &mut [u8]) -> std::io::Result<()> {
    file.seek(SeekFrom::Start(at))?;
    file.read_exact(buffer)
}

fn spool_error(action: &'static str, e: &std::io::Error) -> Error {
    io_error(&std::env::temp_dir(), action, e)
}

/// A temporary file without a name: the system removes it when the last clone goes, however the process ends.
#[derive(Debug, Clone)]
pub(super) struct Spool {
    file: Arc<Mutex<File>>,
}

/// A temporary file that is being written.
pub(super) struct SpoolWriter {
    out: BufWriter<File>,
}

impl SpoolWriter {
    pub fn new() -> Result<Self, Error> {
        let file = tempfile::tempfile().map_err(|e| spool_error("write", &e))?;
        Ok(SpoolWriter { out: BufWriter::with_capacity(1 << 16, file) })
    }

    pub fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.out.write_all(bytes).map_err(|e| spool_error("write", &e))
    }

    pub fn finish(self) -> Result<Spool, Error> {
        let file = self.out.into_inner().map_err(|e| spool_error("write", e.error()))?;
        Ok(Spool { file: Arc::new(Mutex::new(file)) })
    }
}

impl Spool {
    pub fn read(&self, at: u64, buffer: &mut [u8]) -> Result<(), Error> {
        // A thread that panicked while it read has broken nothing.
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        fill(&mut file, at, buffer).map_err(|e| spool_error("read", &e))
    }
}
