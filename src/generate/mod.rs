//! (generate)

mod sampler;

pub use sampler::Sampler;
