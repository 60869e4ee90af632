//! An encoder in one `safetensors` file.
//!
//! | tensor | shape | |
//! |---|---|---|
//! | `encoder.<parameter>` | as in [`EncoderParameters`] | for example `encoder.layers.0.w_q` |
//! | `codebooks.<unit>.sums` | [Hk, S, K] | |
//! | `codebooks.<unit>.counts` | [Hk, S] | |
//!
//! The metadata has the configuration as JSON under the key `encoder`, and `format_version`. The file is written whole or not
//! at all. One that is read may be anything: sizes are compared before memory is asked for.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use super::{Encoder, EncoderConfig, EncoderParameters};
use crate::codebook::{Codebook, Learning};
use crate::compiled::compiled_here;
use crate::model::TensorFile;
use crate::model::checkpoint::{check_count, ema_tensors, file_error, named_views, read_ema, read_views};
use crate::{Error, Scalar};

/// Raised whenever an older reader would misread what is written.
const FORMAT_VERSION: &str = "1";

/// Keys of the metadata; the first is what names of parameters begin with, too.
const ENCODER: &str = "encoder";
const VERSION: &str = "format_version";

impl<T: Scalar> Encoder<T> {
    /// Writes the encoder into a file, in place of what stood there, all or nothing.
    ///
    /// # Errors
    /// [`Error::Io`], and [`Error::Invalid`] for numbers that are not finite, which [`load`](Self::load) would refuse.
    ///
    /// ```
    /// use transformer_vq::model::{Encoder, EncoderConfig};
    ///
    /// # let folder = tempfile::tempdir().unwrap();
    /// # let path = folder.path().join("encoder.safetensors");
    /// let encoder = Encoder::new(EncoderConfig { d_model: 16, n_layers: 1, ..EncoderConfig::default() }, 1)?;
    /// encoder.save(&path)?;
    /// assert_eq!(Encoder::load(&path)?, encoder);
    /// # Ok::<(), transformer_vq::Error>(())
    /// ```
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), Error> {
        compiled_here!(T, Encoder::<T>::save_here, fn(&Encoder<T>, &Path) -> Result<(), Error>)(
            self,
            path.as_ref(),
        )
    }

    fn save_here(&self, path: &Path) -> Result<(), Error> {
        let mut tensors = named_views(ENCODER, self.parameters.views())?;
        for (i, codebook) in self.codebooks.iter().enumerate() {
            if let Learning::Ema(ema) = codebook.learning() {
                tensors.extend(ema_tensors(i, ema)?);
            }
        }
        let config = serde_json::to_string(&self.config)
            .map_err(|e| file_error(path.into(), format!("the encoder cannot be described: {e}")))?;
        let metadata = [(ENCODER, config), (VERSION, FORMAT_VERSION.into())];
        let metadata: BTreeMap<_, _> = metadata.map(|(key, value)| (key.into(), value)).into();
        TensorFile::write(path, tensors, &metadata)
    }

    /// Reads the encoder that [`save`](Self::save) left in a file.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read, [`Error::File`] if it is not what it should be, saying why.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, Error> {
        compiled_here!(T, Encoder::<T>::load_here, fn(&Path) -> Result<Encoder<T>, Error>)(path.as_ref())
    }

    fn load_here(path: &Path) -> Result<Self, Error> {
        let file = TensorFile::open(path)?;
        let wrong = |problem: String| file_error(path.into(), problem);
        let text = |key: &str| {
            let text = file.metadata().get(key);
            text.ok_or_else(|| wrong(format!("not an encoder: the metadata has no `{key}`")))
        };
        let (config, version) = (text(ENCODER)?, text(VERSION)?);
        if version != FORMAT_VERSION {
            return Err(wrong(format!("format version {version}, this crate reads {FORMAT_VERSION}")));
        }
        let config: EncoderConfig =
            serde_json::from_str(config).map_err(|e| wrong(format!("metadata `{ENCODER}`: {e}")))?;
        config.validate().map_err(|e| wrong(e.to_string()))?;
        check_count(ENCODER, config.n_parameters(), &file)?;
        let mut parameters = EncoderParameters::zeros(&config);
        read_views(ENCODER, parameters.views_mut(), &file)?;
        let dim = (config.key_heads(), config.n_codes, config.d_k);
        let codebook = |i| read_ema(i, dim, config.codebook_decay, &file).map(Codebook::ema);
        let codebooks = (0..config.n_layers).map(codebook).collect::<Result<Vec<_>, _>>()?;
        Ok(Encoder { config, parameters, codebooks, buffers: Arc::default() })
    }
}
