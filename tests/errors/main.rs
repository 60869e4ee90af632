//! Bad input is told apart: every public entry names the argument that is wrong and in which way, and changes nothing.

mod attention;
mod bidirectional;
mod codebook;
mod heads;
#[cfg(feature = "model")]
mod model;
mod ops;
mod starting;
mod state;
#[allow(dead_code)] // each test takes its part
#[path = "../support/mod.rs"]
mod support;

use transformer_vq::Error;

/// Numbers that are not.
const BAD: [f64; 3] = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY];

/// Asserts that a call was refused, in this way, for this argument, which its message names.
#[track_caller]
fn refused<R>(result: Result<R, Error>, variant: &str, what: &str) {
    let Err(error) = result else { panic!("`{what}` was accepted, expected {variant}") };
    let got = match &error {
        Error::Shape { what, .. } => ("Shape", *what),
        Error::Invalid { what, .. } => ("Invalid", *what),
        Error::TooLarge { what, .. } => ("TooLarge", *what),
        Error::Empty { what } => ("Empty", *what),
        Error::NotFinite { what, .. } => ("NotFinite", *what),
        Error::OutOfRange { what, .. } => ("OutOfRange", *what),
        other => panic!("{other}"),
    };
    assert_eq!(got, (variant, what), "{error}");
    assert!(error.to_string().contains(&format!("`{what}`")), "{error}");
}

#[test]
fn messages_say_what_was_expected_and_what_came() {
    let shape = Error::Shape { what: "v", expected: vec![3, 4], got: vec![4, 3] };
    assert_eq!(shape.to_string(), "`v` has shape [4, 3], expected [3, 4]");
    let codes = Error::OutOfRange { what: "codes", index: vec![1, 2], got: 9, limit: 8 };
    assert_eq!(codes.to_string(), "`codes` holds 9 at index [1, 2], expected less than 8");
    let finite = Error::NotFinite { what: "q", index: vec![0], value: "NaN".into() };
    assert_eq!(finite.to_string(), "`q` is NaN at index [0], expected finite numbers");
}
