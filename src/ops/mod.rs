//! Pure functions on arrays, each with its gradient beside it.
//!
//! Rows are tokens. A function that takes an array it does not need later borrows it; gradients of parameters are added to
//! what the caller brings, gradients of inputs are returned.

pub(crate) mod matmul;
pub(crate) mod simd;
