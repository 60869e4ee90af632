//! The numbers of the published implementation, reproduced.
//!
//! Every `*.safetensors` file of `tests/golden/`, or of the folder that `TRANSFORMER_VQ_GOLDEN_DIR` names, is compared key by
//! key: a key that no comparison asks for fails the test. Errors are relative RMS per array.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use ndarray::{Array1, Array2, ArrayD, ArrayViewD, Axis, s};
use serde_json::Value;
use transformer_vq::Scalar;
use transformer_vq::model::published::{self, Tensors};
use transformer_vq::model::{ModelState, Transformer};
use transformer_vq::ops::cross_entropy;
use transformer_vq::train::{AdamW, Batch, Schedule, Trainer};

/// The largest error allowed for each kind of number.
#[derive(Clone, Copy)]
struct Tolerances {
    /// Outputs, losses, states.
    outputs: f64,
    /// Gradients and codebook steps.
    gradients: f64,
    /// Losses along a training run, and its final parameters.
    run: f64,
}

/// The best that inputs stored in f32 and printed by f32 arithmetic allow.
const F64: Tolerances = Tolerances { outputs: 1e-6, gradients: 1e-5, run: 1e-5 };
/// A key near the border of two cells may get another code.
const F32: Tolerances = Tolerances { outputs: 2e-5, gradients: 2e-4, run: 5e-3 };

#[test]
fn golden_files_in_f64() {
    compare_all::<f64>("f64", F64);
}

#[test]
fn golden_files_in_f32() {
    compare_all::<f32>("f32", F32);
}

