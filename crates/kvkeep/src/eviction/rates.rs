//! How soon blocks are used again: rates of reuse by kind and age, learned while the cache runs.
//!
//! For every kind and age two sums are kept: uses at that age, and the time that blocks have
//! waited at that age (measured by looking at a few entries at each touch, so that what is still
//! waiting counts as well as what has come back). Their quotient is the rate of reuse. From the
//! rates follows what keeping a block is worth: the best uses per time that any further waiting
//! promises, which is the Gittins index of a block (Gittins 1979) and what hit density estimates
//! (Beckmann, Chen and Cidon, "LHD", NSDI 2018).
//!
//! Few uses say little, so each rate leans on the rate at that age of its family (the same but
//! for the length of the request), that one on the rate of all kinds, and that one on a rate
//! that falls with age: untaught, this policy is LRU. All blocks of a request come back together
//! and are one observation, not many: so what is leant on counts as a part of one request of
//! average length. A fixed number of uses was the alternative: right for one length of
//! requests only. Old sums fade by half, so that a change of traffic is learned.

use super::Place;

/// Two for each doubling of age, from [`FINEST`] up.
const BINS: usize = 40;
/// Ages are told apart from here on, in touches.
const FINEST: u32 = 16;
/// What is leant on counts as so many requests of average length.
const LEAN: f32 = 0.5;
/// The weight of one request in the average length.
const LATEST: f32 = 0.02;
/// What nothing is known of: one use in ten for each factor e of age.
const UNTAUGHT: f32 = 0.1;
/// Touches between two looks at what the sums say.
const LEARN_EVERY: u32 = 512;
/// Sums fade by half after so many touches for each block known.
const FADE_EVERY: usize = 8;

/// What distinguishes blocks: how often they were touched, how much of the request was there
/// already, how long it was, and whether they ended it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Kind(u8);

#[derive(Debug)]
pub(super) struct Rates {
    kinds: Vec<Sums>,
    widths: [f32; BINS],
    /// Blocks that a request touches or stores, on average; 0 before the first.
    request_blocks: f32,
    since_learned: u32,
    since_faded: usize,
}

#[derive(Debug, Clone, Copy)]
struct Sums {
    uses: [f32; BINS],
    waited: [f32; BINS],
    worth: [f32; BINS],
}

impl Kind {
    pub(super) const FIRST: Self = Self(0);
    pub(super) const ALL: usize = 60;
    /// The bits a kind takes.
    pub(super) const MASK: u32 = 63;
    /// Kinds that differ in the length of the request alone.
    const FAMILY: usize = 4;
    /// Touches 0, 1, 2 to 3, more; part found under an eighth, under three quarters, more;
    /// four lengths; apart from these, the never touched ends.
    const ENDS: u8 = 48;

    pub(super) fn of(touches: u8, place: Place) -> Self {
        let Place { depth, blocks, found } = place;
        let touched = match touches {
            0 | 1 => touches,
            2 | 3 => 2,
            _ => 3,
        };
        let part =
            u8::from(found.saturating_mul(8) >= blocks) + u8::from(found.saturating_mul(4) >= blocks.saturating_mul(3));
        let length = match blocks {
            0..4 => 0,
            4..16 => 1,
            16..64 => 2,
            _ => 3,
        };
        if touches == 0 && depth + 1 >= blocks {
            return Self(Self::ENDS + part * 4 + length);
        }
        Self((touched * 3 + part) * 4 + length)
    }

    pub(super) fn number(self) -> u8 {
        self.0
    }

    pub(super) fn from_number(number: u8) -> Self {
        Self(number)
    }

    /// The least number of touches of this kind.
    pub(super) fn touches(self) -> u8 {
        match self.0 {
            12..24 => 1,
            24..36 => 2,
            36..48 => 4,
            _ => 0,
        }
    }
}

impl Rates {
    pub(super) fn new() -> Self {
        let none = Sums { uses: [0.0; BINS], waited: [0.0; BINS], worth: [0.0; BINS] };
        let mut widths = [0.0; BINS];
        let bounds = (0..BINS).map(|bin| (begin(bin), begin(bin + 1)));
        widths.iter_mut().zip(bounds).for_each(|(width, (from, to))| *width = to - from);
        let mut rates =
            Self { kinds: vec![none; Kind::ALL], widths, request_blocks: 0.0, since_learned: 0, since_faded: 0 };
        rates.conclude();
        rates
    }

    /// A request has touched or stored so many blocks.
    pub(super) fn ended(&mut self, blocks: u32) {
        if blocks > 0 {
            let part = if self.request_blocks > 0.0 { LATEST } else { 1.0 };
            self.request_blocks += part * (float(blocks) - self.request_blocks);
        }
    }

    /// A block of this kind was used again at this age; it stands for `weight` blocks.
    pub(super) fn reused(&mut self, kind: Kind, age: u32, weight: u32) {
        if let Some(uses) = self.sums(kind).and_then(|sums| sums.uses.get_mut(bin(age))) {
            *uses += float(weight);
        }
    }

