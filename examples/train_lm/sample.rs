//! What a model writes, or draws, once it has learned.

use std::error::Error;

use transformer_vq::generate::{Generator, Sampler};
use transformer_vq::model::write_atomically;
use transformer_vq::ndarray::Array1;
use transformer_vq::train::ImageShape;

use crate::run::Run;
use crate::say::say;

/// Tokens of a prompt and of a sample.
const PROMPT: usize = 64;
const SAMPLE: usize = 400;
/// Numbers of the largest picture that is drawn: half a minute for a small model.
const LARGEST_IMAGE: usize = 3 << 16;

/// Continues the beginning of what was held out; of images, draws one into `sample.png`.
pub fn show(run: &Run) -> Result<(), Box<dyn Error>> {
    let (text, held_out) = (&run.text, &run.held_out);
    let (prompt, len) = match (text.image_shape(), text.end_of_document()) {
        // After the end of one image comes another.
        (Some(shape), Some(end)) => (vec![end], shape.height * shape.width * shape.channels),
        _ => (text.read(held_out.start..held_out.end.min(held_out.start + PROMPT))?, SAMPLE),
    };
    if len > LARGEST_IMAGE {
        say(format!("no sample: a picture of {len} numbers would take long to draw, one after the other"));
        return Ok(());
    }
    let sampler = Sampler { temperature: 0.8, top_k: None, top_p: Some(0.95) };
    let mut generator = Generator::new(run.trainer.model(), sampler, run.options.seed)?;
    generator.read(Array1::from_vec(prompt.clone()).view())?;
    let tokens = (0..len).map(|_| generator.next_token()).collect::<Result<Vec<u32>, _>>()?;
    if let Some(shape) = text.image_shape() {
        // An end in the midst of an image is a dark spot.
        let bytes: Vec<u8> = tokens.into_iter().map(|token| u8::try_from(token).unwrap_or(0)).collect();
        let path = run.folder.join("sample.png");
        write_atomically(&path, |out| Ok(encode(out, shape, &bytes)?))?;
        say(format!("a sample is in {}", path.display()));
        return Ok(());
    }
    let words =
        |tokens: &[u32]| Ok::<_, Box<dyn Error>>(String::from_utf8_lossy(&text.decode(tokens)?).into_owned());
    say(format!("\n--- sample after {:?}:", words(&prompt)?));
    say(format!("{}\n---", words(&tokens)?));
    Ok(())
}

fn encode(out: &mut dyn std::io::Write, shape: ImageShape, bytes: &[u8]) -> Result<(), png::EncodingError> {
    let mut encoder = png::Encoder::new(out, shape.width as u32, shape.height as u32);
    encoder.set_color(match shape.channels {
        1 => png::ColorType::Grayscale,
        2 => png::ColorType::GrayscaleAlpha,
        3 => png::ColorType::Rgb,
        _ => png::ColorType::Rgba,
    });
    encoder.write_header()?.write_image_data(bytes)
}
