//! Shows that every hand-written gradient is the derivative of its forward function: each is compared, in f64, with
//! finite differences of fourth order, and one line is printed for each. Runs for about a quarter of a minute.
//!
//! ```text
//! cargo run --release --example gradcheck
//! ```
//! Exits with 1 if a line says FAIL. To add checks, add them to a module's `checks()`, or a module to [`checks`].
//! `tests/gradients.rs` runs this same table.

use std::process::ExitCode;

mod attention;
mod bidirectional;
mod heads;
mod model;
mod ops;
#[path = "../support/worst.rs"]
pub mod worst;

/// One line of the table.
pub struct Check {
    /// What is compared, as printed.
    pub name: &'static str,
    /// The largest relative RMS error over all gradients and all sizes tried.
    pub worst_error: fn() -> f64,
    /// The largest error that passes.
    pub tolerance: f64,
}

/// The whole table.
pub fn checks() -> Vec<Check> {
    let attention = [attention::checks(), bidirectional::checks(), heads::checks()].into_iter().flatten();
    ops::checks().into_iter().chain(attention).chain(model::checks()).collect()
}

/// Prints one line for each check and returns whether all of them pass.
pub fn report(checks: &[Check]) -> bool {
    let mut all_pass = true;
    println!("{:44}  {:>8}  {:>9}", "gradient of", "error", "tolerance");
    for check in checks {
        let error = (check.worst_error)();
        let pass = error <= check.tolerance;
        all_pass &= pass;
        println!(
            "{:44}  {error:8.1e}  {:9.0e}  {}",
            check.name,
            check.tolerance,
            if pass { "ok" } else { "FAIL" }
        );
    }
    all_pass
}

pub fn main() -> ExitCode {
    println!("Hand-written gradients against finite differences of fourth order, f64, relative RMS.");
    println!("Takes about a quarter of a minute.\n");
    if report(&checks()) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
