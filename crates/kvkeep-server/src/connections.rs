//! Open connections, and which of them goes when there is no place for another.
//!
//! Invariant: who does not ask takes no place from who does. A connection with a request under
//! way is never closed for another one; of the others the idlest goes, those first that have
//! never shown a key, and of those the ones whose address has the most. Some places more are
//! kept for probes and for operators, who are let in when all others are being answered. Having
//! the newcomer wait until somebody leaves was the alternative: whoever opened enough
//! connections and said nothing kept everybody out, the operator too.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

/// Whoever has just come gets this long to say something, if others can go; and a body that has
/// not moved for this long is not worth a place that others wait for.
const GRACE: Duration = Duration::from_secs(1);
/// At most one line of the log in this time says how many were closed.
const LOGGED_EVERY: Duration = Duration::from_secs(10);

/// The places of a server.
#[derive(Debug)]
pub(crate) struct Connections {
    table: Mutex<Table>,
    /// Somebody has left, or has been answered.
    changed: Notify,
    places: usize,
    kept: usize,
}

#[derive(Debug, Default)]
struct Table {
    open: Vec<Arc<Connection>>,
    closed: usize,
    logged: Option<Instant>,
}

/// One connection. The last clone but the table's gives the place back.
#[derive(Debug)]
pub(crate) struct Connection {
    peer: IpAddr,
    state: Mutex<State>,
    /// Tells its task to close it.
    close: Notify,
    /// Has something of the answer under way been sent?
    answered: AtomicBool,
}

/// A connection's place among all; dropping it gives the place back.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) connection: Arc<Connection>,
    all: Arc<Connections>,
}

/// A request under way, until this is dropped.
#[derive(Debug)]
pub(crate) struct Asked(Arc<Place>);

#[derive(Debug, Clone, Copy)]
struct State {
    phase: Phase,
    /// In this phase; a body that moves begins it anew.
    since: Instant,
    /// Has it asked something with a key that the server knows?
    known: bool,
    /// Does it have one of the places that are kept?
    kept: bool,
}

/// What a connection waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// The client's next request, or the rest of its head.
    Idle,
    /// The rest of a request's body.
    Receiving,
    /// The server.
    Answering,
}

impl Connections {
    /// With so many places, and some more that are kept.
    pub(crate) fn new(places: usize) -> Arc<Self> {
        let kept = (places / 8).clamp(4, 32);
        Arc::new(Self { table: Mutex::default(), changed: Notify::new(), places, kept })
    }

    /// A place for a new connection; waits for one if everybody is being answered.
    pub(crate) async fn enter(self: &Arc<Self>, peer: IpAddr) -> Place {
        loop {
            let changed = self.changed.notified();
            if let Some(connection) = self.try_enter(network(peer), Instant::now()) {
                return Place { connection, all: Arc::clone(self) };
            }
            // A body that stands still makes nobody known that it does.
            drop(tokio::time::timeout(GRACE, changed).await);
        }
    }

    fn try_enter(&self, peer: IpAddr, now: Instant) -> Option<Arc<Connection>> {
        let mut table = self.lock();
        let mut kept = false;
        if table.taken(false) >= self.places {
            let full = table.taken(true) >= self.kept;
            match table.idlest(now) {
                Some((at, fresh)) if full || !fresh => kept = table.close(at, now),
                _ if !full => kept = true,
                _ => return None,
            }
        }
        let state = State { phase: Phase::Idle, since: now, known: false, kept };
        let connection = Arc::new(Connection {
            peer,
            state: Mutex::new(state),
            close: Notify::new(),
            answered: AtomicBool::new(false),
        });
        table.open.push(Arc::clone(&connection));
        Some(connection)
    }

