//! Keeps this node's picture of the store up to date: what lies there when it opens, and what others write.
//!
//! While the picture is complete, what is not in it costs no question. A filter that each node keeps in the store for the
//! others was the alternative: it is read and written as a whole.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::index::Shown;
use crate::shared::Shared;
use crate::store::{News, StoreError};

/// For so long the picture is complete after the last news.
const FRESH: Duration = Duration::from_secs(3);
/// After so long without news, some may have been missed.
const STALE: Duration = Duration::from_secs(60);
/// Between two tries.
const PAUSE: Duration = Duration::from_millis(200);
const LAST_PAUSE: Duration = Duration::from_secs(5);
/// A list is not begun again before so many times what the last one took.
const LIST_SHARE: u32 = 10;

/// Follows the store, for as long as this is awaited.
pub(crate) async fn run(shared: Arc<Shared>) {
    let (mut heard, mut list_took, mut pause) = (None::<Instant>, Duration::ZERO, PAUSE);
    let mut swept = Instant::now();
    loop {
        if swept.elapsed() > shared.refresh {
            swept = Instant::now();
            shared.sweep();
        }
        if !shared.health.allows() {
            tokio::time::sleep(PAUSE).await;
            continue;
        }
        let followed = match heard.filter(|heard| heard.elapsed() < STALE) {
            None => list(&shared).await.map(|took| list_took = took),
            Some(_) => follow(&shared, &mut list_took).await,
        };
        match followed {
            Ok(()) => (heard, pause) = (Some(Instant::now()), PAUSE),
            // Until something is heard again, the store is asked.
            Err(_) => {
                shared.health.look();
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LAST_PAUSE);
            }
        }
    }
}

/// Lists everything; says how long that took.
async fn list(shared: &Shared) -> Result<Duration, StoreError> {
    shared.store.follow().await?;
    let (began, number, mut shown) = (Instant::now(), shared.lock().begin_list(), Shown::default());
    let mut each = |part: Vec<crate::store::Listed>| {
        let mut state = shared.lock();
        for listed in part {
            shown.insert(listed.name.key, ());
            state.shown(listed);
        }
    };
    shared.store.list(None, &mut each).await?;
    let mut state = shared.lock();
    for key in state.index.end_list(number, &shown) {
        state.reports.iter().for_each(|reports| reports.went(&key));
    }
    let took = began.elapsed();
    state.index.is_complete(Some(Instant::now() + FRESH));
    Ok(took)
}

/// Waits for news. A store that tells none is listed again after a while.
async fn follow(shared: &Shared, list_took: &mut Duration) -> Result<(), StoreError> {
    match shared.store.news().await? {
        News::Written(written) => {
            let mut state = shared.lock();
            written.into_iter().for_each(|listed| state.index.heard(listed));
            state.index.is_complete(Some(Instant::now() + FRESH));
        }
        News::Untold => {
            let pause = shared.refresh.max(*list_took * LIST_SHARE);
            shared.lock().index.is_complete(Some(Instant::now() + pause + *list_took * 2 + FRESH));
            tokio::time::sleep(pause).await;
            *list_took = list(shared).await?;
        }
    }
    Ok(())
}
