//! Which process this is, told without a system call, and what a child must not inherit.
//!
//! After a `fork` a child has its parent's locks as they stood, maybe locked for ever, the arena's pages still
//! shared with the parent, and no thread but its own. So whatever came from the parent is unusable in a child:
//! every call asks first and takes no lock, and nothing is given back when it is dropped there.
//!
//! The C library tells of each `fork` (`pthread_atfork`); asking costs one load of a number that hardly ever
//! changes. `getpid` in each call was the alternative: a system call in a hit of less than a microsecond. A page
//! that the kernel wipes in children (`MADV_WIPEONFORK`) was another: Linux alone has it, and it cannot let go
//! of a lock. A process made without the C library (`clone` called by hand) is not seen.

#![expect(unsafe_code, reason = "hooks of the C library; see `register`")]

#[cfg(feature = "disk")]
use std::os::fd::BorrowedFd;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

/// Forks that lie between the first process and this one.
static FORKS: AtomicU64 = AtomicU64::new(0);

/// Descriptors that children let go of; 0 is a free place.
static NOT_INHERITED: [AtomicI32; 64] = [const { AtomicI32::new(0) }; 64];

/// What children get in place of those: an open `/dev/null`.
static NOTHING: OnceLock<Option<OwnedFd>> = OnceLock::new();

/// The process that made a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Process(u64);

/// A descriptor that children do not share while this lives.
#[cfg(feature = "disk")]
#[derive(Debug)]
pub(crate) struct NotInherited(&'static AtomicI32);

impl Process {
    /// The process that runs this.
    #[must_use]
    pub fn current() -> Self {
        static REGISTERED: OnceLock<()> = OnceLock::new();
        REGISTERED.get_or_init(register);
        Self(FORKS.load(Ordering::Relaxed))
    }

    /// Is it still that one, and not a child that it has forked?
    #[must_use]
    pub fn is_current(self) -> bool {
        self.0 == FORKS.load(Ordering::Relaxed)
    }
}

/// Keeps children from sharing an open file: what is locked by it stays locked for as long as any of them has
/// it open. `None` if there is no more room for that; then they share it.
#[cfg(feature = "disk")]
pub(crate) fn not_inherited(fd: BorrowedFd<'_>) -> Option<NotInherited> {
    let _ = Process::current();
    let open = || std::fs::File::open("/dev/null").ok().map(OwnedFd::from);
    NOTHING.get_or_init(open).as_ref()?;
    let fd = fd.as_raw_fd();
    let take = |place: &&AtomicI32| place.compare_exchange(0, fd, Ordering::SeqCst, Ordering::SeqCst).is_ok();
    NOT_INHERITED.iter().find(take).map(NotInherited)
}

#[cfg(feature = "disk")]
impl Drop for NotInherited {
    fn drop(&mut self) {
        self.0.store(0, Ordering::SeqCst);
    }
}

fn register() {
    // SAFETY: the hook is a function of this library with no arguments, and does only what a child of a
    // process with many threads may do. It fails only without memory; then forks go unseen.
    let _ = unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
}

/// Runs in each child before anything else. Takes no lock and no memory.
extern "C" fn in_child() {
    FORKS.fetch_add(1, Ordering::SeqCst);
    let Some(Some(nothing)) = NOTHING.get() else { return };
    for place in &NOT_INHERITED {
        let fd = place.swap(0, Ordering::SeqCst);
        if fd != 0 {
            // SAFETY: both descriptors are open: a place is left before its descriptor is closed. The number
            // stays open, so that its owner may close it here too.
            let _ = unsafe { libc::dup2(nothing.as_raw_fd(), fd) };
        }
    }
}
