//! The folder that results go into: as `model::write_atomically`, for examples that do without the model too.

use std::fmt;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

/// A folder that takes files.
pub struct Folder(PathBuf);

impl Folder {
    /// Creates the folder, and a file in it that goes again: what is refused is refused before the work.
    pub fn create(path: &Path) -> Result<Self, String> {
        let probed = fs::create_dir_all(path).and_then(|()| temporary(path));
        probed.map_err(|e| format!("cannot write into {}: {e}", path.display()))?;
        Ok(Folder(path.to_path_buf()))
    }

    /// Writes a file; a reader finds the old one or the new one, never a part. Its path.
    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> Result<PathBuf, String> {
        let path = self.0.join(name);
        let written = temporary(&self.0).and_then(|mut file| {
            file.write_all(bytes.as_ref())?;
            Ok(file.persist(&path)?)
        });
        written.map_err(|e| format!("cannot write {}: {e}", path.display()))?;
        Ok(path)
    }
}

impl AsRef<Path> for Folder {
    fn as_ref(&self) -> &Path {
        &self.0
    }
}

impl fmt::Display for Folder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.display().fmt(f)
    }
}

/// A file that goes with its handle, unless it gets a name; who may read it is for the process's umask to say.
fn temporary(folder: &Path) -> io::Result<NamedTempFile> {
    let mut options = tempfile::Builder::new();
    options.prefix(".").suffix(".tmp");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        options.permissions(fs::Permissions::from_mode(0o666));
    }
    options.tempfile_in(folder)
}
