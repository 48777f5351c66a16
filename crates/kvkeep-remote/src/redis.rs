//! Redis and Valkey: one server, Sentinel, or a cluster.
//!
//! - Commands are pipelined: whoever asks does not wait for the answers to what was asked before.
//! - A block is one string. What is written is told in a stream, which others follow.
//!
//! Keys of one namespace in one slot of a cluster were the alternative: then a server has all of a model's blocks.

mod connect;

use std::collections::HashMap;
use std::future::Future;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{FuturesUnordered, StreamExt};
use kvkeep::NamespaceId;
use kvkeep::tiers::{BlockKey, Messages};
use redis::{Cmd, FromRedisValue, RedisError, RedisResult, RedisWrite, ToRedisArgs, Value};

use crate::store::{Lane, Listed, Name, News, Reply, Store, StoreError, namespace_text};
use connect::{Connection, Server};

/// What a command may take that no request waits for.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long news are waited for.
const NEWS_MS: u64 = 1000;
/// Messages that the stream of news keeps, about.
const NEWS_KEPT: u32 = 10_000;
/// Keys that a part of a list has, about.
const LIST_PART: u32 = 1000;
/// Of an object in the news: its namespace, hash and layer, and its bytes.
const NEWS_BYTES: usize = 76;

/// Objects in Redis.
#[derive(Debug)]
pub(crate) struct Redis {
    server: Server,
    prefix: String,
    /// How long a server may take to say that it is there.
    deadline: Duration,
    lanes: [Mutex<Option<Connection>>; 4],
    /// Up to where the news were read.
    since: Mutex<String>,
    /// Ours in the news.
    node: String,
}

/// Two parts that are one argument.
struct Parts<'a>([&'a [u8]; 2]);

impl ToRedisArgs for Parts<'_> {
    fn write_redis_args<W: ?Sized + RedisWrite>(&self, out: &mut W) {
        use std::io::Write;
        let mut writer = out.writer_for_next_arg();
        // Into memory: it does not fail.
        self.0.iter().for_each(|part| _ = writer.write_all(part));
    }
}

impl From<RedisError> for StoreError {
    fn from(error: RedisError) -> Self {
        if error.is_timeout() {
            Self::Late
        } else if error.is_io_error() || error.is_unrecoverable_error() {
            Self::Broken(error.to_string())
        } else {
            Self::Refused(error.to_string())
        }
    }
}

impl Redis {
    /// The store at a URL. Nothing is connected yet.
    pub(crate) fn new(url: &str, prefix: &str, deadline: Duration, node: String) -> Result<Self, String> {
        let server = Server::parse(url)?;
        let (lanes, since) = (Default::default(), Mutex::new("$".to_owned()));
        Ok(Self { server, prefix: prefix.to_owned(), deadline, lanes, since, node })
    }

    fn text(&self, name: &Name) -> String {
        name.text(&self.prefix, ':')
    }

    fn feed(&self) -> String {
        format!("{}:news", self.prefix)
    }

    fn lane(&self, lane: Lane) -> &Mutex<Option<Connection>> {
        let [ask, read, write, follow] = &self.lanes;
        match lane {
            Lane::Ask => ask,
            Lane::Read => read,
            Lane::Write => write,
            Lane::Follow => follow,
        }
    }

