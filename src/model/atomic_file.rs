//! Writing a file so that it is either the old one or the new one, never half of one.
//!
//! The bytes go to a temporary file in the same folder, which is flushed to the disk and then renamed over the old one.
//! A process that is killed on the way leaves the old file as it was, and perhaps a `.tmp` file beside it.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use crate::Error;

/// Writes a file through `write`, in place of what stood there, all or nothing.
///
/// # Errors
/// [`Error::Io`] if the folder or the disk refuses, or `write` fails; then the old file, if there was one, is untouched.
///
/// ```
/// use transformer_vq::model::write_atomically;
///
/// # let folder = tempfile::tempdir().unwrap();
/// # let path = folder.path().join("losses.csv");
/// write_atomically(&path, |out| writeln!(out, "step,loss"))?;
/// assert_eq!(std::fs::read_to_string(&path).unwrap(), "step,loss\n");
/// # Ok::<(), transformer_vq::Error>(())
/// ```
pub fn write_atomically(
    path: impl AsRef<Path>,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<(), Error> {
    let path = path.as_ref();
    try_write(path, write).map_err(|e| Error::Io {
        path: path.to_path_buf(),
        action: "write",
        message: e.to_string(),
    })
}

fn try_write(path: &Path, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    // The rename would say so too, but only after everything has been written.
    if path.file_name().is_none() || path.is_dir() {
        return Err(io::Error::new(io::ErrorKind::IsADirectory, "this is a folder"));
    }
    let folder = match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    };
    let mut options = tempfile::Builder::new();
    options.prefix(".").suffix(".tmp");
    #[cfg(unix)]
    {
        // What a plain `File::create` asks for: the process's umask decides who may read.
        use std::os::unix::fs::PermissionsExt;
        options.permissions(std::fs::Permissions::from_mode(0o666));
    }
    let temporary = options.tempfile_in(folder)?;
    let mut out = BufWriter::with_capacity(1 << 20, temporary.as_file());
    write(&mut out)?;
    out.flush()?;
    drop(out);
    temporary.as_file().sync_all()?;
    temporary.persist(path).map_err(|e| e.error)?;
    // The new name is on the disk when the folder is. Not every system lets a folder be synchronised, and the file is
    // in place by now: so a refusal is not an error.
    if let Ok(folder) = File::open(folder) {
        let _ = folder.sync_all();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(folder).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn a_new_file_replaces_the_old_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        for text in ["a long first text", "short", ""] {
            write_atomically(&path, |out| out.write_all(text.as_bytes())).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
            assert_eq!(names(folder.path()), ["file"], "nothing temporary is left");
        }
    }

    #[cfg(unix)]
    #[test]
    fn the_file_has_the_permissions_of_any_other() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let mode = |name| std::fs::metadata(folder.path().join(name)).unwrap().permissions().mode();
        std::fs::write(folder.path().join("plain"), "x").unwrap();
        write_atomically(folder.path().join("atomic"), |out| out.write_all(b"x")).unwrap();
        assert_eq!(mode("atomic"), mode("plain"));
    }

    #[test]
    fn a_failure_leaves_the_old_file_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        write_atomically(&path, |out| out.write_all(b"old")).unwrap();
        let error = write_atomically(&path, |out| {
            out.write_all(&vec![7; 3 << 20])?;
            out.flush()?;
            // What a process that is killed here leaves: the old file under its name.
            assert_eq!(std::fs::read(&path).unwrap(), b"old");
            Err(io::Error::other("the disk is full"))
        });
        let expected =
            Error::Io { path: path.clone(), action: "write", message: "the disk is full".to_string() };
        assert_eq!(error, Err(expected));
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        assert_eq!(names(folder.path()), ["file"]);
    }

    #[test]
    fn impossible_places_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("missing").join("file");
        for path in [missing.as_path(), folder.path(), Path::new(""), Path::new("/"), Path::new("..")] {
            let error = write_atomically(path, |_| Ok(())).unwrap_err();
            assert!(matches!(&error, Error::Io { action: "write", .. }), "{error}");
        }
        assert!(names(folder.path()).is_empty());
    }
}
