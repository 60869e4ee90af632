//! Every optimizer against its definition, one number at a time in `f64`.

use ndarray::ArrayD;

use super::*;

/// Parameters of all ranks, empty ones, and some longer than a task's share.
fn shapes() -> Vec<Vec<usize>> {
    let small =
        vec![vec![], vec![0], vec![1], vec![3, 5], vec![2, 0, 4], vec![2, 3, 7], vec![1, 6], vec![6, 1]];
    [small, vec![vec![CHUNK + 13], vec![2, CHUNK / 40 + 11, 40]]].concat()
}

/// A number in (-1, 1) that differs from parameter to parameter, element to element and step to step.
fn number(parameter: usize, element: usize, step: u64) -> f64 {
    (1.0 + parameter as f64 * 1.7 + element as f64 * 0.37 + step as f64 * 2.3).sin()
}

fn filled<T: Scalar>(f: impl Fn(usize, usize) -> f64) -> Vec<ArrayD<T>> {
    let fill = |(k, shape): (usize, Vec<usize>)| {
        let len = shape.iter().product();
        let values = (0..len).map(|i| T::from_f64(f(k, i))).collect();
        ArrayD::from_shape_vec(shape, values).unwrap()
    };
    shapes().into_iter().enumerate().map(fill).collect()
}

/// Gradients that grow, so that a clipping norm in between is first off and then on.
fn gradient(parameter: usize, element: usize, step: u64) -> f64 {
    number(parameter, element, step) * 0.001 * (step + 1) as f64
}

const STEPS: u64 = 12;

fn factor(step: u64) -> f64 {
    (step as f64 / 5.0).min(1.0)
}

/// Every second parameter decays.
fn decay(optimizer: &Optimizer, parameter: usize) -> f64 {
    if parameter % 2 == 1 { optimizer.weight_decay() } else { 0.0 }
}

fn run<T: Scalar>(optimizer: &Optimizer, layout: impl Fn(ArrayD<T>) -> ArrayD<T>) -> Vec<ArrayD<T>> {
    let mut parameters: Vec<_> = filled(|k, i| number(k, i, 99)).into_iter().map(&layout).collect();
    let zeros = |shape: Vec<usize>| {
        optimizer.moments(&shape).into_iter().map(|m| ArrayD::zeros(m.shape)).collect::<Vec<_>>()
    };
    let mut moments: Vec<_> = shapes().into_iter().map(zeros).collect();
    for step in 0..STEPS {
        let gradients = filled::<T>(|k, i| gradient(k, i, step));
        let norm = gradients.iter().map(|g| sum_of_squares(g.view())).sum::<f64>().sqrt();
        for (k, p) in parameters.iter_mut().enumerate() {
            let gradient_scale = optimizer.gradient_scale(norm);
            let pace = Pace { factor: factor(step), gradient_scale, decay: decay(optimizer, k) };
            optimizer.update(step + 1, &pace, p.view_mut(), gradients[k].view(), &mut moments[k]);
        }
    }
    parameters
}

/// The gradients of one parameter step by step, clipped by all.
fn clipped(optimizer: &Optimizer) -> Vec<Vec<Vec<f64>>> {
    let sizes: Vec<usize> = shapes().iter().map(|shape| shape.iter().product()).collect();
    let of_step = |step: u64| {
        let all: Vec<Vec<f64>> =
            sizes.iter().enumerate().map(|(k, &n)| (0..n).map(|i| gradient(k, i, step)).collect()).collect();
        let norm = all.iter().flatten().map(|g| g * g).sum::<f64>().sqrt();
        (norm, all)
    };
    let mut all: Vec<_> = (0..STEPS).map(of_step).collect();
    if let Some(clip) = optimizer.clip() {
        assert!(all[0].0 < clip && all[STEPS as usize - 1].0 > clip, "a clip that is off and on");
        for (norm, gradients) in all.iter_mut().filter(|(norm, _)| *norm > clip) {
            gradients.iter_mut().flatten().for_each(|g| *g = *g / *norm * clip);
        }
    }
    (0..sizes.len()).map(|k| all.iter().map(|(_, gradients)| gradients[k].clone()).collect()).collect()
}