    fn leave(&self, connection: &Arc<Connection>) {
        self.lock().open.retain(|open| !Arc::ptr_eq(open, connection));
        self.changed.notify_waiters();
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    /// Places that are taken, of the usual ones or of those that are kept.
    fn taken(&self, kept: bool) -> usize {
        self.open.iter().filter(|connection| connection.lock().kept == kept).count()
    }

    /// Whoever can go and is missed least, and whether it has only just come.
    fn idlest(&self, now: Instant) -> Option<(usize, bool)> {
        let mut of_peer: HashMap<IpAddr, usize> = HashMap::new();
        for connection in &self.open {
            *of_peer.entry(connection.peer).or_default() += 1;
        }
        let rank = |(at, connection): (usize, &Arc<Connection>)| {
            let State { phase, since, known, .. } = *connection.lock();
            let waited = now.saturating_duration_since(since);
            let stands = phase == Phase::Receiving && waited >= GRACE;
            let many = usize::MAX - of_peer.get(&connection.peer).copied().unwrap_or_default();
            (phase == Phase::Idle || stands).then_some((stands, waited < GRACE, known, many, since, at))
        };
        self.open.iter().enumerate().filter_map(rank).min().map(|(_, fresh, .., at)| (at, fresh))
    }

    /// Closes a connection; says whether its place was one that is kept.
    fn close(&mut self, at: usize, now: Instant) -> bool {
        let connection = self.open.swap_remove(at);
        connection.close.notify_one();
        self.closed += 1;
        if self.logged.is_none_or(|logged| now.saturating_duration_since(logged) >= LOGGED_EVERY) {
            tracing::warn!(closed = self.closed, "every place for a connection is taken: the idlest are closed");
            (self.closed, self.logged) = (0, Some(now));
        }
        connection.lock().kept
    }
}

impl Place {
    /// A request begins; a body is still to come, or it is all there.
    pub(crate) fn asked(self: &Arc<Self>, body: bool) -> Asked {
        self.connection.answered.store(false, Ordering::Relaxed);
        self.connection.enter(if body { Phase::Receiving } else { Phase::Answering });
        Asked(Arc::clone(self))
    }

    /// Has it one of the usual places? If one is free now it gets it.
    pub(crate) fn is_usual(&self) -> bool {
        if !self.connection.lock().kept {
            return true;
        }
        let table = self.all.lock();
        let free = table.taken(false) < self.all.places;
        let mut state = self.connection.lock();
        state.kept &= !free;
        !state.kept
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.all.leave(&self.connection);
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        self.0.connection.enter(Phase::Idle);
        self.0.all.changed.notify_waiters();
    }
}

impl Connection {
    /// Some of a body has come.
    pub(crate) fn moved(&self) {
        self.lock().since = Instant::now();
    }

    /// All of a body has come.
    pub(crate) fn received(&self) {
        self.enter(Phase::Answering);
    }

    /// It has shown a key, or needs none.
    pub(crate) fn showed_key(&self) {
        self.lock().known = true;
    }

    pub(crate) fn phase(&self) -> Phase {
        self.lock().phase
    }

    /// Something was sent.
    pub(crate) fn sent(&self) {
        self.answered.store(true, Ordering::Relaxed);
    }

    /// Was something sent since the request under way began?
    pub(crate) fn is_answered(&self) -> bool {
        self.answered.load(Ordering::Relaxed)
    }

    /// Waits until it has to go.
    pub(crate) async fn closed(&self) {
        self.close.notified().await;
    }