    fn connection(&self, lane: Lane) -> Option<Connection> {
        self.lane(lane).lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Asks over the connections of a lane. Those that failed are given up.
    async fn ask<T: FromRedisValue>(&self, lane: Lane, command: &Cmd, at_most: Duration) -> Result<T, StoreError> {
        let mut connection = self.connection(lane).ok_or(StoreError::Away)?;
        let asked = tokio::time::timeout(at_most, connection.ask(command)).await;
        let answered =
            asked.unwrap_or_else(|_| Err(RedisError::from(std::io::Error::from(std::io::ErrorKind::TimedOut))));
        let answered = self.settle(lane, &connection, answered.and_then(|value| Ok(T::from_redis_value(value)?)));
        if matches!(answered, Err(StoreError::Late)) {
            self.give_up(lane);
        }
        answered
    }

    fn settle<T>(&self, lane: Lane, used: &Connection, answered: RedisResult<T>) -> Result<T, StoreError> {
        let answered = answered.map_err(StoreError::from);
        if matches!(answered, Err(StoreError::Broken(_))) {
            let mut connection = self.lane(lane).lock().unwrap_or_else(PoisonError::into_inner);
            if connection.as_ref().is_some_and(|now| now.number() == used.number() && !now.heals()) {
                *connection = None;
            }
        }
        answered
    }

    /// Connects a lane if need be, and asks whether the server is there.
    async fn mend_lane(&self, lane: Lane) -> Result<(), StoreError> {
        if self.connection(lane).is_none() {
            let connection = self.server.connect().await?;
            *self.lane(lane).lock().unwrap_or_else(PoisonError::into_inner) = Some(connection);
        }
        // Over the others, an answer waits for what is being moved.
        if lane != Lane::Ask {
            return Ok(());
        }
        let mut connection = self.connection(lane).ok_or(StoreError::Away)?;
        let answered = within(self.deadline, connection.ping()).await;
        let answered = self.settle(lane, &connection, answered);
        if matches!(answered, Err(StoreError::Late)) {
            // What is still to come over it would be in the way.
            self.give_up(lane);
        }
        answered.map(drop)
    }

    /// One part of a list, of one server: the next place, and what was there.
    async fn list_part(
        &self,
        server: Option<&(String, u16)>,
        pattern: &str,
        at: &str,
    ) -> Result<(String, Vec<Listed>), StoreError> {
        let mut connection = self.connection(Lane::Write).ok_or(StoreError::Away)?;
        let mut scan = redis::cmd("SCAN");
        scan.arg(at).arg("MATCH").arg(pattern).arg("COUNT").arg(LIST_PART);
        let answered = within(PATIENCE, connection.ask_server(server, &scan)).await;
        let (next, names): (String, Vec<String>) = self.settle(
            Lane::Write,
            &connection,
            answered.and_then(|value| Ok(FromRedisValue::from_redis_value(value)?)),
        )?;
        let names = names.iter().filter_map(|name| Name::parse(&self.prefix, ':', name));
        let mut sizes: FuturesUnordered<_> = names.map(|name| self.size(name)).collect();
        let mut listed = Vec::with_capacity(sizes.len());
        while let Some(size) = sizes.next().await {
            listed.extend(size?);
        }
        Ok((next, listed))
    }

    async fn size(&self, name: Name) -> Result<Option<Listed>, StoreError> {
        let mut command = redis::cmd("STRLEN");
        command.arg(self.text(&name));
        let bytes: u64 = self.ask(Lane::Write, &command, PATIENCE).await?;
        Ok((bytes > 0).then_some(Listed { name, bytes, expires_at_ms: u64::MAX }))
    }

    async fn list_all(
        &self,
        namespace: Option<NamespaceId>,
        each: &mut (dyn FnMut(Vec<Listed>) + Send),
    ) -> Result<(), StoreError> {
        let begin = namespace.map_or_else(|| format!("{}:", self.prefix), |id| namespace_text(&self.prefix, ':', id));
        let pattern = escaped(&begin) + "*";
        let mut connection = self.connection(Lane::Write).ok_or(StoreError::Away)?;
        for server in connection.servers().await? {
            let mut at = "0".to_owned();
            loop {
                let (next, listed) = self.list_part(server.as_ref(), &pattern, &at).await?;
                each(listed);
                if next == "0" {
                    break;
                }
                at = next;
            }
        }
        Ok(())
    }

    async fn read_news(&self) -> Result<News, StoreError> {
        let since = self.since.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut command = redis::cmd("XREAD");
        command.arg("COUNT").arg(1000).arg("BLOCK").arg(NEWS_MS).arg("STREAMS").arg(self.feed()).arg(since);
        type Entry = (String, HashMap<String, Vec<u8>>);
        let told: Option<Vec<(String, Vec<Entry>)>> = self.ask(Lane::Follow, &command, PATIENCE).await?;
        let mut written = Vec::new();
        for (id, fields) in told.into_iter().flatten().flat_map(|(_, entries)| entries) {
            if fields.get("node").is_none_or(|node| *node != self.node.as_bytes()) {
                let keys = fields.get("keys").map(Vec::as_slice).unwrap_or_default();
                // What is damaged would be taken for objects that take no one knows how much.
                if fields.get("sum").is_none_or(|sum| *sum != sum_of(keys)) {
                    if written.is_empty() {
                        return Err(StoreError::Broken("news were damaged".to_owned()));
                    }
                    break;
                }
                written.extend(keys.as_chunks::<NEWS_BYTES>().0.iter().filter_map(from_news));
            }
            *self.since.lock().unwrap_or_else(PoisonError::into_inner) = id;
        }
        Ok(News::Written(written))
    }

    /// The place of the last message, so that none after it is missed.
    async fn begin_to_follow(&self) -> Result<(), StoreError> {
        let mut command = redis::cmd("XREVRANGE");
        command.arg(self.feed()).arg("+").arg("-").arg("COUNT").arg(1);
        let last: Vec<(String, HashMap<String, Vec<u8>>)> = self.ask(Lane::Follow, &command, PATIENCE).await?;
        let place = last.into_iter().next().map_or_else(|| "0-0".to_owned(), |(id, _)| id);
        *self.since.lock().unwrap_or_else(PoisonError::into_inner) = place;
        Ok(())
    }
}

impl Store for Redis {
    fn name(&self) -> &'static str {
        "redis"
    }

