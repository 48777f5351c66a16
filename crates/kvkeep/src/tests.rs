//! What measurements share: how long locks are held, in processor time of the thread that holds them. On the wall's clock it
//! would count, too, how long somebody else has the processor.

use std::sync::Mutex;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

fn now() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap())
}

pub(crate) fn timed<T>(action: impl FnOnce() -> T) -> (Duration, T) {
    let begin = now();
    let result = action();
    (now() - begin, result)
}

/// How long the slices of something took.
#[derive(Debug, Default)]
pub(crate) struct Slices {
    pub(crate) count: usize,
    all: Duration,
    pub(crate) longest: Duration,
    /// Those of a millisecond and more.
    pub(crate) long: usize,
}

impl Slices {
    pub(crate) fn of(mut slice: impl FnMut(u64) -> Option<u64>) -> Self {
        let mut slices = Self::default();
        let mut next = Some(0);
        while let Some(from) = next {
            let (took, then) = timed(|| slice(from));
            next = then;
            slices.add(took);
        }
        slices
    }

    pub(crate) fn add(&mut self, took: Duration) {
        self.count += 1;
        self.all += took;
        self.longest = self.longest.max(took);
        self.long += usize::from(took >= Duration::from_millis(1));
    }
}

impl std::fmt::Display for Slices {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { count, all, longest, long } = self;
        write!(f, "{count} slices in {all:?}, the longest {longest:?}, {long} of 1 ms or more")
    }
}

/// A lock that is being held.
pub(crate) struct Hold<'a>(Duration, &'a Mutex<Slices>);

impl<'a> Hold<'a> {
    pub(crate) fn begin(holds: &'a Mutex<Slices>) -> Self {
        Self(now(), holds)
    }
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        self.1.lock().unwrap().add(now() - self.0);
    }
}
