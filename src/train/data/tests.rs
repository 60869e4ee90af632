//! Corpora: ranges, splits, pieces and sizes.

use std::fs;
use std::ops::Range;

use super::*;
use crate::Error;

/// A text whose bytes tell where they are, up to 251.
fn text(len: usize) -> Corpus {
    Corpus::from_bytes((0..len).map(|i| (i % 251) as u8).collect()).unwrap()
}

#[test]
fn pieces_predict_each_token_once() {
    let text = text(60);
    for range in [0..60, 0..2, 1..2, 1..60, 50..60, 59..60, 13..40] {
        for piece_len in [1, 2, 3, 7, 59, 60, 1000] {
            let mut stream: Vec<u32> = Vec::new();
            for piece in text.pieces(range.clone(), piece_len).unwrap() {
                let (tokens, targets) = piece.unwrap();
                assert_eq!(tokens.dim(), targets.dim());
                assert!(tokens.ncols() >= 1 && tokens.ncols() <= piece_len && tokens.nrows() == 1);
                assert_eq!(targets, &tokens + 1, "each byte is fed just before it is predicted");
                stream.extend(&targets);
            }
            let expected: Vec<u32> = (range.start.max(1) as u32..range.end as u32).collect();
            assert_eq!(stream, expected, "{range:?} in pieces of {piece_len}");
            assert_eq!(text.size_of(range.clone()).unwrap().tokens, expected.len() as u64);
        }
    }
    let lens = text.pieces(10..20, 4).unwrap().map(|piece| piece.unwrap().0.ncols());
    assert_eq!(Vec::from_iter(lens), [4, 4, 2]);
}

#[test]
fn the_last_part_is_held_out() {
    assert_eq!(text(100).split(Corpus::VALIDATION_FRACTION), Ok((0..90, 90..100)));
    assert_eq!(text(19).split(0.1), Ok((0..18, 18..19)));
    assert_eq!(text(5).split(0.0), Ok((0..5, 5..5)));
    assert_eq!(text(2).split(0.999), Ok((0..1, 1..2)));
    for len in [2, 3, 1000, 1024, 4097] {
        assert_eq!(text(len).split(1.0 - f64::EPSILON / 2.0), Ok((0..1, 1..len)));
    }
    for fraction in [0.1, -0.1, 1.0, 2.0, f64::NAN] {
        let error = text(9).split(fraction).unwrap_err();
        assert!(matches!(error, Error::Invalid { what: "validation_fraction", .. }), "{error}");
    }
    let error = text(9).split(0.1).unwrap_err().to_string();
    assert!(error.contains("9 tokens") && error.contains("0.1"), "{error}");
}

#[test]
fn impossible_ranges_are_refused() {
    let refused = |range: Range<usize>, piece_len: usize, name: &str| {
        let error = text(50).pieces(range, piece_len).unwrap_err();
        assert!(matches!(&error, Error::Invalid { what, .. } if *what == name), "{error}");
    };
    refused(0..50, 0, "piece_len");
    refused(0..51, 4, "range");
    for empty in [0..0, 0..1, 20..20, 50..50] {
        refused(empty.clone(), 4, "range");
        assert!(text(50).size_of(empty).is_err());
    }
    #[allow(clippy::reversed_empty_ranges)] // the mistake under test
    for beyond in [0..51, 51..51, 9..3] {
        assert!(matches!(text(50).read(beyond.clone()), Err(Error::Invalid { what: "range", .. })));
        assert!(matches!(text(50).read_bytes(beyond), Err(Error::Invalid { what: "range", .. })));
    }
    assert_eq!(Corpus::from_bytes(Vec::new()).unwrap_err(), Error::Empty { what: "text" });
}

/// Three documents in a folder, one of them in a folder below, and the tokens that they are.
fn books() -> (tempfile::TempDir, Vec<u32>) {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("b")).unwrap();
    let books = [("a.txt", "  one two"), ("b/x", "three\nfour "), ("c", "5")];
    let mut tokens = vec![];
    for (name, book) in books {
        fs::write(folder.path().join(name), book).unwrap();
        tokens.extend(book.bytes().map(u32::from));
        tokens.push(256);
    }
    fs::write(folder.path().join(".hidden"), "hidden").unwrap();
    (folder, tokens)
}

#[test]
fn every_range_of_a_folder_is_what_its_files_say() {
    let (folder, tokens) = books();
    let corpus = Corpus::open(folder.path()).unwrap();
    assert_eq!((corpus.len(), corpus.vocab_size(), corpus.n_bytes()), (tokens.len(), 257, tokens.len() - 3));
    assert_eq!(corpus.end_of_document(), Some(256));
    let text: Vec<u8> = tokens.iter().filter(|&&token| token < 256).map(|&token| token as u8).collect();
    for start in 0..=tokens.len() {
        for end in start..=tokens.len() {
            assert_eq!(corpus.read(start..end).unwrap(), tokens[start..end], "{start}..{end}");
        }
    }
    for start in 0..=text.len() {
        for end in start..=text.len() {
            assert_eq!(corpus.read_bytes(start..end).unwrap(), text[start..end]);
        }
    }
    assert_eq!(corpus.decode(&tokens).unwrap(), text);
    let outside = corpus.decode(&[1, 257]).unwrap_err();
    assert!(matches!(outside, Error::OutOfRange { got: 257, limit: 257, .. }), "{outside}");
}

