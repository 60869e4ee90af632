//! How a codebook learns: what its codewords follow from, and what moves that.
//!
//! | | codewords | moved by |
//! |---|---|---|
//! | [`Learning::Ema`] | sums over counts | [`update`](super::Codebook::update), from statistics |
//! | [`Learning::Gradient`] | a parameter | an optimizer, from the gradient |
//! | [`Learning::Linear`] | basis times a matrix | an optimizer, from the gradient |
//! | [`Learning::Frozen`] | given | nothing |

use ndarray::{Array2, Array3, ArrayView3, ArrayViewD, ArrayViewMutD};

use super::assign::check_codewords;
use super::{CodeStats, Ema, linear};
use crate::error::{check_memory, check_shape};
use crate::ops::finite::check_finite;
use crate::{Error, Scalar};

/// How a codebook learns, with that part of its state that no optimizer moves.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Learning<T> {
    /// Codewords are moving averages of their keys.
    Ema(Ema<T>),
    /// Codewords are parameters.
    Gradient,
    /// Codewords are a basis times a matrix that is a parameter (SimVQ).
    Linear(Basis<T>),
    /// Codewords [H, S, K] stay as they are.
    Frozen(Array3<T>),
}

/// What the matrix of [`Learning::Linear`] multiplies.
#[derive(Debug, Clone, PartialEq)]
pub enum Basis<T> {
    /// F [H, S, f] stays as it is.
    Frozen(Array3<T>),
    /// F is a parameter too.
    Learned,
}

/// What an optimizer moves in a codebook. Gradients and moments have the same type; what a kind of learning does not have is
/// `None`.
#[derive(Debug, Clone, PartialEq)]
pub struct CodebookParameters<T> {
    /// C [H, S, K] of [`Learning::Gradient`].
    pub codewords: Option<Array3<T>>,
    /// F [H, S, f] of [`Learning::Linear`], if learned.
    pub basis: Option<Array3<T>>,
    /// W [H, K, f] of [`Learning::Linear`].
    pub weight: Option<Array3<T>>,
    /// b [H, K] of [`Learning::Linear`], if it has one.
    pub bias: Option<Array2<T>>,
}

impl<T> Default for CodebookParameters<T> {
    /// None.
    fn default() -> Self {
        CodebookParameters { codewords: None, basis: None, weight: None, bias: None }
    }
}

impl<T: Scalar> CodebookParameters<T> {
    /// Every array with its name, in a fixed order.
    pub fn views(&self) -> Vec<(&'static str, ArrayViewD<'_, T>)> {
        let mut views = vec![];
        views.extend(self.codewords.as_ref().map(|x| ("codewords", x.view().into_dyn())));
        views.extend(self.basis.as_ref().map(|x| ("basis", x.view().into_dyn())));
        views.extend(self.weight.as_ref().map(|x| ("weight", x.view().into_dyn())));
        views.extend(self.bias.as_ref().map(|x| ("bias", x.view().into_dyn())));
        views
    }

    fn names(&self) -> Vec<&'static str> {
        self.views().iter().map(|(name, _)| *name).collect()
    }

    /// Every array with its name, to be changed, in the order of [`views`](Self::views).
    pub fn views_mut(&mut self) -> Vec<(&'static str, ArrayViewMutD<'_, T>)> {
        let mut views = vec![];
        views.extend(self.codewords.as_mut().map(|x| ("codewords", x.view_mut().into_dyn())));
        views.extend(self.basis.as_mut().map(|x| ("basis", x.view_mut().into_dyn())));
        views.extend(self.weight.as_mut().map(|x| ("weight", x.view_mut().into_dyn())));
        views.extend(self.bias.as_mut().map(|x| ("bias", x.view_mut().into_dyn())));
        views
    }

    /// Arrays of the same shapes, all zero.
    pub fn zeros_like(&self) -> Self {
        let mut zeros = self.clone();
        zeros.views_mut().into_iter().for_each(|(_, mut x)| x.fill(T::zero()));
        zeros
    }

    /// The same numbers in another precision.
    pub fn cast<U: Scalar>(&self) -> CodebookParameters<U> {
        let cast = |x: T| U::from_f64(x.as_f64());
        CodebookParameters {
            codewords: self.codewords.as_ref().map(|x| x.mapv(cast)),
            basis: self.basis.as_ref().map(|x| x.mapv(cast)),
            weight: self.weight.as_ref().map(|x| x.mapv(cast)),
            bias: self.bias.as_ref().map(|x| x.mapv(cast)),
        }
    }

    /// Checks that `other` has arrays of the same names and shapes.
    pub(crate) fn check_like(&self, what: &'static str, other: &Self) -> Result<(), Error> {
        let (mine, theirs) = (self.views(), other.views());
        let (names, others) = (self.names(), other.names());
        if names != others {
            return Err(Error::invalid(what, format!("{names:?}"), format!("{others:?}")));
        }
        mine.iter().zip(&theirs).try_for_each(|((_, a), (_, b))| check_shape(what, a.shape(), b.shape()))
    }
}

