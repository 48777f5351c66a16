//! What is to be written, in order: by the callers put in, by the writer taken out.
//!
//! Invariant: of a key only the newest write is wanted; what is not wanted any more stays in the queue and is passed over.
//! Taking it out was the alternative: a removal would then look through the whole queue.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::{Arc, Weak};

use super::coded::Draft;
use super::index::Fingerprint;
use crate::key::{NamespaceId, ObjectKey};
use crate::sync::Mutex;
use crate::tier::Payload;

/// One thing for the writer to do.
pub(crate) enum Op {
    Write(Box<Write>),
    Remove(Vec<ObjectKey>),
    /// A namespace, or everything.
    Clear(Option<NamespaceId>),
    Flush(Arc<Reply>),
    Close(Arc<Reply>),
}

/// A record to be written.
pub(crate) struct Write {
    pub(crate) ticket: u64,
    pub(crate) draft: Arc<Draft>,
    /// Of whoever admitted it, kept with it.
    pub(crate) mark: u8,
    pub(crate) payload: Arc<dyn Payload>,
}

/// A block of which something can be made ahead of the writer, if it still waits.
pub(crate) struct Ahead {
    payload: Weak<dyn Payload>,
    draft: Weak<Draft>,
}

/// What is to be written, in order. Bounded by the bytes of its payloads.
#[derive(Default)]
pub(crate) struct Queue {
    pub(crate) ops: VecDeque<Op>,
    pub(crate) ahead: VecDeque<Ahead>,
    /// Does anybody work ahead?
    pub(crate) works_ahead: bool,
    pub(crate) bytes: u64,
    /// The newest write of each key that is queued or under way: others are of no use.
    wanted: HashMap<Fingerprint, Wanted>,
    last_ticket: u64,
}

/// What is known of a write by its key alone.
#[derive(Debug, Clone, Copy)]
struct Wanted {
    ticket: u64,
    namespace: NamespaceId,
    layer: u32,
    expires_at_ms: u64,
}

/// Where the writer answers. Comes after the state's lock.
#[derive(Debug, Default)]
pub(crate) struct Reply(pub(crate) Mutex<Option<io::Result<()>>>);

impl Queue {
    /// Queues a write, in place of an earlier one of its key. Whoever drops the payload counts its bytes out.
    pub(crate) fn push(&mut self, draft: Draft, mark: u8, payload: Arc<dyn Payload>) {
        self.last_ticket += 1;
        let (ticket, meta) = (self.last_ticket, draft.meta);
        let wanted =
            Wanted { ticket, namespace: meta.namespace, layer: meta.key.layer(), expires_at_ms: meta.expires_at_ms };
        self.wanted.insert(Fingerprint::of(&meta.key.0), wanted);
        self.bytes += payload.bytes().len() as u64;
        let draft = Arc::new(draft);
        if self.works_ahead && draft.is_work() {
            self.ahead.push_back(Ahead { payload: Arc::downgrade(&payload), draft: Arc::downgrade(&draft) });
        }
        self.ops.push_back(Op::Write(Box::new(Write { ticket, draft, mark, payload })));
    }

    /// Is a write of this key queued or under way?
    pub(super) fn has(&self, key: &ObjectKey) -> bool {
        self.wanted.contains_key(&Fingerprint::of(key))
    }

    /// And has what is written not expired?
    pub(crate) fn wants(&self, key: &ObjectKey, now_ms: u64) -> bool {
        self.wanted.get(&Fingerprint::of(key)).is_some_and(|wanted| wanted.expires_at_ms > now_ms)
    }

    /// One more than the highest layer of a namespace that is queued or under way.
    pub(super) fn layers(&self, id: NamespaceId) -> u32 {
        self.wanted.values().filter(|wanted| wanted.namespace == id).map(|wanted| wanted.layer + 1).max().unwrap_or(0)
    }

    /// Is this the newest write of its key?
    pub(crate) fn is_wanted(&self, key: &ObjectKey, ticket: u64) -> bool {
        self.wanted.get(&Fingerprint::of(key)).is_some_and(|newest| newest.ticket == ticket)
    }

    /// A write is done with, one way or the other. Its payload counts until it is dropped.
    pub(crate) fn finish(&mut self, key: &ObjectKey, ticket: u64) {
        if self.is_wanted(key, ticket) {
            self.wanted.remove(&Fingerprint::of(key));
        }
    }

    /// Nobody wants this key to be written any more; says whether it was to be.
    pub(crate) fn forget(&mut self, key: &ObjectKey) -> bool {
        self.wanted.remove(&Fingerprint::of(key)).is_some()
    }

    /// Nobody wants anything of a namespace, or anything at all.
    pub(crate) fn forget_all(&mut self, namespace: Option<NamespaceId>) {
        self.wanted.retain(|_, wanted| namespace.is_some_and(|namespace| namespace != wanted.namespace));
    }

    /// Takes out all writes that have not begun; the caller drops them without the lock.
    pub(crate) fn cancel_writes(&mut self) -> Vec<Write> {
        let (mut writes, mut kept) = (Vec::new(), VecDeque::new());
        for op in self.ops.drain(..) {
            match op {
                Op::Write(write) => writes.push(*write),
                other => kept.push_back(other),
            }
        }
        self.ops = kept;
        for write in &writes {
            self.finish(&write.draft.meta.key.0, write.ticket);
        }
        writes
    }
}

impl Ahead {
    /// Makes what is written of it, if it still waits and nobody has. Gives it back to be looked at again.
    pub(crate) fn make(&self) -> Weak<Draft> {
        if let (Some(payload), Some(draft)) = (self.payload.upgrade(), self.draft.upgrade())
            && draft.is_work()
        {
            draft.form(payload.bytes());
        }
        Weak::clone(&self.draft)
    }
}