    fn mend(&self) -> Reply<'_, ()> {
        Box::pin(async move {
            for lane in [Lane::Ask, Lane::Read, Lane::Write, Lane::Follow] {
                self.mend_lane(lane).await?;
            }
            Ok(())
        })
    }

    fn give_up(&self, lane: Lane) {
        *self.lane(lane).lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn head<'a>(&'a self, name: &'a Name) -> Reply<'a, Option<(Bytes, u64)>> {
        Box::pin(async move {
            let (mut head, mut size) = (redis::cmd("GETRANGE"), redis::cmd("STRLEN"));
            head.arg(self.text(name)).arg(0).arg(Messages::HEADER_BYTES - 1);
            size.arg(self.text(name));
            let (head, size) = (self.ask(Lane::Ask, &head, PATIENCE), self.ask(Lane::Ask, &size, PATIENCE));
            let (head, size): (Result<Vec<u8>, _>, Result<u64, _>) = futures_util::future::join(head, size).await;
            let (head, size) = (head?, size?);
            Ok((!head.is_empty()).then(|| (head.into(), size)))
        })
    }

    fn get<'a>(&'a self, name: &'a Name) -> Reply<'a, Option<Bytes>> {
        Box::pin(async move {
            let mut command = redis::cmd("GET");
            command.arg(self.text(name));
            match self.ask(Lane::Read, &command, PATIENCE).await? {
                Value::BulkString(bytes) => Ok(Some(bytes.into())),
                _ => Ok(None),
            }
        })
    }

    fn put<'a>(&'a self, name: &'a Name, parts: [&'a [u8]; 2], ttl: Option<Duration>) -> Reply<'a, ()> {
        let mut command = Cmd::with_capacity(5, parts.iter().map(|part| part.len()).sum::<usize>() + 128);
        command.arg("SET").arg(self.text(name)).arg(Parts(parts));
        if let Some(ttl) = ttl {
            command.arg("PX").arg(u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX >> 1).max(1));
        }
        // How long that may take depends on more than this block: the writer says it.
        Box::pin(async move { self.ask::<Value>(Lane::Write, &command, Duration::MAX).await.map(drop) })
    }

    fn remove<'a>(&'a self, names: &'a [Name]) -> Reply<'a, ()> {
        Box::pin(async move {
            let remove = |name: &Name| {
                let mut command = redis::cmd("UNLINK");
                command.arg(self.text(name));
                async move { self.ask::<Value>(Lane::Write, &command, PATIENCE).await }
            };
            let mut removed: FuturesUnordered<_> = names.iter().map(remove).collect();
            while let Some(one) = removed.next().await {
                one?;
            }
            Ok(())
        })
    }

    fn list<'a>(
        &'a self,
        namespace: Option<NamespaceId>,
        each: &'a mut (dyn FnMut(Vec<Listed>) + Send),
    ) -> Reply<'a, ()> {
        Box::pin(self.list_all(namespace, each))
    }

    fn knows_time(&self) -> bool {
        true
    }

    fn follow(&self) -> Reply<'_, ()> {
        Box::pin(self.begin_to_follow())
    }

    fn news(&self) -> Reply<'_, News> {
        Box::pin(self.read_news())
    }

    fn tell<'a>(&'a self, written: &'a [Listed]) -> Reply<'a, ()> {
        let keys: Vec<u8> = written.iter().flat_map(to_news).collect();
        let mut command = redis::cmd("XADD");
        command.arg(self.feed()).arg("MAXLEN").arg("~").arg(NEWS_KEPT).arg("*");
        command.arg("node").arg(&self.node).arg("sum").arg(sum_of(&keys)).arg("keys").arg(keys);
        Box::pin(async move { self.ask::<Value>(Lane::Write, &command, PATIENCE).await.map(drop) })
    }
}

