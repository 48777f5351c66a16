//! Parts of payloads, read without bringing their blocks up: a range of layers.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use super::guard::Pin;
use super::plan::{Plan, Whereabouts};
use super::tiers::Tiers;
use crate::block::{BlockKey, BlockMeta};
use crate::clock::Deadline;
use crate::key::ObjectKey;
use crate::sync::{Condvar, Mutex};
use crate::tier::{Read, ReadTarget};

/// Parts of payloads under way at a time.
const PARTS_AT_ONCE: usize = 8;

/// A part of a payload that a tier reads.
struct Part {
    bytes: Vec<u8>,
    answer: Arc<Answer>,
}

/// Where a part is handed over.
#[derive(Default)]
struct Answer {
    /// The part, or that there is none, once that is known.
    part: Mutex<Option<Option<Vec<u8>>>>,
    known: Condvar,
}

impl Tiers {
    /// Hands these bytes of the first `wanted` blocks of a plan to `each`, in order, until one is not there. Gives
    /// what is held of the run, and says how many blocks there were.
    pub(super) fn read_parts(
        &self,
        keys: &[ObjectKey],
        plan: Plan,
        wanted: usize,
        range: &Range<usize>,
        each: &mut impl FnMut(usize, &[u8]),
        deadline: Deadline,
    ) -> (Pin, usize) {
        let mut positions = Vec::new();
        let mut pin = Pin::new(Arc::clone(self.shared()), Vec::new());
        for (position, held) in plan.held {
            positions.push(position);
            pin.extend(vec![held]);
        }
        let mut reads: VecDeque<Option<Arc<Answer>>> = VecDeque::new();
        let (mut done, mut begun) = (0, 0);
        let mut held = positions.iter().enumerate().peekable();
        while done < wanted {
            while begun < wanted && reads.len() < PARTS_AT_ONCE {
                reads.push_back(self.begin_part(keys, (&plan.places, plan.waited), begun, range));
                begun += 1;
            }
            match reads.pop_front().flatten() {
                None => {
                    let Some((at, _)) = held.next_if(|(_, position)| **position == done) else { break };
                    let bytes = pin.bytes(at);
                    let part = range.start.min(bytes.len())..range.end.min(bytes.len());
                    each(done, bytes.get(part).unwrap_or_default());
                }
                Some(answer) => match answer.wait(deadline) {
                    Ok(Some(bytes)) => each(done, &bytes),
                    Ok(None) => break,
                    Err(()) => {
                        self.each().for_each(|tier| tier.gave_up_waiting());
                        break;
                    }
                },
            }
            done += 1;
        }
        let used = positions.iter().take_while(|position| **position < done).count();
        pin.truncate(used);
        (pin, done)
    }

    /// `None` if it is not in a tier.
    fn begin_part(
        &self,
        keys: &[ObjectKey],
        (places, waited): (&[Whereabouts], Duration),
        position: usize,
        range: &Range<usize>,
    ) -> Option<Arc<Answer>> {
        let (Some(Whereabouts::Tier(number, located)), Some(key)) = (places.get(position), keys.get(position)) else {
            return None;
        };
        let answer = Arc::<Answer>::default();
        let target = Box::new(Part { bytes: vec![0; range.len()], answer: Arc::clone(&answer) });
        let (key, namespace) = (BlockKey(*key), located.namespace);
        let mark = located.mark;
        self.tier(*number)?.read(vec![Read { key, namespace, range: Some(range.clone()), waited, target }]);
        self.shared().with(|ledger| ledger.read_below(mark));
        Some(answer)
    }
}

impl Answer {
    /// `Err` if the time is over.
    fn wait(&self, deadline: Deadline) -> Result<Option<Vec<u8>>, ()> {
        let mut part = self.part.lock();
        loop {
            if let Some(known) = part.take() {
                return Ok(known);
            }
            if deadline.is_over() {
                return Err(());
            }
            (part, _) = self.known.wait_timeout(part, deadline.left());
        }
    }

    /// What is said first counts.
    fn say(&self, said: Option<Vec<u8>>) {
        self.part.lock().get_or_insert(said);
        self.known.notify_all();
    }
}

impl ReadTarget for Part {
    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    fn complete(mut self: Box<Self>, read: Option<BlockMeta>) {
        let bytes = std::mem::take(&mut self.bytes);
        self.answer.say(read.map(|_| bytes));
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        self.answer.say(None);
    }
}
