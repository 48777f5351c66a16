//! What a remote tier promises, on a directory. It needs no server.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::common::{BLOCK_TOKENS, Node, namespace, prefix, prompt, until};
use kvkeep::tiers::contract;
use kvkeep::{Error, ManualClock, Tier};
use kvkeep_remote::{RemoteConfig, RemoteTier};

/// What lies in a directory: a folder for the prefix, one for each namespace, a file for each block.
fn files(dir: &tempfile::TempDir) -> Vec<PathBuf> {
    let inside = |folder: PathBuf| std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let prefixes = inside(dir.path().to_owned()).filter(|path| path.is_dir());
    prefixes.flat_map(inside).flat_map(inside).collect()
}

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

/// A flush ended well where no block could be written: a write that failed counted as one that may be there, so the block was
/// not offered again, and a failure while the flush waited was told nobody.
#[test]
fn a_flush_says_what_could_not_be_written_and_the_next_one_writes_it() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    let config = RemoteConfig::new(format!("file://{}", store.display())).deadline(Duration::from_secs(5));
    let (model, tokens) = (namespace("m"), prompt(1, 5));
    let one = Node::new(&config, 8 << 20);
    std::fs::remove_dir_all(&store).unwrap();
    std::fs::write(&store, "no directory any more").unwrap();
    one.store(&model, &tokens);
    for _ in 0..3 {
        let flushed = one.cache.flush();
        assert!(matches!(flushed, Err(Error::NotTaken { blocks: 5, .. })), "{flushed:?}");
    }
    std::fs::remove_file(&store).unwrap();
    std::fs::create_dir(&store).unwrap();
    until("the store works again", || one.cache.flush().is_ok());
    assert_eq!(Node::new(&config, 8 << 20).lookup(&model, &tokens).0, 5 * BLOCK_TOKENS);
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

/// An engine's scheduler looks up in its own thread: all requests waited while a store said what one of them may load.
#[test]
fn a_lookup_that_never_waits_finds_what_the_store_has_said_meanwhile() {
    let dir = tempfile::tempdir().unwrap();
    let config = RemoteConfig::new(format!("file://{}", dir.path().display())).deadline(Duration::from_secs(5));
    let (model, tokens) = (namespace("m"), prompt(1, 3));
    let one = Node::new(&config, 8 << 20);
    one.store(&model, &tokens);
    one.cache.flush().unwrap();
    let two = Node::new(&config.never_waits(), 8 << 20);
    two.know_all();
    assert!(!two.tier.is_asking(), "nobody has looked");
    assert_eq!(two.lookup(&model, &tokens).0, 0, "a name alone is known of them");
    until("the store has said what they are", || !two.tier.is_asking());
    assert_eq!(two.lookup(&model, &tokens).0, 3 * BLOCK_TOKENS);
    assert_eq!(two.lookup(&model, &prompt(9, 3)).0, 0);
    assert!(!two.tier.is_asking(), "what is not there costs no question");
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
    let whole: Vec<(PathBuf, Vec<u8>)> =
        files(&dir).into_iter().map(|path| (path.clone(), std::fs::read(path).unwrap())).collect();
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

#[test]
fn a_namespace_that_is_cleared_is_gone_from_the_directory_and_others_are_not() {
    let dir = tempfile::tempdir().unwrap();
    let config = RemoteConfig::new(format!("file://{}", dir.path().display())).deadline(Duration::from_secs(5));
    let (goes, stays, tokens) = (namespace("goes"), namespace("stays"), prompt(1, 2));
    let one = Node::new(&config, 8 << 20);
    [&goes, &stays].into_iter().for_each(|of| one.store(of, &tokens));
    one.cache.flush().unwrap();
    assert_eq!(files(&dir).len(), 4);
    // By one that has written none of it.
    let two = Node::new(&config, 8 << 20);
    two.cache.clear_namespace(goes.id());
    two.cache.flush().unwrap();
    assert_eq!(files(&dir).len(), 2);
    let three = Node::new(&config, 8 << 20);
    assert_eq!((three.lookup(&goes, &tokens).0, three.lookup(&stays, &tokens).0), (0, 2 * BLOCK_TOKENS));
}

/// A time to live was told to Redis alone: in a directory, blocks stayed for ever.
#[test]
fn what_has_a_ttl_is_gone_from_the_directory_when_it_is_over_whoever_wrote_it() {
    let dir = tempfile::tempdir().unwrap();
    let config = RemoteConfig::new(format!("file://{}", dir.path().display()))
        .deadline(Duration::from_secs(5))
        .refresh(Duration::from_millis(100))
        .ttl(Some(Duration::from_millis(700)));
    let (model, tokens) = (namespace("m"), prompt(1, 2));
    {
        let one = Node::new(&config, 8 << 20);
        one.store(&model, &tokens);
        one.cache.flush().unwrap();
        assert_eq!(files(&dir).len(), 2);
    }
    let two = Node::new(&config, 8 << 20);
    assert_eq!(two.lookup(&model, &tokens).0, 2 * BLOCK_TOKENS);
    until("they are gone", || files(&dir).is_empty());
    until("nor does its RAM have them", || two.lookup(&model, &tokens).0 == 0);
}

#[test]
fn an_unknown_store_says_which_builds_know_it() {
    let error = RemoteTier::open(&RemoteConfig::new("gopher://host")).unwrap_err().to_string();
    assert!(error.contains("gopher") && error.contains("feature `remote`"), "{error}");
}
