//! Which prefixes requests have had in common: a compressed radix tree over block hashes,
//! with the tokens of each branch, how many requests went through it, and when the last did.
//!
//! Invariants:
//! - A branch is named by the hash of its last block, which covers its namespace and everything
//!   before it. When a branch is split its lower part keeps the name, so a name that was handed
//!   out stays true.
//! - A parent was used at least as often and as lately as each of its children.
//! - There are never more branches or tokens than the limits say, but for pinned ones and what
//!   they hang from: the coldest leaves go first.
//!
//! Asking the cache for its chains was the alternative: it keeps hashes alone, no tokens, and
//! forgets what it evicts, which is what an operator wants to see.

use std::collections::HashMap;
use std::time::Instant;

use kvkeep::{BlockHash, Namespace, NamespaceId, TokenId};

use crate::auth::Tenant;

/// How much is remembered.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) branches: usize,
    pub(crate) tokens: usize,
}

#[derive(Debug)]
pub(crate) struct PrefixTree {
    limits: Limits,
    branches: HashMap<BlockHash, Branch>,
    roots: HashMap<NamespaceId, Root>,
    tokens: usize,
}

/// A namespace in which prompts were answered.
#[derive(Debug)]
pub(crate) struct Root {
    pub(crate) namespace: Namespace,
    pub(crate) tenant: Tenant,
    children: Children,
}

/// A run of blocks that requests had in common.
#[derive(Debug)]
struct Branch {
    namespace: NamespaceId,
    parent: Option<BlockHash>,
    first_token: usize,
    hashes: Vec<BlockHash>,
    tokens: Vec<TokenId>,
    children: Children,
    requests: u64,
    last_used: Instant,
    pinned: bool,
}

/// The first block of each child → the child's name.
type Children = HashMap<BlockHash, BlockHash>;

/// A branch, as it is shown.
#[derive(Debug, Clone)]
pub(crate) struct BranchView {
    pub(crate) id: BlockHash,
    pub(crate) parent: Option<BlockHash>,
    pub(crate) namespace: NamespaceId,
    pub(crate) tenant: Tenant,
    pub(crate) first_token: usize,
    pub(crate) tokens: usize,
    /// The first of its tokens.
    pub(crate) begin: Vec<TokenId>,
    pub(crate) requests: u64,
    pub(crate) last_used: Instant,
    pub(crate) pinned: bool,
}

/// A prompt from its first token to a branch's last.
#[derive(Debug, Clone)]
pub(crate) struct Path {
    pub(crate) namespace: Namespace,
    pub(crate) tokens: Vec<TokenId>,
    /// Where the branch begins.
    pub(crate) first_token: usize,
}

impl Default for Limits {
    /// About 6 MB: 4 bytes a token and 32 a block, of which there are usually 16 tokens.
    fn default() -> Self {
        Self { branches: 4096, tokens: 1 << 20 }
    }
}

impl PrefixTree {
    pub(crate) fn new(limits: Limits) -> Self {
        Self { limits, branches: HashMap::new(), roots: HashMap::new(), tokens: 0 }
    }

    /// As [`PrefixTree::insert_hashed`], of a prompt that nobody has hashed.
    #[cfg(test)]
    pub(crate) fn insert(
        &mut self,
        namespace: &Namespace,
        tenant: &Tenant,
        prompt: &[TokenId],
        now: Instant,
    ) -> Option<BlockHash> {
        let hashes = namespace.block_hashes(prompt).unwrap_or_default();
        self.insert_hashed(namespace, tenant, prompt, &hashes, now)
    }

