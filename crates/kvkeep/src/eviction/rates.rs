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
//! for the length of the request), that one on the rate of all kinds touched as often, that one
//! on the rate of all kinds, and that one on a rate that falls with age: untaught, this policy is
//! LRU. Families that leant on all kinds at once were the alternative: each had to learn by itself
//! that what was never touched is used less. All blocks of a request come back together and are
//! one observation, not many: so what is leant on counts as a part of one request of average
//! length. A fixed number of uses was the alternative: right for one length of requests only.
//! Old sums fade by half, so that a change of traffic is learned.
//!
//! One bin of ages for each doubling, with what a block is worth drawn as a line between them.
//! Two bins for each, worth a step each, were the alternative: twice the memory, and each
//! learned from half as much.

use std::ops::Range;

use super::Place;

/// Ages are told apart from here on, in touches: the first bin ends at twice as many.
const FINEST: u32 = 64;
/// Before anything is known.
const FEWEST_BINS: usize = 5;
/// Enough for every age that can be told.
const MOST_BINS: usize = 26;
/// There are bins for ages of up to so many touches for each block known: few blocks are older.
const REACH: usize = 4;
/// What is seen in a bin counts by so much in each of its neighbours.
const SPREAD: f32 = 0.25;
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
    /// From the youngest age up.
    bins: Vec<[Sums; Kind::ALL]>,
    /// Blocks that a request touches or stores, on average; 0 before the first.
    request_blocks: f32,
    since_learned: u32,
    since_faded: usize,
}

#[derive(Debug, Clone, Copy)]
struct Sums {
    uses: f32,
    waited: f32,
    /// At the age at which the bin begins.
    worth: f32,
}

/// Uses per touch of waiting, by age.
type Curve = [f32; MOST_BINS];

impl Kind {
    pub(super) const FIRST: Self = Self(0);
    pub(super) const ALL: usize = 60;
    /// The bits a kind takes.
    pub(super) const MASK: u32 = 63;
    /// Kinds that differ in the length of the request alone.
    const FAMILY: usize = 4;
    /// Kinds that were touched as often: never, once, 2 to 3 times, more.
    const TOUCHED_ALIKE: [Range<usize>; 4] = [0..24, 24..36, 36..48, 48..60];

    /// Five times three parts found (under an eighth, under three quarters, more) times four lengths.
    pub(super) fn of(touches: u8, place: Place) -> Self {
        let Place { depth, blocks, found } = place;
        let touched = match touches {
            0 if depth + 1 >= blocks => 0,
            0 => 1,
            1 => 2,
            2 | 3 => 3,
            _ => 4,
        };
        let part =
            u8::from(found.saturating_mul(8) >= blocks) + u8::from(found.saturating_mul(4) >= blocks.saturating_mul(3));
        let length = match blocks {
            0..4 => 0,
            4..16 => 1,
            16..64 => 2,
            _ => 3,
        };
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
            0..24 => 0,
            24..36 => 1,
            36..48 => 2,
            _ => 4,
        }
    }
}

impl Rates {
    pub(super) fn new() -> Self {
        let mut rates = Self { bins: Vec::new(), request_blocks: 0.0, since_learned: 0, since_faded: 0 };
        rates.reach(0);
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

    /// A block of this kind was used again at this age.
    pub(super) fn reused(&mut self, kind: Kind, age: u32) {
        if let Some(sums) = self.sums(kind, age) {
            sums.uses += 1.0;
        }
    }

    /// A block of this kind waits at this age; it stands for `weight` touches of waiting.
    pub(super) fn waits(&mut self, kind: Kind, age: u32, weight: u32) {
        if let Some(sums) = self.sums(kind, age) {
            sums.waited += float(weight);
        }
    }

    /// What keeping a block is worth: uses per touch of waiting.
    pub(super) fn worth(&self, kind: Kind, age: u32) -> f32 {
        let worth = |bin: usize| Some(self.bins.get(bin)?.get(kind.0 as usize)?.worth);
        let (bin, part) = place(age);
        match (worth(bin), worth(bin + 1)) {
            (Some(here), Some(next)) => here + part * (next - here),
            _ => worth(self.bins.len() - 1).unwrap_or(0.0),
        }
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
            for sums in self.bins.iter_mut().flatten() {
                sums.uses *= 0.5;
                sums.waited *= 0.5;
            }
        }
        self.reach(known);
        self.conclude();
    }

    pub(super) fn memory_bytes(&self) -> usize {
        self.bins.capacity() * size_of::<[Sums; Kind::ALL]>()
    }

    fn sums(&mut self, kind: Kind, age: u32) -> Option<&mut Sums> {
        let bin = place(age).0.min(self.bins.len() - 1);
        self.bins.get_mut(bin)?.get_mut(kind.0 as usize)
    }

