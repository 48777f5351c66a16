//! The same code once more, compiled for AVX2 and BMI2: what codecs do to a frame.
//!
//! Invariant: nothing is written twice. Compilers make vectors of the loops and single instructions of the shifts, and
//! what is stored is the same by construction: no feature that rounds otherwise (FMA) is among them. Intrinsics were
//! the alternative: a twin to keep in step.

#![cfg_attr(target_arch = "x86_64", expect(unsafe_code, reason = "calls what is compiled for a certain processor"))]

/// What is compiled once for any processor and once for wide ones: all that it calls must be `#[inline(always)]`.
pub(super) trait Work {
    type Out;
    fn run(self) -> Self::Out;
}

/// Proof that this processor has what [`Wide::run`] is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Wide(());

/// As fast as this processor allows, if it may be.
pub(super) fn run<W: Work>(wide: Option<Wide>, work: W) -> W::Out {
    match wide {
        Some(wide) => wide.run(work),
        None => work.run(),
    }
}

impl Wide {
    #[cfg(not(target_arch = "x86_64"))]
    pub(super) fn detected() -> Option<Self> {
        None
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn run<W: Work>(self, work: W) -> W::Out {
        work.run()
    }

    #[cfg(target_arch = "x86_64")]
    pub(super) fn detected() -> Option<Self> {
        let is_there = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("bmi1")
            && is_x86_feature_detected!("bmi2")
            && is_x86_feature_detected!("lzcnt");
        is_there.then_some(Self(()))
    }

    #[cfg(target_arch = "x86_64")]
    fn run<W: Work>(self, work: W) -> W::Out {
        // SAFETY: a `Wide` is made only where all features are there.
        unsafe { compiled(work) }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,bmi1,bmi2,lzcnt")]
fn compiled<W: Work>(work: W) -> W::Out {
    work.run()
}
