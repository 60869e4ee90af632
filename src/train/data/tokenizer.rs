//! Tokens of any Hugging Face `tokenizer.json`.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::documents::{Document, Documents};
use super::spool::{Spool, SpoolWriter, io_error};
use crate::Error;

/// Bytes that are encoded at once, at most.
const PIECE: usize = 1 << 20;

/// A tokenizer as Hugging Face's library writes it, with its normalizer, pre-tokenizer and decoder; truncation and padding are
/// left out. In pure Rust.
#[derive(Clone)]
pub struct Tokenizer {
    tokenizer: tokenizers::Tokenizer,
    vocab_size: usize,
    path: PathBuf,
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tokenizer({}, {} tokens)", self.path.display(), self.vocab_size)
    }
}

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read, [`Error::File`] if it describes no tokenizer or one without tokens.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref().to_path_buf();
        let json = std::fs::read(&path).map_err(|e| io_error(&path, "read", &e))?;
        let wrong = |problem: String| Error::File { path: path.clone(), problem };
        let tokenizer = tokenizers::Tokenizer::from_bytes(json);
        let mut tokenizer = tokenizer.map_err(|e| wrong(format!("not a tokenizer: {e}")))?;
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|e| wrong(e.to_string()))?;
        // Numbers may have gaps.
        let last = tokenizer.get_vocab(true).into_values().max();
        let last = last.ok_or_else(|| wrong("a tokenizer without tokens".into()))?;
        if last == u32::MAX {
            return Err(wrong(format!(
                "a token with the number {last}: none is left for the end of a document"
            )));
        }
        let vocab_size = last as usize + 1;
        Ok(Tokenizer { tokenizer, vocab_size, path })
    }

    /// One more than the largest token.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The tokens of a text, without special tokens around it, each with the byte after the text that it stands for.
    fn encode(&self, text: &str) -> Result<Vec<(u32, usize)>, String> {
        let encoding = self.tokenizer.encode(text, false).map_err(|e| e.to_string())?;
        let ends = encoding.get_offsets().iter().map(|&(_, end)| end);
        Ok(encoding.get_ids().iter().copied().zip(ends).collect())
    }

    /// The text of tokens.
    pub(super) fn decode(&self, tokens: &[u32]) -> Result<Vec<u8>, Error> {
        let text = self.tokenizer.decode(tokens, false);
        let refused = |e: tokenizers::Error| Error::File {
            path: self.path.clone(),
            problem: format!("tokens that the tokenizer cannot decode: {e}"),
        };
        text.map(String::into_bytes).map_err(refused)
    }
}

/// The tokens of documents, in temporary files.
#[derive(Debug)]
pub(super) struct Encoded {
    tokenizer: Tokenizer,
    /// u32 each.
    tokens: Spool,
    /// u64 each: bytes of the documents up to the end of the token. What no token stands for is counted with the next one.
    ends: Spool,
    len: usize,
}

/// [`Encoded`] in the making.
struct Writer {
    tokens: SpoolWriter,
    ends: SpoolWriter,
    last: u64,
    len: usize,
}

impl Writer {
    fn push(&mut self, token: u32, end: usize) -> Result<(), Error> {
        self.last = self.last.max(end as u64);
        self.len += 1;
        self.tokens.write(&token.to_le_bytes())?;
        self.ends.write(&self.last.to_le_bytes())
    }
}

impl Encoded {
    pub fn new(documents: &Documents, ends: bool, tokenizer: Tokenizer) -> Result<Self, Error> {
        let mut writer = Writer { tokens: SpoolWriter::new()?, ends: SpoolWriter::new()?, last: 0, len: 0 };
        for document in documents.all() {
            encode_document(document, &tokenizer, &mut writer)?;
            if ends {
                writer.push(tokenizer.vocab_size as u32, document.start + document.len)?;
            }
        }
        if writer.len == 0 {
            let problem = "a text without any token of the tokenizer".into();
            return Err(Error::File { path: documents.all()[0].path(), problem });
        }
        let Writer { tokens, ends, len, .. } = writer;
        Ok(Encoded { tokenizer, tokens: tokens.finish()?, ends: ends.finish()?, len })
    }

    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn read(&self, range: Range<usize>) -> Result<Vec<u32>, Error> {
        let mut bytes = vec![0; 4 * range.len()];
        self.tokens.read(4 * range.start as u64, &mut bytes)?;
        let (tokens, _) = bytes.as_chunks::<4>();
        Ok(tokens.iter().map(|&token| u32::from_le_bytes(token)).collect())
    }