    /// Bins for the ages that so many known blocks come to.
    fn reach(&mut self, known: usize) {
        let enough =
            |bins: &Vec<_>| bins.len() >= FEWEST_BINS && begin(bins.len()) as usize >= REACH.saturating_mul(known);
        while self.bins.len() < MOST_BINS && !enough(&self.bins) {
            self.bins.reserve_exact(1);
            self.bins.push([Sums { uses: 0.0, waited: 0.0, worth: 0.0 }; Kind::ALL]);
        }
    }

    /// From the sums to what each kind is worth at each age.
    fn conclude(&mut self) {
        let lean = LEAN * self.request_blocks.max(1.0);
        let mut untaught = [0.0; MOST_BINS];
        untaught.iter_mut().enumerate().for_each(|(bin, rate)| *rate = UNTAUGHT / float(begin(bin)));
        let common = self.rates(0..Kind::ALL, &untaught, lean);
        for alike in Kind::TOUCHED_ALIKE {
            let touched = self.rates(alike.clone(), &common, lean);
            for family in alike.step_by(Kind::FAMILY) {
                let shared = self.rates(family..family + Kind::FAMILY, &touched, lean);
                for kind in family..family + Kind::FAMILY {
                    let rates = self.rates(kind..kind + 1, &shared, lean);
                    self.judge(kind, &rates);
                }
            }
        }
    }

    /// The rates of several kinds taken together, leant on others as if those had been seen for
    /// `lean` uses.
    fn rates(&self, kinds: Range<usize>, lean_on: &Curve, lean: f32) -> Curve {
        let (mut uses, mut waited) = ([0.0f32; MOST_BINS], [0.0f32; MOST_BINS]);
        for ((uses, waited), bin) in uses.iter_mut().zip(&mut waited).zip(&self.bins) {
            for sums in bin.get(kinds.clone()).unwrap_or_default() {
                *uses += sums.uses;
                *waited += sums.waited;
            }
        }
        let (uses, waited) = (spread(&uses), spread(&waited));
        let mut rates = *lean_on;
        let seen = uses.iter().zip(&waited);
        rates.iter_mut().zip(seen).for_each(|(rate, (uses, waited))| *rate = (uses + lean) / (waited + lean / *rate));
        rates
    }

    /// From the oldest age down: a stretch is joined with the one behind it while that one is
    /// worth more, so that each is worth the best that any further waiting promises.
    fn judge(&mut self, kind: usize, rates: &Curve) {
        let mut behind = [Stretch { uses: 0.0, time: 1.0, left: 0.0 }; MOST_BINS];
        let mut depth: usize = 0;
        for ((number, bin), rate) in self.bins.iter_mut().enumerate().zip(rates).rev() {
            let left = (-rate * float(begin(number + 1) - begin(number))).exp();
            let mut here = Stretch { uses: 1.0 - left, time: (1.0 - left) / rate, left };
            while let Some(next) = depth.checked_sub(1).and_then(|top| behind.get(top)) {
                if next.uses * here.time <= here.uses * next.time {
                    break;
                }
                here = here.then(next);
                depth -= 1;
            }
            if let Some(sums) = bin.get_mut(kind) {
                sums.worth = here.uses / here.time;
            }
            if let Some(top) = behind.get_mut(depth) {
                *top = here;
            }
            depth += 1;
        }
    }
}

/// A stretch of waiting: uses it promises, how long it takes on average, and how likely it ends
/// without a use.
#[derive(Debug, Clone, Copy)]
struct Stretch {
    uses: f32,
    time: f32,
    left: f32,
}

impl Stretch {
    fn then(self, next: &Self) -> Self {
        Self {
            uses: self.uses + self.left * next.uses,
            time: self.time + self.left * next.time,
            left: self.left * next.left,
        }
    }
}

fn spread(sums: &Curve) -> Curve {
    let mut wider = *sums;
    wider.iter_mut().skip(1).zip(sums).for_each(|(sum, before)| *sum += SPREAD * before);
    wider.iter_mut().zip(sums.iter().skip(1)).for_each(|(sum, after)| *sum += SPREAD * after);
    wider
}

/// The bin that an age is in, and the part of it that lies behind.
fn place(age: u32) -> (usize, f32) {
    let age = age.max(FINEST);
    let bin = (age / FINEST).ilog2();
    let from = FINEST << bin;
    (bin as usize, float(age - from) / float(from))
}

/// The age at which a bin begins; the first one holds all younger ages too.
fn begin(bin: usize) -> u32 {
    match bin {
        0 => 1,
        _ => u32::try_from(u64::from(FINEST) << bin.min(32)).unwrap_or(u32::MAX),
    }
}

#[expect(clippy::cast_precision_loss, reason = "a statistic")]
fn float(count: u32) -> f32 {
    count as f32
}
