//! The rules of the source tree: lower levels never import higher ones, files stay short, `unsafe` stays in one place, and
//! public types can be shared, copied and printed.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::path::Path;

use transformer_vq::attention::{
    AttentionState, BatchBiasGradients, BatchBiases, BatchGradients, BatchInputs, BatchOutput, BatchSaved,
    BiasGradients, Biases, BidirectionalAttention, BidirectionalGradients, BidirectionalInputs,
    BidirectionalOutput, BidirectionalSaved, CompressiveCache, Gradients, Inputs, Output, PreparedHeads,
    VqAttention, WindowKeys, bidirectional, blockwise,
};
use transformer_vq::codebook::{
    Basis, CodeStats, Codebook, CodebookParameters, Ema, Estimator, Learning, Replacement, Residual,
    Rotation, Smoothing, residual,
};
use transformer_vq::ops::rms_norm;

/// What a module of the crate may import: only what has a smaller number.
const LEVELS: [(&str, u32); 10] = [
    ("error", 0),
    ("scalar", 0),
    ("compiled", 0),
    ("check", 0),
    ("ops", 1),
    ("codebook", 2),
    ("attention", 3),
    ("model", 4),
    ("train", 5),
    ("generate", 5),
];

/// Re-exports of the crate's root.
const ROOT: [(&str, &str); 2] = [("Error", "error"), ("Scalar", "scalar")];

const MOST_LINES: usize = 400;

