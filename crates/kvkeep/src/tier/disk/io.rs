//! Files: the only place of the disk tier that makes system calls.
//!
//! [`Backend`] is a directory and [`DiskFile`] a file in it, as narrow as the tier needs
//! them, so that tests can put a simulated disk in their place: one that fails, hangs, or
//! forgets what was not synced.
//!
//! Segments are written and read with `O_DIRECT` where the file system has it: payloads go
//! straight between the disk and the arena, whose pages are the RAM tier, and a second copy
//! in the page cache would only take memory that the arena could have.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, FallocateFlags, FlockOperation, Mode, OFlags};

use crate::process::{NotInherited, Process, not_inherited};

const LOCK: &str = "LOCK";

/// A file's length, and what it takes on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FileSize {
    pub(crate) bytes: u64,
    pub(crate) allocated_bytes: u64,
}

/// One directory.
pub(crate) trait Backend: Send + Sync + fmt::Debug {
    /// The names of all files.
    fn list(&self) -> io::Result<Vec<String>>;
    /// A new file, to be read and written.
    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>>;
    /// An existing file; to be written too, if asked for.
    fn open(&self, name: &str, write: bool) -> io::Result<Arc<dyn DiskFile>>;
    /// Takes the place of what has the new name, all at once.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    fn remove(&self, name: &str) -> io::Result<()>;
    /// Makes creations, renames and removals durable.
    fn sync_dir(&self) -> io::Result<()>;
    /// Is the directory still where it was opened? An error says that it is not.
    fn check(&self) -> io::Result<()>;
}

/// Finds the directory again after it was gone.
pub(crate) type Opener = Box<dyn Fn() -> io::Result<Arc<dyn Backend>> + Send>;

/// One file. Offsets and lengths are whole pages, buffers are page-aligned.
pub(crate) trait DiskFile: Send + Sync + fmt::Debug {
    /// Fills all buffers, or fails.
    fn read(&self, into: &mut [&mut [u8]], at: u64) -> io::Result<()>;
    /// Writes all buffers, or fails.
    fn write(&self, from: &[&[u8]], at: u64) -> io::Result<()>;
    /// Makes what was written durable.
    fn sync(&self) -> io::Result<()>;
    /// Makes room for this many bytes at once, so that writing cannot run out of space.
    fn allocate(&self, bytes: u64) -> io::Result<()>;
    /// Cuts the file off here.
    fn truncate(&self, bytes: u64) -> io::Result<()>;
    fn size(&self) -> io::Result<FileSize>;
}

/// How a directory is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// Created if need be, locked for this process alone.
    Exclusive,
    /// Only read, beside other readers; refused while a process writes.
    ReadOnly,
}

/// Why a directory cannot be opened.
#[derive(Debug)]
pub(crate) enum OpenError {
    /// Another process holds it; its id if it could be read.
    Locked(Option<u32>),
    Io(io::Error),
}

impl From<io::Error> for OpenError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<rustix::io::Errno> for OpenError {
    fn from(error: rustix::io::Errno) -> Self {
        Self::Io(error.into())
    }
}

/// A directory of the file system.
#[derive(Debug)]
pub(crate) struct Directory {
    path: PathBuf,
    fd: OwnedFd,
    /// Held until the process ends or this value goes.
    _lock: Option<Lock>,
}

/// A lock on a directory: that of an open file. Children of this process inherit open files and would hold the
/// lock with it for as long as they live, so they let go of the file, and what they may still have of it is unlocked.
#[derive(Debug)]
struct Lock {
    file: File,
    kept: Option<NotInherited>,
    process: Process,
}

impl Drop for Lock {
    fn drop(&mut self) {
        // A child must not unlock what is its parent's.
        if self.process.is_current() {
            drop(self.kept.take());
            let _ = rustix::fs::flock(&self.file, FlockOperation::Unlock);
        }
    }
}

impl Directory {
    pub(crate) fn open(path: &Path, access: Access) -> Result<Self, OpenError> {
        if access == Access::Exclusive && !path.is_dir() {
            create_private_dir(path)?;
        }
        let fd = rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let lock = lock(&fd, access)?;
        Ok(Self { path: path.to_owned(), fd, _lock: lock })
    }

    /// With `O_DIRECT` if the file system has it, in the page cache if not.
    fn open_file(&self, name: &str, flags: OFlags) -> io::Result<Arc<dyn DiskFile>> {
        let mode = Mode::RUSR | Mode::WUSR;
        let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let direct = rustix::fs::openat(&self.fd, name, flags | OFlags::DIRECT, mode);
        let fd = match direct {
            Err(rustix::io::Errno::INVAL) => rustix::fs::openat(&self.fd, name, flags - OFlags::EXCL, mode)?,
            other => other?,
        };
        Ok(Arc::new(RealFile(fd)))
    }
}

