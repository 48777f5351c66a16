//! Why a directory cannot be used, as whoever asked for it is told: with what to do about it.

use std::path::Path;

use super::format::VERSION;
use super::io::OpenError;
use super::manifest;
use super::survey::Refusal;
use crate::error::Error;

pub(crate) fn open_error(dir: &Path, error: OpenError) -> Error {
    match error {
        OpenError::Locked(pid) => Error::DiskLocked { dir: dir.to_owned(), pid },
        OpenError::Io(source) => Error::Disk { dir: dir.to_owned(), doing: "open", source: advised(source) },
    }
}

/// The error with what to do about it.
fn advised(error: std::io::Error) -> std::io::Error {
    use std::io::ErrorKind;
    let advice = match error.kind() {
        ErrorKind::NotFound => "give a directory that is there",
        ErrorKind::AlreadyExists | ErrorKind::NotADirectory => {
            "a file or a link to nowhere stands in the way: give a directory, or a path at which one can be made"
        }
        ErrorKind::PermissionDenied => "give the user of this process the directory and the files in it",
        ErrorKind::ReadOnlyFilesystem => "a cache must write there: give a directory on another file system",
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => "make room, or give a directory on another file system",
        _ => return error,
    };
    std::io::Error::new(error.kind(), format!("{error}: {advice}"))
}

pub(crate) fn refused(dir: &Path, doing: &'static str, refusal: Refusal) -> Error {
    let dir = dir.to_owned();
    let reason = match refusal {
        Refusal::Io(source) => return Error::Disk { dir, doing, source: advised(source) },
        Refusal::Manifest(error) => {
            let text = format!(
                "its manifest cannot be read ({error}): try again; if it stays so, remove the file {}, and the segments \
                 are read without it",
                manifest::NAME
            );
            return Error::Disk { dir, doing, source: std::io::Error::new(error.kind(), text) };
        }
        Refusal::OtherVersion(version) => {
            let ours = VERSION;
            format!("its format is version {version}, this release reads version {ours}: use another directory")
        }
        Refusal::WrongKey => "it is encrypted with another key".into(),
        Refusal::KeyMissing => "it is encrypted: give the key file".into(),
        Refusal::NotEncrypted => "it is not encrypted: open it without a key, or use another directory".into(),
    };
    Error::DiskRefused { dir, reason }
}
