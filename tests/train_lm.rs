//! The example `train_lm` as its users meet it: processes that are stopped, killed, resumed, and given nonsense.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Once;
use std::time::Duration;

use tempfile::TempDir;
use transformer_vq::model::Transformer;
use transformer_vq::train::Trainer;

/// A model of a few hundred parameters, three updates to a sequence.
const SIZES: &str = "--d-model 8 --n-layers 2 --d-k 4 --d-v 8 --n-codes 6 --block-len 8 --window 8 --batch-size 2 \
                     --sequence-len 96 --update-len 32";

/// The program of an example, which `cargo test` has built beside this test; if it has not, it is told to. (With `--test
/// train_lm` alone cargo does not build examples anew.)
fn example(name: &str) -> PathBuf {
    static BUILD: Once = Once::new();
    let test = std::env::current_exe().unwrap();
    let program = |name: &str| {
        let file = format!("{name}{}", std::env::consts::EXE_SUFFIX);
        test.parent().unwrap().parent().unwrap().join("examples").join(file)
    };
    BUILD.call_once(|| {
        if !["train_lm", "generate"].iter().all(|name| program(name).exists()) {
            let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
            cargo.args(["build", "--example", "train_lm", "--example", "generate"]);
            if program("").parent().unwrap().parent().unwrap().ends_with("release") {
                cargo.arg("--release");
            }
            assert!(cargo.current_dir(env!("CARGO_MANIFEST_DIR")).status().unwrap().success());
        }
    });
    program(name)
}

/// A folder with a text in it; runs go beside the text.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let text: String = (0..700).map(|i| format!("{} and {}; ", i % 17, i * i % 23)).collect();
        fs::write(folder.path().join("text"), text).unwrap();
        Place(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, arguments: &str) -> Command {
        let mut command = Command::new(example("train_lm"));
        command.current_dir(self.0.path()).args(arguments.split_whitespace());
        command
    }

    /// A run of `SIZES` on the text.
    fn train(&self, out: &str, arguments: &str) -> Output {
        self.command(&format!("{SIZES} --data text --out {out} {arguments}")).output().unwrap()
    }

    fn resume(&self, out: &str, arguments: &str) -> Output {
        self.command(&format!("--resume {out} {arguments}")).output().unwrap()
    }
}

/// What a successful process has written to its standard output.
fn success(output: &Output) -> String {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && errors.is_empty(), "{}: {errors}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The tensors of the one checkpoint in a folder.
fn tensors(folder: &Path) -> Vec<u8> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let files: Vec<_> = entries.filter(|path| path.extension().is_some_and(|e| e == "safetensors")).collect();
    assert_eq!(files.len(), 1, "{files:?}");
    fs::read(&files[0]).unwrap()
}

/// The log without the columns that tell of the clock.
fn log(folder: &Path) -> Vec<Vec<String>> {
    let mut reader = csv::Reader::from_path(folder.join("log.csv")).unwrap();
    let columns = [
        "step",
        "seconds",
        "tokens",
        "learning_rate",
        "tokens_per_second",
        "train_bits_per_byte",
        "val_bits_per_byte",
        "perplexity_0",
        "perplexity_1",
    ];
    assert_eq!(reader.headers().unwrap(), &columns[..]);
    let row = |record: csv::StringRecord| {
        let numbers: Vec<f64> = record.iter().map(|x| x.parse().unwrap()).collect();
        assert!(numbers.iter().all(|x| x.is_finite() && *x >= 0.0), "{record:?}");
        record.iter().enumerate().filter(|(i, _)| ![1, 4].contains(i)).map(|(_, x)| x.to_string()).collect()
    };
    reader.records().map(|record| row(record.unwrap())).collect()
}

fn last_line(text: &str) -> &str {
    text.lines().last().unwrap_or_default()
}