/// Corrections as divisions, the decay as its own subtraction.
fn slow_adamw(a: &AdamW, decay: f64, p: &mut [f64], gradients: &[Vec<f64>]) {
    for (i, p) in p.iter_mut().enumerate() {
        let (mut m, mut v) = (0.0, 0.0);
        for (step, g) in gradients.iter().enumerate() {
            m = a.beta1 * m + (1.0 - a.beta1) * g[i];
            v = a.beta2 * v + (1.0 - a.beta2) * g[i] * g[i];
            let m_hat = m / (1.0 - a.beta1.powi(step as i32 + 1));
            let v_hat = v / (1.0 - a.beta2.powi(step as i32 + 1));
            let old = *p;
            *p -= a.learning_rate * factor(step as u64) * m_hat / (v_hat.sqrt() + a.epsilon);
            *p -= decay * old;
        }
    }
}

fn slow_lion(a: &Lion, decay: f64, p: &mut [f64], gradients: &[Vec<f64>]) {
    for (i, p) in p.iter_mut().enumerate() {
        let mut m = 0.0;
        for (step, g) in gradients.iter().enumerate() {
            let c = a.beta1 * m + (1.0 - a.beta1) * g[i];
            let sign = if c == 0.0 { 0.0 } else { c / c.abs() };
            *p -= a.learning_rate * factor(step as u64) * sign + decay * *p;
            m = a.beta2 * m + (1.0 - a.beta2) * g[i];
        }
    }
}

/// The paper's algorithm with sums in place of means, matrix by matrix.
fn slow_adafactor(a: &Adafactor, decay: f64, shape: &[usize], p: &mut [f64], gradients: &[Vec<f64>]) {
    let root_mean_square = |x: &[f64]| (x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64).sqrt();
    let [n, m] = match *shape {
        [.., n, m] => [n, m],
        _ => [1, p.len()],
    };
    // Rows of all matrices, one after the other; so for columns.
    let (mut rows, mut columns) = (vec![0.0; p.len() / m], vec![0.0; p.len() / n]);
    let mut v = vec![0.0; p.len()];
    for (step, g) in gradients.iter().enumerate() {
        let b = 1.0 - 1.0 / (step as f64 + 1.0).powf(a.decay_exponent);
        rows.iter_mut().chain(&mut columns).chain(&mut v).for_each(|x| *x *= b);
        for i in 0..p.len() {
            let square = (1.0 - b) * (g[i] * g[i] + a.epsilon);
            rows[i / m] += square;
            columns[i / (n * m) * m + i % m] += square;
            v[i] += square;
        }
        let mut u = g.clone();
        for i in 0..p.len() {
            let matrix = i / (n * m);
            let total: f64 = rows[matrix * n..][..n].iter().sum();
            let factored = rows[i / m] * columns[matrix * m + i % m] / total;
            u[i] /= if shape.len() < 2 { v[i].sqrt() } else { factored.sqrt() };
        }
        let bound = (root_mean_square(&u) / a.threshold).max(1.0);
        let size = a.relative.map_or(1.0, |least| root_mean_square(p).max(least));
        for (p, u) in p.iter_mut().zip(u) {
            *p = *p - a.learning_rate * factor(step as u64) * size * u / bound - decay * *p;
        }
    }
}

