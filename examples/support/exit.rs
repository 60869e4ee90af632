//! How a program ends.

use std::fmt::Display;
use std::process::ExitCode;

/// Success, or the error printed in one line and failure.
pub fn exit<E: Display>(result: Result<(), E>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
