//! A language model built from linear-time attention: configuration, units, forward and backward.
//!
//! ```text
//! tokens -> embedding -> unit -> unit -> ... -> norm -> logits
//!                        | norm, projections, attention over the codebook, gate, residual
//!                        | norm, feed-forward, residual                                      if the configuration has it
//! ```
//!
//! One configuration describes the published gated unit, the usual Transformer, and what lies between:
//!
//! | for | set |
//! |---|---|
//! | the published model: one gated head, no feed-forward | `estimator: Estimator::StraightThrough`, or [`ModelConfig::enwik8`] and its like |
//! | multi-head attention | `n_heads`, `gate: false` |
//! | grouped or multi-query heads | `n_key_heads` |
//! | a feed-forward branch | `feed_forward` |
//! | exact quadratic attention, windows, or a mix of both with linear units | `units` |
//! | dropout | `dropout` |
//! | less memory in training, for a third more time | `recompute` |
//!
//! ```
//! use transformer_vq::model::{FeedForward, FeedForwardKind, ModelConfig, Transformer, UnitKind};
//!
//! // Eight query heads for two key heads, SwiGLU, and every other unit of linear attention replaced by a window.
//! let config = ModelConfig {
//!     n_heads: 8,
//!     n_key_heads: Some(2),
//!     d_v: 64,
//!     gate: false,
//!     feed_forward: Some(FeedForward { kind: FeedForwardKind::SwiGlu, width: 512 }),
//!     units: vec![UnitKind::Vq, UnitKind::Window],
//!     ..ModelConfig::default()
//! };
//! let model = Transformer::new(config.clone(), 1)?;
//! assert_eq!(model.parameters().len() as u128, config.n_parameters());
//! assert_eq!(model.new_state(1)?.size_in_bytes() as u128, config.state_bytes(1, 1_000_000, size_of::<f32>()));
//! # Ok::<(), transformer_vq::Error>(())
//! ```
//!
//! An [`Encoder`] reads whole sequences, with bidirectional attention in the same units: it fills in masked tokens or tells
//! classes of sequences ([`EncoderConfig`]).
//!
//! Read in this order: [`ModelConfig`], [`Transformer`], in the sources `layer`; then [`EncoderConfig`], [`Encoder`].

mod atomic_file;
mod buffers;
pub(crate) mod checkpoint;
mod codebooks;
mod config;
mod dropout;
mod encoder;
mod layer;
mod learning;
mod loss;
mod parameters;
mod passes;
mod prepared;
mod presets;
pub mod published;
mod sizes;
mod state;
mod tensor_file;
mod transformer;

pub use atomic_file::write_atomically;
pub use config::{FeedForward, FeedForwardKind, ModelConfig, UnitKind};
pub use dropout::{Dropout, DropoutSeed};
pub use encoder::{
    Encoder, EncoderBatch, EncoderConfig, EncoderHead, EncoderLoss, EncoderParameters, EncoderUnitParameters,
    EncoderUnitReport,
};
pub use layer::{LayerReport, PieceReport};
pub use learning::{CodebookStart, CodewordGradient, LearningConfig, Revival};
pub use loss::LossAndGradients;
pub use parameters::{
    FeedForwardParameters, LayerParameters, NormParameters, Parameter, ParameterMut, Parameters,
};
pub use passes::Saved;
pub use prepared::Prepared;
pub use state::{ModelState, UnitState};
pub use tensor_file::{Tensor, TensorFile};
pub use transformer::Transformer;
pub(crate) use transformer::check_tokens;
