//! Softmax attention in linear time, through a learned codebook: Transformer-VQ on an ordinary CPU.
//!
//! Softmax attention compares every query with every key: T tokens cost T^2. Transformer-VQ (Lingle, ICLR 2024,
//! [arXiv 2309.16354](https://arxiv.org/abs/2309.16354)) replaces each key by the nearest of S learned codewords. Then keys
//! repeat, and all that a query needs to know of the distant past is one *count* and one *mean value* per code:
//!
//! ```text
//! o_i = sum_j softmax_j(q_i . k^_j) v_j                                     every key by itself, k^_j = c_{z_j}
//!     = sum_s softmax_s(q_i . c_s + ln N_s) mu_s                            the same number, code by code
//! ```
//!
//! This is not an approximation of softmax attention over the quantized keys, it *is* softmax attention over them, in
//! T S operations instead of T^2, with a state that does not grow. The nearest M keys are attended one by one as well, so
//! that they can carry relative biases and pass gradients.
//!
//! # Quickstart
//! ```
//! use transformer_vq::attention::{BatchInputs, VqAttention};
//! use transformer_vq::codebook::{Codebook, Ema, Estimator};
//! use transformer_vq::ndarray::{Array3, Array4};
//!
//! // One head: 256 tokens, keys and values of width 4, 8 codes.
//! let wave = |n: usize| Array4::from_shape_fn((1, 1, 256, 4), |(_, _, t, k)| ((t * n + k) as f32).sin());
//! let (q, k, v) = (wave(3), wave(5), wave(7));
//! let codewords = Array3::from_shape_fn((1, 8, 4), |(_, s, k)| ((s * 5 + k) as f32).sin());
//! let mut codebook = Codebook::ema(Ema::from_codewords(codewords, 0.99)?);
//!
//! let attention = VqAttention { block_len: 32, window: 32, ..VqAttention::default() };
//! let mut states = attention.new_states(1, &codebook, 4)?;
//! let inputs = BatchInputs::new(q.view(), k.view(), v.view());
//! let (output, saved) = attention.forward(&inputs, &codebook, &mut states)?;
//!
//! // Your loss gives d_out; every gradient comes back.
//! let d_out = output.out.mapv(|o| 2.0 * o);
//! let gradients = attention.backward(&inputs, saved, d_out.view(), Estimator::StraightThrough, 1e-4)?;
//! assert_eq!(gradients.k.dim(), (1, 1, 256, 4));
//! codebook.update(&output.stats)?;
//! # Ok::<(), transformer_vq::Error>(())
//! ```
//!
//! # Notation
//! What letters mean in this crate, where a page does not say otherwise:
//!
//! | letter | meaning |
//! |---|---|
//! | `B` | sequences in a batch |
//! | `T` | tokens of a sequence, or of one piece of it |
//! | `L` | block length |
//! | `M` | window length |
//! | `S` | codes in a codebook |
//! | `H`, `Hk` | heads; heads of keys and values, each with its own table of codewords, where they are fewer than those of queries |
//! | `N` | keys or rows in a list; as a divisor, those that a code has |
//! | `f` | width of a basis (SimVQ) |
//! | `K`, `V` | width of a key and of a value, per head |
//! | `D` | width of the model |
//!
//! `d_x` is the gradient of the loss with respect to `x`. Losses are in nats per token unless a name says otherwise.
//!
//! # Read in this order
//! 1. [`attention::naive`]: the definition, in plain loops.
//! 2. [`attention`]: the same numbers in linear time ([`attention::blockwise`]) and token by token ([`attention::stream`]);
//!    [`VqAttention`] runs them over batch and heads.
//!    [`attention::bidirectional`] is attention without an order of time.
//! 3. [`codebook`]: how keys become codes, and how codewords learn.
//! 4. [`model`]: a language model made of these; [`train`]: how it learns; [`generate`]: how it writes.
//! 5. [`ops`]: everything else that a model needs, each operation with its gradient beside it. [`check`] compares gradients of
//!    your own with finite differences.
//!
//! # What holds everywhere
//! - Every fast form is tested against the definition, outputs and every gradient, and every gradient against finite
//!   differences.
//! - Public functions return [`Error`] for bad input; they do not panic.
//! - The same seed gives the same bits, whatever the number of threads. Work runs on the caller's rayon pool.
//! - The best of AVX-512, AVX2, NEON and plain code is picked when the program runs; a plain dependency is fast.
//!
//! # Features
//! `model` (default): [`model`], [`train`] and [`generate`]. Without it, attention and codebooks alone, with few dependencies.
//!
//! `tokenizers`: text through any Hugging Face `tokenizer.json`, without C dependencies.

#![deny(unsafe_code)]
#![warn(missing_docs, missing_debug_implementations)]

pub mod attention;
pub mod check;
pub mod codebook;
mod compiled;
mod error;
pub mod ops;
mod scalar;

#[cfg(feature = "model")]
pub mod generate;
#[cfg(feature = "model")]
pub mod model;
#[cfg(feature = "model")]
pub mod train;

pub use attention::VqAttention;
pub use codebook::Codebook;
pub use error::Error;
#[cfg(feature = "model")]
pub use model::{ModelConfig, Transformer};
pub use ndarray;
#[cfg(feature = "model")]
pub use rand;
pub use scalar::Scalar;

/// The README's code is compiled and run with the documentation's.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
