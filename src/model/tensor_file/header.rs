//! The header: what it says, made for writing and checked after reading.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};
use serde_json::{Map, json};

use crate::Error;

/// The longest header that readers of the format accept, in bytes.
pub(super) const MAX_LEN: usize = 100_000_000;
/// The one name that is not an array's.
const METADATA: &str = "__metadata__";

/// The JSON that describes these arrays, one behind the other, filled up with spaces to a multiple of 8 bytes.
pub(super) fn compose<'a>(
    tensors: impl Iterator<Item = (&'a str, Dtype, &'a [usize])>,
    metadata: &BTreeMap<String, String>,
) -> Result<Vec<u8>, Error> {
    let mut entries = Map::new();
    entries.insert(METADATA.to_string(), json!(metadata));
    let mut start = 0usize;
    for (name, dtype, shape) in tensors {
        let shape = shape.to_vec();
        // A view may repeat its elements, so it can be longer than any memory.
        let end = shape
            .iter()
            .try_fold(dtype.bitsize() / 8, |bytes, &n| bytes.checked_mul(n))
            .and_then(|bytes| start.checked_add(bytes))
            .ok_or_else(|| Error::TooLarge { what: "tensors", shape: shape.clone() })?;
        let info = json!(TensorInfo { dtype, shape, data_offsets: (start, end) });
        if entries.insert(name.to_string(), info).is_some() {
            let expected = format!("named differently from each other and from {METADATA}");
            return Err(Error::invalid("tensors", expected, format!("`{name}` twice")));
        }
        start = end;
    }
    let mut header = json!(entries).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    if header.len() > MAX_LEN {
        let expected = format!("described by a header of at most {MAX_LEN} bytes");
        return Err(Error::invalid("tensors", expected, header.len()));
    }
    Ok(header)
}

/// What a header says: arrays one behind the other without gaps, each as long as its type and shape want.
pub(super) struct Header {
    pub(super) metadata: BTreeMap<String, String>,
    pub(super) tensors: BTreeMap<String, TensorInfo>,
    /// Bytes of all arrays together.
    pub(super) data_len: u64,
}

/// Reads a header, or says what is wrong with it.
pub(super) fn parse(json: &[u8]) -> Result<Header, String> {
    #[derive(Deserialize)]
    struct Entries {
        #[serde(rename = "__metadata__")]
        metadata: Option<Distinct<String>>,
        #[serde(flatten)]
        tensors: Distinct<TensorInfo>,
    }
    let entries: Entries = serde_json::from_slice(json)
        .map_err(|e| format!("not a safetensors file: its header cannot be read: {e}"))?;
    let tensors = entries.tensors.0;
    let mut in_order: Vec<_> = tensors.clone().into_iter().collect();
    in_order.sort_by_key(|(_, info)| info.data_offsets);
    let checked = Metadata::new(None, in_order).map_err(|e| format!("damaged header: {e}"))?;
    Ok(Header {
        metadata: entries.metadata.map_or_else(BTreeMap::new, |texts| texts.0),
        tensors,
        data_len: checked.data_len() as u64,
    })
}