/// Every source file below `src`, by its path from there.
fn sources() -> Vec<(String, String)> {
    fn walk(root: &Path, folder: &Path, files: &mut Vec<(String, String)>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(root, &path, files);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(root).unwrap().to_str().unwrap().replace('\\', "/");
                files.push((name, std::fs::read_to_string(&path).unwrap()));
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = vec![];
    walk(&root, &root, &mut files);
    files.sort();
    files
}

/// The text without comments (whose links may point anywhere) and string literals of one line.
fn code(source: &str) -> String {
    let lines = source.lines().map(|line| {
        let mut code = String::new();
        for (i, part) in line.split('"').enumerate() {
            let quoted = i % 2 == 1;
            let Some(comment) = part.find("//").filter(|_| !quoted) else {
                code.push_str(if quoted { "\"\"" } else { part });
                continue;
            };
            code.push_str(&part[..comment]);
            break;
        }
        code
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// The modules behind every `crate::` of the code: `crate::a::b` and `crate::{a::b, c}`.
fn imports(code: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let names = |c: char| c.is_alphanumeric() || c == '_';
    for (at, path) in code.match_indices("crate::") {
        // `pub(crate)` has no colons; `other_crate::` is somebody else's.
        if code[..at].ends_with(names) {
            continue;
        }
        let rest = &code[at + path.len()..];
        let mut depth = 0;
        let mut starts = vec![0];
        if rest.starts_with('{') {
            starts.clear();
            for (i, c) in rest.char_indices() {
                match c {
                    '{' => depth += 1,
                    '}' => depth -= 1,
                    _ => {}
                }
                if depth == 1 && (c == '{' || c == ',') {
                    starts.push(i + 1);
                }
                if depth == 0 {
                    break;
                }
            }
        }
        for start in starts {
            let name: String = rest[start..].trim_start().chars().take_while(|&c| names(c)).collect();
            found.insert(name);
        }
    }
    found.remove("");
    found
}

fn level(module: &str) -> Option<u32> {
    let module = ROOT.iter().find(|(name, _)| *name == module).map_or(module, |&(_, module)| module);
    LEVELS.iter().find(|(name, _)| *name == module).map(|&(_, level)| level)
}

/// The top-level module that a file belongs to.
fn module(file: &str) -> &str {
    file.split(['/', '.']).next().unwrap()
}

/// The first import of a file that its level does not allow.
fn forbidden(file: &str, source: &str) -> Option<String> {
    let own = module(file);
    let own_level = level(own).unwrap_or_else(|| panic!("{file} has no level"));
    imports(&code(source)).into_iter().find(|import| {
        let imported =
            level(import).unwrap_or_else(|| panic!("{file} imports `{import}`, which has no level"));
        import != own && imported >= own_level && imported > 0
    })
}

#[test]
fn lower_levels_never_import_higher_ones() {
    for (file, source) in sources() {
        if file == "lib.rs" {
            continue;
        }
        assert_eq!(forbidden(&file, &source), None, "{file} reaches above its level");
    }
}

#[test]
fn forbidden_imports_are_seen() {
    let seen = |file, source| forbidden(file, source);
    assert_eq!(seen("ops/linear.rs", "use crate::codebook::Codebook;"), Some("codebook".into()));
    assert_eq!(seen("ops/linear.rs", "fn f() { crate::model::f() }"), Some("model".into()));
    assert_eq!(
        seen("train/mod.rs", "use crate::{\n    Error,\n    generate::Sampler,\n};"),
        Some("generate".into())
    );
    assert_eq!(seen("generate/mod.rs", "use crate::{model::{self, A}, train};"), Some("train".into()));
    assert_eq!(seen("error.rs", "use crate::ops;"), Some("ops".into()));
    assert_eq!(seen("ops/mod.rs", "//! See crate::model.\nuse crate::Scalar; // crate::train"), None);
    assert_eq!(seen("ops/mod.rs", "let x = \"crate::model\"; use crate::ops::rows;"), None);
    assert_eq!(seen("model/mod.rs", "use crate::{Error, attention::{A, B}, codebook, ops};"), None);
    assert_eq!(seen("ops/mod.rs", "use other_crate::model; pub(crate) fn f() {}"), None);
}

#[test]
fn files_are_short() {
    for (file, source) in sources() {
        let lines = source.lines().count();
        assert!(lines <= MOST_LINES, "{file} has {lines} lines, at most {MOST_LINES} are allowed");
    }
}

#[test]
fn unsafe_stays_in_one_folder() {
    let word =
        |code: &str| code.split(|c: char| !(c.is_alphanumeric() || c == '_')).any(|word| word == "unsafe");
    for (file, source) in sources() {
        assert_eq!(word(&code(&source)), file.starts_with("ops/matmul/"), "{file}");
    }
    assert!(word("unsafe {") && word("(unsafe fn())") && !word("deny(unsafe_code)"));
}

fn public<X: Send + Sync + Clone + Debug>() {}

#[test]
fn public_types_can_be_shared_copied_and_printed() {
    public::<transformer_vq::Error>();
    public::<VqAttention>();
    public::<Inputs<'_, f32>>();
    public::<Biases<'_, f32>>();
    public::<Output<f32>>();
    public::<Gradients<f32>>();
    public::<BiasGradients<f32>>();
    public::<blockwise::Saved<f32>>();
    public::<AttentionState<f32>>();
    public::<WindowKeys<f32>>();
    public::<CompressiveCache<f32>>();
    public::<BatchInputs<'_, f32>>();
    public::<BatchBiases<'_, f32>>();
    public::<BatchOutput<f32>>();
    public::<BatchSaved<f32>>();
    public::<PreparedHeads<f32>>();
    public::<BatchGradients<f32>>();
    public::<BatchBiasGradients<f32>>();
    public::<bidirectional::Inputs<'_, f32>>();
    public::<bidirectional::Output<f32>>();
    public::<bidirectional::Gradients<f32>>();
    public::<bidirectional::Saved<f32>>();
    public::<BidirectionalAttention>();
    public::<BidirectionalInputs<'_, f32>>();
    public::<BidirectionalOutput<f32>>();
    public::<BidirectionalSaved<f32>>();
    public::<BidirectionalGradients<f32>>();
    public::<Codebook<f32>>();
    public::<Learning<f32>>();
    public::<Ema<f32>>();
    public::<CodeStats<f32>>();
    public::<Estimator>();
    public::<Replacement<f32>>();
    public::<Residual<f32>>();
    public::<residual::Quantized<f32>>();
    public::<residual::Saved<f32>>();
    public::<Rotation>();
    public::<Smoothing>();
    public::<Basis<f32>>();
    public::<CodebookParameters<f32>>();
    public::<rms_norm::Saved<f32>>();
}

#[cfg(feature = "model")]
#[test]
fn public_types_of_the_model_can_be_shared_copied_and_printed() {
    use transformer_vq::{generate, model, train};
    public::<model::ModelConfig>();
    public::<model::LearningConfig>();
    public::<model::CodewordGradient>();
    public::<model::CodebookStart>();
    public::<model::Revival>();
    public::<model::Transformer>();
    public::<model::Saved<f32>>();
    public::<model::LossAndGradients<f32>>();
    public::<model::LayerReport<f32>>();
    public::<model::PieceReport>();
    public::<model::Prepared<'_, f32>>();
    public::<model::ModelState<f32>>();
    public::<model::Parameters<f32>>();
    public::<model::LayerParameters<f32>>();
    public::<model::NormParameters<f32>>();
    public::<model::Parameter<'_, f32>>();
    public::<model::Encoder>();
    public::<model::EncoderConfig>();
    public::<model::EncoderHead>();
    public::<model::EncoderBatch<'_>>();
    public::<model::EncoderLoss<f32>>();
    public::<model::EncoderParameters<f32>>();
    public::<model::EncoderUnitParameters<f32>>();
    public::<model::EncoderUnitReport<f32>>();
    public::<generate::Sampler>();
    public::<generate::Generator<'_>>();
    public::<generate::BatchGenerator<'_>>();
    public::<generate::Scorer<'_>>();
    public::<train::Optimizer>();
    public::<train::AdamW>();
    public::<train::Lion>();
    public::<train::Adafactor>();
    public::<train::ParameterGroup>();
    public::<train::Gradients>();
    public::<train::Schedule>();
    public::<train::Decay>();
    public::<train::Trainer>();
    public::<train::EncoderTrainer>();
    public::<train::StepReport>();
    public::<train::Corpus>();
    public::<train::ImageShape>();
    public::<train::TextSize>();
    public::<train::Batches>();
    public::<train::BatchConfig>();
    public::<train::Batch>();
    public::<train::Pieces>();
    public::<train::Progress>();
    public::<train::Budget>();
}
