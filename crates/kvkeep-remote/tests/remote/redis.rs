//! What a remote tier promises, on real Redis servers. `make test-remote` runs it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::common::proxy::{Mode, Proxy};
use crate::common::server::{Cluster, RedisServer};
use crate::common::{BLOCK_TOKENS, Node, namespace, prefix, prompt, until};
use kvkeep::tiers::{Codecs, contract};
use kvkeep::{ManualClock, Tier};
use kvkeep_remote::{RemoteConfig, RemoteTier};

const DEADLINE: Duration = Duration::from_millis(50);
/// What a busy machine of two cores adds to a wait, before it is no longer this tier's fault.
const TOLERANCE: Duration = Duration::from_millis(60);
const RAM_BYTES: u64 = 8 << 20;
/// RAM in which a prompt of four blocks drives out all others.
const LITTLE_RAM: u64 = 4 * (32 << 10);

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

/// Lookups of what is in the store, in turns, so that each has to be read from there.
struct Load {
    node: Node,
    model: kvkeep::Namespace,
    next: u32,
}

impl Load {
    const PROMPTS: u32 = 12;

    fn new(config: &RemoteConfig) -> Self {
        let node = Node::new(config, LITTLE_RAM);
        let model = namespace("m");
        for number in 0..Self::PROMPTS {
            node.store(&model, &prompt(number, 2));
            node.cache.flush().unwrap();
        }
        Self { node, model, next: 0 }
    }

    /// One lookup; none of its bytes is wrong.
    fn turn(&mut self) -> (usize, Duration) {
        self.next = (self.next + 1) % Self::PROMPTS;
        self.node.lookup(&self.model, &prompt(self.next, 2))
    }

    /// Goes on for so long; says how many lookups there were, how many found all, and the longest.
    fn run(&mut self, time: Duration) -> (usize, usize, Duration) {
        let (began, mut lookups, mut hits, mut longest) = (Instant::now(), 0, 0, Duration::ZERO);
        while began.elapsed() < time {
            let (found, took) = self.turn();
            lookups += 1;
            hits += usize::from(found == 2 * BLOCK_TOKENS);
            longest = longest.max(took);
            // What was missed is stored again, as a request would.
            if found < 2 * BLOCK_TOKENS {
                self.node.store(&self.model, &prompt(self.next, 2));
            }
        }
        (lookups, hits, longest)
    }
}

#[test]
#[ignore = "needs redis-server: make test-remote"]
fn through_delays_drops_cuts_and_wrong_bytes_nothing_is_wrong_late_or_gone_for_good() {
    let server = RedisServer::start(&[]);
    let proxy = Proxy::to(server.port);
    let mut load = Load::new(&RemoteConfig::new(proxy.url()).prefix(prefix()).deadline(DEADLINE));
    let (lookups, hits, _) = load.run(Duration::from_millis(300));
    assert!(hits * 10 > lookups * 9, "{hits} of {lookups}");
    let delay = Mode::Delay(Duration::from_millis(200));
    for mode in [delay, Mode::Drop, Mode::Cut, Mode::Corrupt] {
        proxy.set(mode);
        let (lookups, hits, longest) = load.run(Duration::from_millis(1500));
        proxy.set(Mode::Pass);
        let back = until("the tier is back", || load.turn().0 == 2 * BLOCK_TOKENS && load.node.tier.works());
        println!("{mode:?}: {lookups} lookups, {hits} hits, the longest {longest:?}; back after {back:?}");
        assert!(longest < DEADLINE + Duration::from_millis(10) + TOLERANCE, "{mode:?}: {longest:?}");
        assert!(back < Duration::from_secs(2), "{mode:?}: {back:?}");
    }
    let (lookups, hits, _) = load.run(Duration::from_millis(300));
    assert!(hits * 10 > lookups * 9, "{hits} of {lookups}");
    println!("{:?}", load.node.tier.stats());
}

#[test]
#[ignore = "needs redis-server: make test-remote"]
fn a_server_that_is_killed_and_comes_back_empty_is_used_again() {
    let mut server = RedisServer::start(&[]);
    let mut load = Load::new(&RemoteConfig::new(server.url()).prefix(prefix()).deadline(DEADLINE));
    server.kill();
    let (_, _, longest) = load.run(Duration::from_secs(1));
    assert!(longest < DEADLINE + Duration::from_millis(10) + TOLERANCE, "{longest:?}");
    assert!(load.node.tier.stats().failing);
    server.restart();
    let back = until("the tier is back", || load.node.tier.works());
    assert!(back < Duration::from_secs(2), "{back:?}");
    load.run(Duration::from_millis(500));
    load.node.cache.flush().unwrap();
    let (lookups, hits, _) = load.run(Duration::from_millis(500));
    assert!(hits * 10 > lookups * 9, "{hits} of {lookups}: what was lost is written again");
}

#[test]
#[ignore = "needs redis-server: make test-remote"]
fn a_master_that_is_killed_under_load_makes_no_request_wrong_or_late() {
    let mut cluster = Cluster::start();
    let mut load = Load::new(&RemoteConfig::new(cluster.url()).prefix(prefix()).deadline(DEADLINE));
    let (lookups, hits, _) = load.run(Duration::from_millis(500));
    assert!(hits * 10 > lookups * 9, "{hits} of {lookups}");
    cluster.servers[1].kill();
    let (lookups, hits, longest) = load.run(Duration::from_secs(3));
    println!("without a master of three: {lookups} lookups, {hits} hits, the longest {longest:?}");
    assert!(longest < DEADLINE + Duration::from_millis(10) + TOLERANCE, "{longest:?}");
    cluster.servers[1].restart();
    let began = Instant::now();
    until("the cluster works", || {
        load.run(Duration::from_millis(100));
        let (lookups, hits, _) = load.run(Duration::from_millis(100));
        hits * 10 > lookups * 9
    });
    println!("all found again {:?} after the master was back", began.elapsed());
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
