//! The one error type of the crate: flat, comparable, and specific enough to act on.

use std::path::PathBuf;

/// What went wrong, which argument it was, what was expected and what came.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An array does not have the shape that the other arguments imply.
    #[error("`{what}` has shape {got:?}, expected {expected:?}")]
    Shape {
        /// The argument.
        what: &'static str,
        /// The shape it must have.
        expected: Vec<usize>,
        /// The shape it has.
        got: Vec<usize>,
    },
    /// A number or a combination of numbers that cannot be: a width of zero, a decay above one.
    #[error("`{what}` must be {expected}, got {got}")]
    Invalid {
        /// The argument or the field of a configuration.
        what: &'static str,
        /// What it must be.
        expected: String,
        /// What it is.
        got: String,
    },
    /// Sizes whose product does not fit the address space.
    #[error("`{what}` of shape {shape:?} is too large for this machine")]
    TooLarge {
        /// The array that would be needed.
        what: &'static str,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// An input without elements, where an answer needs at least one.
    #[error("`{what}` is empty")]
    Empty {
        /// The argument.
        what: &'static str,
    },
    /// A NaN or an infinity where a finite number is needed.
    #[error("`{what}` is {value} at index {index:?}, expected finite numbers")]
    NotFinite {
        /// The argument.
        what: &'static str,
        /// Index of the first such element.
        index: Vec<usize>,
        /// `NaN`, `inf` or `-inf`.
        value: String,
    },
    /// A token or a code that is not below the size of its table.
    #[error("`{what}` holds {got} at index {index:?}, expected less than {limit}")]
    OutOfRange {
        /// The argument.
        what: &'static str,
        /// Index of the first such element.
        index: Vec<usize>,
        /// The element.
        got: u64,
        /// The size of the table.
        limit: usize,
    },
    /// Training met a loss that is NaN or infinite; nothing was updated by that step.
    #[error(
        "the loss is {loss} at step {step}; {}",
        match checkpoint {
            Some(path) => format!("the last good checkpoint is {}", path.display()),
            None => "no checkpoint has been written yet".to_string(),
        }
    )]
    Diverged {
        /// Steps taken before this one.
        step: u64,
        /// The loss, as printed.
        loss: String,
        /// The last checkpoint that was written.
        checkpoint: Option<PathBuf>,
    },
    /// The operating system refused a file.
    #[error("cannot {action} {}: {message}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was tried: `read`, `write`, `create`.
        action: &'static str,
        /// The system's words.
        message: String,
    },
    /// A file that is readable but is not what it should be.
    #[error("{}: {problem}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
}

impl Error {
    /// `what` must be `expected`, but is `got`.
    pub(crate) fn invalid(what: &'static str, expected: impl Into<String>, got: impl ToString) -> Self {
        Error::Invalid { what, expected: expected.into(), got: got.to_string() }
    }
}

/// Checks that `got` equals `expected`.
pub(crate) fn check_shape(what: &'static str, expected: &[usize], got: &[usize]) -> Result<(), Error> {
    if expected == got {
        return Ok(());
    }
    Err(Error::Shape { what, expected: expected.to_vec(), got: got.to_vec() })
}

/// The number of elements of an array of this shape, if an array of them can exist.
pub(crate) fn checked_len(what: &'static str, shape: &[usize]) -> Result<usize, Error> {
    // ndarray wants the product of the non-zero axes to fit in isize; 16 bytes is the largest element
    // (a count beside its mean) that the crate keeps.
    let fits = shape.iter().filter(|&&n| n != 0).try_fold(16usize, |len, &n| len.checked_mul(n));
    match fits {
        Some(bytes) if bytes <= isize::MAX as usize => Ok(shape.iter().product()),
        _ => Err(Error::TooLarge { what, shape: shape.to_vec() }),
    }
}

/// Checks that the system would give the memory for an array of this shape: an allocation that fails ends the process.
pub(crate) fn check_memory<T>(what: &'static str, shape: &[usize]) -> Result<(), Error> {
    let len = checked_len(what, shape)?;
    // Asked for, and given back untouched.
    Vec::<T>::new().try_reserve_exact(len).map_err(|_| Error::TooLarge { what, shape: shape.to_vec() })
}