#[test]
fn sizes_count_bytes_and_words_where_they_begin() {
    let (folder, tokens) = books();
    let corpus = Corpus::open(folder.path()).unwrap();
    for start in 0..tokens.len() {
        for end in start.max(1) + 1..=tokens.len() {
            let from = start.max(1);
            let predicted = &tokens[from..end];
            let space = |token: u32| token == 256 || (token as u8).is_ascii_whitespace();
            let begins = |i: usize| !space(tokens[i]) && (i == 0 || space(tokens[i - 1]));
            let expected = TextSize {
                tokens: predicted.len() as u64,
                bytes: predicted.iter().filter(|&&token| token < 256).count() as u64,
                words: (from..end).filter(|&i| begins(i)).count() as u64,
            };
            assert_eq!(corpus.size_of(start..end).unwrap(), expected, "{start}..{end}");
        }
    }
    // A long text, more than is read at once.
    let long = Corpus::from_bytes(b"ab c\n".repeat(50_000)).unwrap();
    let expected = TextSize { tokens: 249_999, bytes: 249_999, words: 99_999 };
    assert_eq!(long.size_of(0..250_000).unwrap(), expected);
}

#[test]
fn losses_are_divided_by_what_they_are_per() {
    let size = TextSize { tokens: 12, bytes: 40, words: 6 };
    let bits = size.bits_per_byte(std::f64::consts::LN_2);
    assert!((bits - 0.3).abs() < 1e-15, "{bits}");
    assert!((size.word_perplexity(0.5) - 1f64.exp()).abs() < 1e-15);
    // A byte that is a token: bits per token; a word that is a token: perplexity.
    let same = TextSize { tokens: 7, bytes: 7, words: 7 };
    assert_eq!(same.bits_per_byte(3.0), 3.0 / std::f64::consts::LN_2);
    assert_eq!(same.word_perplexity(3.0), 3f64.exp());
}

#[test]
fn what_cannot_be_read_is_refused_with_its_reason() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    fs::write(path("text"), b"any bytes \xff\x00").unwrap();
    let corpus = Corpus::open(path("text")).unwrap();
    assert_eq!((corpus.vocab_size(), corpus.end_of_document(), corpus.image_shape()), (256, None, None));
    assert_eq!(corpus.read_bytes(0..12).unwrap(), b"any bytes \xff\x00");

    let file = |error: Error, at: &str, words: &str| match &error {
        Error::File { path: p, problem } => {
            assert!(*p == path(at) && problem.contains(words), "{words}: {error}");
        }
        _ => panic!("{error}"),
    };
    fs::write(path("empty"), "").unwrap();
    file(Corpus::open(path("empty")).unwrap_err(), "empty", "the text is empty");
    file(Corpus::open(folder.path()).unwrap_err(), "empty", "the text is empty");
    fs::create_dir(path("nothing")).unwrap();
    file(Corpus::open(path("nothing")).unwrap_err(), "nothing", "there is no file in this folder");
    file(Corpus::images(path("nothing")).unwrap_err(), "nothing", "there is no .png file in this folder");
    for missing in [Corpus::open(path("missing")), Corpus::images(path("missing"))] {
        let error = missing.unwrap_err();
        assert!(
            matches!(&error, Error::Io { path: p, action: "read", .. } if *p == path("missing")),
            "{error}"
        );
    }
    // What was there when it was opened must stay.
    fs::write(path("text"), "shorter").unwrap();
    file(corpus.read(0..12).unwrap_err(), "text", "is shorter than when it was opened");
    assert!(corpus.read(0..7).is_ok());
    let config = BatchConfig { batch_size: 2, sequence_len: 10, update_len: 10, seed: 1 };
    let mut batches = Batches::new(corpus.clone(), 0..12, config).unwrap();
    assert!(matches!(batches.next_batch(), Err(Error::File { .. })));
    assert_eq!(batches.position(), 0);
    fs::remove_file(path("text")).unwrap();
    assert!(matches!(corpus.read(0..7), Err(Error::Io { action: "read", .. })));
}