    fn enter(&self, phase: Phase) {
        let mut state = self.lock();
        (state.phase, state.since) = (phase, Instant::now());
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Who somebody is, as far as an address says: of IPv6, where everybody has many, the network.
fn network(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        IpAddr::V4(address) => address.into(),
        IpAddr::V6(address) => {
            let [a, b, c, d, ..] = address.segments();
            IpAddr::from([a, b, c, d, 0, 0, 0, 0])
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LATER: Duration = Duration::from_secs(5);

    fn peer(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    /// Places that are taken by connections from these addresses, the first one the longest.
    fn full(peers: &[u8], begin: Instant) -> (Arc<Connections>, Vec<Arc<Connection>>) {
        let all = Connections::new(peers.len());
        let enter = |(number, last): (u64, &u8)| all.try_enter(peer(*last), begin + Duration::from_millis(number));
        let open = (0..).zip(peers).map(enter).collect::<Option<Vec<_>>>();
        (Arc::clone(&all), open.unwrap())
    }

    fn gone(all: &Connections, open: &[Arc<Connection>]) -> Vec<usize> {
        let table = all.lock();
        let there = |connection: &Arc<Connection>| table.open.iter().any(|other| Arc::ptr_eq(other, connection));
        (0..open.len()).filter(|at| !there(&open[*at])).collect()
    }

    #[test]
    fn the_idlest_connection_of_the_address_with_most_goes_first() {
        let begin = Instant::now();
        let (all, open) = full(&[1, 2, 2, 2, 3], begin);
        for expected in [vec![1], vec![1, 2]] {
            all.try_enter(peer(4), begin + LATER).unwrap();
            assert_eq!(gone(&all, &open), expected);
        }
    }

    #[test]
    fn who_has_shown_a_key_goes_after_all_who_have_not() {
        let begin = Instant::now();
        let (all, open) = full(&[1, 1, 1, 2], begin);
        open[..3].iter().for_each(|connection| connection.showed_key());
        all.try_enter(peer(4), begin + LATER).unwrap();
        assert_eq!(gone(&all, &open), [3]);
        // A newcomer has a moment to say something: one that has been idle for long goes before it.
        all.try_enter(peer(5), begin + LATER + GRACE / 2).unwrap();
        assert_eq!(gone(&all, &open), [0, 3]);
    }

    #[test]
    fn who_is_being_answered_stays_and_the_kept_places_fill_up() {
        let begin = Instant::now();
        let (all, open) = full(&[1, 1, 1, 1], begin);
        open.iter().for_each(|connection| connection.enter(Phase::Answering));
        let late: Vec<_> = (0..4).map(|_| all.try_enter(peer(2), begin).unwrap()).collect();
        assert!(late.iter().all(|connection| connection.lock().kept));
        assert_eq!(gone(&all, &late), [0; 0], "they have only just come");
        late.iter().for_each(|connection| connection.enter(Phase::Answering));
        assert!(all.try_enter(peer(2), begin + LATER).is_none(), "everybody is being answered");
        assert_eq!(gone(&all, &open), [0; 0]);
        // A usual place that is free is taken by who had a kept one, when that one asks.
        all.leave(&open[0]);
        let place = Place { connection: Arc::clone(&late[0]), all: Arc::clone(&all) };
        assert!(place.is_usual());
        let other = Place { connection: Arc::clone(&late[1]), all: Arc::clone(&all) };
        assert!(!other.is_usual());
    }

    #[test]
    fn a_body_that_stands_still_goes_after_all_who_are_idle() {
        let begin = Instant::now();
        let (all, open) = full(&[1, 1, 1], begin);
        open[0].enter(Phase::Receiving);
        open[1].enter(Phase::Answering);
        all.try_enter(peer(2), begin + LATER).unwrap();
        assert_eq!(gone(&all, &open), [2]);
        let late = Instant::now() + LATER;
        all.lock().open[2].enter(Phase::Answering);
        all.try_enter(peer(2), late).unwrap();
        assert_eq!(gone(&all, &open), [0, 2]);
    }

    #[test]
    fn an_address_of_ipv6_stands_for_its_network() {
        let one = network("2001:db8:1:2:3::4".parse().unwrap());
        assert_eq!(one, network("2001:db8:1:2:ffff::1".parse().unwrap()));
        assert_ne!(one, network("2001:db8:1:3::1".parse().unwrap()));
        assert_eq!(network("::ffff:10.0.0.1".parse().unwrap()), peer(1));
    }
}