    /// A request went through the full blocks of this prompt, which have these names. Names the branch in which they
    /// end.
    pub(crate) fn insert_hashed(
        &mut self,
        namespace: &Namespace,
        tenant: &Tenant,
        prompt: &[TokenId],
        hashes: &[BlockHash],
        now: Instant,
    ) -> Option<BlockHash> {
        let last = *hashes.last()?;
        let new_root = || Root { namespace: namespace.clone(), tenant: tenant.clone(), children: Children::new() };
        self.roots.entry(namespace.id()).or_insert_with(new_root);
        let (mut at, mut depth) = (None, 0);
        while let Some(next) = hashes.get(depth) {
            let rest = hashes.get(depth..).unwrap_or_default();
            let child = self.children_mut(namespace.id(), at).and_then(|children| children.get(next).copied());
            let (id, blocks) = match child {
                Some(child) => self.shared(child, rest),
                None => {
                    let first_token = depth * namespace.layout().block_tokens();
                    self.add_leaf(namespace, at, prompt, first_token, rest, now);
                    (last, rest.len())
                }
            };
            if let Some(branch) = self.branches.get_mut(&id) {
                branch.requests += 1;
                branch.last_used = branch.last_used.max(now);
            }
            (at, depth) = (Some(id), depth + blocks.max(1));
        }
        self.trim();
        Some(last)
    }

    /// The branch with this name, and everything before it.
    pub(crate) fn path(&self, id: BlockHash) -> Option<Path> {
        let branch = self.branches.get(&id)?;
        let namespace = self.roots.get(&branch.namespace)?.namespace.clone();
        let mut line = vec![branch];
        while let Some(parent) = line.last().and_then(|branch| self.branches.get(&branch.parent?)) {
            line.push(parent);
        }
        let tokens = line.iter().rev().flat_map(|branch| branch.tokens.iter().copied()).collect();
        Some(Path { namespace, tokens, first_token: branch.first_token })
    }

    /// The names of a branch and of everything behind it; a parent comes before its children.
    pub(crate) fn subtree(&self, id: BlockHash) -> Vec<BlockHash> {
        let mut found = Vec::from_iter(self.branches.contains_key(&id).then_some(id));
        let mut next = 0;
        while let Some(branch) = found.get(next).and_then(|id| self.branches.get(id)) {
            found.extend(branch.children.values().copied());
            next += 1;
        }
        found
    }

    pub(crate) fn is_leaf(&self, id: BlockHash) -> bool {
        self.branches.get(&id).is_some_and(|branch| branch.children.is_empty())
    }

    /// Forgets a branch and everything behind it.
    pub(crate) fn remove(&mut self, id: BlockHash) {
        for id in self.subtree(id).into_iter().rev() {
            self.remove_leaf(id);
        }
    }

    /// Forgets a namespace, or everything.
    pub(crate) fn clear(&mut self, namespace: Option<NamespaceId>) {
        let gone = |id: &NamespaceId| namespace.is_none_or(|namespace| namespace == *id);
        self.branches.retain(|_, branch| !gone(&branch.namespace));
        self.roots.retain(|id, _| !gone(id));
        self.tokens = self.branches.values().map(|branch| branch.tokens.len()).sum();
    }

    /// A pinned branch is not forgotten. Says whether there is such a branch.
    pub(crate) fn set_pinned(&mut self, id: BlockHash, pinned: bool) -> bool {
        let branch = self.branches.get_mut(&id);
        branch.map(|branch| branch.pinned = pinned).is_some()
    }

    /// Namespaces with branches.
    pub(crate) fn roots(&self) -> impl Iterator<Item = &Root> {
        self.roots.values()
    }

    /// The most used branches, at most so many; the parents of each are among those before it.
    pub(crate) fn hottest(&self, limit: usize, begin_tokens: usize) -> Vec<BranchView> {
        let mut all: Vec<_> = self.branches.iter().collect();
        all.sort_unstable_by(|(_, a), (_, b)| {
            let heat = |branch: &Branch| (branch.requests, branch.last_used);
            heat(b).cmp(&heat(a)).then(a.first_token.cmp(&b.first_token))
        });
        let view = |(id, branch): (&BlockHash, &Branch)| {
            Some(BranchView {
                id: *id,
                parent: branch.parent,
                namespace: branch.namespace,
                tenant: self.roots.get(&branch.namespace)?.tenant.clone(),
                first_token: branch.first_token,
                tokens: branch.tokens.len(),
                begin: branch.tokens.iter().copied().take(begin_tokens).collect(),
                requests: branch.requests,
                last_used: branch.last_used,
                pinned: branch.pinned,
            })
        };
        all.into_iter().take(limit).filter_map(view).collect()
    }

