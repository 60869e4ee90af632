//! Parameters that are trained otherwise than the rest, by patterns of their names.

use serde::{Deserialize, Serialize};

use crate::Error;

/// How the parameters that a pattern names are trained.
///
/// A parameter belongs to the first group whose pattern is its name, such as `layers.0.w_q`, from beginning to end; a `*`
/// stands for any characters or none, dots included. Codebooks that learn by moving averages are no parameters.
///
/// ```
/// use transformer_vq::train::ParameterGroup;
///
/// let groups = [
///     ParameterGroup { frozen: true, ..ParameterGroup::new("embedding") },
///     ParameterGroup { learning_rate: 0.1, weight_decay: Some(0.0), ..ParameterGroup::new("layers.*.w_*") },
/// ];
/// assert!(groups[1].matches("layers.3.w_out") && !groups[1].matches("layers.3.norm.gain"));
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ParameterGroup {
    /// Which parameters.
    pub pattern: String,
    /// Factor on the learning rate.
    pub learning_rate: f64,
    /// The part that one step takes away, of every parameter of the group. None: the optimizer's, and only of embedding and
    /// projection matrices.
    pub weight_decay: Option<f64>,
    /// Whether the parameters and their moments stay as they are. Their gradients take no part in the norm, and no hook sees
    /// them.
    pub frozen: bool,
}

impl ParameterGroup {
    /// A group that is trained as all others are, to be changed.
    pub fn new(pattern: impl Into<String>) -> Self {
        ParameterGroup { pattern: pattern.into(), learning_rate: 1.0, weight_decay: None, frozen: false }
    }

    /// Checks the numbers in it.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a learning rate that is negative or not finite, or a decay outside [0, 1).
    pub fn validate(&self) -> Result<(), Error> {
        if !(self.learning_rate.is_finite() && self.learning_rate >= 0.0) {
            let expected = "finite and not negative";
            return Err(Error::invalid("learning_rate of a group", expected, self.learning_rate));
        }
        match self.weight_decay {
            Some(decay) if !(0.0..1.0).contains(&decay) => {
                Err(Error::invalid("weight_decay of a group", "in [0, 1)", decay))
            }
            _ => Ok(()),
        }
    }

    /// Whether the pattern is this name.
    pub fn matches(&self, name: &str) -> bool {
        let Some((first, rest)) = self.pattern.split_once('*') else {
            return self.pattern == name;
        };
        let (middle, last) = rest.rsplit_once('*').unwrap_or(("", rest));
        let Some(mut name) = name.strip_prefix(first).and_then(|name| name.strip_suffix(last)) else {
            return false;
        };
        // What stands between two stars is looked for from left to right: the earliest place leaves most of the name.
        middle.split('*').all(|part| match name.find(part) {
            Some(at) => {
                name = &name[at + part.len()..];
                true
            }
            None => false,
        })
    }
}

/// The group of every name, if it has one: the number of the first that matches.
///
/// # Errors
/// [`Error::Invalid`] for a pattern that is no name, and as [`ParameterGroup::validate`].
pub(in crate::train) fn assign<'n>(
    groups: &[ParameterGroup],
    names: impl Iterator<Item = &'n str> + Clone,
) -> Result<Vec<Option<usize>>, Error> {
    for group in groups {
        group.validate()?;
        if !names.clone().any(|name| group.matches(name)) {
            let expected = "the name of a parameter, such as layers.0.w_q, with * for any part of it";
            return Err(Error::invalid("pattern", expected, format!("`{}`", group.pattern)));
        }
    }
    Ok(names.map(|name| groups.iter().position(|group| group.matches(name))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_name_what_they_should() {
        let all = ["", "a", "b", "aa", "ab", "ba", "aab", "aba", "abab", "layers.0.w_q", "layers.10.w_q"];
        let cases: [(&str, &[&str]); 13] = [
            ("", &[""]),
            ("*", &all),
            ("**", &all),
            ("a", &["a"]),
            ("a*", &["a", "aa", "ab", "aab", "aba", "abab"]),
            ("*b", &["b", "ab", "aab", "abab"]),
            ("a*b", &["ab", "aab", "abab"]),
            ("a*a", &["aa", "aba"]),
            ("*a*b*", &["ab", "aab", "aba", "abab"]),
            ("*a*b*a*", &["aba", "abab"]),
            ("layers.0.*", &["layers.0.w_q"]),
            ("layers.*.w_q", &["layers.0.w_q", "layers.10.w_q"]),
            ("*0.w*", &["layers.0.w_q", "layers.10.w_q"]),
        ];
        for (pattern, expected) in cases {
            let group = ParameterGroup::new(pattern);
            let matched: Vec<&str> = all.into_iter().filter(|name| group.matches(name)).collect();
            assert_eq!(matched, expected, "{pattern}");
        }
    }

    #[test]
    fn the_first_match_wins_and_one_must_be() {
        let groups = ["b*", "*"].map(ParameterGroup::new);
        let names = ["a", "b", "bc"];
        assert_eq!(assign(&groups, names.into_iter()), Ok(vec![Some(1), Some(0), Some(0)]));
        assert_eq!(assign(&groups[..1], names.into_iter()), Ok(vec![None, Some(0), Some(0)]));
        let error = assign(&["b", "c"].map(ParameterGroup::new), names.into_iter()).unwrap_err();
        assert!(error.to_string().contains("got `c`"), "{error}");
        for (learning_rate, weight_decay) in [(-1.0, None), (f64::NAN, None), (1.0, Some(1.0))] {
            let group = ParameterGroup { learning_rate, weight_decay, ..ParameterGroup::new("*") };
            assert!(matches!(assign(&[group], names.into_iter()), Err(Error::Invalid { .. })));
        }
    }
}