#[test]
fn stopped_and_resumed_is_never_stopped() {
    let place = Place::new();
    let whole = success(&place.train("whole", "--steps 44"));
    let bits = last_line(&whole).strip_prefix("val_bits_per_byte: ").expect("the result at the end");
    let bits: f64 = bits.parse().unwrap();
    assert!(bits > 0.0 && bits < 9.0, "{bits}");
    assert_eq!(log(&place.path("whole")).len(), 20, "one row per evaluation");
    assert_eq!(whole.matches("validation").count(), 20, "and one line each");
    well_formed(&fs::read_to_string(place.path("whole/curves.svg")).unwrap());

    // Stops in the middle of a sequence, and between two evaluations.
    for stop in [0, 5, 13] {
        let out = format!("stopped{stop}");
        let first = success(&place.train(&out, &format!("--steps 44 --stop-after {stop}")));
        assert_eq!(
            last_line(&first),
            format!("stopped after {stop} of 44 steps; continue with: --resume {out}")
        );
        success(&place.resume(&out, "--stop-after 14"));
        if stop == 5 {
            // Killed between a row and its checkpoint: the log is ahead.
            fs::copy(place.path("whole/log.csv"), place.path("stopped5/log.csv")).unwrap();
        }
        let second = success(&place.resume(&out, ""));
        assert_eq!(last_line(&second), last_line(&whole));
        assert!(tensors(&place.path(&out)) == tensors(&place.path("whole")), "stopped after {stop}");
        assert_eq!(log(&place.path(&out)), log(&place.path("whole")), "stopped after {stop}");
    }

    // A run that is over says so, and its result again, and changes nothing.
    let before = fs::metadata(place.path("whole/checkpoint.json")).unwrap().modified().unwrap();
    let again = success(&place.resume("whole", ""));
    assert!(again.contains("this run is over, after 44 steps"), "{again}");
    assert_eq!(last_line(&again), last_line(&whole));
    assert_eq!(fs::metadata(place.path("whole/checkpoint.json")).unwrap().modified().unwrap(), before);

    // A new run in the same folder is a new run.
    success(&place.train("whole", "--steps 2 --seed 2"));
    assert_eq!(log(&place.path("whole")).len(), 2);
    well_formed(&fs::read_to_string(place.path("whole/curves.svg")).unwrap());
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    let place = Place::new();
    for threads in ["1", "2", "8"] {
        success(&place.train(threads, &format!("--steps 12 --threads {threads}")));
    }
    for threads in ["2", "8"] {
        assert!(tensors(&place.path(threads)) == tensors(&place.path("1")), "{threads} threads");
        assert_eq!(log(&place.path(threads)), log(&place.path("1")));
    }
    success(&place.train("other", "--steps 12 --seed 2"));
    assert!(tensors(&place.path("other")) != tensors(&place.path("1")), "the seed matters");
}

#[test]
fn every_way_of_training_resumes() {
    let place = Place::new();
    for (i, options) in [
        "--optimizer lion --schedule linear --accumulate 2",
        "--optimizer adafactor --schedule inverse-square-root --freeze layers.1.* --freeze *bias",
        "--schedule constant --accumulate 3 --learning-rate 1e-3",
    ]
    .into_iter()
    .enumerate()
    {
        let (whole, stopped) = (format!("whole{i}"), format!("stopped{i}"));
        let all = success(&place.train(&whole, &format!("{options} --steps 9")));
        assert!(last_line(&all).starts_with("val_bits_per_byte: "));
        success(&place.train(&stopped, &format!("{options} --steps 9 --stop-after 4")));
        success(&place.resume(&stopped, ""));
        assert!(tensors(&place.path(&stopped)) == tensors(&place.path(&whole)), "{options}");
    }
    let frozen = Trainer::<f32>::load(place.path("whole1")).unwrap().0;
    assert_eq!(frozen.groups().len(), 2);
    assert!(frozen.model().parameters().output_bias.iter().all(|&x| x == 0.0), "as it began");
    // Micro-batches are sequences of one batch: so many tokens in all.
    let rows = log(&place.path("whole2"));
    assert_eq!(rows.last().unwrap()[1], (9 * 6 * 32).to_string());
}

#[test]
fn folders_of_books_and_of_images_are_learned() {
    let place = Place::new();
    fs::create_dir(place.path("books")).unwrap();
    let text = fs::read(place.path("text")).unwrap();
    fs::write(place.path("books/1"), &text[..4000]).unwrap();
    fs::write(place.path("books/2"), &text[4000..]).unwrap();
    let run = |data: &str, options: &str| {
        let arguments = format!("{SIZES} --data {data} --out {data}-run --steps 4 {options}");
        success(&place.command(&arguments).output().unwrap())
    };
    let books = run("books", "");
    for words in ["--- sample after ", "val_nats_per_token: ", "val_word_perplexity: ", "val_bits_per_byte: "]
    {
        assert!(books.contains(words), "{words}: {books}");
    }
    assert_eq!(books.contains("peak memory: "), cfg!(target_os = "linux"), "{books}");
    assert_eq!(Transformer::<f32>::load(place.path("books-run")).unwrap().config().vocab_size, 257);
    success(&place.resume("books-run", ""));

    fs::create_dir(place.path("pictures")).unwrap();
    for i in 0..20u8 {
        let file = fs::File::create(place.path(&format!("pictures/{i}.png"))).unwrap();
        let mut encoder = png::Encoder::new(file, 6, 5);
        encoder.set_color(png::ColorType::Rgb);
        let bytes: Vec<u8> = (0..90).map(|j| i.wrapping_mul(j)).collect();
        encoder.write_header().unwrap().write_image_data(&bytes).unwrap();
    }
    let pictures = run("pictures", "--images");
    assert!(pictures.contains("sample.png") && !pictures.contains("val_word_perplexity"), "{pictures}");
    let sample = BufReader::new(fs::File::open(place.path("pictures-run/sample.png")).unwrap());
    let reader = png::Decoder::new(sample).read_info().unwrap();
    assert_eq!((reader.info().width, reader.info().height), (6, 5));
    success(&place.resume("pictures-run", ""));
}