#[test]
fn enwik8_is_cut_as_is_the_custom() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("enwik8");
    // A file of zeros that takes no place.
    let file = fs::File::create(&path).unwrap();
    file.set_len(100_000_000).unwrap();
    let split = Corpus::open(&path).unwrap().split_enwik8().unwrap();
    assert_eq!(split, [0..90_000_000, 90_000_000..95_000_000, 95_000_000..100_000_000]);
    file.set_len(99_999_999).unwrap();
    let error = Corpus::open(&path).unwrap().split_enwik8().unwrap_err();
    assert!(matches!(error, Error::Invalid { what: "enwik8", .. }), "{error}");
    file.set_len(99_999_999).unwrap();
    let error = Corpus::open(folder.path()).unwrap().split_enwik8().unwrap_err().to_string();
    assert!(error.contains("100000000 tokens of 99999999 bytes"), "{error}");
}

/// Writes a PNG image.
fn png(path: &std::path::Path, width: u32, height: u32, color: png::ColorType, bytes: &[u8]) {
    let mut encoder = png::Encoder::new(fs::File::create(path).unwrap(), width, height);
    encoder.set_color(color);
    let deep = bytes.len() == 2 * (width * height) as usize * color.samples();
    encoder.set_depth(if deep { png::BitDepth::Sixteen } else { png::BitDepth::Eight });
    if color == png::ColorType::Indexed {
        encoder.set_palette(&[10, 20, 30, 40, 50, 60]);
    }
    encoder.write_header().unwrap().write_image_data(bytes).unwrap();
}

/// Links that lead back to where they lie: each file is there once.
#[cfg(unix)]
#[test]
fn folders_within_themselves_are_read_once() {
    use std::os::unix::fs::symlink;

    let (folder, tokens) = books();
    symlink(folder.path(), folder.path().join("b/all")).unwrap();
    symlink(".", folder.path().join("again")).unwrap();
    symlink("b", folder.path().join("d")).unwrap();
    let corpus = Corpus::open(folder.path()).unwrap();
    // `d` is another way to `b`, which holds it not.
    let twice = &tokens[tokens.iter().position(|&token| token == 256).unwrap() + 1..][..12];
    assert_eq!(corpus.read(0..corpus.len()).unwrap(), [&tokens, twice].concat());
}

#[test]
fn an_image_larger_than_memory_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.png");
    let mut encoder = png::Encoder::new(fs::File::create(&path).unwrap(), 1_000_000, u32::MAX >> 1);
    encoder.set_color(png::ColorType::Rgba);
    encoder.write_header().unwrap().write_chunk(png::chunk::IDAT, &[0x78, 0x9c]).unwrap();
    let error = Corpus::images(folder.path()).unwrap_err().to_string();
    assert!(error.contains("too large an image"), "{error}");
}

#[test]
fn images_are_bytes_in_raster_order() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    png(&path("a.png"), 2, 1, png::ColorType::Rgb, &[1, 2, 3, 4, 5, 6]);
    png(&path("b.PNG"), 2, 1, png::ColorType::Indexed, &[1, 0]);
    png(&path("c.png"), 2, 1, png::ColorType::Rgb, &[7, 0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 255]);
    fs::write(path("notes.txt"), "no image").unwrap();
    let corpus = Corpus::images(folder.path()).unwrap();
    assert_eq!(corpus.image_shape(), Some(ImageShape { height: 1, width: 2, channels: 3 }));
    let expected =
        [[1, 2, 3, 4, 5, 6, 256], [40, 50, 60, 10, 20, 30, 256], [7, 8, 9, 10, 11, 12, 256]].concat();
    assert_eq!(corpus.read(0..corpus.len()).unwrap(), expected);
    assert_eq!((corpus.vocab_size(), corpus.n_bytes()), (257, 18));
    // Rows come one after the other.
    let grey = tempfile::tempdir().unwrap();
    png(&grey.path().join("a.png"), 2, 3, png::ColorType::Grayscale, &[1, 2, 3, 4, 5, 6]);
    let corpus = Corpus::images(grey.path()).unwrap();
    assert_eq!(corpus.image_shape(), Some(ImageShape { height: 3, width: 2, channels: 1 }));
    assert_eq!(corpus.read(0..7).unwrap(), [1, 2, 3, 4, 5, 6, 256]);

    let refused = |name: &str, words: &str| {
        let error = Corpus::images(folder.path()).unwrap_err();
        assert!(matches!(&error, Error::File { path: p, .. } if *p == path(name)), "{error}");
        assert!(error.to_string().contains(words), "{words}: {error}");
        fs::remove_file(path(name)).unwrap();
    };
    png(&path("d.png"), 1, 2, png::ColorType::Rgb, &[0; 6]);
    refused("d.png", "1 x 2 pixels of 3 bytes, the first image has 2 x 1 pixels of 3 bytes");
    png(&path("d.png"), 2, 1, png::ColorType::Grayscale, &[0; 2]);
    refused("d.png", "2 x 1 pixels of 1 bytes, the first");
    fs::write(path("d.png"), "").unwrap();
    refused("d.png", "no PNG image that can be read");
    let whole = fs::read(path("a.png")).unwrap();
    fs::write(path("d.png"), &whole[..whole.len() / 2]).unwrap();
    refused("d.png", "no PNG image that can be read");
}