async fn within<T>(at_most: Duration, asked: impl Future<Output = RedisResult<T>>) -> RedisResult<T> {
    let late = |_| Err(RedisError::from(std::io::Error::from(std::io::ErrorKind::TimedOut)));
    tokio::time::timeout(at_most, asked).await.unwrap_or_else(late)
}

/// A prefix in which no character means more than itself to `MATCH`.
fn escaped(prefix: &str) -> String {
    let one = |character: char| {
        if matches!(character, '*' | '?' | '[' | ']' | '^' | '\\') { vec!['\\', character] } else { vec![character] }
    };
    prefix.chars().flat_map(one).collect()
}

fn sum_of(keys: &[u8]) -> Vec<u8> {
    twox_hash::XxHash3_64::oneshot(keys).to_le_bytes().to_vec()
}

fn to_news(listed: &Listed) -> Vec<u8> {
    let Listed { name: Name { namespace, key }, bytes, .. } = listed;
    [namespace.as_bytes().as_slice(), key.hash(), &key.layer().to_le_bytes(), &bytes.to_le_bytes()].concat()
}

fn from_news(bytes: &[u8; NEWS_BYTES]) -> Option<Listed> {
    let (namespace, rest) = bytes.split_first_chunk::<32>()?;
    let (hash, rest) = rest.split_first_chunk::<32>()?;
    let (layer, rest) = rest.split_first_chunk::<4>()?;
    let name =
        Name { namespace: NamespaceId::from_bytes(*namespace), key: BlockKey::new(*hash, u32::from_le_bytes(*layer)) };
    Some(Listed { name, bytes: u64::from_le_bytes(*rest.first_chunk::<8>()?), expires_at_ms: u64::MAX })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_is_what_is_heard() {
        let name = Name { namespace: NamespaceId::from_bytes([8; 32]), key: BlockKey::new([9; 32], 3) };
        let listed = Listed { name, bytes: 1 << 33, expires_at_ms: u64::MAX };
        let told = to_news(&listed);
        assert_eq!(told.as_chunks::<NEWS_BYTES>().0.iter().filter_map(from_news).collect::<Vec<_>>(), [listed]);
    }

    #[test]
    fn a_prefix_is_no_pattern() {
        assert_eq!(escaped(r"a*[b]?\c:"), r"a\*\[b\]\?\\c:");
    }

    /// A password in a URL must not get into a log.
    #[test]
    fn urls_are_understood_or_refused_and_never_shown() {
        let deadline = Duration::from_millis(1);
        let open = |url: &str| Redis::new(url, "p", deadline, String::new());
        for url in [
            "redis://h",
            "redis://:secret@h:1/2",
            "rediss://me:secret@h",
            "redis-cluster://me:secret@h:1,g:2",
            "rediss-cluster://h",
            "redis-sentinel://:secret@h:1,g/name/3",
            "rediss-sentinel://h/name",
        ] {
            let store = open(url).unwrap_or_else(|error| panic!("{url}: {error}"));
            assert!(!format!("{store:?}").contains("secret"), "{store:?}");
        }
        for url in ["redis-sentinel://h:1", "redis-cluster://", "redis-other://h", "h:1", "redis-sentinel://h/name/x"] {
            assert!(open(url).is_err(), "{url}");
        }
    }
}
