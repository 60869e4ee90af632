//! The carried state of a model as arrays, and back.

use ndarray::{Array, Array2, ArrayD, ArrayView, Axis, Dimension, Ix1, Ix2, s};

use super::{MOST_COUNTED, key_values};
use crate::attention::{AttentionState, CompressiveCache, WindowKeys};
use crate::model::checkpoint::{file_error, tensor};
use crate::model::{ModelConfig, ModelState, Tensor, TensorFile, UnitKind, UnitState};
use crate::{Error, Scalar};

/// The states [B, H] of one unit, as arrays.
pub(super) struct StateArrays<T> {
    position: Array2<u64>,
    mean: ArrayD<T>,
    residual: ArrayD<T>,
    count: ArrayD<u64>,
    codes: ArrayD<u32>,
    k_hat: ArrayD<T>,
    v: ArrayD<T>,
}

impl<T: Scalar> StateArrays<T> {
    pub fn new(states: &Array2<AttentionState<T>>) -> Self {
        let windows: Vec<_> = states.iter().map(|state| (state.window_keys(), state.window())).collect();
        StateArrays {
            position: states.map(AttentionState::position),
            mean: stacked(states, states.iter().map(|state| state.cache().mean())),
            residual: stacked(states, states.iter().map(|state| state.cache().residual())),
            count: stacked(states, states.iter().map(|state| state.cache().count())),
            codes: padded(states, &windows, |keys| keys.codes.view()),
            k_hat: padded(states, &windows, |keys| keys.k_hat.view()),
            v: padded(states, &windows, |keys| keys.v.view()),
        }
    }

    pub fn tensors(&self, prefix: &str) -> Result<Vec<Tensor<'_>>, Error> {
        Ok(vec![
            Tensor::new(format!("{prefix}.position"), self.position.view()),
            tensor(format!("{prefix}.mean"), self.mean.view())?,
            tensor(format!("{prefix}.residual"), self.residual.view())?,
            Tensor::new(format!("{prefix}.count"), self.count.view()),
            Tensor::new(format!("{prefix}.codes"), self.codes.view()),
            tensor(format!("{prefix}.k_hat"), self.k_hat.view())?,
            tensor(format!("{prefix}.v"), self.v.view())?,
        ])
    }
}

/// Arrays of one shape, one per state, as one array [B, H, ..].
pub(super) fn stacked<'a, E: Clone + 'a, D: Dimension, S>(
    states: &Array2<S>,
    parts: impl Iterator<Item = ArrayView<'a, E, D>>,
) -> ArrayD<E> {
    let parts: Vec<_> = parts.map(|part| part.into_dyn()).collect();
    let shape: Vec<usize> = states.shape().iter().chain(parts[0].shape()).copied().collect();
    let stack = ndarray::stack(Axis(0), &parts).expect("states of one unit have one shape");
    stack.into_shape_with_order(shape).expect("as many elements")
}

/// [`stacked`], each part filled up with zeros to M rows.
fn padded<E: Clone + Default, D: Dimension, T, S>(
    states: &Array2<S>,
    windows: &[(WindowKeys<T>, usize)],
    part: impl Fn(&WindowKeys<T>) -> ArrayView<'_, E, D>,
) -> ArrayD<E> {
    let full = windows.iter().map(|(keys, window)| {
        let part = part(keys);
        let mut shape = part.raw_dim();
        shape[0] = *window;
        let mut full = Array::<E, D>::default(shape);
        full.slice_axis_mut(Axis(0), (..part.len_of(Axis(0))).into()).assign(&part);
        full
    });
    let full: Vec<_> = full.collect();
    stacked(states, full.iter().map(|part| part.view()))
}

/// What [`StateArrays`] has written, unit by unit.
pub(super) fn read_state<T: Scalar>(config: &ModelConfig, file: &TensorFile) -> Result<ModelState<T>, Error> {
    let read = |i| match config.unit(i) {
        UnitKind::Quadratic => key_values::read(config, i, file).map(UnitState::from),
        _ => read_states(config, i, file).map(UnitState::from),
    };
    let layers: Vec<UnitState<T>> = (0..config.n_layers).map(read).collect::<Result<_, Error>>()?;
    let wrong = |problem: String| file_error(file.path().into(), format!("state: {problem}"));
    if let Some(i) = layers.iter().position(|states| states.dim() != layers[0].dim()) {
        let (b, other) = (layers[0].dim().0, layers[i].dim().0);
        return Err(wrong(format!("{b} sequences in unit 0, {other} in unit {i}")));
    }
    ModelState::from_parts(layers).map_err(|e| wrong(e.to_string()))
}

/// The states [B, H] of one unit.
fn read_states<T: Scalar>(
    config: &ModelConfig,
    unit: usize,
    file: &TensorFile,
) -> Result<Array2<AttentionState<T>>, Error> {
    let (n_heads, &ModelConfig { n_codes, d_k, d_v, .. }) = (config.key_heads(), config);
    let window = config.attention.window;
    let wrong = |problem: String| file_error(file.path().into(), format!("state.{unit}: {problem}"));
    let name = |part: &str| format!("state.{unit}.{part}");
    let b = match *file.shape(&name("position"))? {
        [b, h] if b > 0 && h == n_heads => b,
        ref shape => return Err(wrong(format!("position {shape:?}, expected [B, {n_heads}] with B > 0"))),
    };
    let position = file.integers::<u64>(&name("position"), &[b, n_heads])?;
    let position = position.into_dimensionality::<Ix2>().expect("its shape has been checked");
    if let Some(position) = position.iter().find(|&&p| p > MOST_COUNTED) {
        return Err(wrong(format!("position {position}, more than can have been")));
    }
    let mean = file.array::<T>(&name("mean"), &[b, n_heads, n_codes, d_v])?;
    let residual = file.array::<T>(&name("residual"), &[b, n_heads, n_codes, d_v])?;
    let count = file.integers::<u64>(&name("count"), &[b, n_heads, n_codes])?;
    let codes = file.integers::<u32>(&name("codes"), &[b, n_heads, window])?;
    let k_hat = file.array::<T>(&name("k_hat"), &[b, n_heads, window, d_k])?;
    let v = file.array::<T>(&name("v"), &[b, n_heads, window, d_v])?;
    let mut states = Vec::with_capacity(position.len());
    for ((b, h), &position) in position.indexed_iter() {
        let held = usize::try_from(position).map_or(window, |p| p.min(window));
        let table = |array: &ArrayD<T>| -> Array2<T> {
            let part = array.slice(s![b, h, .., ..]).into_dimensionality::<Ix2>();
            part.expect("its shape has been checked").to_owned()
        };
        let rows = |array: &ArrayD<T>| table(array).slice_move(s![..held, ..]);
        let counts =
            count.slice(s![b, h, ..]).into_dimensionality::<Ix1>().expect("its shape has been checked");
        let held_codes = codes.slice(s![b, h, ..held]).into_dimensionality::<Ix1>();
        let keys = WindowKeys {
            codes: held_codes.expect("its shape has been checked").to_owned(),
            k_hat: rows(&k_hat),
            v: rows(&v),
        };
        let cache = CompressiveCache::from_parts(table(&mean), table(&residual), counts.to_owned());
        let state = cache.and_then(|cache| AttentionState::from_parts(position, window, cache, &keys));
        states.push(state.map_err(|e| wrong(e.to_string()))?);
    }
    Ok(Array2::from_shape_vec(position.raw_dim(), states).expect("one state per position"))
}
