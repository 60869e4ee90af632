//! Finding the codes of keys.

use std::hint::black_box;

use transformer_vq::codebook::{assign, assign_naive};
use transformer_vq::ndarray::{Array2, s};

use crate::report::Report;
use crate::shapes::Normal;
use crate::{Result, Run};

const KEYS: usize = 32_768;
const D_K: usize = 128;
const N_CODES: usize = 512;
/// Keys whose codes are compared with those of the definition.
const CHECKED: usize = 1024;

/// One row.
pub fn table(run: &Run<'_>, report: &mut Report) -> Result {
    let mut normal = Normal::new(1);
    let keys: Array2<f32> = normal.array((KEYS, D_K), 1.0);
    let codewords: Array2<f32> = normal.array((N_CODES, D_K), 1.0);
    let codes = assign(keys.view(), codewords.view())?;
    let expected = assign_naive(keys.slice(s![..CHECKED, ..]), codewords.view())?;
    if codes.slice(s![..CHECKED]) != expected {
        return Err("codes are not those of the definition: no times".into());
    }
    let operations = 2.0 * (KEYS * N_CODES * D_K) as f64;
    let measured = run.machine.pairs(run.pairs, operations, &mut || {
        black_box(assign(keys.view(), codewords.view()).expect("checked before"));
    });
    report.table(&["assignment", "keys/s", "GFLOP/s", "ratio"])?;
    report.row(&[
        format!("N={KEYS} K={D_K} S={N_CODES}"),
        format!("{:.0}", KEYS as f64 / measured.seconds()),
        format!("{:.0}", operations / measured.seconds() / 1e9),
        format!("{:.2}", measured.ratio()),
    ])?;
    report.end()
}
