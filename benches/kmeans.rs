//! k-means++ with 10 steps of Lloyd, beside one assignment of the same keys; prints the ratio.
//!
//! Runs for about half a minute.
//!
//! Checked once, before anything is timed: the steps lower the error, and every code is in use.
//!
//! Bias: 32768 keys, 512 codes, width 128, f32, on one thread. The keys are normal noise, in which no step finds nothing to
//! change, so that all ten are taken. Both figures hold their checks of the input and the preparation of the codebook.

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use transformer_vq::codebook::{Codebook, Ema, assign, commitment, start};
use transformer_vq::ndarray::{Axis, s};

const KEYS: usize = 32_768;
const CODES: usize = 512;
const WIDTH: usize = 128;

fn k_means(c: &mut Criterion) {
    rayon::ThreadPoolBuilder::new().num_threads(1).build_global().unwrap();
    let keys = start::random::<f32>(1, KEYS, WIDTH, 1.0, 1).unwrap().insert_axis(Axis(0)); // [B, H, T, K]
    let run = |steps| start::k_means(keys.view(), CODES, None, steps, 1).unwrap();
    let error = |steps| {
        let codebook = Codebook::ema(Ema::from_codewords(run(steps), 0.99).unwrap());
        let codes = codebook.assign(keys.view()).unwrap();
        assert!((0..CODES as u32).all(|code| codes.iter().any(|&z| z == code)), "every code is in use");
        commitment::loss(keys.view(), codes.view(), codebook.codewords().view(), None).unwrap()
    };
    assert!(error(10) < error(0));

    let codewords = run(0);
    let (rows, table) = (keys.slice(s![0, 0, .., ..]), codewords.slice(s![0, .., ..]));
    let mut group = c.benchmark_group(format!("N={KEYS} S={CODES} K={WIDTH}"));
    group.sample_size(10).warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(5));
    group.throughput(Throughput::Elements(KEYS as u64));
    group.bench_function("assign", |b| b.iter(|| assign(rows, table).unwrap()));
    group.bench_function("k-means++", |b| b.iter(|| run(0)));
    group.bench_function("k-means++ and 10 steps", |b| b.iter(|| run(10)));
    group.finish();

    // In turns, so that a slower moment of the machine meets both.
    let seconds = |f: &dyn Fn()| {
        let begin = Instant::now();
        f();
        begin.elapsed().as_secs_f64()
    };
    let mut ratios: Vec<f64> = (0..5)
        .map(|_| {
            let one = seconds(&|| drop(black_box(assign(rows, table).unwrap())));
            seconds(&|| drop(black_box(run(10)))) / one
        })
        .collect();
    ratios.sort_by(f64::total_cmp);
    println!("k-means++ and 10 steps take {:.1} times one assignment (median of 5)", ratios[2]);
}

criterion_group!(benches, k_means);
criterion_main!(benches);
