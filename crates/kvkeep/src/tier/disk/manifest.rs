//! The manifest's file: replaced as a whole, so that there is always an old or a new one.

use std::io;

use super::format::{Manifest, PAGE_BYTES};
use super::io::{Backend, Pages};

pub(crate) const NAME: &str = "MANIFEST";
pub(crate) const TEMPORARY: &str = "MANIFEST.new";
/// A longer file is not a manifest.
const MAX_BYTES: u64 = 4 << 20;

/// What a directory's manifest says.
#[derive(Debug)]
pub(crate) enum Read {
    Whole(Manifest),
    Missing,
    Damaged,
    /// Written by another release.
    OtherVersion(u32),
}

/// Makes this the manifest, durably.
pub(crate) fn write(backend: &dyn Backend, manifest: &Manifest) -> io::Result<()> {
    let mut pages = Pages::new(manifest.encoded_bytes() / PAGE_BYTES);
    manifest.encode(pages.bytes_mut());
    match backend.remove(TEMPORARY) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let file = backend.create(TEMPORARY)?;
    file.write(&[pages.bytes()], 0)?;
    file.sync()?;
    backend.rename(TEMPORARY, NAME)?;
    backend.sync_dir()
}

/// Reads the manifest.
pub(crate) fn read(backend: &dyn Backend) -> io::Result<Read> {
    let file = match backend.open(NAME, false) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Read::Missing),
        Err(error) => return Err(error),
    };
    let bytes = file.size()?.bytes.min(MAX_BYTES);
    let pages = usize::try_from(bytes / PAGE_BYTES as u64).unwrap_or(0);
    let mut buffer = Pages::new(pages);
    file.read(&mut [buffer.bytes_mut()], 0)?;
    if let Some(version) = Manifest::other_version(buffer.bytes()) {
        return Ok(Read::OtherVersion(version));
    }
    Ok(Manifest::decode(buffer.bytes()).map_or(Read::Damaged, Read::Whole))
}
