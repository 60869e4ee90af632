//! The results as tables and as a picture.

use std::error::Error;

use plotters::prelude::*;

use crate::chart::{Chart, Curve, number};
use crate::out::Folder;
use crate::say::say;
use crate::stream::{KEPT_PER_PLACE, Streamed};

/// One seed: the same model and text, with the cache and without.
pub struct Outcome {
    pub seed: u64,
    pub on: Streamed,
    pub off: Streamed,
}

type Cache = fn(&Outcome) -> &Streamed;
const CACHES: [(&str, Cache); 2] = [("on", |outcome| &outcome.on), ("off", |outcome| &outcome.off)];

/// Writes the tables, with the picture, into a folder, and prints them.
pub fn write(outcomes: &[Outcome], folder: &Folder) -> Result<(), Box<dyn Error>> {
    let tables = format!("{}\n{}\n{}", kept(outcomes), by_position(outcomes), places(outcomes));
    folder.write("table.md", &tables)?;
    folder.write("long_context.svg", draw(outcomes)?)?;
    say(format!("{tables}\ninto {folder}"));
    Ok(())
}

/// What times are of: seeds run at the same time, and share the machine.
fn side_by_side(outcomes: &[Outcome]) -> String {
    match outcomes.len() {
        1 => String::new(),
        n => format!(", {n} seeds side by side"),
    }
}

/// Facts told at the beginning, by distance: how many of them are known.
fn kept(outcomes: &[Outcome]) -> String {
    let mut table = "| cache | seed |".to_string();
    let distances = Vec::from_iter(outcomes[0].on.kept.iter().map(|kept| kept.distance));
    distances.iter().for_each(|distance| table += &format!(" {distance} bytes later |"));
    table += &format!("\n|---|---:|{}\n", "---:|".repeat(distances.len()));
    for (name, streamed) in CACHES {
        for outcome in outcomes {
            table += &format!("| {name} | {} |", outcome.seed);
            for kept in &streamed(outcome).kept {
                table += &format!(" {} of {KEPT_PER_PLACE}, {:.2} bits |", kept.right, kept.bits);
            }
            table += "\n";
        }
    }
    table
}

/// Edges of the stretches that bits are averaged over: four for a factor of ten.
fn edges(len: usize) -> Vec<usize> {
    let edges = (0..).map(|i| (1000.0 * 10f64.powf(f64::from(i) / 4.0)).round() as usize);
    let mut edges = Vec::from_iter(edges.take_while(|&edge| edge < len - len / 20));
    edges.insert(0, 0);
    edges.push(len);
    edges
}

/// Means of `points` (position, bits) between the edges, over all seeds; NaN where there are none.
fn means(outcomes: &[Outcome], points: impl Fn(&Outcome) -> &[(usize, f64)], edges: &[usize]) -> Vec<f64> {
    let of = |edges: &[usize]| {
        let inside = outcomes.iter().flat_map(&points);
        let inside = inside.filter(|(position, _)| edges[0] < *position && *position <= edges[1]);
        let (n, sum) = inside.fold((0, 0.0), |(n, sum), (_, bits)| (n + 1, sum + bits));
        sum / f64::from(n)
    };
    edges.windows(2).map(of).collect()
}

/// The length of the text.
fn len(outcomes: &[Outcome]) -> usize {
    outcomes.iter().filter_map(|outcome| Some(outcome.on.places.last()?.position)).max().unwrap_or(0)
}