fn slow(optimizer: &Optimizer) -> Vec<Vec<f64>> {
    let of_parameter = |(k, shape): (usize, Vec<usize>), gradients: &[Vec<f64>]| {
        let mut p: Vec<f64> = (0..shape.iter().product()).map(|i| number(k, i, 99)).collect();
        let decay = decay(optimizer, k);
        match optimizer {
            Optimizer::AdamW(adamw) => slow_adamw(adamw, decay, &mut p, gradients),
            Optimizer::Lion(lion) => slow_lion(lion, decay, &mut p, gradients),
            Optimizer::Adafactor(a) if !p.is_empty() => slow_adafactor(a, decay, &shape, &mut p, gradients),
            Optimizer::Adafactor(_) => {}
        }
        p
    };
    let gradients = clipped(optimizer);
    shapes().into_iter().enumerate().map(|k| of_parameter(k.clone(), &gradients[k.0])).collect()
}

/// With a clip between the norms that come.
fn kinds() -> Vec<Optimizer> {
    let (weight_decay, clip) = (0.01, Some(1.0));
    let adamw = AdamW { epsilon: 1e-3, weight_decay, clip: None, ..AdamW::default() };
    let lion = Lion { weight_decay, clip: None, ..Lion::default() };
    let adafactor = Adafactor { weight_decay, clip: None, ..Adafactor::default() };
    vec![
        adamw.into(),
        AdamW { clip, ..adamw }.into(),
        lion.into(),
        Lion { clip, ..lion }.into(),
        adafactor.into(),
        Adafactor { clip, epsilon: 1e-4, ..adafactor }.into(),
        Adafactor { relative: None, threshold: 0.5, decay_exponent: 0.5, ..adafactor }.into(),
    ]
}

fn relative_rms<T: Scalar>(got: &[ArrayD<T>], expected: &[Vec<f64>]) -> f64 {
    let expected = expected.iter().flatten();
    let (mut error, mut size) = (0.0, 0.0);
    for (&got, expected) in got.iter().flatten().zip(expected) {
        error += (got.as_f64() - expected).powi(2);
        size += expected.powi(2);
    }
    (error / size).sqrt()
}

#[test]
fn steps_equal_the_definition() {
    for optimizer in kinds() {
        let expected = slow(&optimizer);
        let error = relative_rms(&run::<f64>(&optimizer, |x| x), &expected);
        println!("{optimizer:?}: f64 {error:e}");
        assert!(error < 1e-14, "f64, {optimizer:?}: {error:e}");
        let error = relative_rms(&run::<f32>(&optimizer, |x| x), &expected);
        println!("{optimizer:?}: f32 {error:e}");
        assert!(error < 1e-6, "f32, {optimizer:?}: {error:e}");
    }
}

#[test]
fn layouts_and_thread_counts_do_not_change_a_bit() {
    for optimizer in kinds() {
        let plain = run::<f32>(&optimizer, |x| x);
        let column_major = |x: ArrayD<f32>| x.t().as_standard_layout().into_owned().reversed_axes();
        assert_eq!(run::<f32>(&optimizer, column_major), plain);
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            assert_eq!(pool.install(|| run::<f32>(&optimizer, |x| x)), plain, "{threads} threads");
        }
    }
}

#[test]
fn clipping_bounds_the_norm() {
    for optimizer in kinds() {
        let scales = [0.0, 0.5, 4.0].map(|norm| optimizer.gradient_scale(norm));
        assert_eq!(scales, [1.0, 1.0, if optimizer.clip().is_some() { 0.25 } else { 1.0 }]);
    }
}

#[test]
fn nothing_trained_stays_as_it_is() {
    let smallest = 2e-38;
    let adamw = AdamW { epsilon: smallest, ..AdamW::default() };
    let adafactor = Adafactor { epsilon: smallest, ..Adafactor::default() };
    for optimizer in [adamw.into(), Lion::default().into(), adafactor.into()] {
        let optimizer: Optimizer = optimizer;
        assert_eq!(optimizer.validate(), Ok(()));
        let (mut parameters, zeros) = (filled::<f32>(|_, _| 1.0), filled::<f32>(|_, _| 0.0));
        for (k, p) in parameters.iter_mut().enumerate() {
            for t in [1, 2, u64::MAX] {
                let moments = optimizer.moments(p.shape());
                let mut moments: Vec<_> = moments.into_iter().map(|m| ArrayD::zeros(m.shape)).collect();
                let pace = Pace { factor: 1.0, gradient_scale: 1.0, decay: 0.0 };
                optimizer.update(t, &pace, p.view_mut(), zeros[k].view(), &mut moments);
            }
        }
        assert_eq!(parameters, filled::<f32>(|_, _| 1.0), "{optimizer:?}");
    }
}

