//! What training tells of a step.

/// What one step saw.
#[derive(Debug, Clone, PartialEq)]
pub struct StepReport {
    /// Steps taken, this one included.
    pub step: u64,
    /// Cross-entropy before the step, nats per token.
    pub loss: f64,
    /// Commitment loss, summed over units, without its weight.
    pub commit_loss: f64,
    /// Norm of all gradients together, after a hook and before clipping.
    pub gradient_norm: f64,
    /// Perplexity of the codes of this batch, mean over heads, one per unit; 0 where a unit has no codebook.
    pub perplexity: Vec<f64>,
    /// Fraction of codes that this batch used, mean over heads, one per unit; 0 where a unit has no codebook.
    pub usage: Vec<f64>,
}