fn by_position(outcomes: &[Outcome]) -> String {
    let edges = edges(len(outcomes));
    let mut table = "| up to byte | bits per byte, cache on | off | bits per answer, cache on | off |\n\
                     |---:|---:|---:|---:|---:|\n"
        .to_string();
    let columns = CACHES.map(|(_, streamed)| means(outcomes, move |outcome| &streamed(outcome).bits, &edges));
    let answers =
        CACHES.map(|(_, streamed)| means(outcomes, move |outcome| &streamed(outcome).answers, &edges));
    for (i, edge) in edges[1..].iter().enumerate() {
        let [on, off] = [&columns[0], &columns[1]].map(|column| column[i]);
        let [answers_on, answers_off] = [&answers[0], &answers[1]].map(|column| column[i]);
        table += &format!("| {edge} | {on:.3} | {off:.3} | {answers_on:.3} | {answers_off:.3} |\n");
    }
    table
}

/// Of the first seed.
fn places(outcomes: &[Outcome]) -> String {
    let beside = side_by_side(outcomes);
    let mut table = format!(
        "| at byte | µs for a byte by itself{beside} | bytes/s in pieces of 250{beside} | state, bytes | process, MB |\n\
         |---:|---:|---:|---:|---:|\n"
    );
    for place in &outcomes[0].on.places {
        let resident = place.resident.map_or(String::new(), |bytes| format!("{:.0}", bytes as f64 / 1e6));
        table += &format!(
            "| {} | {:.0} | {:.0} | {} | {resident} |\n",
            place.position, place.single, place.per_second, place.state
        );
    }
    table
}

fn draw(outcomes: &[Outcome]) -> Result<String, Box<dyn Error>> {
    let edges = edges(len(outcomes));
    let mut svg = String::new();
    let area = SVGBackend::with_string(&mut svg, (800, 1280)).into_drawing_area();
    area.fill(&WHITE)?;
    let parts = area.split_evenly((4, 1));
    let log = |position: usize| (position as f64).log10();
    let x = 3.0..log(len(outcomes)).max(3.5);
    let curves = |points: &dyn Fn(Cache) -> Vec<(f64, f64)>| {
        CACHES.map(|(name, streamed)| Curve { name: format!("cache {name}"), points: points(streamed) })
    };
    let bits = curves(&|streamed| {
        let means = means(outcomes, |outcome| &streamed(outcome).bits, &edges);
        edges[1..].iter().map(|&edge| log(edge)).zip(means).collect()
    });
    let answers = curves(&|streamed| {
        let means = means(outcomes, |outcome| &streamed(outcome).answers, &edges);
        edges[1..].iter().map(|&edge| log(edge)).zip(means).collect()
    });
    let kept = curves(&|streamed| {
        let all = (0..outcomes[0].on.kept.len()).map(|i| {
            let right = outcomes.iter().map(|outcome| streamed(outcome).kept[i].right).sum::<usize>();
            let asked = KEPT_PER_PLACE * outcomes.len();
            (log(outcomes[0].on.kept[i].distance), 100.0 * right as f64 / asked as f64)
        });
        all.collect()
    });
    // Of one seed.
    let times = curves(&|streamed| {
        let places = &streamed(&outcomes[0]).places;
        places.iter().map(|place| (log(place.position), place.single)).collect()
    });
    let highest = |curves: &[Curve]| {
        let all = curves.iter().flat_map(|curve| &curve.points).map(|point| point.1);
        1.1 * all.filter(|y| y.is_finite()).fold(0.1, f64::max)
    };
    let of_times = format!("Microseconds for a byte by itself{}", side_by_side(outcomes));
    for (part, title, x_desc, curves, top) in [
        (&parts[0], "Bits per byte", "position, log10 of bytes", &bits, highest(&bits)),
        (&parts[1], "Bits per answer", "position, log10 of bytes", &answers, highest(&answers)),
        (&parts[2], "Facts from the beginning known, percent", "distance, log10 of bytes", &kept, 105.0),
        (&parts[3], &of_times, "position, log10 of bytes", &times, highest(&times)),
    ] {
        let chart = Chart { title, x: x.clone(), x_desc, y: 0.0..top, y_label: &number };
        chart.draw(part, curves)?;
    }
    area.present()?;
    drop((parts, area));
    Ok(svg)
}
