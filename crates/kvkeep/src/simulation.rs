//! The cache without payload: the library's real index, policy and accounting, driven by
//! requests that are lists of block numbers. What `kvkeep replay` runs.
//!
//! One block takes one page. A second implementation would be simpler to make fast, and
//! would prove nothing about the first.

use crate::error::Result;
use crate::eviction::{Place, PolicyKind};
use crate::index::NEVER;
use crate::key::{NamespaceId, ObjectKey};
use crate::store::state::{Request, State, Written, new_entry};
use crate::store::OnPresent;
use crate::tier::ram::{PAGE_BYTES, pages_without_arena};

/// A cache of blocks that have a number and no payload.
#[derive(Debug)]
pub struct Simulation {
    state: State,
    namespace: NamespaceId,
    keys: Vec<ObjectKey>,
}

impl Simulation {
    /// A cache of `capacity_blocks` blocks.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for a capacity of no blocks.
    pub fn new(capacity_blocks: u32, policy: PolicyKind) -> Result<Self> {
        let state = State::new(pages_without_arena(capacity_blocks), policy);
        Ok(Self { state, namespace: NamespaceId::named("simulation"), keys: Vec::new() })
    }

    /// One request, as a live cache sees it: look up, read what is there, store what is
    /// missing. `blocks` are prefix-chained: equal numbers mean equal blocks and equal
    /// everything before them. Returns the blocks that were there, from the first one on.
    pub fn request(&mut self, blocks: &[u64]) -> usize {
        let Self { state, namespace, keys } = self;
        keys.clear();
        keys.extend(blocks.iter().map(|number| ObjectKey::numbered(*number)));
        let request = Request::Tokens { requested: keys.len(), block_tokens: 1 };
        let found = state.hold_run(keys, 0, request);
        let hits = found.len();
        state.release(found);
        if hits < keys.len() {
            let (present, missing, _) = state.reserve(keys, PAGE_BYTES, 0, 0);
            let written = missing.into_iter().filter_map(|(position, extent)| {
                let entry = new_entry(*keys.get(position)?, extent, NEVER, None, 0);
                let parent = position.checked_sub(1).and_then(|before| keys.get(before)).copied();
                Some(Written { entry, parent, place: Place::of(position, keys.len(), hits) })
            });
            state.seal_all(*namespace, written, OnPresent::Keep);
            state.release(present);
        }
        hits
    }

    /// Memory of the policy, in bytes.
    #[must_use]
    pub fn policy_bytes(&self) -> usize {
        self.state.policy_bytes()
    }
}