    fn children_mut(&mut self, namespace: NamespaceId, of: Option<BlockHash>) -> Option<&mut Children> {
        match of {
            Some(id) => Some(&mut self.branches.get_mut(&id)?.children),
            None => Some(&mut self.roots.get_mut(&namespace)?.children),
        }
    }

    /// The part of a branch that these blocks go through, split off if it is not all of it; and
    /// how many blocks that is.
    fn shared(&mut self, id: BlockHash, blocks: &[BlockHash]) -> (BlockHash, usize) {
        let Some(branch) = self.branches.get(&id) else { return (id, 0) };
        let shared = branch.hashes.iter().zip(blocks).take_while(|(own, other)| own == other).count();
        if shared == branch.hashes.len() {
            return (id, shared);
        }
        (self.split(id, shared).unwrap_or(id), shared)
    }

    /// Makes the first blocks of a branch one of its own; says its name.
    fn split(&mut self, id: BlockHash, blocks: usize) -> Option<BlockHash> {
        let branch = self.branches.get_mut(&id)?;
        let tokens = blocks * branch.tokens.len() / branch.hashes.len().max(1);
        let (lower_hashes, lower_tokens) = (branch.hashes.split_off(blocks), branch.tokens.split_off(tokens));
        let head_hashes = std::mem::replace(&mut branch.hashes, lower_hashes);
        let (name, begins, continues) = (*head_hashes.last()?, *head_hashes.first()?, *branch.hashes.first()?);
        let head = Branch {
            namespace: branch.namespace,
            parent: branch.parent.replace(name),
            first_token: branch.first_token,
            hashes: head_hashes,
            tokens: std::mem::replace(&mut branch.tokens, lower_tokens),
            children: Children::from([(continues, id)]),
            requests: branch.requests,
            last_used: branch.last_used,
            pinned: false,
        };
        branch.first_token += tokens;
        let (namespace, parent) = (head.namespace, head.parent);
        self.branches.insert(name, head);
        self.children_mut(namespace, parent)?.insert(begins, name);
        Some(name)
    }

    fn add_leaf(
        &mut self,
        namespace: &Namespace,
        parent: Option<BlockHash>,
        prompt: &[TokenId],
        first_token: usize,
        hashes: &[BlockHash],
        now: Instant,
    ) {
        let (Some(begins), Some(name)) = (hashes.first(), hashes.last()) else { return };
        let end = first_token + hashes.len() * namespace.layout().block_tokens();
        let tokens = prompt.get(first_token..end).unwrap_or_default().to_vec();
        self.tokens += tokens.len();
        let leaf = Branch {
            namespace: namespace.id(),
            parent,
            first_token,
            hashes: hashes.to_vec(),
            tokens,
            children: Children::new(),
            requests: 0,
            last_used: now,
            pinned: false,
        };
        self.branches.insert(*name, leaf);
        if let Some(children) = self.children_mut(namespace.id(), parent) {
            children.insert(*begins, *name);
        }
    }

    fn remove_leaf(&mut self, id: BlockHash) {
        let Some(leaf) = self.branches.remove(&id) else { return };
        self.tokens -= leaf.tokens.len();
        let Some(begins) = leaf.hashes.first() else { return };
        if let Some(children) = self.children_mut(leaf.namespace, leaf.parent) {
            children.remove(begins);
        }
        if self.roots.get(&leaf.namespace).is_some_and(|root| root.children.is_empty()) {
            self.roots.remove(&leaf.namespace);
        }
    }

