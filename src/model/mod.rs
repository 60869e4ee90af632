//! A language model built from linear-time attention: configuration, units, forward and backward.
//!
//! ```text
//! tokens -> embedding -> unit -> unit -> ... -> norm -> logits
//!                        | norm, projections, attention over the codebook, gate, residual
//! ```
//!
//! Read in this order: [`ModelConfig`], `layer`, [`Transformer`].

mod atomic_file;
pub(crate) mod checkpoint;
mod codebooks;
mod config;
mod layer;
mod loss;
mod parameters;
mod prepared;
pub mod published;
mod sizes;
mod state;
mod tensor_file;
mod transformer;

pub use atomic_file::write_atomically;
pub use config::{
    CodebookStart, CodewordGradient, FeedForward, FeedForwardKind, LearningConfig, ModelConfig, Revival,
};
pub use layer::{LayerReport, PieceReport};
pub use loss::LossAndGradients;
pub use parameters::{
    FeedForwardParameters, LayerParameters, NormParameters, Parameter, ParameterMut, Parameters,
};
pub use prepared::Prepared;
pub use state::ModelState;
pub use tensor_file::{Tensor, TensorFile};
pub use transformer::{Saved, Transformer};