    pub fn bytes_before(&self, token: usize) -> Result<usize, Error> {
        if token == 0 {
            return Ok(0);
        }
        let mut end = [0; 8];
        self.ends.read(8 * (token as u64 - 1), &mut end)?;
        Ok(u64::from_le_bytes(end) as usize)
    }
}

/// Piece by piece; a piece ends with a line where there is one.
fn encode_document(document: &Document, tokenizer: &Tokenizer, writer: &mut Writer) -> Result<(), Error> {
    let wrong = |problem: String| Error::File { path: document.path(), problem };
    let mut at = 0;
    while at < document.len {
        let mut bytes = vec![0; PIECE.min(document.len - at)];
        document.read(at, &mut bytes)?;
        let last = at + bytes.len() == document.len;
        if !last && let Some(line) = bytes.iter().rposition(|&byte| byte == b'\n') {
            bytes.truncate(line + 1);
        }
        let text = match std::str::from_utf8(&bytes) {
            Ok(text) => text,
            // A character that the piece has cut in two.
            Err(e) if !last && e.error_len().is_none() && e.valid_up_to() > 0 => {
                std::str::from_utf8(&bytes[..e.valid_up_to()]).expect("valid up to here")
            }
            Err(e) => return Err(wrong(format!("not UTF-8 at byte {}", at + e.valid_up_to()))),
        };
        let tokens = tokenizer.encode(text);
        let tokens = tokens.map_err(|e| wrong(format!("the tokenizer refuses it: {e}")))?;
        for (token, end) in tokens {
            if token as usize >= tokenizer.vocab_size {
                return Err(wrong(format!("the tokenizer makes a token {token} that it does not have")));
            }
            writer.push(token, document.start + at + end)?;
        }
        at += text.len();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::{Corpus, TextSize};
    use super::*;

    const WORDS: &str = r#"{"version": "1.0", "truncation": {"direction": "Right", "max_length": 2, "strategy":
        "LongestFirst", "stride": 0}, "padding": null, "added_tokens": [], "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null, "model": {"type": "WordLevel",
        "vocab": {"[UNK]": 0, "one": 1, "two": 5}, "unk_token": "[UNK]"}}"#;
    const BYTES: &str = r#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true},
        "post_processor": null, "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false,
        "use_regex": true}, "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": {"l": 0, "o": 1, "w": 2, "e": 3,
        "r": 4, "Ġ": 5, "Ċ": 6, "Ã": 7, "©": 8, "lo": 9, "low": 10, "Ġlow": 11},
        "merges": ["l o", "lo w", "Ġ low"]}}"#;

    struct Place(tempfile::TempDir);

    impl Place {
        fn new() -> Self {
            Place(tempfile::tempdir().unwrap())
        }

        fn write(&self, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
            let path = self.0.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
            path
        }

        fn tokenizer(&self, json: &str) -> Tokenizer {
            Tokenizer::open(self.write("tokenizer.json", json)).unwrap()
        }
    }

    #[test]
    fn tokens_of_bytes_are_their_text_again() {
        let place = Place::new();
        let text = "low lower\nlow é\n";
        let corpus = Corpus::open(place.write("text", text)).unwrap();
        let corpus = corpus.with_tokenizer(place.tokenizer(BYTES)).unwrap();
        let tokens = [10, 11, 3, 4, 6, 10, 5, 7, 8, 6];
        assert_eq!((corpus.len(), corpus.vocab_size(), corpus.n_bytes()), (10, 12, 17));
        assert_eq!(corpus.read(0..10).unwrap(), tokens);
        assert_eq!(corpus.decode(&tokens).unwrap(), text.as_bytes());
        for start in 0..10 {
            assert_eq!(corpus.read(start..10).unwrap(), tokens[start..]);
        }
        // Of everything but the first token: two words begin after it on the first line, two on the second.
        let size = corpus.size_of(0..10).unwrap();
        assert_eq!(size, TextSize { tokens: 9, bytes: 14, words: 3 });
        let bits = size.bits_per_byte(std::f64::consts::LN_2);
        assert!((bits - 9.0 / 14.0).abs() < 1e-15);
        assert!((size.word_perplexity(0.5) - 1.5f64.exp()).abs() < 1e-12);
        // Parts add up.
        let parts = [0..4, 4..7, 7..10].map(|range| corpus.size_of(range).unwrap());
        let sum = |of: fn(&TextSize) -> u64| parts.iter().map(of).sum::<u64>();
        assert_eq!([sum(|s| s.tokens), sum(|s| s.bytes), sum(|s| s.words)], [9, 14, 3]);
    }

    #[test]
    fn words_of_a_folder_end_with_their_documents() {
        let place = Place::new();
        place.write("books/1", "One two  three ");
        place.write("books/2", "two");
        let corpus = Corpus::open(place.0.path().join("books")).unwrap();
        let corpus = corpus.with_tokenizer(place.tokenizer(WORDS)).unwrap();
        // Numbers have gaps, and a truncation in the file cuts nothing.
        assert_eq!((corpus.vocab_size(), corpus.end_of_document()), (7, Some(6)));
        assert_eq!(corpus.read(0..corpus.len()).unwrap(), [1, 5, 0, 6, 5, 6]);
        let all = corpus.size_of(0..6).unwrap();
        assert_eq!(all, TextSize { tokens: 5, bytes: 15, words: 3 });
        assert!(corpus.split_enwik8().is_err());
    }

    #[test]
    fn long_texts_are_encoded_in_pieces() {
        let place = Place::new();
        // Lines, then two bytes to a character without an end of line: a piece cuts one in two.
        for text in
            ["low lower\n".repeat(120_000), "é".repeat(PIECE / 2 + 1000), format!("l{}", "é".repeat(PIECE))]
        {
            let corpus = Corpus::open(place.write("text", &text)).unwrap();
            let corpus = corpus.with_tokenizer(place.tokenizer(BYTES)).unwrap();
            let tokens = corpus.read(0..corpus.len()).unwrap();
            assert!(corpus.decode(&tokens).unwrap() == text.as_bytes());
            assert!(corpus.size_of(0..corpus.len()).unwrap().bytes >= text.len() as u64 - 3);
        }
    }

    #[test]
    fn what_cannot_be_encoded_is_refused_with_its_reason() {
        let place = Place::new();
        let refused = |result: Result<String, Error>, path: &Path, words: &str| match result {
            Err(Error::File { path: p, problem }) => {
                assert!(p == path && problem.contains(words), "{}: {problem}", p.display());
            }
            other => panic!("{other:?}"),
        };
        let open = |path: &Path| Tokenizer::open(path).map(|tokenizer| format!("{tokenizer:?}"));
        for json in ["", "{}", "[]", "not json", &WORDS[..WORDS.len() - 9]] {
            let path = place.write("broken.json", json);
            refused(open(&path), &path, "not a tokenizer: ");
        }
        let missing = place.0.path().join("missing");
        assert!(
            matches!(Tokenizer::open(&missing), Err(Error::Io { path, action: "read", .. }) if path == missing)
        );

        let encode = |path: &Path, json: &str| {
            let corpus = Corpus::open(path).unwrap().with_tokenizer(place.tokenizer(json));
            corpus.map(|corpus| format!("{corpus:?}"))
        };
        let path = place.write("text", b"low \xff low");
        refused(encode(&path, BYTES), &path, "not UTF-8 at byte 4");
        let path = place.write("cut", "low é".as_bytes().split_last().unwrap().1);
        refused(encode(&path, BYTES), &path, "not UTF-8 at byte 4");
        let path = place.write("foreign", "XYZ");
        refused(encode(&path, BYTES), &path, "a text without any token of the tokenizer");
        let without_unknown = WORDS.replace("\"[UNK]\": 0, ", "");
        refused(encode(&path, &without_unknown), &path, "the tokenizer refuses it: ");
    }
}
