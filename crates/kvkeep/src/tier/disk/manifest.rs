//! The manifest's file: replaced as a whole, so that there is always an old or a new one. What becomes durable between
//! two of them is noted behind the one that counts, in place.
//!
//! Invariant: a mark is written after what it speaks of is durable. So it never claims too much; after a killed process
//! it claims all, after a power cut all but perhaps the last.

use std::io;
use std::sync::Arc;

use super::format::{MARK_PAGES, Manifest, Mark, PAGE_BYTES, StoreId};
use super::io::{Backend, DiskFile};
use super::pages::Pages;

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

/// The place for marks behind the manifest.
#[derive(Debug)]
pub(crate) struct Marks {
    file: Arc<dyn DiskFile>,
    at: u64,
    mark: Mark,
}

impl Marks {
    /// So many pages of a segment are durable. Not synced: a killed process leaves it there all the same.
    pub(crate) fn durable(&mut self, segment: u64, durable_pages: u32) -> io::Result<()> {
        (self.mark.segment, self.mark.durable_pages) = (segment, durable_pages);
        self.write()
    }

    /// These segments are about to be removed. Takes no room, so that a full disk can be told.
    pub(crate) fn gone(&mut self, segments: impl Iterator<Item = u64>) -> io::Result<()> {
        self.mark.gone.extend(segments);
        self.write()?;
        self.file.sync()
    }

    /// In turns: where one is torn the other one counts.
    fn write(&mut self) -> io::Result<()> {
        self.mark.sequence += 1;
        let mut page = Pages::new(1);
        self.mark.encode(page.bytes_mut());
        let turn = self.mark.sequence % MARK_PAGES as u64;
        self.file.write(&[page.bytes()], self.at + turn * PAGE_BYTES as u64)
    }
}

/// Makes this the manifest, durably. `marks` are those of the one that is there afterwards, also if this fails.
pub(crate) fn write(backend: &dyn Backend, manifest: &Manifest, marks: &mut Option<Marks>) -> io::Result<()> {
    let bytes = manifest.encoded_bytes();
    let mut pages = Pages::new(bytes / PAGE_BYTES + MARK_PAGES);
    if let Some(head) = pages.bytes_mut().get_mut(..bytes) {
        manifest.encode(head);
    }
    match backend.remove(TEMPORARY) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let file = backend.create(TEMPORARY)?;
    file.write(&[pages.bytes()], 0)?;
    file.sync()?;
    backend.rename(TEMPORARY, NAME)?;
    let mark = Mark { store_id: manifest.identity.store_id, ..Mark::default() };
    *marks = Some(Marks { file, at: bytes as u64, mark });
    backend.sync_dir()
}

/// Reads the manifest, with what was noted behind it.
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
    let Some(mut manifest) = Manifest::decode(buffer.bytes()) else { return Ok(Read::Damaged) };
    if manifest.has_marks {
        let from = manifest.encoded_bytes();
        let Some(marks) = buffer.bytes().get(from..from + MARK_PAGES * PAGE_BYTES) else { return Ok(Read::Damaged) };
        newest_mark(marks, manifest.identity.store_id).iter().for_each(|mark| manifest.apply(mark));
    }
    Ok(Read::Whole(manifest))
}

/// `None` before the first. One that was torn leaves the one before it.
fn newest_mark(pages: &[u8], store_id: StoreId) -> Option<Mark> {
    let marks = pages.chunks_exact(PAGE_BYTES).filter_map(Mark::decode);
    marks.filter(|mark| mark.store_id == store_id).max_by_key(|mark| mark.sequence)
}