    fn trim(&mut self) {
        while self.branches.len() > self.limits.branches || self.tokens > self.limits.tokens {
            let leaves = self.branches.iter().filter(|(_, branch)| branch.children.is_empty() && !branch.pinned);
            let coldest = leaves.min_by_key(|(_, branch)| (branch.last_used, branch.requests));
            let Some((id, _)) = coldest else { return };
            self.remove_leaf(*id);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashSet};
    use std::time::Duration;

    use kvkeep::{DType, KvLayout};
    use proptest::prelude::*;

    use super::*;

    /// As `namespace` has it.
    const BLOCK_TOKENS: usize = 2;

    fn namespace(model: &str) -> Namespace {
        let layout = KvLayout::new(1, 1, 8, DType::F16).unwrap().with_block_tokens(2).unwrap();
        Namespace::new(model, layout)
    }

    fn tree(branches: usize, tokens: usize) -> PrefixTree {
        PrefixTree::new(Limits { branches, tokens })
    }

    /// Requests through each block, by the tokens up to its end.
    fn counts(tree: &PrefixTree, name: &Namespace) -> BTreeMap<Vec<TokenId>, u64> {
        let of = tree.hottest(usize::MAX, 0).into_iter().filter(|branch| branch.namespace == name.id());
        let blocks = of.flat_map(|branch| {
            let path = tree.path(branch.id).unwrap();
            assert_eq!(path.tokens.len(), branch.first_token + branch.tokens);
            let ends = (branch.first_token..path.tokens.len()).step_by(BLOCK_TOKENS);
            ends.map(|at| (path.tokens[..at + BLOCK_TOKENS].to_vec(), branch.requests)).collect::<Vec<_>>()
        });
        blocks.collect()
    }

    /// The same, without compression and limits.
    fn naive(prompts: &[Vec<TokenId>]) -> BTreeMap<Vec<TokenId>, u64> {
        let mut counts = BTreeMap::new();
        for prompt in prompts {
            for end in (BLOCK_TOKENS..=prompt.len()).step_by(BLOCK_TOKENS) {
                *counts.entry(prompt[..end].to_vec()).or_insert(0) += 1;
            }
        }
        counts
    }

    fn assert_sound(tree: &PrefixTree) {
        let views = tree.hottest(usize::MAX, 1);
        let mut seen = HashSet::new();
        for view in &views {
            if let Some(parent) = view.parent {
                assert!(seen.contains(&parent), "a parent comes before its children");
                let parent = &tree.branches[&parent];
                assert!(parent.requests >= view.requests && parent.last_used >= view.last_used);
                assert_eq!(parent.first_token + parent.tokens.len(), view.first_token);
            }
            assert_eq!(view.begin.len(), 1);
            seen.insert(view.id);
            let branch = &tree.branches[&view.id];
            assert_eq!(branch.hashes.last(), Some(&view.id));
            assert_eq!(branch.tokens.len(), branch.hashes.len() * BLOCK_TOKENS);
        }
        assert_eq!(views.len(), tree.branches.len());
        assert_eq!(tree.tokens, tree.branches.values().map(|branch| branch.tokens.len()).sum::<usize>());
        let of_branches: HashSet<_> = tree.branches.values().map(|branch| branch.namespace).collect();
        assert_eq!(tree.roots.keys().copied().collect::<HashSet<_>>(), of_branches);
    }

    /// Prompts over a tiny alphabet, so that they share beginnings.
    fn prompts() -> impl Strategy<Value = Vec<Vec<TokenId>>> {
        prop::collection::vec(prop::collection::vec(0..2u32, 0..14), 1..40)
    }

    proptest! {
        #[test]
        fn it_counts_as_a_plain_trie_does_and_in_namespaces_of_their_own(prompts in prompts()) {
            let (mut tree, begin) = (tree(usize::MAX, usize::MAX), Instant::now());
            let (mine, yours) = (namespace("mine"), namespace("yours"));
            for (second, prompt) in (0..).zip(&prompts) {
                let now = begin + Duration::from_secs(second);
                let id = tree.insert(&mine, &Tenant::OPERATOR, prompt, now);
                prop_assert_eq!(id.is_some(), prompt.len() >= BLOCK_TOKENS);
                if let Some(id) = id {
                    let path = tree.path(id).unwrap();
                    prop_assert_eq!(&path.tokens[..], &prompt[..prompt.len() / BLOCK_TOKENS * BLOCK_TOKENS]);
                    prop_assert_eq!(tree.branches[&id].last_used, now);
                }
                assert_sound(&tree);
            }
            tree.insert(&yours, &Tenant::OPERATOR, &prompts[0], begin);
            assert_sound(&tree);
            prop_assert_eq!(counts(&tree, &mine), naive(&prompts));
            prop_assert_eq!(counts(&tree, &yours), naive(&prompts[..1]));
            tree.clear(Some(mine.id()));
            assert_sound(&tree);
            prop_assert_eq!(counts(&tree, &yours), naive(&prompts[..1]));
            prop_assert!(counts(&tree, &mine).is_empty());
        }

        #[test]
        fn it_stays_in_its_limits_and_what_it_keeps_is_true(
            prompts in prompts(), branches in 1..12usize, tokens in 2..40usize, pin in 0..40usize,
        ) {
            let (mut tree, begin, name) = (tree(branches, tokens), Instant::now(), namespace("m"));
            let mut pinned = None;
            for (second, prompt) in (0..).zip(&prompts) {
                let id = tree.insert(&name, &Tenant::OPERATOR, prompt, begin + Duration::from_secs(second));
                if let (Some(id), true) = (id, second == pin as u64) {
                    pinned = Some(id).filter(|id| tree.set_pinned(*id, true));
                }
                assert_sound(&tree);
                if pinned.is_none() {
                    prop_assert!(tree.branches.len() <= branches && tree.tokens <= tokens);
                }
            }
            prop_assert!(pinned.is_none_or(|id| tree.path(id).is_some()));
            let all = naive(&prompts);
            for (block, requests) in counts(&tree, &name) {
                prop_assert!(requests <= all[&block]);
            }
        }

        #[test]
        fn removing_a_branch_takes_what_is_behind_it_and_nothing_else(prompts in prompts(), which in 0..100usize) {
            let (mut tree, name) = (tree(usize::MAX, usize::MAX), namespace("m"));
            for prompt in &prompts {
                tree.insert(&name, &Tenant::OPERATOR, prompt, Instant::now());
            }
            let all = tree.hottest(usize::MAX, 0);
            prop_assume!(!all.is_empty());
            let gone = tree.path(all[which % all.len()].id).unwrap();
            tree.remove(all[which % all.len()].id);
            assert_sound(&tree);
            let from = gone.tokens[..gone.first_token + BLOCK_TOKENS].to_vec();
            let mut left = naive(&prompts);
            left.retain(|block, _| !block.starts_with(&from));
            prop_assert_eq!(counts(&tree, &name), left);
        }
    }

    #[test]
    fn a_branch_keeps_its_name_when_it_is_split() {
        let (mut tree, name) = (tree(10, 100), namespace("m"));
        let first = tree.insert(&name, &Tenant::OPERATOR, &[1, 2, 3, 4, 5, 6], Instant::now()).unwrap();
        assert!(tree.set_pinned(first, true));
        tree.insert(&name, &Tenant::OPERATOR, &[1, 2, 3, 4, 9, 9], Instant::now()).unwrap();
        let path = tree.path(first).unwrap();
        assert_eq!((path.tokens, path.first_token), (vec![1, 2, 3, 4, 5, 6], 4));
        let views = tree.hottest(10, 2);
        assert_eq!(views.iter().map(|view| view.requests).collect::<Vec<_>>(), [2, 1, 1]);
        assert_eq!(views.iter().filter(|view| view.pinned).map(|view| view.id).collect::<Vec<_>>(), [first]);
    }

    #[test]
    fn the_coldest_leaves_go_first_and_pinned_ones_stay() {
        let (mut tree, name, begin) = (tree(3, 1000), namespace("m"), Instant::now());
        let mut insert = |token: u32, second: u64| {
            let now = begin + Duration::from_secs(second);
            let id = tree.insert(&name, &Tenant::OPERATOR, &[token; 4], now).unwrap();
            (id, tree.set_pinned(id, token == 1))
        };
        let pinned = insert(1, 0).0;
        let ids: Vec<_> = [(2, 1), (3, 2), (2, 3), (4, 4)].map(|(token, second)| insert(token, second).0).into();
        assert!(tree.path(pinned).is_some());
        assert!(tree.path(ids[1]).is_none(), "the coldest");
        assert!(tree.path(ids[0]).is_some() && tree.path(ids[3]).is_some());
    }
}
