//! Values of a command line.
#![allow(dead_code)] // each example takes what it needs

use std::fmt::Display;
use std::ops::RangeInclusive;

use clap::builder::RangedU64ValueParser;

pub fn positive(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(x) if x > 0.0 && f64::is_finite(x) => Ok(x),
        _ => Err("expected a positive number".into()),
    }
}

pub fn within(range: RangeInclusive<u64>) -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(range)
}

/// Refuses a list that names something twice: it would count twice.
pub fn distinct<T: PartialEq + Display>(option: &str, list: &[T]) -> Result<(), String> {
    match list.iter().enumerate().find(|(i, value)| list[..*i].contains(value)) {
        Some((_, value)) => Err(format!("{option} names {value} more than once")),
        None => Ok(()),
    }
}
