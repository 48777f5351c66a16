//! The exact optimum: what a cache that knows the future would reach.
//!
//! After each request the blocks that are needed soonest stay (Belady 1966, with bypass). On
//! prefix chains that is consistent with leaves first: a block is needed whenever one behind it
//! is, so never later, and among blocks of one next request the ones nearer to the root stay.
//! What is kept is then a set of whole prefixes, in which Belady's hits, the most that any
//! cache reaches without the rule of prefixes, all satisfy it.

use std::collections::{BTreeSet, HashMap};

use super::trace::Request;

/// When a block is needed next, how deep it lies, and the block.
type Need = (usize, usize, u64);

/// Blocks that hit with the best decisions, of all requests together.
pub(crate) fn hits(requests: &[Request], capacity_blocks: usize) -> usize {
    let mut needs = needs(requests).into_iter();
    let mut kept: BTreeSet<Need> = BTreeSet::new();
    let mut known: HashMap<u64, Need> = HashMap::new();
    let mut hits = 0;
    for request in requests {
        let mut unbroken = true;
        for (depth, block) in request.blocks.iter().enumerate() {
            let resident = known.remove(block).is_some_and(|need| kept.remove(&need));
            unbroken &= resident;
            hits += usize::from(unbroken);
            if let Some(Some(next)) = needs.next() {
                let need = (next, depth, *block);
                kept.insert(need);
                known.insert(*block, need);
            }
        }
        while kept.len() > capacity_blocks {
            if let Some((_, _, block)) = kept.pop_last() {
                known.remove(&block);
            }
        }
    }
    hits
}

/// For each block of each request, the next request that needs it.
fn needs(requests: &[Request]) -> Vec<Option<usize>> {
    let mut next = HashMap::new();
    let mut needs = Vec::with_capacity(requests.iter().map(|request| request.blocks.len()).sum());
    for (number, request) in requests.iter().enumerate().rev() {
        needs.extend(request.blocks.iter().rev().map(|block| next.insert(*block, number)));
    }
    needs.reverse();
    needs
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    /// The most hits from here on, by trying every set of blocks that may stay.
    fn brute_force(requests: &[Request], resident: &[u64], capacity: usize) -> usize {
        let Some((first, rest)) = requests.split_first() else { return 0 };
        let hits = first.blocks.iter().take_while(|block| resident.contains(block)).count();
        let all: Vec<u64> = resident.iter().chain(&first.blocks).copied().collect::<HashSet<_>>().into_iter().collect();
        let subsets = (0u32..1 << all.len()).filter(|set| set.count_ones() as usize <= capacity);
        let best = subsets.map(|set| {
            let kept: Vec<u64> =
                all.iter().enumerate().filter(|(at, _)| set & (1 << at) != 0).map(|(_, block)| *block).collect();
            brute_force(rest, &kept, capacity)
        });
        hits + best.max().unwrap_or(0)
    }

    /// Paths in a small tree: block 1 is the root, 2n and 2n + 1 are the children of n.
    fn path(leaf: u64) -> Request {
        let mut blocks: Vec<u64> = std::iter::successors(Some(leaf), |n| (n / 2 > 0).then_some(n / 2)).collect();
        blocks.reverse();
        Request { at_ms: None, tokens: blocks.len() as u64, blocks }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]

        #[test]
        fn nobody_who_tries_everything_does_better(leaves in prop::collection::vec(2u64..8, 1..6), capacity in 0usize..4) {
            let requests: Vec<Request> = leaves.into_iter().map(path).collect();
            prop_assert_eq!(hits(&requests, capacity), brute_force(&requests, &[], capacity));
        }
    }

    #[test]
    fn an_unbounded_cache_misses_each_block_once() {
        let requests: Vec<Request> = [4, 5, 4, 6].map(path).into();
        assert_eq!(hits(&requests, 100), 12 - 6);
        assert_eq!(hits(&requests, 0), 0);
    }
}
