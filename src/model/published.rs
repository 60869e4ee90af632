//! Reading and writing a model in the parameter names of the published JAX implementation.
//!
//! One of its layers is two of this crate's units: `transformer_layers_i.scanned_attn1` is unit 2i, `scanned_attn2` is unit
//! 2i + 1. Matrices are [in, out] on both sides. Other differences:
//!
//! | there | here |
//! |---|---|
//! | `kvg_proj.kernel` [D, H K + 2 H V] | `w_k`, `w_v`, `w_gate`, side by side |
//! | `q_proj`, `r_proj`, `res_proj` | `w_q`, `w_relative`, `w_out` |
//! | `u`, `v` [H K] | `content_bias`, `position_bias` [H, K] |
//! | `input_ln.g`, `input_ln.b`, `out_ln` | `norm.gain`, `norm.bias`, `final_norm` |
//! | `quantizer.c_sum`, `c_count` | the codebook's sums and counts |
//! | `token_embedder.bias_out` or `out_proj.bias` | `output_bias` |
//!
//! `token_embedder.bias_out` is there even if `out_proj` has its own bias; then it is unused and written as zeros.

use std::collections::BTreeMap;

use ndarray::{Array, ArrayD, Axis, Dimension, concatenate, s};
use serde::Deserialize;

use super::parameters::{LayerParameters, NormParameters, Parameters};
use super::{CodebookStart, Dropout, LearningConfig, ModelConfig, Transformer, UnitKind};
use crate::attention::VqAttention;
use crate::codebook::{Ema, Estimator, Learning};
use crate::compiled::compiled_here;
use crate::error::check_shape;
use crate::{Error, Scalar};

/// Arrays by published name, `out_ln.g` for example.
pub type Tensors<T> = BTreeMap<String, ArrayD<T>>;

/// The published configuration, as far as it describes the model.
#[derive(Debug, Deserialize)]
struct PublishedConfig {
    n_layer: usize,
    n_head: usize,
    d_model: usize,
    d_k: usize,
    d_v: usize,
    d_ff: usize,
    n_code: usize,
    n_vocab: usize,
    block_len: usize,
    mem_len: usize,
    agg_cache: bool,
    grad_thru_cache: bool,
    e_tie: bool,
    e_preln: bool,
    e_scale: f64,
    pe_abs: bool,
    pe_lam: f64,
    c_beta: f64,
    c_gamma: f64,
}

/// The configuration of this crate that equals a published one, given as JSON.
///
/// # Errors
/// [`Error::Invalid`] for text that is not such a configuration, for a feed-forward layer (`d_ff`), and as
/// [`ModelConfig::validate`].
pub fn config_from_json(json: &str) -> Result<ModelConfig, Error> {
    let unreadable = |e: serde_json::Error| Error::invalid("config", "a published configuration", e);
    let published: PublishedConfig = serde_json::from_str(json).map_err(unreadable)?;
    if published.d_ff != 0 {
        return Err(Error::invalid("d_ff", "0: gated units have no feed-forward layer", published.d_ff));
    }
    let n_layers = published.n_layer.checked_mul(2);
    let config = ModelConfig {
        vocab_size: published.n_vocab,
        d_model: published.d_model,
        n_layers: n_layers.ok_or_else(|| Error::invalid("n_layer", "a count", published.n_layer))?,
        n_heads: published.n_head,
        n_key_heads: None,
        d_k: published.d_k,
        d_v: published.d_v,
        n_codes: published.n_code,
        gate: true,
        feed_forward: None,
        units: vec![],
        dropout: Dropout::default(),
        attention: VqAttention {
            block_len: published.block_len,
            window: published.mem_len,
            cache: published.agg_cache,
            gradient_through_cache: published.grad_thru_cache,
        },
        tied_embedding: published.e_tie,
        absolute_positions: published.pe_abs,
        final_norm: published.e_preln,
        logit_scale: published.e_scale,
        position_lambda: published.pe_lam,
        commit_weight: published.c_beta,
        codebook_decay: published.c_gamma,
        learning: LearningConfig::default(),
        recompute: false,
        estimator: Estimator::StraightThrough,
        start: CodebookStart::Random,
        revival: None,
    };
    config.validate()?;
    Ok(config)
}

/// A model's parameters and codebook states by their published names.
///
/// # Errors
/// [`Error::Invalid`] for units that are not built as the published ones are (gated, no feed-forward branch, as many key heads as
/// query heads), and for codebooks that do not learn as they do: by moving averages with the count clamp. There are no names for
/// others.
pub fn to_tensors<T: Scalar>(model: &Transformer<T>) -> Result<Tensors<T>, Error> {
    compiled_here!(T, to_tensors_here::<T>, fn(&Transformer<T>) -> Result<Tensors<T>, Error>)(model)
}