/// A JSON object without two entries of one name. A plain map would keep the last and say nothing.
struct Distinct<V>(BTreeMap<String, V>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Distinct<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries<V>(PhantomData<V>);

        impl<'de, V: Deserialize<'de>> Visitor<'de> for Entries<V> {
            type Value = Distinct<V>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Self::Value, A::Error> {
                let mut map = BTreeMap::new();
                while let Some((name, value)) = entries.next_entry::<String, V>()? {
                    if map.contains_key(&name) {
                        return Err(A::Error::custom(format!("`{name}` is there twice")));
                    }
                    map.insert(name, value);
                }
                Ok(Distinct(map))
            }
        }

        deserializer.deserialize_map(Entries(PhantomData))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(json: &str) -> String {
        parse(json.as_bytes()).err().unwrap_or_else(|| panic!("accepted {json}"))
    }

    fn entry(name: &str, dtype: &str, shape: &str, offsets: &str) -> String {
        format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}"#)
    }

    #[test]
    fn what_is_composed_is_parsed() {
        let texts = BTreeMap::from([("key".to_string(), "value \"\n".to_string())]);
        let tensors: [(&str, Dtype, &[usize]); 4] = [
            ("b", Dtype::F64, &[2, 3]),
            ("a", Dtype::F32, &[]),
            ("empty", Dtype::F32, &[0, 7]),
            ("\u{e9} \"", Dtype::U32, &[1]),
        ];
        let json = compose(tensors.into_iter(), &texts).unwrap();
        assert_eq!(json.len() % 8, 0);
        let header = parse(&json).unwrap();
        assert_eq!((header.metadata, header.data_len), (texts, 56));
        for ((name, dtype, shape), offsets) in
            tensors.into_iter().zip([(0, 48), (48, 52), (52, 52), (52, 56)])
        {
            let info = &header.tensors[name];
            assert_eq!((info.dtype, &*info.shape, info.data_offsets), (dtype, shape, offsets));
        }
        let none = parse(&compose([].into_iter(), &BTreeMap::new()).unwrap()).unwrap();
        assert_eq!((none.tensors.len(), none.data_len), (0, 0));
    }

    #[test]
    fn what_cannot_be_described_is_refused() {
        let none = BTreeMap::new();
        for names in [["a", "a"], ["a", METADATA]] {
            let tensors = names.into_iter().map(|name| (name, Dtype::F32, &[1][..]));
            let error = compose(tensors, &none).unwrap_err();
            assert!(error.to_string().contains(&format!("`{}` twice", names[1])), "{error}");
        }
        let sizes: [&[usize]; 3] = [&[usize::MAX / 3], &[usize::MAX, usize::MAX], &[1 << 61]];
        for shape in sizes {
            let error = compose([("a", Dtype::F64, shape)].into_iter(), &none).unwrap_err();
            assert!(matches!(error, Error::TooLarge { .. }), "{error}");
        }
        let half: &[usize] = &[usize::MAX / 16];
        let tensors = ["a", "b", "c"].into_iter().map(|name| (name, Dtype::F64, half));
        assert!(matches!(compose(tensors, &none), Err(Error::TooLarge { .. })), "together");
        let long = BTreeMap::from([("text".to_string(), "x".repeat(MAX_LEN))]);
        assert!(matches!(compose([].into_iter(), &long), Err(Error::Invalid { what: "tensors", .. })));
    }

    #[test]
    fn unsound_headers_are_refused() {
        let sound = entry("a", "F32", "[2]", "[0,8]");
        assert_eq!(parse(format!("{{{sound}}}").as_bytes()).unwrap().data_len, 8);
        let refused = [
            (entry("b", "F32", "[2]", "[0,8]"), "offset"),
            (entry("b", "F32", "[2]", "[4,12]"), "offset"),
            (entry("b", "F32", "[2]", "[12,20]"), "offset"),
            (entry("b", "F32", "[2]", "[16,8]"), "offset"),
            (entry("b", "F32", "[3]", "[8,16]"), "shape"),
            (entry("b", "F32", "[18446744073709551615,18446744073709551615]", "[8,16]"), "overflow"),
            (entry("b", "F32", "[4611686018427387904]", "[8,16]"), "overflow"),
            (entry("b", "F32", "[2]", "[8,18446744073709551615]"), "shape"),
            (entry("b", "F32", "[-2]", "[8,16]"), "header"),
            (entry("b", "F31", "[2]", "[8,16]"), "F31"),
            (entry("a", "F32", "[2]", "[8,16]"), "`a` is there twice"),
            (entry("a", "F32", "[0]", "[8,8]"), "`a` is there twice"),
            (r#""__metadata__":{"k":1}"#.to_string(), "header"),
            (r#""__metadata__":{"k":"1","k":"2"}"#.to_string(), "`k` is there twice"),
            (r#""__metadata__":{},"__metadata__":{}"#.to_string(), "duplicate"),
        ];
        for (second, words) in refused {
            let found = problem(&format!("{{{sound},{second}}}"));
            assert!(found.contains(words), "{second}: {found}");
        }
        for json in ["", "[]", "null", "7", "{\"a\":", "{\"a\":{}}", &"[".repeat(10_000), "\u{0}\u{1}"] {
            problem(json);
        }
        assert!(parse(b"\xff\xfe").is_err());
    }
}