#[test]
fn the_clock_can_be_the_budget() {
    let place = Place::new();
    let text = success(&place.train("run", "--minutes 0.01"));
    assert!(last_line(&text).starts_with("val_bits_per_byte: "));
    let rows = log(&place.path("run"));
    assert!((1..=20).contains(&rows.len()), "{rows:?}");
    let (_, progress) = Trainer::<f32>::load(place.path("run")).unwrap();
    assert!(progress.seconds >= 0.6, "{}", progress.seconds);
}

#[cfg(unix)]
#[test]
fn an_interrupted_run_leaves_a_checkpoint_that_resumes() {
    let place = Place::new();
    let mut command = place.command(&format!("{SIZES} --data text --out run --steps 200000000"));
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    lines.by_ref().nth(1).unwrap().unwrap();
    std::thread::sleep(Duration::from_millis(200)); // into the training
    let kill = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(kill.success());
    let last = lines.last().unwrap().unwrap();
    assert!(last.starts_with("stopped after ") && last.ends_with("continue with: --resume run"), "{last}");
    success(&child.wait_with_output().unwrap());
    let steps = Trainer::<f32>::load(place.path("run")).unwrap().0.steps();
    assert!(steps > 0);
    success(&place.resume("run", &format!("--stop-after {}", steps + 3)));
    assert_eq!(Trainer::<f32>::load(place.path("run")).unwrap().0.steps(), steps + 3);
}

#[test]
fn a_killed_run_leaves_a_checkpoint_that_resumes() {
    let place = Place::new();
    success(&place.train("whole", "--steps 60"));
    for round in 0..8 {
        let out = format!("killed{round}");
        let mut command = place.command(&format!("{SIZES} --data text --out {out} --steps 60"));
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        // Two lines come after the first checkpoint; each line after them comes just before another one.
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let read = lines.take(2 + 2 * round).count();
        std::thread::sleep(Duration::from_micros(700 * round as u64));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(read, 2 + 2 * round);
        let (trainer, _) = Trainer::<f32>::load(place.path(&out)).unwrap();
        assert_eq!(Transformer::<f32>::load(place.path(&out)).as_ref(), Ok(trainer.model()));
        success(&place.resume(&out, ""));
        assert!(tensors(&place.path(&out)) == tensors(&place.path("whole")), "round {round}");
        assert_eq!(log(&place.path(&out)), log(&place.path("whole")), "round {round}");
    }
}

const TOKENIZER: &str = if cfg!(feature = "tokenizers") { "cannot read" } else { "needs `cargo run" };

#[test]
fn a_new_run_sets_the_old_one_aside() {
    let place = Place::new();
    let begun = |steps: &str| success(&place.train("run", steps));
    begun("--steps 10 --stop-after 3");
    let old = tensors(&place.path("run"));
    let said = begun("--steps 2 --seed 9");
    assert!(said.contains("the run that was in run is now in run/previous"), "{said}");
    assert!(tensors(&place.path("run/previous")) == old);
    assert!(success(&place.resume("run/previous", "")).contains("10 steps"));
    // It makes room for the next one.
    let old = tensors(&place.path("run"));
    begun("--steps 2");
    assert!(tensors(&place.path("run/previous")) == old);
    assert!(success(&place.resume("run/previous", "")).contains("after 2 steps"));
}

