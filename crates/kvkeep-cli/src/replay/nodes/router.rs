//! A router that knows by events which node has which block, as of a moment ago.
//!
//! The longest prefix wins, among nodes that are not over the load limit; then fewer requests under way. A weighted sum of
//! both was the alternative: its weight is a figure of an engine, and a limit is a promise to the busiest node.

use std::collections::{HashMap, VecDeque};

use kvkeep::Changes;

/// A request counts as under way for so long: an answer of 340 tokens at 30 ms each.
const UNDER_WAY_MS: u32 = 10_000;
/// A prefix counts if it is so much of the prompt. Where a system prompt counted, the first nodes that had it drew all new
/// sessions up to the limit, and those under way had to leave: 9% of blocks in place of 17 on 100 nodes.
const WORTH_PART: usize = 4;

#[derive(Debug)]
pub(super) struct Router {
    delay_ms: u32,
    load_limit: f64,
    /// Nodes that are believed to have a block.
    holders: HashMap<u64, Vec<u16>>,
    /// When it is heard, by which node it was sent, and what it says.
    coming: VecDeque<(u32, u16, Changes)>,
    /// When it ends, and where.
    requests: VecDeque<(u32, u16)>,
    under_way: Vec<u32>,
}

impl Router {
    pub(super) fn new(nodes: u16, delay_ms: u32, load_limit: f64) -> Self {
        Self {
            delay_ms,
            load_limit,
            holders: HashMap::new(),
            coming: VecDeque::new(),
            requests: VecDeque::new(),
            under_way: vec![0; usize::from(nodes)],
        }
    }

    /// The node for a request that comes now.
    pub(super) fn choose(&mut self, now_ms: u32, blocks: &[u64]) -> u16 {
        self.hear(now_ms);
        while let Some((_, node)) = self.requests.pop_front_if(|(ends, _)| *ends <= now_ms) {
            self.count(node, -1);
        }
        let mean = crate::stats::ratio(
            crate::stats::float(self.requests.len() + 1),
            crate::stats::float(self.under_way.len()),
        );
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "casts of floats stay in range")]
        let limit = (mean * self.load_limit).ceil() as u32;
        let load = |node: &u16| self.under_way.get(usize::from(*node)).copied().unwrap_or(u32::MAX);
        let has = |block: &u64| {
            let holders = self.holders.get(block)?;
            holders.iter().copied().filter(|node| load(node) < limit).min_by_key(load)
        };
        let anyone = || (0..=u16::MAX).zip(&self.under_way).min_by_key(|(_, load)| **load).map_or(0, |(node, _)| node);
        let least = blocks.len().div_ceil(WORTH_PART);
        let node = blocks.iter().skip(least.saturating_sub(1)).rev().find_map(has).unwrap_or_else(anyone);
        self.requests.push_back((now_ms.saturating_add(UNDER_WAY_MS), node));
        self.count(node, 1);
        node
    }

    /// A node tells what a request changed.
    pub(super) fn tell(&mut self, now_ms: u32, node: u16, changes: Changes) {
        self.coming.push_back((now_ms.saturating_add(self.delay_ms), node, changes));
    }

    fn hear(&mut self, now_ms: u32) {
        while let Some((_, node, changes)) = self.coming.pop_front_if(|(heard, ..)| *heard <= now_ms) {
            for block in changes.stored {
                self.holders.entry(block).or_default().push(node);
            }
            for block in changes.removed {
                let Some(holders) = self.holders.get_mut(&block) else { continue };
                holders.retain(|holder| *holder != node);
                if holders.is_empty() {
                    self.holders.remove(&block);
                }
            }
        }
    }

    fn count(&mut self, node: u16, change: i32) {
        if let Some(load) = self.under_way.get_mut(usize::from(node)) {
            *load = load.saturating_add_signed(change);
        }
    }
}
