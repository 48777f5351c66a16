//! Memory that is still what a file holds, for `kvkeep._files`: mapped from it, and no page of it written to.
//!
//! The kernel says both: `/proc/self/maps` which file lies where, `/proc/self/pagemap` which pages became this process's
//! own when somebody wrote to them. So an edit is seen, however it was made, without reading the memory. Where the
//! kernel does not say (another system, a sandbox), nothing is known of any memory.
//!
//! To go by how a weight was loaded was the alternative that lost: it says nothing of what was done to it since.

use std::fs::File;
use std::io::BufRead;
use std::io::BufReader;
use std::os::unix::fs::FileExt;

use pyo3::prelude::*;

/// Bits of an entry of the page map: the page is in memory, it is swapped out, it belongs to the file.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_THE_FILE: u64 = 1 << 61;
/// Entries that are read at once.
const ENTRIES: usize = 8192;

/// A private mapping of a file.
struct Mapping {
    start: u64,
    end: u64,
    offset: u64,
    device: String,
    inode: u64,
    path: String,
}

/// Where memory comes from: (path, device as `major:minor` in hexadecimal, inode, offset in the file).
type Origin = (String, String, u64, u64);

/// For each (address, bytes) the file whose bytes lie there unchanged; None where that is not so or not known.
#[pyfunction]
pub(crate) fn files_behind(py: Python<'_>, places: Vec<(u64, u64)>, page_bytes: u64) -> Vec<Option<Origin>> {
    py.detach(|| {
        let (Some(mappings), Ok(pages)) = (mappings(), File::open("/proc/self/pagemap")) else {
            return vec![None; places.len()];
        };
        places.into_iter().map(|(address, bytes)| origin(&mappings, &pages, address, bytes, page_bytes)).collect()
    })
}

fn origin(mappings: &[Mapping], pages: &File, address: u64, bytes: u64, page_bytes: u64) -> Option<Origin> {
    let end = address.checked_add(bytes)?;
    let found = mappings.iter().find(|mapping| mapping.start <= address && end <= mapping.end)?;
    let (first, last) = (address.checked_div(page_bytes)?, end.checked_next_multiple_of(page_bytes)? / page_bytes);
    are_of_the_file(pages, first, last)
        .then(|| (found.path.clone(), found.device.clone(), found.inode, found.offset + (address - found.start)))
}

/// Has nobody written to these pages?
fn are_of_the_file(pages: &File, first: u64, last: u64) -> bool {
    let mut entries = vec![0; ENTRIES * size_of::<u64>()];
    let mut next = first;
    while next < last {
        let count = usize::try_from(last - next).unwrap_or(ENTRIES).min(ENTRIES);
        let Some(wanted) = entries.get_mut(..count * size_of::<u64>()) else { return false };
        if pages.read_exact_at(wanted, next * size_of::<u64>() as u64).is_err() {
            return false;
        }
        let (entries, _) = wanted.as_chunks::<8>();
        let untouched = |entry: &[u8; 8]| {
            let entry = u64::from_le_bytes(*entry);
            // What was never looked at is read from the file when it is.
            entry & SWAPPED == 0 && (entry & PRESENT == 0 || entry & OF_THE_FILE != 0)
        };
        if !entries.iter().all(untouched) {
            return false;
        }
        next += count as u64;
    }
    true
}

fn mappings() -> Option<Vec<Mapping>> {
    let lines = BufReader::new(File::open("/proc/self/maps").ok()?).lines();
    Some(lines.map_while(Result::ok).filter_map(|line| mapping(&line)).collect())
}

/// `start-end perms offset device inode   path`, if it is a private one of a file.
fn mapping(line: &str) -> Option<Mapping> {
    let (mut rest, mut fields) = (line, Vec::new());
    for _ in 0..5 {
        let (field, after) = rest.split_once(' ')?;
        fields.push(field);
        rest = after.trim_start();
    }
    let [range, permissions, offset, device, inode] = fields.try_into().ok()?;
    let (start, end) = range.split_once('-')?;
    let hexadecimal = |digits| u64::from_str_radix(digits, 16).ok();
    // A backslash stands for a character that was replaced, so the path is not the file's.
    let is_file = permissions.ends_with('p') && inode != "0" && rest.starts_with('/') && !rest.contains('\\');
    is_file.then_some(Mapping {
        start: hexadecimal(start)?,
        end: hexadecimal(end)?,
        offset: hexadecimal(offset)?,
        device: device.to_owned(),
        inode: inode.parse().ok()?,
        path: rest.to_owned(),
    })
}
