//! Adam, for examples that do without the crate's `model`.
//!
//! ```text
//! m <- 0.9 m + 0.1 g,   v <- 0.99 v + 0.01 g g,   p <- p - rate m^ / (sqrt(v^) + 1e-8),   ^: over 1 - beta^t
//! ```

use transformer_vq::ndarray::{ArrayD, ArrayViewD, ArrayViewMutD, Zip};

const BETAS: (f32, f32) = (0.9, 0.99);

/// Moments of some arrays, always passed in the same order.
#[derive(Debug, Default)]
pub struct Adam {
    steps: i32,
    /// m and v of each array.
    moments: Vec<[ArrayD<f32>; 2]>,
}

impl Adam {
    /// Moves parameters along their gradients.
    pub fn step<'a>(
        &mut self,
        rate: f32,
        pairs: impl IntoIterator<Item = (ArrayViewMutD<'a, f32>, ArrayViewD<'a, f32>)>,
    ) {
        self.steps += 1;
        let unbias = |beta: f32| 1.0 / (1.0 - beta.powi(self.steps));
        let (unbias1, unbias2) = (unbias(BETAS.0), unbias(BETAS.1));
        for (i, (parameter, gradient)) in pairs.into_iter().enumerate() {
            if i == self.moments.len() {
                self.moments.push([ArrayD::zeros(gradient.shape()), ArrayD::zeros(gradient.shape())]);
            }
            let [m, v] = &mut self.moments[i];
            Zip::from(parameter).and(gradient).and(m).and(v).for_each(|p, &g, m, v| {
                *m += (1.0 - BETAS.0) * (g - *m);
                *v += (1.0 - BETAS.1) * (g * g - *v);
                *p -= rate * unbias1 * *m / ((unbias2 * *v).sqrt() + 1e-8);
            });
        }
    }
}
