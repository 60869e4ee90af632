//! The states of exact attention in a checkpoint.

use ndarray::{Array2, ArrayD, ArrayView2, Ix2, s};

use super::states::stacked;
use crate::attention::quadratic::KeyValues;
use crate::model::checkpoint::{file_error, tensor};
use crate::model::{ModelConfig, Tensor, TensorFile};
use crate::{Error, Scalar};

/// The states [B, Hk] of one unit, as arrays.
pub(super) struct KeyValueArrays<T> {
    position: Array2<u64>,
    k: ArrayD<T>,
    v: ArrayD<T>,
}

impl<T: Scalar> KeyValueArrays<T> {
    pub fn new(states: ArrayView2<'_, KeyValues<T>>) -> Self {
        let states = states.to_owned();
        KeyValueArrays {
            position: states.map(KeyValues::position),
            k: stacked(&states, states.iter().map(|state| state.keys())),
            v: stacked(&states, states.iter().map(|state| state.values())),
        }
    }

    pub fn tensors(&self, prefix: &str) -> Result<Vec<Tensor<'_>>, Error> {
        Ok(vec![
            Tensor::new(format!("{prefix}.position"), self.position.view()),
            tensor(format!("{prefix}.k"), self.k.view())?,
            tensor(format!("{prefix}.v"), self.v.view())?,
        ])
    }
}

/// The states [B, Hk] of one unit.
pub(super) fn read<T: Scalar>(
    config: &ModelConfig,
    unit: usize,
    file: &TensorFile,
) -> Result<Array2<KeyValues<T>>, Error> {
    let (n_heads, &ModelConfig { d_k, d_v, .. }) = (config.key_heads(), config);
    let wrong = |problem: String| file_error(file.path().into(), format!("state.{unit}: {problem}"));
    let name = |part: &str| format!("state.{unit}.{part}");
    let (b, len) = match *file.shape(&name("k"))? {
        [b, h, len, _] if b > 0 && h == n_heads => (b, len),
        ref shape => {
            let expected = format!("[B, {n_heads}, P, {d_k}] with B > 0");
            return Err(wrong(format!("k {shape:?}, expected {expected}")));
        }
    };
    let position = file.integers::<u64>(&name("position"), &[b, n_heads])?;
    if let Some(position) = position.iter().find(|&&p| p != len as u64) {
        return Err(wrong(format!("position {position}, {len} keys")));
    }
    let k = file.array::<T>(&name("k"), &[b, n_heads, len, d_k])?;
    let v = file.array::<T>(&name("v"), &[b, n_heads, len, d_v])?;
    let mut states = Vec::with_capacity(b * n_heads);
    for (b, h) in ndarray::indices((b, n_heads)) {
        let [k, v] = [&k, &v].map(|array| {
            let part = array.slice(s![b, h, .., ..]).into_dimensionality::<Ix2>();
            part.expect("its shape has been checked")
        });
        let state = KeyValues::new(d_k, d_v).and_then(|mut state| state.push(k, v).map(|()| state));
        states.push(state.map_err(|e| wrong(e.to_string()))?);
    }
    Ok(Array2::from_shape_vec((b, n_heads), states).expect("one state per sequence and head"))
}
