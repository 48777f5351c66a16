//! What is written to disk at all: pure, as the policies are. It knows what it is told of uses,
//! and answers before each write.
//!
//! Writing everything is simplest and wears the disk out for blocks that are never read again.
//! The alternatives: write what is used a second time, or what blocks of its kind have proved
//! to be worth.

use std::fmt;
use std::str::FromStr;

use super::Place;
use super::rates::Kind;
use crate::error::{Error, Result};

/// Which blocks are written to disk.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[non_exhaustive]
pub enum Admission {
    /// Every block that is stored.
    #[default]
    All,
    /// A block that is used a second time.
    SecondUse,
    /// A block of a kind that is read from disk at least so many times for each write: what a
    /// write costs, as a part of what computing a block again does. One write in 16 of the other
    /// kinds is made all the same, to keep knowing.
    Worth(f32),
}

impl Admission {
    /// Refuses a rule that is none.
    pub(crate) fn check(self) -> Result<Self> {
        match self {
            Self::Worth(least) if !(0.0..=1000.0).contains(&least) => {
                Err(Error::Config(format!("worth:{least} admits nothing sensible: give worth:R with R from 0 to 1000")))
            }
            rule => Ok(rule),
        }
    }
}

/// `all`, `second-use`, or `worth:R`.
impl FromStr for Admission {
    type Err = Error;

    fn from_str(rule: &str) -> Result<Self> {
        let unknown = || Error::Config(format!("there is no rule {rule:?}: give all, second-use or worth:R"));
        match rule.split_once(':') {
            None if rule == "all" => Ok(Self::All),
            None if rule == "second-use" => Ok(Self::SecondUse),
            Some(("worth", least)) => Self::Worth(least.parse().map_err(|_| unknown())?).check(),
            _ => Err(unknown()),
        }
    }
}

/// As it is read.
impl fmt::Display for Admission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("all"),
            Self::SecondUse => f.write_str("second-use"),
            Self::Worth(least) => write!(f, "worth:{least}"),
        }
    }
}

/// Decides, and remembers what its decisions were worth.
#[derive(Debug)]
pub(crate) struct Admitter {
    admission: Admission,
    /// Reads and writes of each kind.
    kinds: Vec<(f32, f32)>,
    denied: u32,
}

/// Writes of a kind before it is judged.
const TRIAL_WRITES: f32 = 64.0;
const EXPLORE_EVERY: u32 = 16;
/// Sums of a kind fade by half when it has been written so often.
const FADE_WRITES: f32 = 65_536.0;

impl Admitter {
    pub(crate) fn new(admission: Admission) -> Self {
        let kinds = vec![(0.0, 0.0); Kind::ALL];
        Self { admission, kinds, denied: 0 }
    }

    /// Is a block to be written that has been used again `touches` times?
    pub(crate) fn admits(&mut self, touches: u8, place: Place) -> bool {
        match self.admission {
            Admission::All => true,
            Admission::SecondUse => touches > 0,
            Admission::Worth(least) => {
                let kind = Self::kind(touches, place);
                let (reads, writes) = self.kinds.get(usize::from(kind)).copied().unwrap_or_default();
                if writes < TRIAL_WRITES || reads >= least * writes {
                    return true;
                }
                self.denied = self.denied.wrapping_add(1);
                self.denied.is_multiple_of(EXPLORE_EVERY)
            }
        }
    }

    /// The number of a block's kind, to be kept with it when it is written.
    pub(crate) fn kind(touches: u8, place: Place) -> u8 {
        Kind::of(touches, place).number()
    }

    /// A block of this kind was written.
    pub(crate) fn wrote(&mut self, kind: u8) {
        if let Some((reads, writes)) = self.kinds.get_mut(usize::from(kind)) {
            *writes += 1.0;
            if *writes > FADE_WRITES {
                (*reads, *writes) = (*reads / 2.0, *writes / 2.0);
            }
        }
    }

    /// A block that was written as this kind was read because it was not in RAM.
    pub(crate) fn read(&mut self, kind: u8) {
        if let Some((reads, _)) = self.kinds.get_mut(usize::from(kind)) {
            *reads += 1.0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_that_is_never_read_is_written_rarely_and_one_that_is_read_always() {
        let mut admitter = Admitter::new(Admission::Worth(0.5));
        let (dead, live) = (Place { depth: 0, blocks: 1, found: 0 }, Place { depth: 0, blocks: 100, found: 0 });
        let (mut dead_writes, mut live_writes) = (0, 0);
        for _ in 0..2_000 {
            if admitter.admits(0, dead) {
                admitter.wrote(Admitter::kind(0, dead));
                dead_writes += 1;
            }
            if admitter.admits(0, live) {
                admitter.wrote(Admitter::kind(0, live));
                admitter.read(Admitter::kind(0, live));
                live_writes += 1;
            }
        }
        assert_eq!(live_writes, 2_000);
        assert!((64..64 + 2_000 / 16 + 1).contains(&dead_writes), "{dead_writes}");
    }

    #[test]
    fn second_use_writes_nothing_that_was_used_once() {
        let mut admitter = Admitter::new(Admission::SecondUse);
        assert!(!admitter.admits(0, Place::default()) && admitter.admits(1, Place::default()));
        assert!(Admitter::new(Admission::All).admits(0, Place::default()));
    }

    #[test]
    fn a_rule_is_read_from_its_name_and_a_wrong_one_is_a_clear_error() {
        let read = |rule: &str| rule.parse::<Admission>();
        assert_eq!(read("all").unwrap(), Admission::All);
        assert_eq!(read("second-use").unwrap(), Admission::SecondUse);
        assert_eq!(read("worth:0.25").unwrap(), Admission::Worth(0.25));
        for wrong in ["", "some", "worth", "worth:", "worth:x", "worth:-1", "worth:NaN", "all:1"] {
            assert!(read(wrong).unwrap_err().to_string().contains("give"), "{wrong}");
        }
        for rule in ["all", "second-use", "worth:0.25"] {
            assert_eq!(read(rule).unwrap().to_string(), rule);
        }
    }
}
