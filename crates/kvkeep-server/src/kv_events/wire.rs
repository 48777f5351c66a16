//! What goes over the wire: the cache's events in vLLM's format.
//!
//! A batch is an array `[time, [event, ..], rank]`, an event a map with a `type`, as vLLM has sent them since 0.26.
//! Hashes are numbers of 64 bits, the last eight bytes of a block's hash: what vLLM sends unless it is told otherwise,
//! and all that some routers read. Sending all 32 bytes was the alternative: readers that know numbers alone drop the
//! whole batch.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use kvkeep::{BlockHash, Event, NamespaceId, TokenId};
use serde::Serialize;

/// One server is one engine to its readers.
const RANK: u32 = 0;

/// An event, with the fields of vLLM's. Those that may be left out are, as vLLM leaves them out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "type")]
pub(super) enum WireEvent {
    BlockStored {
        block_hashes: Vec<u64>,
        parent_block_hash: Option<u64>,
        token_ids: Vec<TokenId>,
        /// 0 where nobody knows, as vLLM has it.
        block_size: usize,
        lora_id: Option<u64>,
        medium: &'static str,
        lora_name: Option<String>,
        #[serde(skip_serializing_if = "Option::is_none")]
        locality: Option<&'static str>,
    },
    BlockRemoved {
        block_hashes: Vec<u64>,
        medium: &'static str,
        #[serde(skip_serializing_if = "Option::is_none")]
        locality: Option<&'static str>,
    },
    AllBlocksCleared,
}

/// Which blocks readers believe to be where. The format can say that all is cleared, but not that a namespace is: of
/// that, the removal of its blocks is told, one by one.
#[derive(Debug, Default)]
pub(super) struct Told(HashMap<NamespaceId, HashMap<Arc<str>, HashSet<u64>>>);

impl Told {
    /// The same in vLLM's words.
    pub(super) fn translate(&mut self, events: Vec<Event>) -> Vec<WireEvent> {
        events.into_iter().flat_map(|event| self.translate_one(event)).collect()
    }

    fn translate_one(&mut self, event: Event) -> Vec<WireEvent> {
        match event {
            Event::Stored { tier, namespace, blocks, parent, block_tokens, tokens, .. } => {
                let hashes: Vec<u64> = blocks.iter().map(number).collect();
                self.0.entry(namespace).or_default().entry(Arc::clone(&tier)).or_default().extend(&hashes);
                vec![WireEvent::BlockStored {
                    block_hashes: hashes,
                    parent_block_hash: parent.as_ref().map(number),
                    token_ids: tokens,
                    block_size: block_tokens.unwrap_or(0),
                    lora_id: None,
                    medium: medium(&tier),
                    lora_name: None,
                    locality: locality(&tier),
                }]
            }
            Event::Removed { tier, namespace, blocks, .. } => {
                let hashes: Vec<u64> = blocks.iter().map(number).collect();
                self.forget(namespace, &tier, &hashes);
                vec![removed(&tier, hashes)]
            }
            Event::Cleared { namespace: None, .. } => {
                self.0.clear();
                vec![WireEvent::AllBlocksCleared]
            }
            Event::Cleared { namespace: Some(id), .. } => {
                let tiers = self.0.remove(&id).into_iter().flatten();
                tiers.map(|(tier, hashes)| removed(&tier, hashes.into_iter().collect())).collect()
            }
            _ => Vec::new(),
        }
    }

    fn forget(&mut self, namespace: NamespaceId, tier: &Arc<str>, hashes: &[u64]) {
        let Some(tiers) = self.0.get_mut(&namespace) else { return };
        if let Some(known) = tiers.get_mut(tier) {
            for hash in hashes {
                known.remove(hash);
            }
            if known.is_empty() {
                tiers.remove(tier);
            }
        }
        if tiers.is_empty() {
            self.0.remove(&namespace);
        }
    }
}

/// A batch as bytes.
pub(super) fn encode(seconds: f64, events: &[WireEvent]) -> Result<Vec<u8>, rmp_serde::encode::Error> {
    rmp_serde::to_vec_named(&(seconds, events, RANK))
}

fn removed(tier: &str, block_hashes: Vec<u64>) -> WireEvent {
    WireEvent::BlockRemoved { block_hashes, medium: medium(tier), locality: locality(tier) }
}

/// The last eight bytes of the hash, as vLLM has it.
fn number(block: &BlockHash) -> u64 {
    let last = block.as_bytes().last_chunk::<8>();
    last.copied().map_or(0, u64::from_be_bytes)
}

/// vLLM's word for where it is.
fn medium(tier: &str) -> &'static str {
    if tier == "ram" { "CPU" } else { "STORAGE" }
}

/// Nothing is said of RAM and disk, as vLLM's own blocks say nothing: there are routers that leave out what says LOCAL.
fn locality(tier: &str) -> Option<&'static str> {
    (!matches!(tier, "ram" | "disk")).then_some("REMOTE")
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOLDEN: &str = "93cb3ff80000000000009388a474797065ab426c6f636b53746f726564ac626c6f636b5f6861736865739201cf\
                          ffffffffffffffffb1706172656e745f626c6f636b5f6861736807a9746f6b656e5f696473940506cd012cce00\
                          011170aa626c6f636b5f73697a6502a76c6f72615f6964c0a66d656469756da3435055a96c6f72615f6e616d65\
                          c083a474797065ac426c6f636b52656d6f766564ac626c6f636b5f6861736865739101a66d656469756da75354\
                          4f5241474581a474797065b0416c6c426c6f636b73436c656172656400";

    fn stored(token_ids: Vec<TokenId>) -> WireEvent {
        WireEvent::BlockStored {
            block_hashes: vec![1, u64::MAX],
            parent_block_hash: Some(7),
            token_ids,
            block_size: 2,
            lora_id: None,
            medium: "CPU",
            lora_name: None,
            locality: None,
        }
    }

    /// What vLLM's own encoder makes of the same batch, byte for byte: `tests/kv_events.py` compares the two again.
    #[test]
    fn a_batch_has_the_bytes_that_vllm_sends() {
        let events = [
            stored(vec![5, 6, 300, 70_000]),
            WireEvent::BlockRemoved { block_hashes: vec![1], medium: "STORAGE", locality: None },
            WireEvent::AllBlocksCleared,
        ];
        let hex: String = encode(1.5, &events).unwrap().iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, GOLDEN);
    }

    #[test]
    fn only_what_is_far_says_where_it_is() {
        for (tier, says) in [("ram", None), ("disk", None), ("redis", Some("REMOTE"))] {
            let WireEvent::BlockRemoved { medium, locality, .. } = removed(tier, vec![1]) else { unreachable!() };
            assert_eq!((medium, locality), (if tier == "ram" { "CPU" } else { "STORAGE" }, says));
        }
    }
}