impl<T: Scalar> Learning<T> {
    /// Checks state and parameters against each other; H, S and K.
    pub(crate) fn check(&self, parameters: &CodebookParameters<T>) -> Result<(usize, usize, usize), Error> {
        let CodebookParameters { codewords, basis, weight, bias } = parameters;
        let has = [codewords.is_some(), basis.is_some(), weight.is_some()];
        let (needs, kind) = match self {
            Learning::Ema(_) | Learning::Frozen(_) => ([false; 3], "none: an optimizer moves nothing of it"),
            Learning::Gradient => ([true, false, false], "`codewords` alone"),
            Learning::Linear(Basis::Frozen(_)) => ([false, false, true], "`weight` and perhaps `bias`"),
            Learning::Linear(Basis::Learned) => ([false, true, true], "`basis`, `weight` and perhaps `bias`"),
        };
        if has != needs || (bias.is_some() && weight.is_none()) {
            return Err(Error::invalid("parameters", kind, format!("{:?}", parameters.names())));
        }
        parameters.views().into_iter().try_for_each(|(name, x)| check_finite(name, x))?;
        if let (Some(basis), Some(weight)) = (self.basis(parameters), weight) {
            let (n_heads, n_codes, width) = basis.dim();
            let d_k = weight.dim().1;
            check_finite("basis", basis)?;
            check_shape("weight", &[n_heads, d_k, width], weight.shape())?;
            if let Some(bias) = bias {
                check_shape("bias", &[n_heads, d_k], bias.shape())?;
            }
            if width == 0 || n_codes == 0 || d_k == 0 {
                return Err(Error::Empty { what: if d_k == 0 { "weight" } else { "basis" } });
            }
            check_memory::<T>("codewords", &[n_heads, n_codes, d_k])?;
        }
        let codewords = self.codewords(parameters);
        check_codewords(codewords.view())?;
        Ok(codewords.dim())
    }

    /// F [H, S, f], if it has one.
    fn basis<'a>(&'a self, parameters: &'a CodebookParameters<T>) -> Option<ArrayView3<'a, T>> {
        match self {
            Learning::Linear(Basis::Frozen(basis)) => Some(basis.view()),
            Learning::Linear(Basis::Learned) => parameters.basis.as_ref().map(|basis| basis.view()),
            _ => None,
        }
    }

    /// H, S and K of what [`check`](Self::check) has accepted.
    pub(super) fn dim(&self, parameters: &CodebookParameters<T>) -> (usize, usize, usize) {
        match self {
            Learning::Ema(ema) => ema.sums().dim(),
            Learning::Frozen(codewords) => codewords.dim(),
            Learning::Gradient => parameters.codewords.as_ref().expect("checked").dim(),
            Learning::Linear(_) => {
                let (n_heads, n_codes, _) = self.basis(parameters).expect("checked").dim();
                (n_heads, n_codes, parameters.weight.as_ref().expect("checked").dim().1)
            }
        }
    }

    /// C [H, S, K].
    pub(crate) fn codewords(&self, parameters: &CodebookParameters<T>) -> Array3<T> {
        match self {
            Learning::Ema(ema) => ema.codewords(),
            Learning::Frozen(codewords) => codewords.clone(),
            Learning::Gradient => parameters.codewords.clone().expect("checked"),
            Learning::Linear(_) => linear::codewords(self.basis(parameters).expect("checked"), parameters),
        }
    }

    /// Adds to `d`, which has the shapes of `parameters`, what they get of `d_codewords` [H, S, K].
    pub(crate) fn backward(
        &self,
        parameters: &CodebookParameters<T>,
        d_codewords: ArrayView3<'_, T>,
        d: &mut CodebookParameters<T>,
    ) {
        match self {
            Learning::Ema(_) | Learning::Frozen(_) => {}
            Learning::Gradient => *d.codewords.as_mut().expect("like the parameters") += &d_codewords,
            Learning::Linear(_) => {
                linear::backward(self.basis(parameters).expect("checked"), parameters, d_codewords, d);
            }
        }
    }

    /// Learns from statistics of the right shape, if it is what this kind learns from.
    pub(crate) fn update(&mut self, stats: &CodeStats<T>) -> Result<(), Error> {
        match self {
            Learning::Ema(ema) => ema.update(stats),
            Learning::Gradient | Learning::Linear(_) | Learning::Frozen(_) => Ok(()),
        }
    }

    /// The same in another precision.
    pub(crate) fn cast<U: Scalar>(&self) -> Learning<U> {
        let cast = |x: &Array3<T>| x.mapv(|x| U::from_f64(x.as_f64()));
        match self {
            Learning::Ema(ema) => Learning::Ema(ema.cast()),
            Learning::Gradient => Learning::Gradient,
            Learning::Linear(Basis::Frozen(basis)) => Learning::Linear(Basis::Frozen(cast(basis))),
            Learning::Linear(Basis::Learned) => Learning::Linear(Basis::Learned),
            Learning::Frozen(codewords) => Learning::Frozen(cast(codewords)),
        }
    }
}
