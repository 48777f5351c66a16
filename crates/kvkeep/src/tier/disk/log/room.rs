//! Making room on the disk: segments go, oldest first, and what is hot in them is written again.
//!
//! Invariant: where a record was written again, its old copy goes only after the new one is durable.

use std::io;
use std::sync::Arc;

use super::{Log, OVERHEAD_BYTES, Record, segment_bytes, segment_name};
use crate::key::ObjectKey;
use crate::tier::disk::format::{HEADER_KEYS, RecordMeta, Trailer};
use crate::tier::disk::index::SegmentNumber;
use crate::tier::disk::io::Pages;
use crate::tier::disk::segment::{Expected, Segment, offset};

/// Of a new segment, the part that hot records of an old one may take.
const REINSERT_DIVISOR: u32 = 2;

impl Log {
    /// Seals the newest segment and begins another with room for `pages` pages.
    pub(super) fn rotate(&mut self, pages: u32) -> io::Result<()> {
        if self.active.is_some() {
            self.seal()?;
        }
        let ordinary = segment_bytes(self.capacity_bytes);
        let needed = offset(1) + offset(pages) + offset(Trailer::tail_pages(HEADER_KEYS));
        let bytes = ordinary.max(needed);
        if OVERHEAD_BYTES + bytes > self.capacity_bytes {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        while self.kept_bytes() + bytes > self.capacity_bytes && self.segments() > 0 {
            self.forget_oldest();
        }
        self.begin(bytes)?;
        while self.kept_bytes() + ordinary > self.capacity_bytes && self.segments() > 1 {
            self.evict_oldest()?;
        }
        Ok(())
    }

    /// Evicts until what lies here fits the cap.
    pub(in crate::tier::disk) fn shrink(&mut self) -> io::Result<()> {
        while self.kept_bytes() > self.capacity_bytes && self.segments() > 0 {
            self.forget_oldest();
        }
        // A full disk has no room for a manifest until something is gone. The oldest segments can go first: nothing is
        // older than they are that their loss could put in doubt.
        if self.write_manifest().is_err() {
            self.remove_doomed()?;
            self.write_manifest()?;
        }
        self.remove_doomed()
    }

    /// Evicts the oldest segment from a disk that is full before the cap is reached; says whether there was one.
    pub(in crate::tier::disk) fn evict_to_make_room(&mut self) -> io::Result<bool> {
        self.abandon();
        if self.segments() == 0 {
            return Ok(false);
        }
        self.forget_oldest();
        self.shrink()?;
        Ok(true)
    }

    pub(super) fn segments(&self) -> usize {
        self.lines.len() + self.aside.len()
    }

    /// Evicts the oldest segment, after what is hot in it has been written again.
    fn evict_oldest(&mut self) -> io::Result<()> {
        if !self.is_aside_oldest() {
            self.reinsert_hot()?;
        }
        self.forget_oldest();
        self.write_manifest()?;
        self.remove_doomed()
    }

    fn is_aside_oldest(&self) -> bool {
        let aside = self.aside.first().map(|aside| aside.line.segment);
        aside.is_some_and(|aside| self.lines.first().is_none_or(|line| aside < line.segment.id))
    }

    /// Takes the oldest segment out of everything but the directory.
    pub(super) fn forget_oldest(&mut self) {
        if self.is_aside_oldest() {
            let aside = self.aside.remove(0);
            self.doomed.push((aside.line.segment, aside.bytes));
            return;
        }
        let line = self.lines.remove(0);
        self.doomed.push((line.segment.id, line.allocated_bytes));
        let evicted = self.shared.remove_segment(line.number);
        self.shared.state.lock().counters.evictions += evicted as u64;
    }

    /// Unlinks what was evicted and is no longer in the manifest.
    pub(super) fn remove_doomed(&mut self) -> io::Result<()> {
        while let Some((id, _)) = self.doomed.last() {
            match self.backend.remove(&segment_name(*id)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => self.doomed.pop(),
            };
            self.shared.progress();
        }
        Ok(())
    }

    /// Writes hot records of the oldest segment again, within a budget, in their order.
    fn reinsert_hot(&mut self) -> io::Result<()> {
        let Some(oldest) = self.lines.first() else { return Ok(()) };
        let (segment, number, entries) = (Arc::clone(&oldest.segment), oldest.number, oldest.entries);
        let records = crate::tier::disk::recover::read_segment(&segment, Some(entries)).entries;
        let stored: Vec<(u32, RecordMeta)> = records.into_iter().filter(|(_, meta)| meta.kind.is_stored()).collect();
        let keys: Vec<ObjectKey> = stored.iter().map(|(_, meta)| meta.key).collect();
        let resident = self.shared.resident(&keys);
        let mut budget = self.active.as_ref().map_or(0, |active| active.capacity_pages / REINSERT_DIVISOR);
        let mut any = false;
        for ((page, meta), resident) in stored.into_iter().zip(resident) {
            let hot = {
                let state = self.shared.state.lock();
                state.index.at(&meta.key, number, page).is_some_and(|slot| slot.is_hot() || resident)
            };
            let pages = meta.pages().unwrap_or(u32::MAX);
            if !hot || pages > budget || !self.fits(pages) {
                continue;
            }
            budget -= pages;
            any |= self.reinsert(&segment, number, page, &meta)?;
        }
        // Before the old copy goes, the new one must be there to stay.
        if any { self.sync() } else { Ok(()) }
    }

    fn reinsert(&mut self, segment: &Segment, number: SegmentNumber, page: u32, meta: &RecordMeta) -> io::Result<bool> {
        let mut payload = Pages::new(meta.payload_pages().unwrap_or(0) as usize);
        let expected = Expected { key: meta.key, namespace: meta.namespace };
        let Ok(header) = segment.read(page, &expected, self.cipher.as_deref(), payload.bytes_mut()) else {
            return Ok(false);
        };
        let record =
            Record { meta: &header.meta, content: &header.content, keys: &[], payload: payload.bytes(), sums: None };
        let written = self.append_here(&[record])?;
        let Some(written) = written.first() else { return Ok(false) };
        let mut state = self.shared.state.lock();
        // It may have been removed or replaced while it was copied.
        if let Some(mark) = state.index.at(&meta.key, number, page).map(|slot| slot.mark) {
            state.index.insert(meta, written.segment, written.page, mark);
            state.counters.reinserted_total += 1;
        }
        Ok(true)
    }
}
