//! Runs the table of `examples/gradcheck` as a test, so that a gradient is checked in one place only.

use std::process::ExitCode;

#[path = "../examples/gradcheck/main.rs"]
mod gradcheck;

use gradcheck::worst::worst;
use gradcheck::{Check, report};

#[test]
fn every_gradient_agrees_with_finite_differences() {
    assert_eq!(gradcheck::main(), ExitCode::SUCCESS, "the lines that failed are printed above");
}

#[test]
fn the_table_can_fail() {
    let with = |worst_error| [Check { name: "", worst_error, tolerance: 1e-8 }];
    assert!(report(&with(|| 1e-8)));
    assert!(!report(&with(|| 1.1e-8)));
    assert!(!report(&with(|| f64::INFINITY)));
    assert!(!report(&with(|| f64::NAN)));
    // A NaN is not lost among other errors.
    for errors in [[f64::NAN, 0.0, 1.0], [0.0, f64::NAN, 0.0], [1.0, 0.0, f64::NAN]] {
        assert_eq!(worst(errors), f64::INFINITY);
    }
    assert_eq!((worst([0.5, 2.0, 1.0]), worst([])), (2.0, 0.0));
    let one_of_three = [with(|| 0.0), with(|| 1.0), with(|| 0.0)];
    assert!(!report(one_of_three.as_flattened()));
    assert!(gradcheck::checks().len() >= 9);
}