fn create_private_dir(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Takes the lock and writes this process's id into it. A reader of a directory without
/// a lock file, which it may be unable to make, goes without.
fn lock(dir: &OwnedFd, access: Access) -> Result<Option<Lock>, OpenError> {
    let (flags, operation) = match access {
        Access::Exclusive => (OFlags::RDWR | OFlags::CREATE, FlockOperation::NonBlockingLockExclusive),
        Access::ReadOnly => (OFlags::RDONLY, FlockOperation::NonBlockingLockShared),
    };
    let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let mut file = match rustix::fs::openat(dir, LOCK, flags, Mode::RUSR | Mode::WUSR) {
        Ok(fd) => File::from(fd),
        Err(rustix::io::Errno::NOENT) if access == Access::ReadOnly => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    if rustix::fs::flock(&file, operation).is_err() {
        let mut holder = String::new();
        let _ = (&mut file).take(32).read_to_string(&mut holder);
        return Err(OpenError::Locked(holder.trim().parse().ok()));
    }
    if access == Access::Exclusive {
        // On a full disk it stays empty: it is locked all the same.
        file.set_len(0)?;
        let _ = write!(file, "{}", std::process::id());
    }
    let kept = not_inherited(file.as_fd());
    Ok(Some(Lock { file, kept, process: Process::current() }))
}

/// Has the disk, or the quota on it, no room?
pub(crate) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Is what was opened a directory or a link, and so no file of ours?
pub(crate) fn is_no_file(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::IsADirectory || error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error())
}

impl Backend for Directory {
    fn list(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::read_from(&self.fd)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if name != "." && name != ".." && name != LOCK {
                names.push(name);
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        self.open_file(name, OFlags::RDWR | OFlags::CREATE | OFlags::EXCL)
    }

    fn open(&self, name: &str, write: bool) -> io::Result<Arc<dyn DiskFile>> {
        self.open_file(name, if write { OFlags::RDWR } else { OFlags::RDONLY })
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        Ok(rustix::fs::renameat(&self.fd, from, &self.fd, to)?)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(&self.fd, name, AtFlags::empty())?)
    }

    fn sync_dir(&self) -> io::Result<()> {
        Ok(rustix::fs::fsync(&self.fd)?)
    }

    fn check(&self) -> io::Result<()> {
        let (ours, now) = (rustix::fs::fstat(&self.fd)?, rustix::fs::stat(&self.path)?);
        if (ours.st_dev, ours.st_ino) == (now.st_dev, now.st_ino) {
            return Ok(());
        }
        Err(io::Error::new(io::ErrorKind::NotFound, "another directory has taken its place"))
    }
}

/// A file of the file system.
#[derive(Debug)]
struct RealFile(OwnedFd);

/// Buffers that one system call takes at most (`IOV_MAX` is 1,024).
const BUFFERS_A_CALL: usize = 1024;

impl DiskFile for RealFile {
    fn read(&self, into: &mut [&mut [u8]], mut at: u64) -> io::Result<()> {
        let mut slices: Vec<IoSliceMut<'_>> = into.iter_mut().map(|bytes| IoSliceMut::new(bytes)).collect();
        let mut rest = slices.as_mut_slice();
        IoSliceMut::advance_slices(&mut rest, 0);
        while !rest.is_empty() {
            let count = rest.len().min(BUFFERS_A_CALL);
            match rustix::io::preadv(self.0.as_fd(), rest.get_mut(..count).unwrap_or_default(), at) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(bytes) => {
                    at += bytes as u64;
                    IoSliceMut::advance_slices(&mut rest, bytes);
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn write(&self, from: &[&[u8]], mut at: u64) -> io::Result<()> {
        let mut slices: Vec<IoSlice<'_>> = from.iter().map(|bytes| IoSlice::new(bytes)).collect();
        let mut rest = slices.as_mut_slice();
        IoSlice::advance_slices(&mut rest, 0);
        while !rest.is_empty() {
            let count = rest.len().min(BUFFERS_A_CALL);
            match rustix::io::pwritev(self.0.as_fd(), rest.get(..count).unwrap_or_default(), at) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(bytes) => {
                    at += bytes as u64;
                    IoSlice::advance_slices(&mut rest, bytes);
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(rustix::fs::fdatasync(&self.0)?)
    }

    fn allocate(&self, bytes: u64) -> io::Result<()> {
        match rustix::fs::fallocate(&self.0, FallocateFlags::empty(), 0, bytes) {
            // A file system without it allocates as we write.
            Err(rustix::io::Errno::OPNOTSUPP) => Ok(()),
            other => Ok(other?),
        }
    }

    fn truncate(&self, bytes: u64) -> io::Result<()> {
        Ok(rustix::fs::ftruncate(&self.0, bytes)?)
    }

    fn size(&self) -> io::Result<FileSize> {
        let stat = rustix::fs::fstat(&self.0)?;
        let bytes = u64::try_from(stat.st_size).unwrap_or(0);
        // Always in units of 512 bytes, whatever the file system's blocks are.
        Ok(FileSize { bytes, allocated_bytes: u64::try_from(stat.st_blocks).unwrap_or(0) * 512 })
    }
}
