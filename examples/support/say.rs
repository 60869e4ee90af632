//! What a program prints on its way.

use std::fmt::Display;
use std::io::Write;

/// Prints a line. A reader that has gone away is no reason to end the work.
pub fn say(line: impl Display) {
    let _ = writeln!(std::io::stdout(), "{line}");
}