fn compare_all<T: Scalar>(precision: &str, tolerances: Tolerances) {
    let folder = std::env::var_os("TRANSFORMER_VQ_GOLDEN_DIR")
        .map_or(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden"), PathBuf::from);
    let entries = std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "safetensors"));
    files.sort();
    assert!(!files.is_empty(), "no *.safetensors in {}", folder.display());
    let mut failures = vec![];
    for path in files {
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        let mut golden = Golden::open(&path);
        compare::<T>(&mut golden, tolerances);
        let (error, key) = &golden.worst;
        println!("{name} in {precision}: at most {error:.2} of what is allowed, at {key}");
        failures.extend(golden.failures.iter().map(|failure| format!("{name}: {failure}")));
        let unasked = golden.tensors.keys().filter(|&key| !golden.asked.contains(key));
        failures.extend(unasked.map(|key| format!("{name}: `{key}` was not compared")));
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// One file, and what became of its comparison.
struct Golden {
    config: String,
    tensors: BTreeMap<String, ArrayD<f64>>,
    asked: BTreeSet<String>,
    /// The largest error as a share of its tolerance, and where.
    worst: (f64, String),
    failures: Vec<String>,
}

impl Golden {
    fn open(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let (_, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        let config = metadata.metadata().as_ref().expect("metadata")["config"].clone();
        let tensors = file.iter().map(|(name, view)| {
            let words = view.data().chunks_exact(4).map(|word| <[u8; 4]>::try_from(word).unwrap());
            let numbers: Vec<f64> = match view.dtype() {
                safetensors::Dtype::F32 => words.map(|w| f32::from_le_bytes(w).into()).collect(),
                safetensors::Dtype::I32 => words.map(|w| i32::from_le_bytes(w).into()).collect(),
                other => panic!("{name}: {other:?}"),
            };
            (name.to_string(), ArrayD::from_shape_vec(view.shape(), numbers).unwrap())
        });
        let tensors = tensors.collect();
        let worst = (0.0, String::from("nothing"));
        Golden { config, tensors, asked: BTreeSet::new(), worst, failures: vec![] }
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.config).unwrap()
    }

    /// An array that the file must have.
    fn ask(&mut self, key: &str) -> ArrayD<f64> {
        self.asked.insert(key.to_string());
        self.tensors.get(key).unwrap_or_else(|| panic!("no `{key}`")).clone()
    }

    /// An array that has no counterpart here, deliberately: it may, as long as it says nothing.
    fn leave_zeros(&mut self, key: &str) {
        assert!(self.ask(key).iter().all(|&x| x == 0.0), "`{key}` says something");
    }

    fn integers(&mut self, key: &str) -> ArrayD<u32> {
        self.ask(key).mapv(|x| x as u32)
    }

    /// All arrays whose names begin with `prefix`, by the rest of their names.
    fn ask_all<T: Scalar>(&mut self, prefix: &str) -> Tensors<T> {
        let keys: Vec<String> = self.tensors.keys().filter(|key| key.starts_with(prefix)).cloned().collect();
        keys.into_iter()
            .map(|key| (key[prefix.len()..].to_string(), self.ask(&key).mapv(T::from_f64)))
            .collect()
    }

    fn compare<T: Scalar>(&mut self, key: &str, got: ArrayViewD<'_, T>, tolerance: f64) {
        let expected = self.ask(key);
        assert_eq!(got.shape(), expected.shape(), "{key}");
        let error = relative_rms(got, expected.view());
        if error.is_nan() || error > tolerance {
            self.failures.push(format!("`{key}` differs by {error:.2e}, allowed {tolerance:.0e}"));
        }
        // A NaN counts as the worst.
        if error.is_nan() || error / tolerance > self.worst.0 {
            self.worst = (error / tolerance, key.to_string());
        }
    }

    /// The same set of names on both sides, each compared.
    fn compare_all<T: Scalar>(&mut self, prefix: &str, got: &Tensors<T>, tolerance: f64) {
        let names: BTreeSet<&str> = self.tensors.keys().filter_map(|key| key.strip_prefix(prefix)).collect();
        assert_eq!(names, got.keys().map(String::as_str).collect(), "{prefix}");
        for (name, got) in got {
            self.compare(&format!("{prefix}{name}"), got.view(), tolerance);
        }
    }
}

/// sqrt(sum (got - expected)^2 / sum expected^2); what should be zero must be zero.
fn relative_rms<T: Scalar>(got: ArrayViewD<'_, T>, expected: ArrayViewD<'_, f64>) -> f64 {
    let (mut difference, mut size) = (0.0, 0.0);
    for (got, expected) in got.iter().zip(&expected) {
        difference += (got.as_f64() - expected).powi(2);
        size += expected.powi(2);
    }
    if difference == 0.0 { 0.0 } else { (difference / size).sqrt() }
}

#[test]
fn the_comparison_sees_what_it_should() {
    let array = |numbers: &[f64]| Array1::from_vec(numbers.to_vec()).into_dyn();
    let error = |a: &[f64], b: &[f64]| relative_rms(array(a).view(), array(b).view());
    assert_eq!(error(&[1.0, 2.0], &[1.0, 2.0]), 0.0);
    assert_eq!(error(&[-3.0, 4.0], &[3.0, 4.0]), 6.0 / 5.0);
    assert_eq!(error(&[1e-30], &[0.0]), f64::INFINITY);
    assert!(error(&[f64::NAN, 1.0], &[1.0, 1.0]).is_nan());
}

fn compare<T: Scalar>(golden: &mut Golden, tolerances: Tolerances) {
    let config = published::config_from_json(&golden.config).unwrap();
    let parameters = golden.ask_all::<T>("param.");
    let model = published::from_tensors(config, parameters.clone()).unwrap();
    // Beside a separate output matrix this bias is unused and never moves: the model does not keep it.
    let unused = (!model.config().tied_embedding).then(|| parameters["token_embedder.bias_out"].clone());
    for (name, written) in with_unused(published::to_tensors(&model).unwrap(), &unused) {
        assert!(written == parameters[&name], "`{name}` does not survive a round trip");
    }

    let update_len = golden.json()["update_len"].as_u64().unwrap() as usize;
    let tokens = golden.integers("tokens").into_dimensionality().unwrap();
    let mut state = model.new_state(tokens.nrows()).unwrap();
    for (n, batch) in updates(&tokens, update_len).enumerate() {
        compare_update(golden, tolerances, &model, n, &batch, &mut state);
    }
    if golden.tensors.contains_key("train.tokens") {
        compare_run(golden, tolerances, model, update_len, &unused);
    }
}

fn with_unused<T: Scalar>(mut tensors: Tensors<T>, unused: &Option<ArrayD<T>>) -> Tensors<T> {
    if let Some(unused) = unused {
        tensors.insert("token_embedder.bias_out".into(), unused.clone());
    }
    tensors
}

/// Consecutive updates of one sequence [B, T_total + 1].
fn updates(tokens: &Array2<u32>, update_len: usize) -> impl Iterator<Item = Batch> {
    let n = (tokens.ncols() - 1) / update_len;
    assert_eq!(n * update_len + 1, tokens.ncols(), "whole updates");
    (0..n).map(move |n| Batch {
        tokens: tokens.slice(s![.., n * update_len..(n + 1) * update_len]).to_owned(),
        targets: tokens.slice(s![.., n * update_len + 1..=(n + 1) * update_len]).to_owned(),
        first: n == 0,
    })
}

fn compare_update<T: Scalar>(
    golden: &mut Golden,
    tolerances: Tolerances,
    model: &Transformer<T>,
    n: usize,
    batch: &Batch,
    state: &mut ModelState<T>,
) {
    let Tolerances { outputs, gradients, .. } = tolerances;
    let config = model.config();
    let (tokens, targets) = (batch.tokens.view(), batch.targets.view());

    let logits = model.push(tokens, &mut state.clone()).unwrap();
    let shape = logits.dim();
    let logits = logits.into_shape_with_order((shape.0 * shape.1, shape.2)).unwrap();
    let logprobs = cross_entropy::log_softmax(logits.view()).unwrap().into_shape_with_order(shape).unwrap();
    golden.compare(&format!("u{n}.logprobs"), logprobs.view().into_dyn(), outputs);

    let result = model.loss_and_gradients(tokens, targets, None, state).unwrap();
    let losses = Array1::from_vec(vec![result.loss, result.commit_loss, result.total]);
    golden.compare(&format!("u{n}.loss"), losses.view().into_dyn(), outputs);

    let stats: Vec<_> = result.layers.into_iter().map(|layer| layer.stats).collect();
    let mut learned = model.clone();
    learned.update_codebooks(&stats).unwrap();
    let codebook = |model| -> Tensors<T> {
        let all = published::to_tensors(model).unwrap().into_iter();
        all.filter(|(name, _)| name.contains(".quantizer.")).collect()
    };
    let (old, new) = (codebook(model), codebook(&learned));
    golden.compare_all(&format!("u{n}.ema_new."), &new, outputs);

    let mut all = published::parameters_to_tensors(config, &result.gradients).unwrap();
    all.extend(old.into_iter().map(|(name, old)| (name.clone(), old - &new[&name])));
    golden.compare_all(&format!("u{n}.grad."), &all, gradients);

    for (i, states) in state.layers().iter().map(|states| states.quantized().unwrap()).enumerate() {
        let prefix = format!("u{n}.state.layer{}.attn{}", i / 2, i % 2 + 1);
        compare_state(golden, outputs, &prefix, config.n_codes, &states.to_owned());
    }
}

/// The state that one unit hands on.
fn compare_state<T: Scalar>(
    golden: &mut Golden,
    tolerance: f64,
    prefix: &str,
    n_codes: usize,
    states: &Array2<transformer_vq::attention::AttentionState<T>>,
) {
    let stack = |part: &dyn Fn(&transformer_vq::attention::AttentionState<T>) -> ArrayD<T>| {
        let parts: Vec<ArrayD<T>> = states.iter().map(part).collect();
        let views: Vec<_> = parts.iter().map(|part| part.view()).collect();
        let stacked = ndarray::stack(Axis(0), &views).unwrap();
        let shape: Vec<usize> = states.shape().iter().chain(parts[0].shape()).copied().collect();
        stacked.into_shape_with_order(shape).unwrap()
    };
    let count = |n: u64| T::from_f64(n as f64);
    let counts = stack(&|state| state.cache().count().mapv(count).into_dyn());
    golden.compare(&format!("{prefix}.aggcache.lower"), counts.view(), tolerance);
    let means = stack(&|state| state.cache().mean().to_owned().into_dyn());
    golden.compare(&format!("{prefix}.aggcache.upper_div_lower"), means.view(), tolerance);
    // Slots of the window that no token has reached come first there: code S, zeros.
    let padded = |part: ArrayD<T>, window: usize, fill: f64| {
        let missing = window - part.len_of(Axis(0));
        let mut shape = part.shape().to_vec();
        shape[0] = missing;
        let fill = ArrayD::from_elem(shape, T::from_f64(fill));
        ndarray::concatenate(Axis(0), &[fill.view(), part.view()]).unwrap()
    };
    let codes = stack(&|state| {
        let codes = state.window_keys().codes.mapv(|code| count(code.into())).into_dyn();
        padded(codes, state.window(), n_codes as f64)
    });
    golden.compare(&format!("{prefix}.xlcache.z"), codes.view(), f64::MIN_POSITIVE);
    let keys = stack(&|state| padded(state.window_keys().k_hat.into_dyn(), state.window(), 0.0));
    golden.compare(&format!("{prefix}.xlcache.k_hat"), keys.view(), tolerance);
    let values = stack(&|state| padded(state.window_keys().v.into_dyn(), state.window(), 0.0));
    golden.compare(&format!("{prefix}.xlcache.v"), values.view(), tolerance);
    let position = Array1::from_elem(1, count(states[[0, 0]].position())).into_dyn();
    golden.compare(&format!("{prefix}.pos_offset"), position.view(), tolerance);
    // A state here is that of one document and gives it no number.
    golden.leave_zeros(&format!("{prefix}.aggcache.latest_doc_id"));
    golden.leave_zeros(&format!("{prefix}.xlcache.doc_ids"));
}

/// A whole training run: losses before every step, and the final parameters.
fn compare_run<T: Scalar>(
    golden: &mut Golden,
    tolerances: Tolerances,
    model: Transformer<T>,
    update_len: usize,
    unused: &Option<ArrayD<T>>,
) {
    let json = golden.json();
    let train = |key: &str| json["train"][key].as_f64().unwrap_or_else(|| panic!("no train.{key}"));
    let optimizer = AdamW {
        learning_rate: train("lr"),
        beta1: train("b1"),
        beta2: train("b2"),
        epsilon: train("eps"),
        weight_decay: train("wd"),
        clip: Some(train("clip")),
    };
    let steps = train("steps") as u64;
    let schedule = Schedule::new(train("warmup") / train("steps"), train("alpha")).unwrap();
    let curve = golden.ask("train.curve");
    let sequences: ndarray::Array3<u32> = golden.integers("train.tokens").into_dimensionality().unwrap();
    let mut trainer = Trainer::new(model, optimizer).unwrap();
    let mut step = 0;
    for sequence in sequences.outer_iter() {
        for batch in updates(&sequence.to_owned(), update_len) {
            let report = trainer.step(&batch, schedule.factor_at_step(step, steps)).unwrap();
            for (i, got) in [report.loss, report.commit_loss].into_iter().enumerate() {
                let expected = curve[[step as usize, i]];
                let error = (got - expected).abs() / expected.abs();
                let share = error / tolerances.run;
                if share.is_nan() || share > 1.0 {
                    golden.failures.push(format!("`train.curve` [{step}, {i}] differs by {error:.2e}"));
                }
                if share > golden.worst.0 {
                    golden.worst = (share, format!("train.curve [{step}, {i}]"));
                }
            }
            step += 1;
        }
    }
    assert_eq!(step as usize, curve.len_of(Axis(0)));
    let trained = with_unused(published::to_tensors(trainer.model()).unwrap(), unused);
    golden.compare_all("train.final.", &trained, tolerances.run);
}