fn to_tensors_here<T: Scalar>(model: &Transformer<T>) -> Result<Tensors<T>, Error> {
    let mut tensors = parameters_to_tensors(model.config(), model.parameters())?;
    for (i, learning) in model.learning().iter().enumerate() {
        let Learning::Ema(ema) = learning else { return Err(other_learning(model.config())) };
        tensors.insert(format!("{}.quantizer.c_sum", unit(i)), ema.sums().to_owned().into_dyn());
        tensors.insert(format!("{}.quantizer.c_count", unit(i)), ema.counts().to_owned().into_dyn());
    }
    Ok(tensors)
}

/// Checks that units are built, and codebooks learn, as the published ones do.
fn check_published(config: &ModelConfig) -> Result<(), Error> {
    let ModelConfig { n_heads, gate, feed_forward, .. } = *config;
    let of_one_kind = (0..config.n_layers).all(|unit| config.unit(unit) == UnitKind::Vq);
    if config.key_heads() != n_heads || !gate || feed_forward.is_some() || !of_one_kind {
        let expected = "gated, with as many key heads as query heads and no feed-forward branch: other units have no \
                        published names";
        let got = format!("{} of {n_heads} key heads, gate {gate}, {feed_forward:?}", config.key_heads());
        return Err(Error::invalid("units", expected, got));
    }
    if config.learning == LearningConfig::default() { Ok(()) } else { Err(other_learning(config)) }
}

fn other_learning(config: &ModelConfig) -> Error {
    let expected = "moving averages with the count clamp: the published names know no others";
    Error::invalid("learning", expected, format!("{:?}", config.learning))
}

/// Parameters, or their gradients, by their published names.
///
/// # Errors
/// As [`to_tensors`].
pub fn parameters_to_tensors<T: Scalar>(
    config: &ModelConfig,
    parameters: &Parameters<T>,
) -> Result<Tensors<T>, Error> {
    compiled_here!(
        T,
        parameters_to_tensors_here::<T>,
        fn(&ModelConfig, &Parameters<T>) -> Result<Tensors<T>, Error>
    )(config, parameters)
}

fn parameters_to_tensors_here<T: Scalar>(
    config: &ModelConfig,
    parameters: &Parameters<T>,
) -> Result<Tensors<T>, Error> {
    config.validate()?;
    check_published(config)?;
    Parameters::try_zeros(config)?.check_like("parameters", parameters)?;
    let mut tensors = Tensors::new();
    let mut add = |name: String, array: ArrayD<T>| tensors.insert(name, array);
    add("token_embedder.embs".into(), parameters.embedding.clone().into_dyn());
    let bias = parameters.output_bias.clone().into_dyn();
    if let Some(output) = &parameters.output {
        add("out_proj.kernel".into(), output.clone().into_dyn());
        add("token_embedder.bias_out".into(), ArrayD::zeros(bias.raw_dim()));
        add("out_proj.bias".into(), bias);
    } else {
        add("token_embedder.bias_out".into(), bias);
    }
    if let Some(scale) = &parameters.position_scale {
        add("position_embedder.scale".into(), scale.clone().into_dyn());
    }
    if let Some(NormParameters { gain, bias }) = &parameters.final_norm {
        add("out_ln.g".into(), gain.clone().into_dyn());
        add("out_ln.b".into(), bias.clone().into_dyn());
    }
    for (i, layer) in parameters.layers.iter().enumerate() {
        let mut add = |name: &str, array: ArrayD<T>| add(format!("{}.{name}", unit(i)), array);
        let parts: Vec<_> =
            [&layer.w_k, &layer.w_v].into_iter().chain(&layer.w_gate).map(|w| w.view()).collect();
        let kvg = concatenate(Axis(1), &parts).expect("one row per dimension of the model");
        let flat =
            |bias: &ndarray::Array2<T>| bias.iter().copied().collect::<ndarray::Array1<T>>().into_dyn();
        add("input_ln.g", layer.norm.gain.clone().into_dyn());
        add("input_ln.b", layer.norm.bias.clone().into_dyn());
        add("kvg_proj.kernel", kvg.into_dyn());
        add("q_proj.kernel", layer.w_q.clone().into_dyn());
        add("r_proj.kernel", layer.w_relative.clone().into_dyn());
        add("res_proj.kernel", layer.w_out.clone().into_dyn());
        add("u", flat(&layer.content_bias));
        add("v", flat(&layer.position_bias));
    }
    Ok(tensors)
}

