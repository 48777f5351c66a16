//! Traces made here, for tests and for policies to be judged on what nobody fitted them to.
//! Each is a kind of traffic of its own; the same in every run.

use std::collections::HashMap;

use anyhow::{Result, bail};

use super::trace::Request;

/// What can be asked for.
pub(crate) const NAMES: [&str; 10] =
    ["chat", "agents", "documents", "flood", "loop", "shift", "retrieval", "branches", "batches", "tenants"];

const BLOCK_TOKENS: u64 = 16;

pub(super) fn requests(name: &str) -> Result<Vec<Request>> {
    let mut maker = Maker { random: 0x2545_f491_4f6c_dd1d, next_block: 0, requests: Vec::new() };
    match name {
        "chat" => maker.chat(),
        "agents" => maker.agents(),
        "documents" => maker.documents(0, 20_000),
        "flood" => maker.flood(),
        "loop" => maker.circle(),
        "retrieval" => maker.retrieval(),
        "branches" => maker.branches(),
        "batches" => maker.batches(),
        "tenants" => maker.tenants(),
        "shift" => (0..5).for_each(|era| maker.documents(era, 4_000)),
        _ => bail!("there is no synthetic trace {name}: choose one of {}", NAMES.join(", ")),
    }
    Ok(maker.requests)
}

struct Maker {
    random: u64,
    next_block: u64,
    requests: Vec<Request>,
}

impl Maker {
    /// Sessions under popular and rare system prompts; each turn extends the one before, most
    /// sessions end after a few, the thinking in between varies.
    fn chat(&mut self) {
        let systems: Vec<Vec<u64>> = (0..40).map(|_| self.fresh(8, 24)).collect();
        let mut sessions: Vec<(u64, Vec<u64>)> = Vec::new();
        for now in 0..20_000 {
            let due = sessions.iter().position(|(due, _)| *due <= now);
            let mut prompt = match due {
                Some(at) => sessions.swap_remove(at).1,
                None => systems.get(self.popular(40)).cloned().unwrap_or_default(),
            };
            let turn = self.fresh(1, 12);
            prompt.extend(turn);
            self.request(&prompt);
            if self.below(100) >= 35 {
                let think = 20 + self.below(40) * self.below(40);
                sessions.push((now + think, prompt));
            }
        }
    }

    /// Agents that work side by side under one system prompt: every step extends the prompt,
    /// and all take steps of about the same length.
    fn agents(&mut self) {
        let system = self.fresh(60, 61);
        let mut agents: Vec<Vec<u64>> = vec![Vec::new(); 12];
        for _ in 0..6_000 {
            let agent = usize::try_from(self.below(12)).unwrap_or(0);
            let ended = self.below(40) == 0;
            let step = self.fresh(4, 20);
            let Some(prompt) = agents.get_mut(agent) else { continue };
            if prompt.is_empty() || ended {
                prompt.clone_from(&system);
            }
            prompt.extend(step);
            let prompt = prompt.clone();
            self.request(&prompt);
        }
    }

    /// Questions about documents, some of which are popular; a new era has other documents.
    fn documents(&mut self, era: u64, requests: u64) {
        let from = era << 40;
        for _ in 0..requests {
            let document = self.popular(800) as u64;
            let length = 10 + (document * 37) % 90;
            let mut prompt: Vec<u64> = (0..length).map(|block| (1 << 60) | from | document << 10 | block).collect();
            prompt.extend(self.fresh(1, 4));
            self.request(&prompt);
        }
    }

    /// Chats, and now and then a batch job that reads many long prompts exactly once.
    fn flood(&mut self) {
        self.chat();
        let chats = std::mem::take(&mut self.requests);
        for (number, chat) in chats.into_iter().enumerate() {
            self.requests.push(chat);
            if number % 4_000 < 800 {
                let once = self.fresh(60, 120);
                self.request(&once);
            }
        }
    }

    /// The same prompts round and round: more than a small cache holds.
    fn circle(&mut self) {
        let prompts: Vec<Vec<u64>> = (0..150).map(|_| self.fresh(20, 60)).collect();
        for _ in 0..60 {
            prompts.iter().for_each(|prompt| self.request(prompt));
        }
    }

