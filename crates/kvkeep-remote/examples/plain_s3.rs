//! The client of S3 that a remote tier uses, without kvkeep: objects of 2 MiB written and read, as many at a time.
//!
//! Usage: `plain_s3 s3://BUCKET/PATH [BLOCKS]` (256 blocks), with the variables of AWS. Prints `set` and `get`, in MB/s, of the
//! median of five rounds. `benches/remote/run.sh` runs it in turns with `rates`.

#![expect(clippy::print_stdout, reason = "what it is for")]

use std::error::Error;
use std::time::Instant;

use futures_util::stream::{self, StreamExt, TryStreamExt};
use object_store::aws::AmazonS3Builder;
use object_store::path::Path;
use object_store::{ClientOptions, ObjectStore, ObjectStoreExt, PutPayload};

const BLOCK_BYTES: usize = 2 << 20;
const AT_ONCE: usize = 32;
const ROUNDS: u32 = 5;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let url = args.next().ok_or("give the URL of a store")?;
    let blocks: usize = args.next().map_or(Ok(256), |blocks| blocks.parse())?;
    let _ = rustls::crypto::ring::default_provider().install_default();
    let options = ClientOptions::new().with_allow_http(true);
    let store = AmazonS3Builder::from_env().with_url(&url).with_client_options(options).build()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let (mut sets, mut gets) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let began = Instant::now();
        runtime.block_on(set(&store, blocks))?;
        sets.push(rate(blocks, began));
        let began = Instant::now();
        runtime.block_on(get(&store, blocks))?;
        gets.push(rate(blocks, began));
    }
    for (name, mut rates) in [("set", sets), ("get", gets)] {
        rates.sort_by(f64::total_cmp);
        println!("{name} {:.0}", rates.get(rates.len() / 2).copied().unwrap_or_default());
    }
    Ok(())
}

fn path(number: usize) -> Path {
    Path::from(format!("plain/{number:04}"))
}

async fn set(store: &dyn ObjectStore, blocks: usize) -> object_store::Result<()> {
    let bytes = bytes::Bytes::from((0..BLOCK_BYTES).map(|at| (at * 7).to_le_bytes()[0]).collect::<Vec<u8>>());
    let puts = stream::iter(0..blocks).map(|number| {
        let payload = PutPayload::from(bytes.clone());
        async move { store.put(&path(number), payload).await }
    });
    puts.buffer_unordered(AT_ONCE).try_for_each(|_| async { Ok(()) }).await
}

async fn get(store: &dyn ObjectStore, blocks: usize) -> object_store::Result<()> {
    let gets = stream::iter(0..blocks).map(|number| async move { store.get(&path(number)).await?.bytes().await });
    gets.buffer_unordered(AT_ONCE).try_for_each(|_| async { Ok(()) }).await
}

#[expect(clippy::cast_precision_loss, reason = "a figure to read")]
fn rate(blocks: usize, began: Instant) -> f64 {
    (blocks * BLOCK_BYTES) as f64 / 1e6 / began.elapsed().as_secs_f64()
}