    /// A block of this kind waits at this age; it stands for `weight` touches of waiting.
    pub(super) fn waits(&mut self, kind: Kind, age: u32, weight: u32) {
        if let Some(waited) = self.sums(kind).and_then(|sums| sums.waited.get_mut(bin(age))) {
            *waited += float(weight);
        }
    }

    /// What keeping a block is worth: uses per touch of waiting.
    pub(super) fn worth(&self, kind: Kind, age: u32) -> f32 {
        let worth = self.kinds.get(kind.0 as usize).and_then(|sums| sums.worth.get(bin(age)));
        worth.copied().unwrap_or(0.0)
    }

    /// Called at each touch, with the number of blocks that are known, resident or not.
    pub(super) fn learn(&mut self, known: usize) {
        self.since_learned += 1;
        if self.since_learned < LEARN_EVERY {
            return;
        }
        self.since_faded += self.since_learned as usize;
        self.since_learned = 0;
        if self.since_faded > FADE_EVERY * known {
            self.since_faded = 0;
            for sums in &mut self.kinds {
                sums.uses.iter_mut().chain(&mut sums.waited).for_each(|sum| *sum *= 0.5);
            }
        }
        self.conclude();
    }

    pub(super) fn memory_bytes(&self) -> usize {
        self.kinds.capacity() * size_of::<Sums>()
    }

    fn sums(&mut self, kind: Kind) -> Option<&mut Sums> {
        self.kinds.get_mut(kind.0 as usize)
    }

    /// From the sums to what each kind is worth at each age.
    fn conclude(&mut self) {
        let mut untaught = [0.0; BINS];
        untaught.iter_mut().enumerate().for_each(|(bin, rate)| *rate = UNTAUGHT / begin(bin));
        let lean = LEAN * self.request_blocks.max(1.0);
        let common = together(&self.kinds, &untaught, lean);
        for family in self.kinds.chunks_mut(Kind::FAMILY) {
            let shared = together(family, &common, lean);
            family.iter_mut().for_each(|sums| sums.conclude(&shared, &self.widths, lean));
        }
    }
}

/// The rates of several kinds taken together.
fn together(kinds: &[Sums], lean_on: &[f32; BINS], lean: f32) -> [f32; BINS] {
    let (mut uses, mut waited) = ([0.0f32; BINS], [0.0f32; BINS]);
    for sums in kinds {
        uses.iter_mut().zip(&sums.uses).for_each(|(sum, part)| *sum += part);
        waited.iter_mut().zip(&sums.waited).for_each(|(sum, part)| *sum += part);
    }
    let mut rates = *lean_on;
    rates
        .iter_mut()
        .zip(uses.iter().zip(&waited))
        .for_each(|(rate, (uses, waited))| *rate = leaning(*uses, *waited, *rate, lean));
    rates
}

/// A stretch of waiting: uses it promises, how long it takes on average, and how likely it ends
/// without a use.
#[derive(Debug, Clone, Copy)]
struct Stretch {
    uses: f32,
    time: f32,
    left: f32,
}

impl Sums {
    /// From the oldest age down: a stretch is joined with the one behind it while that one is
    /// worth more, so that each is worth the best that any further waiting promises.
    fn conclude(&mut self, common: &[f32; BINS], widths: &[f32; BINS], lean: f32) {
        let mut behind = [Stretch { uses: 0.0, time: 1.0, left: 0.0 }; BINS];
        let mut depth: usize = 0;
        let sums = self.uses.iter().zip(&self.waited).zip(&mut self.worth);
        for (((uses, waited), worth), (common, width)) in sums.zip(common.iter().zip(widths)).rev() {
            let rate = leaning(*uses, *waited, *common, lean);
            let left = (-rate * width).exp();
            let mut here = Stretch { uses: 1.0 - left, time: (1.0 - left) / rate, left };
            while let Some(next) = depth.checked_sub(1).and_then(|top| behind.get(top)) {
                if next.uses * here.time <= here.uses * next.time {
                    break;
                }
                here = Stretch {
                    uses: here.uses + here.left * next.uses,
                    time: here.time + here.left * next.time,
                    left: here.left * next.left,
                };
                depth -= 1;
            }
            *worth = here.uses / here.time;
            if let Some(top) = behind.get_mut(depth) {
                *top = here;
            }
            depth += 1;
        }
    }
}

/// A rate that is leant on another one as if that one had been seen for `lean` uses.
fn leaning(uses: f32, waited: f32, rate: f32, lean: f32) -> f32 {
    (uses + lean) / (waited + lean / rate)
}

fn bin(age: u32) -> usize {
    let age = (age / FINEST).max(1);
    let doublings = age.ilog2();
    let half = if doublings == 0 { 0 } else { (age >> (doublings - 1)) & 1 };
    ((2 * doublings + half) as usize).min(BINS - 1)
}

/// The age at which a bin begins.
fn begin(bin: usize) -> f32 {
    if bin == 0 {
        return 1.0;
    }
    let doublings = i32::try_from(bin / 2).unwrap_or(i32::MAX);
    let half = if bin % 2 == 1 { 1.5 } else { 1.0 };
    float(FINEST) * 2f32.powi(doublings) * half
}

#[expect(clippy::cast_precision_loss, reason = "a statistic")]
fn float(count: u32) -> f32 {
    count as f32
}