/// A model from arrays by their published names.
///
/// # Errors
/// [`Error::Invalid`] for a name that is missing or that the configuration does not have, [`Error::Shape`], as [`to_tensors`],
/// and as [`ModelConfig::validate`].
pub fn from_tensors<T: Scalar>(config: ModelConfig, tensors: Tensors<T>) -> Result<Transformer<T>, Error> {
    compiled_here!(T, from_tensors_here::<T>, fn(ModelConfig, Tensors<T>) -> Result<Transformer<T>, Error>)(
        config, tensors,
    )
}

fn from_tensors_here<T: Scalar>(
    config: ModelConfig,
    mut tensors: Tensors<T>,
) -> Result<Transformer<T>, Error> {
    config.validate()?;
    check_published(&config)?;
    let mut parameters = Parameters::try_zeros(&config)?;
    let source = &mut tensors;
    take(source, "token_embedder.embs", &mut parameters.embedding)?;
    if let Some(output) = &mut parameters.output {
        take(source, "out_proj.kernel", output)?;
        take(source, "token_embedder.bias_out", &mut parameters.output_bias)?; // unused there too
        take(source, "out_proj.bias", &mut parameters.output_bias)?;
    } else {
        take(source, "token_embedder.bias_out", &mut parameters.output_bias)?;
    }
    if let Some(scale) = &mut parameters.position_scale {
        take(source, "position_embedder.scale", scale)?;
    }
    if let Some(NormParameters { gain, bias }) = &mut parameters.final_norm {
        take(source, "out_ln.g", gain)?;
        take(source, "out_ln.b", bias)?;
    }
    let mut learning = vec![];
    for (i, layer) in parameters.layers.iter_mut().enumerate() {
        take_unit(source, i, &config, layer)?;
        let ModelConfig { n_heads, n_codes, d_k, codebook_decay, .. } = config;
        let (mut sums, mut counts) =
            (ndarray::Array3::zeros((n_heads, n_codes, d_k)), ndarray::Array2::zeros((n_heads, n_codes)));
        take(source, &format!("{}.quantizer.c_sum", unit(i)), &mut sums)?;
        take(source, &format!("{}.quantizer.c_count", unit(i)), &mut counts)?;
        learning.push(Learning::Ema(Ema::new(sums, counts, codebook_decay)?));
    }
    match tensors.first_key_value() {
        Some((name, _)) => {
            Err(Error::invalid("tensors", "those of the configuration", format!("also `{name}`")))
        }
        None => Transformer::from_parts(config, parameters, learning),
    }
}

fn take_unit<T: Scalar>(
    tensors: &mut Tensors<T>,
    i: usize,
    config: &ModelConfig,
    layer: &mut LayerParameters<T>,
) -> Result<(), Error> {
    let name = |name: &str| format!("{}.{name}", unit(i));
    take(tensors, &name("input_ln.g"), &mut layer.norm.gain)?;
    take(tensors, &name("input_ln.b"), &mut layer.norm.bias)?;
    take(tensors, &name("q_proj.kernel"), &mut layer.w_q)?;
    take(tensors, &name("r_proj.kernel"), &mut layer.w_relative)?;
    take(tensors, &name("res_proj.kernel"), &mut layer.w_out)?;
    let (keys, values) = (config.n_heads * config.d_k, config.n_heads * config.d_v);
    let mut kvg = ndarray::Array2::zeros((config.d_model, keys + 2 * values));
    take(tensors, &name("kvg_proj.kernel"), &mut kvg)?;
    layer.w_k.assign(&kvg.slice(s![.., ..keys]));
    layer.w_v.assign(&kvg.slice(s![.., keys..keys + values]));
    if let Some(w_gate) = &mut layer.w_gate {
        w_gate.assign(&kvg.slice(s![.., keys + values..]));
    }
    for (name, bias) in [(name("u"), &mut layer.content_bias), (name("v"), &mut layer.position_bias)] {
        let mut flat = ndarray::Array1::zeros(keys);
        take(tensors, &name, &mut flat)?;
        bias.iter_mut().zip(flat).for_each(|(to, from)| *to = from);
    }
    Ok(())
}

/// Moves an array out of `tensors` into one of the shape it must have.
fn take<T: Scalar, D: Dimension>(
    tensors: &mut Tensors<T>,
    name: &str,
    to: &mut Array<T, D>,
) -> Result<(), Error> {
    let missing = || Error::invalid("tensors", format!("to contain `{name}`"), "none of that name");
    let from = tensors.remove(name).ok_or_else(missing)?;
    check_shape("tensors", to.shape(), from.shape())?;
    to.iter_mut().zip(&from).for_each(|(to, &from)| *to = from);
    Ok(())
}

/// The published name of unit i.
fn unit(i: usize) -> String {
    format!("transformer_layers_{}.scanned_attn{}", i / 2, i % 2 + 1)
}
