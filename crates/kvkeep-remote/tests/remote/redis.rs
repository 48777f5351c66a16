//! What a remote tier promises, on real Redis servers. `make test-remote` runs it.

use std::sync::Arc;
use std::time::Duration;

use crate::common::server::{Cluster, RedisServer, Sentinel, TlsServer};
use crate::common::{BLOCK_TOKENS, Node, namespace, prefix, prompt, until};
use kvkeep::tiers::{Codecs, contract};
use kvkeep::{ManualClock, Tier};
use kvkeep_remote::{RemoteConfig, RemoteTier};

const DEADLINE: Duration = Duration::from_millis(50);
const RAM_BYTES: u64 = 8 << 20;

fn key_file(dir: &tempfile::TempDir) -> std::path::PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let path = dir.path().join("key");
    std::fs::write(&path, [7; 32]).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    path
}

fn checked(url: &str, with: &dyn Fn(RemoteConfig) -> RemoteConfig) {
    contract::check(&|| {
        let config = RemoteConfig::new(url).prefix(prefix()).capacity_bytes(contract::CAPACITY_BYTES);
        // No deadline of ours on a machine that does other things: the suite asks what is there, not when.
        let config = with(config.deadline(Duration::from_secs(5)));
        Arc::new(RemoteTier::open_at(&config, Arc::new(ManualClock::at(1000))).unwrap()) as Arc<dyn Tier>
    });
}

#[test]
#[ignore = "needs redis-server: make test-remote"]
fn redis_keeps_what_a_tier_promises() {
    let server = RedisServer::start(&[]);
    let dir = tempfile::tempdir().unwrap();
    let key = key_file(&dir);
    checked(&server.url(), &|config| config);
    checked(&server.url(), &|config| config.codecs(Codecs::named("lossless").unwrap()).key_file(&key));
}

#[test]
#[ignore = "needs redis-server: make test-remote"]
fn a_cluster_keeps_what_a_tier_promises() {
    let cluster = Cluster::start();
    checked(&cluster.url(), &|config| config);
}

#[test]
#[ignore = "needs redis-server: make test-remote"]
fn what_one_node_stores_another_finds_and_no_other_namespace_or_prefix_does() {
    let server = RedisServer::start(&[]);
    let config = RemoteConfig::new(server.url()).prefix(prefix());
    let (one, two) = (Node::new(&config, RAM_BYTES), Node::new(&config, RAM_BYTES));
    let elsewhere = Node::new(&RemoteConfig::new(server.url()).prefix(prefix()), RAM_BYTES);
    two.know_all();
    let (model, tokens) = (namespace("m"), prompt(1, 5));
    one.store(&model, &tokens);
    one.cache.flush().unwrap();
    let heard = until("the other node hears of it", || two.lookup(&model, &tokens).0 == 5 * BLOCK_TOKENS);
    println!("a block that one node wrote was found by another {heard:?} later");
    assert_eq!(two.lookup(&namespace("other"), &tokens).0, 0);
    assert_eq!(elsewhere.lookup(&model, &tokens).0, 0);
    // A node that comes later finds it, too.
    let three = Node::new(&config, RAM_BYTES);
    assert_eq!(three.lookup(&model, &tokens).0, 5 * BLOCK_TOKENS);
}

/// An engine's scheduler looks up in its own thread: a store that was silent kept all of its requests waiting.
#[test]
#[ignore = "needs redis-server: make test-remote"]
fn a_lookup_that_never_waits_waits_for_no_silent_server() {
    let server = RedisServer::start(&[]);
    let config = RemoteConfig::new(server.url()).prefix(prefix()).deadline(Duration::from_secs(1));
    let (model, tokens) = (namespace("m"), prompt(1, 5));
    let one = Node::new(&config, RAM_BYTES);
    one.store(&model, &tokens);
    one.cache.flush().unwrap();
    let two = Node::new(&config.never_waits(), RAM_BYTES);
    two.know_all();
    server.ask(&["client", "pause", "4000", "all"]);
    for _ in 0..50 {
        let (found, took) = two.lookup(&model, &tokens);
        assert!(found == 0 && took < Duration::from_millis(100), "{found} tokens after {took:?}");
    }
    until("it has waited in the background, for a deadline", || !two.tier.is_asking());
    until("the server speaks again", || two.lookup(&model, &tokens).0 == 5 * BLOCK_TOKENS);
}

#[test]
#[ignore = "needs redis-server: make test-remote"]
fn a_namespace_that_is_cleared_is_gone_from_the_store_and_others_are_not() {
    let server = RedisServer::start(&[]);
    let config = RemoteConfig::new(server.url()).prefix(prefix());
    let one = Node::new(&config, RAM_BYTES);
    let (goes, stays, tokens) = (namespace("goes"), namespace("stays"), prompt(1, 3));
    [&goes, &stays].into_iter().for_each(|of| one.store(of, &tokens));
    one.cache.flush().unwrap();
    // One that has not written it clears it.
    let two = Node::new(&config, RAM_BYTES);
    two.cache.clear_namespace(goes.id());
    assert_eq!(two.lookup(&goes, &tokens).0, 0, "at once");
    two.cache.flush().unwrap();
    let three = Node::new(&config, RAM_BYTES);
    assert_eq!((three.lookup(&goes, &tokens).0, three.lookup(&stays, &tokens).0), (0, 3 * BLOCK_TOKENS));
}