#[test]
fn nonsense_is_refused_in_one_line() {
    let place = Place::new();
    fs::write(place.path("short"), "too short").unwrap();
    fs::write(place.path("empty"), "").unwrap();
    fs::create_dir(place.path("nothing")).unwrap();
    success(&place.train("sound", "--steps 2"));
    let before = tensors(&place.path("sound"));
    let cases = [
        ("--data missing --out x", "cannot read"),
        ("--data short --out x", "the text is too short: 9 tokens"),
        ("--data empty --out x", "the text is empty"),
        ("--data text --out text/below", "cannot create text/below"),
        ("--data text --out x --d-model 33", "`d_model` must be even"),
        ("--data text --out x --update-len 33", "`sequence_len` must be a multiple of update_len = 33"),
        ("--data text --out x --n-heads 0", "`n_heads` must be between 1"),
        ("--data text --out x --batch-size 0", "`batch_size` must be at least 1"),
        ("--data text --out x --block-len 0", "`block_len` must be at least 1"),
        ("--data text --out x --sequence-len 1000000 --update-len 10", "the text is too short"),
        ("--data text --out x --d-model 4000000000 --d-v 4000000", "parameters do not fit into memory"),
        ("--data text --out x --d-model 18446744073709551614", "`d_model` must be between 1"),
        ("--data text --out x --learning-rate nan", "`learning_rate` must be"),
        ("--data text --out x --warmup 2", "`warmup` must be in [0, 1]"),
        ("--data text --out sound --d-model 33", "`d_model` must be even"),
        ("--data nothing --out x", "there is no file in this folder"),
        ("--data . --out x", "the run would read its own files"),
        ("--data nothing --images --out x", "there is no .png file in this folder"),
        ("--data text --enwik8 --out x", "`enwik8` must be 100000000 bytes"),
        ("--data text --tokenizer missing --out x", TOKENIZER),
        ("--data text --out x --freeze layers.7.*", "`pattern` must be the name of a parameter"),
        ("--data text --out x --schedule inverse-square-root --warmup 0", "`warmup` must be above 0"),
        ("--resume nothing", "no run to resume in nothing"),
        ("--resume missing", "no run to resume in missing"),
        ("--resume text", "no run to resume in text"),
    ];
    for (arguments, words) in cases {
        let output = place.command(arguments).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{arguments}: {errors}");
        let line = errors.strip_suffix('\n').unwrap_or_default();
        assert!(line.starts_with("error: ") && line.contains(words) && !line.contains('\n'), "{errors}");
        assert!(output.stdout.is_empty(), "{arguments}");
        assert!(!place.path("x").exists(), "{arguments} has touched the folder");
    }
    assert!(tensors(&place.path("sound")) == before, "a refused run leaves the one that was there");
    // Options that clap refuses; a run is resumed with the options it was begun with.
    for arguments in ["--steps 0", "--steps 5 --minutes 1", "--minutes -1", "--threads 0", "--surprise", "x"]
        .into_iter()
        .chain(["--resume sound --steps 9", "--resume sound --out x", "--resume sound --d-model 8"])
        .chain([
            "--images",
            "--enwik8",
            "--accumulate 0",
            "--optimizer sgd",
            "--resume sound --optimizer lion",
        ])
    {
        let output = place.command(arguments).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments}: {errors}");
        assert!(errors.starts_with("error: ") && !errors.contains("panicked"), "{arguments}: {errors}");
    }
    let help = success(&place.command("--help").output().unwrap());
    for option in ["--data", "--steps", "--minutes", "--resume", "--stop-after", "--threads", "--d-model"] {
        assert!(help.contains(option), "{option}");
    }

    // The text of a run must stay what it was.
    fs::write(place.path("text"), "now another one").unwrap();
    let output = place.resume("sound", "");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.code() == Some(1) && errors.contains("changed since the run was begun"),
        "{errors}"
    );
}

#[test]
fn generate_prints_as_many_bytes_as_it_is_told() {
    let place = Place::new();
    success(&place.train("run", "--steps 3"));
    let generate = |arguments: &[&str]| {
        Command::new(example("generate")).current_dir(place.0.path()).args(arguments).output().unwrap()
    };
    for n in ["0", "1", "100"] {
        let output =
            generate(&["--model", "run", "--prompt", "1 and ", "--tokens", n, "--temperature", "1.5"]);
        assert!(output.status.success());
        assert!(output.stdout.starts_with(b"1 and "));
        assert_eq!(output.stdout.len(), 6 + n.parse::<usize>().unwrap());
    }
    for arguments in [&["--model", "missing"][..], &["--model", "run", "--prompt", ""]] {
        let output = generate(arguments);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1));
        assert!(errors.starts_with("error: ") && errors.lines().count() == 1, "{errors}");
    }
}

/// Checks that every element is closed in its order, attributes are quoted, and text is escaped.
fn well_formed(xml: &str) {
    let mut open = vec![];
    let mut rest = xml.trim();
    assert!(rest.starts_with("<svg "), "{rest:.40}");
    while let Some(start) = rest.find('<') {
        let text = &rest[..start];
        assert!(!text.contains('>') && (text.trim().is_empty() || !open.is_empty()), "{text}");
        let end = start + rest[start..].find('>').expect("an end of the tag");
        let tag = &rest[start + 1..end];
        rest = &rest[end + 1..];
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name), "closed");
            continue;
        }
        let (name, attributes) = tag.trim_end_matches('/').split_once(' ').unwrap_or((tag, ""));
        assert!(attributes.matches('"').count().is_multiple_of(2) && !attributes.contains("NaN"), "{tag}");
        if !tag.ends_with('/') {
            open.push(name);
        }
    }
    assert!(open.is_empty() && rest.is_empty(), "left open: {open:?}");
}
