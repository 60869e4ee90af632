//! The memory of this process, bytes, where the system tells.
#![allow(dead_code)] // each example takes what it needs

/// What it holds now.
pub fn resident() -> Option<usize> {
    status("VmRSS:")
}

/// The most that it has held.
pub fn peak() -> Option<usize> {
    status("VmHWM:")
}

/// One line of what Linux says.
fn status(name: &str) -> Option<usize> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let kib = text.lines().find_map(|line| line.strip_prefix(name))?.trim().strip_suffix("kB")?;
    Some(kib.trim().parse::<usize>().ok()? << 10)
}