#[test]
#[ignore = "needs redis-server: make test-remote"]
fn what_has_a_ttl_is_gone_from_the_store_when_it_is_over() {
    let server = RedisServer::start(&[]);
    let config = RemoteConfig::new(server.url()).prefix(prefix()).ttl(Some(Duration::from_millis(700)));
    let one = Node::new(&config, RAM_BYTES);
    one.store(&namespace("m"), &prompt(1, 2));
    one.cache.flush().unwrap();
    let blocks = || server.ask(&["eval", "return #redis.call('keys', '*') - #redis.call('keys', '*:news')", "0"]);
    assert_eq!(blocks(), "2");
    until("they are gone", || blocks() == "0");
    let two = Node::new(&config, RAM_BYTES);
    assert_eq!(two.lookup(&namespace("m"), &prompt(1, 2)).0, 0);
}

#[test]
#[ignore = "needs redis-server: make test-remote"]
fn a_lookup_that_misses_everywhere_costs_no_question_once_the_node_knows_the_store() {
    let server = RedisServer::start(&[]);
    let node = Node::new(&RemoteConfig::new(server.url()).prefix(prefix()), RAM_BYTES);
    node.know_all();
    let asked = || server.ask(&["info", "commandstats"]).lines().filter(|line| line.contains("getrange")).count();
    let model = namespace("m");
    let prompts: Vec<_> = (0..2000).map(|number| prompt(number, 1)).collect();
    let mut took: Vec<Duration> = prompts.iter().map(|tokens| node.lookup(&model, tokens).1).collect();
    took.sort();
    println!("a lookup of one block that misses everywhere: median {:?}, 99 of 100 {:?}", took[1000], took[1980]);
    assert_eq!(asked(), 0, "the store was asked");
    let most = Duration::from_micros(if cfg!(debug_assertions) { 50 } else { 5 });
    assert!(took[1000] < most, "{:?}", took[1000]);
}

#[test]
#[ignore = "needs redis-server: make test-remote"]
fn a_store_that_is_not_there_makes_no_error_and_no_wait() {
    let port = crate::common::server::free_port();
    let node = Node::new(&RemoteConfig::new(format!("redis://127.0.0.1:{port}")).prefix(prefix()), RAM_BYTES);
    node.store(&namespace("m"), &prompt(1, 2));
    assert_eq!(node.lookup(&namespace("m"), &prompt(1, 2)).0, 2 * BLOCK_TOKENS, "from RAM");
    let (found, took) = node.lookup(&namespace("m"), &prompt(2, 2));
    assert!(found == 0 && took < DEADLINE, "{took:?}");
    assert!(node.tier.stats().failing);
}

#[test]
#[ignore = "needs redis-server: make test-remote"]
fn redis_behind_tls_keeps_what_a_tier_promises_and_only_with_a_certificate_that_is_trusted() {
    let dir = std::env::var("KVKEEP_TLS").expect("KVKEEP_TLS names a folder with certificates: make test-remote");
    let server = TlsServer::start(std::path::Path::new(&dir), "server");
    checked(&server.url(), &|config| config);
    let stranger = TlsServer::start(std::path::Path::new(&dir), "stranger");
    let node = Node::new(&RemoteConfig::new(stranger.url()).prefix(prefix()), RAM_BYTES);
    assert!(node.tier.stats().failing, "nobody vouches for this one");
    let plain = Node::new(&RemoteConfig::new(stranger.url().replace("rediss", "redis")).prefix(prefix()), RAM_BYTES);
    assert!(plain.tier.stats().failing, "nor is it spoken to in the clear");
}

#[test]
#[ignore = "needs redis-server: make test-remote"]
fn the_master_that_sentinel_names_keeps_what_a_tier_promises_and_its_replica_takes_over() {
    let mut watched = Sentinel::start();
    checked(&watched.url(), &|config| config);
    let config = RemoteConfig::new(watched.url()).prefix(prefix());
    let (node, model, tokens) = (Node::new(&config, RAM_BYTES), namespace("m"), prompt(1, 3));
    node.store(&model, &tokens);
    node.cache.flush().unwrap();
    until("the replica has it", || watched.replica.ask(&["dbsize"]) == watched.master.ask(&["dbsize"]));
    watched.master.kill();
    until("Sentinel names the replica", || watched.named() == watched.replica.port);
    let back = until("another node finds it there", || {
        let later = Node::new(&config, RAM_BYTES);
        later.lookup(&model, &tokens).0 == 3 * BLOCK_TOKENS
    });
    println!("found on the replica {back:?} after Sentinel named it");
    until("and so does the one that was connected to the master", || {
        node.store(&model, &prompt(2, 1));
        node.tier.works() && node.cache.flush().is_ok()
    });
    assert_ne!(watched.replica.ask(&["dbsize"]), "4", "it is written there");
}