    /// Questions with three retrieved passages each, in the order of their rank, behind one system prompt: what comes
    /// after the first passage is shared only if the one before it is the same. Some are asked again within the hour.
    fn retrieval(&mut self) {
        let system = self.fresh(6, 7);
        let mut children: HashMap<(u64, usize), Vec<u64>> = HashMap::new();
        let mut asked: Vec<Vec<u64>> = Vec::new();
        for _ in 0..6_000 {
            if self.below(5) == 0 && !asked.is_empty() {
                let again = asked.len() - 1 - usize::try_from(self.below(60)).unwrap_or(0).min(asked.len() - 1);
                let prompt = asked.get(again).cloned().unwrap_or_default();
                self.request(&prompt);
                continue;
            }
            let mut prompt = system.clone();
            for _ in 0..3 {
                let passage = self.popular(300);
                let before = prompt.last().copied().unwrap_or(0);
                let length = 3 + passage as u64 % 9;
                let known = children.get(&(before, passage)).cloned();
                let blocks = known.unwrap_or_else(|| self.fresh(length, length + 1));
                children.insert((before, passage), blocks.clone());
                prompt.extend(blocks);
            }
            let question = self.fresh(1, 3);
            prompt.extend(question);
            self.request(&prompt);
            asked.push(prompt);
        }
    }

    /// Searches: each task tries several continuations of its best attempts so far, most of which are dropped.
    fn branches(&mut self) {
        let system = self.fresh(20, 21);
        let mut tasks: Vec<Vec<Vec<u64>>> = Vec::new();
        for _ in 0..8_000 {
            if tasks.len() < 6 || self.below(60) == 0 {
                let mut root = system.clone();
                root.extend(self.fresh(5, 40));
                tasks.push(vec![root]);
                if tasks.len() > 6 {
                    tasks.remove(0);
                }
            }
            let task = usize::try_from(self.below(tasks.len() as u64)).unwrap_or(0);
            let step = self.fresh(2, 8);
            let best = self.below(3);
            let Some(attempts) = tasks.get_mut(task) else { continue };
            let from = attempts.len() - 1 - usize::try_from(best).unwrap_or(0).min(attempts.len() - 1);
            let mut prompt = attempts.get(from).cloned().unwrap_or_default();
            prompt.extend(step);
            attempts.push(prompt.clone());
            self.request(&prompt);
        }
    }

    /// Batch jobs: one long template each and hundreds of short items behind it, two jobs at a time; a job comes back
    /// the next day.
    fn batches(&mut self) {
        let templates: Vec<Vec<u64>> = (0..60).map(|_| self.fresh(30, 160)).collect();
        for hour in 0..120u64 {
            let jobs = [self.popular(60), usize::try_from(hour % 24).unwrap_or(0)];
            let items = 20 + self.below(100);
            for _ in 0..items {
                let job = usize::try_from(self.below(2)).unwrap_or(0);
                let mut prompt = jobs.get(job).and_then(|job| templates.get(*job)).cloned().unwrap_or_default();
                let item = self.fresh(1, 10);
                prompt.extend(item);
                self.request(&prompt);
            }
        }
    }

    /// Tenants of very different sizes: a few with long chats that come back within minutes, many with short prompts
    /// of their own that come back rarely or never.
    fn tenants(&mut self) {
        let systems: Vec<Vec<u64>> = (0..200).map(|_| self.fresh(2, 30)).collect();
        let mut chats: Vec<Vec<u64>> = vec![Vec::new(); 16];
        for _ in 0..15_000 {
            if self.below(3) == 0 {
                let chat = self.popular(16);
                let (turn, is_over) = (self.fresh(2, 12), self.below(25) == 0);
                let Some(prompt) = chats.get_mut(chat) else { continue };
                if prompt.is_empty() || is_over {
                    prompt.clone_from(systems.get(chat).unwrap_or(&Vec::new()));
                }
                prompt.extend(turn);
                let prompt = prompt.clone();
                self.request(&prompt);
            } else {
                let tenant = self.popular(200);
                let mut prompt = systems.get(tenant).cloned().unwrap_or_default();
                let own = self.fresh(1, 8);
                prompt.extend(own);
                self.request(&prompt);
            }
        }
    }

    fn request(&mut self, blocks: &[u64]) {
        let tokens = blocks.len() as u64 * BLOCK_TOKENS;
        self.requests.push(Request { at_ms: None, tokens, blocks: blocks.to_vec() });
    }

    /// Between `least` and `most` (excluded) blocks that never were before.
    fn fresh(&mut self, least: u64, most: u64) -> Vec<u64> {
        let count = least + self.below(most - least);
        let first = self.next_block;
        self.next_block += count;
        (first..self.next_block).collect()
    }

    /// One of `count`, the n-th with a probability like 1/n.
    fn popular(&mut self, count: usize) -> usize {
        let weights = (1..=count).map(|rank| 1_000_000 / rank as u64);
        let mut at = self.below(weights.clone().sum());
        for (number, weight) in weights.enumerate() {
            match at.checked_sub(weight) {
                Some(rest) => at = rest,
                None => return number,
            }
        }
        0
    }

    fn below(&mut self, end: u64) -> u64 {
        // xorshift64 (Marsaglia 2003).
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) % end.max(1)
    }
}
