//! PNG images as bytes in raster order.

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use super::documents::{Documents, Store};
use super::spool::{SpoolWriter, io_error};
use crate::Error;
use crate::error::check_memory;

/// The size of an image; its bytes are `height * width * channels`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageShape {
    /// Rows of pixels.
    pub height: usize,
    /// Pixels of a row.
    pub width: usize,
    /// Bytes of a pixel: 1 grey, 2 grey and opacity, 3 red, green and blue, 4 these and opacity.
    pub channels: usize,
}

/// The bytes of images of one shape.
pub(super) fn read(paths: Vec<PathBuf>) -> Result<(Documents, ImageShape), Error> {
    let mut spool = SpoolWriter::new()?;
    let mut first: Option<ImageShape> = None;
    let n_images = paths.len();
    for path in paths {
        let (bytes, shape) = decode(&path)?;
        let expected = *first.get_or_insert(shape);
        if shape != expected {
            let say = |s: ImageShape| format!("{} x {} pixels of {} bytes", s.width, s.height, s.channels);
            let problem = format!("{}, the first image has {}", say(shape), say(expected));
            return Err(Error::File { path, problem });
        }
        spool.write(&bytes)?;
    }
    let shape = first.expect("at least one path");
    let (spool, len) = (spool.finish()?, shape.height * shape.width * shape.channels);
    let image = |i: usize| (len, Store::Spool(spool.clone(), (i * len) as u64));
    Ok((Documents::new((0..n_images).map(image).collect()), shape))
}

fn decode(path: &Path) -> Result<(Vec<u8>, ImageShape), Error> {
    let wrong = |problem: String| Error::File { path: path.to_path_buf(), problem };
    let broken = |e: png::DecodingError| wrong(format!("no PNG image that can be read: {e}"));
    let file = File::open(path).map_err(|e| io_error(path, "read", &e))?;
    let mut decoder = png::Decoder::new(BufReader::new(file));
    decoder.set_transformations(png::Transformations::normalize_to_color8());
    let mut reader = decoder.read_info().map_err(broken)?;
    let size = reader.output_buffer_size().ok_or_else(|| wrong("too large an image".into()))?;
    check_memory::<u8>("image", &[size]).map_err(|_| wrong(format!("too large an image: {size} bytes")))?;
    let mut bytes = vec![0; size];
    let info = reader.next_frame(&mut bytes).map_err(broken)?;
    bytes.truncate(info.buffer_size());
    let (height, width) = (info.height as usize, info.width as usize);
    Ok((bytes, ImageShape { height, width, channels: info.color_type.samples() }))
}
