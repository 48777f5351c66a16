//! What a remote tier promises, on a real server that speaks S3. `make test-remote` runs it.

use std::sync::Arc;
use std::time::Duration;

use crate::common::server::S3Server;
use crate::common::{BLOCK_TOKENS, Node, namespace, prompt, until};
use kvkeep::tiers::contract;
use kvkeep::{ManualClock, Tier};
use kvkeep_remote::RemoteTier;

const RAM_BYTES: u64 = 8 << 20;

#[test]
#[ignore = "needs an S3 server: make test-remote"]
fn s3_keeps_what_a_tier_promises() {
    let server = S3Server::start();
    contract::check(&|| {
        let config = server.config().capacity_bytes(contract::CAPACITY_BYTES);
        Arc::new(RemoteTier::open_at(&config, Arc::new(ManualClock::at(1000))).unwrap()) as Arc<dyn Tier>
    });
}

#[test]
#[ignore = "needs an S3 server: make test-remote"]
fn what_one_node_writes_to_s3_another_finds() {
    let server = S3Server::start();
    let config = server.config().refresh(Duration::from_millis(100));
    let (one, two) = (Node::new(&config, RAM_BYTES), Node::new(&config, RAM_BYTES));
    two.know_all();
    one.store(&namespace("m"), &prompt(1, 3));
    one.cache.flush().unwrap();
    until("the other node hears of it", || two.lookup(&namespace("m"), &prompt(1, 3)).0 == 3 * BLOCK_TOKENS);
    let wrong = server.config().variables([("AWS_SECRET_ACCESS_KEY", "wrong")]);
    let stranger = Node::new(&wrong, RAM_BYTES);
    assert_eq!(stranger.lookup(&namespace("m"), &prompt(1, 3)).0, 0);
    assert!(stranger.tier.stats().failing);
}

/// Where not all answers came in time nothing was found, however often it was asked.
#[test]
#[ignore = "needs an S3 server: make test-remote"]
fn of_a_long_prompt_what_the_store_says_in_time_is_found_and_later_the_rest() {
    let server = S3Server::start();
    let config = server.config();
    let (model, tokens) = (namespace("m"), prompt(1, 150));
    let one = Node::new(&config, RAM_BYTES);
    one.store(&model, &tokens);
    one.cache.flush().unwrap();
    let two = Node::new(&config.deadline(Duration::from_millis(100)), RAM_BYTES);
    two.know_all();
    let mut found = Vec::new();
    until("all is found", || {
        found.push(two.lookup(&model, &tokens).0 / BLOCK_TOKENS);
        found.last() == Some(&150)
    });
    println!("blocks of 150 that one lookup after another found: {found:?}");
}
