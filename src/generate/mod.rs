//! Text from a model, and the probability of text under it.
//!
//! ```text
//! prompt -> Generator::read -> logits -> Sampler -> token -> logits -> ...      state of constant size
//! text   -> Scorer::push    -> log-probabilities
//! ```

mod batch;
mod generator;
mod sampler;
mod score;

pub use batch::BatchGenerator;
pub use generator::Generator;
pub use sampler::Sampler;
pub use score::{Scorer, log_probabilities};