/// Squares of such gradients are beyond `f32`.
#[test]
fn huge_gradients_leave_adafactor_finite() {
    let optimizer: Optimizer = Adafactor { clip: None, ..Adafactor::default() }.into();
    for shape in [vec![6], vec![4, 6]] {
        let (mut p, mut g) = (ArrayD::<f32>::ones(shape.clone()), ArrayD::<f32>::ones(shape.clone()));
        *g.iter_mut().last().unwrap() = 1e30;
        let mut moments: Vec<_> =
            optimizer.moments(&shape).into_iter().map(|m| ArrayD::<f32>::zeros(m.shape)).collect();
        for t in 1..4 {
            let pace = Pace { factor: 1.0, gradient_scale: 1.0, decay: 0.0 };
            optimizer.update(t, &pace, p.view_mut(), g.view(), &mut moments);
        }
        let numbers = p.iter().chain(moments.iter().flatten());
        assert!(numbers.copied().all(f32::is_finite), "{p} {moments:?}");
        assert!(p.iter().any(|&p| p < 1.0), "{p}");
    }
}

#[test]
fn impossible_constants_are_refused() {
    fn refused<O: Default + Into<Optimizer>>(name: &str, change: fn(&mut O, f64), values: &[f64]) {
        assert_eq!(O::default().into().validate(), Ok(()));
        for &value in values {
            let mut optimizer = O::default();
            change(&mut optimizer, value);
            let error = optimizer.into().validate().unwrap_err();
            assert!(matches!(error, Error::Invalid { what, .. } if what == name), "{name}: {error}");
        }
    }
    let (nan, inf) = (f64::NAN, f64::INFINITY);
    let (size, part, above) = ([-1e-3, nan, inf], [-0.1, 1.0, nan], [0.0, -1.0, nan, inf]);
    let tiny = [0.0, -1e-9, 1e-40, nan, inf];
    refused::<AdamW>("learning_rate", |a, x| a.learning_rate = x, &size);
    refused::<AdamW>("beta1", |a, x| a.beta1 = x, &part);
    refused::<AdamW>("beta2", |a, x| a.beta2 = x, &part);
    refused::<AdamW>("epsilon", |a, x| a.epsilon = x, &tiny);
    refused::<AdamW>("weight_decay", |a, x| a.weight_decay = x, &part);
    refused::<AdamW>("clip", |a, x| a.clip = Some(x), &above);
    refused::<Lion>("learning_rate", |a, x| a.learning_rate = x, &size);
    refused::<Lion>("beta1", |a, x| a.beta1 = x, &part);
    refused::<Lion>("beta2", |a, x| a.beta2 = x, &part);
    refused::<Lion>("weight_decay", |a, x| a.weight_decay = x, &part);
    refused::<Lion>("clip", |a, x| a.clip = Some(x), &above);
    refused::<Adafactor>("learning_rate", |a, x| a.learning_rate = x, &size);
    refused::<Adafactor>("decay_exponent", |a, x| a.decay_exponent = x, &above);
    refused::<Adafactor>("epsilon", |a, x| a.epsilon = x, &tiny);
    refused::<Adafactor>("threshold", |a, x| a.threshold = x, &above);
    refused::<Adafactor>("relative", |a, x| a.relative = Some(x), &above);
    refused::<Adafactor>("weight_decay", |a, x| a.weight_decay = x, &part);
    refused::<Adafactor>("clip", |a, x| a.clip = Some(x), &above);
}
