//! What a remote tier promises, on a directory. It needs no server.

use std::sync::Arc;
use std::time::Duration;

use crate::common::{BLOCK_TOKENS, Node, namespace, prefix, prompt, until};
use kvkeep::tiers::contract;
use kvkeep::{ManualClock, Tier};
use kvkeep_remote::{RemoteConfig, RemoteTier};

#[test]
fn a_directory_keeps_what_a_tier_promises() {
    let dir = tempfile::tempdir().unwrap();
    let url = format!("file://{}", dir.path().display());
    contract::check(&|| {
        let config = RemoteConfig::new(&url).prefix(prefix()).capacity_bytes(contract::CAPACITY_BYTES);
        let config = config.deadline(Duration::from_secs(5));
        Arc::new(RemoteTier::open_at(&config, Arc::new(ManualClock::at(1000))).unwrap()) as Arc<dyn Tier>
    });
}

#[test]
fn what_one_node_writes_into_a_directory_another_finds_after_its_next_list() {
    let dir = tempfile::tempdir().unwrap();
    let config = RemoteConfig::new(format!("file://{}", dir.path().display()))
        .deadline(Duration::from_secs(5))
        .refresh(Duration::from_millis(100));
    let (one, two) = (Node::new(&config, 8 << 20), Node::new(&config, 8 << 20));
    two.know_all();
    one.store(&namespace("m"), &prompt(1, 3));
    one.cache.flush().unwrap();
    until("the other node hears of it", || two.lookup(&namespace("m"), &prompt(1, 3)).0 == 3 * BLOCK_TOKENS);
    assert_eq!(two.lookup(&namespace("other"), &prompt(1, 3)).0, 0);
}

#[test]
fn a_file_of_which_a_byte_is_wrong_or_that_is_another_s_is_a_miss() {
    let dir = tempfile::tempdir().unwrap();
    let config = RemoteConfig::new(format!("file://{}", dir.path().display())).deadline(Duration::from_secs(5));
    let (model, first, second) = (namespace("m"), prompt(1, 1), prompt(2, 1));
    {
        let one = Node::new(&config, 8 << 20);
        one.store(&model, &first);
        one.store(&model, &second);
        one.cache.flush().unwrap();
    }
    let files = || std::fs::read_dir(dir.path().join("kvkeep")).unwrap().map(|entry| entry.unwrap().path());
    let whole: Vec<(std::path::PathBuf, Vec<u8>)> =
        files().map(|path| (path.clone(), std::fs::read(path).unwrap())).collect();
    assert_eq!(whole.len(), 2);
    let misses = |what: &str| {
        let node = Node::new(&config, 8 << 20);
        for tokens in [&first, &second] {
            assert_eq!(node.lookup(&model, tokens).0, 0, "{what}");
        }
    };
    for at in [0, 50, 200, 4095, 4096, whole[0].1.len() - 1] {
        for (path, bytes) in &whole {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1;
            std::fs::write(path, flipped).unwrap();
        }
        misses(&format!("byte {at}"));
    }
    whole.iter().for_each(|(path, bytes)| std::fs::write(path, &bytes[..bytes.len() - 1]).unwrap());
    misses("cut");
    std::fs::write(&whole[0].0, &whole[1].1).unwrap();
    std::fs::write(&whole[1].0, &whole[0].1).unwrap();
    misses("swapped");
    whole.iter().for_each(|(path, bytes)| std::fs::write(path, bytes).unwrap());
    let node = Node::new(&config, 8 << 20);
    assert_eq!(node.lookup(&model, &first).0, BLOCK_TOKENS);
}
