//! Servers by URL, and connections to them.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::cluster::{ClusterClient, ClusterClientBuilder};
use redis::cluster_async::ClusterConnection;
use redis::cluster_routing::{RoutingInfo, SingleNodeRoutingInfo};
use redis::sentinel::{SentinelClient, SentinelClientBuilder, SentinelServerType};
use redis::{AsyncConnectionConfig, Client, Cmd, ConnectionAddr, FromRedisValue, RedisResult, TlsMode, Value};

use crate::store::StoreError;

/// What connecting may take.
const CONNECT: Duration = Duration::from_secs(2);
/// Of Sentinel.
const SENTINEL_PORT: u16 = 26379;

/// Where to connect to.
pub(crate) struct Server {
    kind: Kind,
    connections: AtomicU64,
}

enum Kind {
    One(Box<Client>),
    Sentinel(Box<tokio::sync::Mutex<SentinelClient>>),
    Cluster(Box<ClusterClient>),
}

/// A connection, or those to a cluster. Clones share it.
#[derive(Clone)]
pub(crate) struct Connection {
    number: u64,
    to: To,
}

#[derive(Clone)]
enum To {
    One(MultiplexedConnection),
    Cluster(ClusterConnection),
}

/// A URL in parts.
struct Url<'a> {
    tls: bool,
    user: Option<&'a str>,
    password: Option<&'a str>,
    hosts: Vec<&'a str>,
    path: Vec<&'a str>,
}

impl Server {
    /// # Errors
    /// Why the URL is none.
    pub(crate) fn parse(url: &str) -> Result<Self, String> {
        let (scheme, rest) = url.split_once("://").ok_or("give a URL such as redis://host:6379")?;
        let kind = match scheme {
            "redis" | "rediss" => Kind::One(Box::new(Client::open(url).map_err(|error| error.to_string())?)),
            "redis-cluster" | "rediss-cluster" => cluster(&Url::parse(scheme, rest)?)?,
            "redis-sentinel" | "rediss-sentinel" => sentinel(&Url::parse(scheme, rest)?)?,
            _ => return Err(format!("no store is called {scheme}://")),
        };
        Ok(Self { kind, connections: AtomicU64::new(0) })
    }

    pub(crate) async fn connect(&self) -> Result<Connection, StoreError> {
        // Whoever asks says how long the answer may take.
        let config = AsyncConnectionConfig::new().set_connection_timeout(Some(CONNECT)).set_response_timeout(None);
        let to = match &self.kind {
            Kind::One(client) => To::One(client.get_multiplexed_async_connection_with_config(&config).await?),
            Kind::Sentinel(client) => To::One(client.lock().await.get_async_connection_with_config(&config).await?),
            Kind::Cluster(client) => To::Cluster(client.get_async_connection().await?),
        };
        Ok(Connection { number: self.connections.fetch_add(1, Ordering::Relaxed), to })
    }
}

impl<'a> Url<'a> {
    fn parse(scheme: &str, rest: &'a str) -> Result<Self, String> {
        let (login, rest) = match rest.rsplit_once('@') {
            Some((login, rest)) => (Some(login), rest),
            None => (None, rest),
        };
        let (user, password) = match login.map(|login| login.split_once(':').unwrap_or(("", login))) {
            Some((user, password)) => (Some(user).filter(|user| !user.is_empty()), Some(password)),
            None => (None, None),
        };
        let mut parts = rest.split('/');
        let hosts: Vec<&str> = parts.next().unwrap_or_default().split(',').filter(|host| !host.is_empty()).collect();
        if hosts.is_empty() {
            return Err("the URL names no host".to_owned());
        }
        let path = parts.filter(|part| !part.is_empty()).collect();
        Ok(Self { tls: scheme.starts_with("rediss"), user, password, hosts, path })
    }
}

fn cluster(url: &Url<'_>) -> Result<Kind, String> {
    let scheme = if url.tls { "rediss" } else { "redis" };
    let nodes = url.hosts.iter().map(|host| format!("{scheme}://{host}"));
    let mut builder = ClusterClientBuilder::new(nodes)
        .connection_timeout(CONNECT)
        .response_timeout(CONNECT)
        // A request does not wait for a cluster that sorts itself out.
        .retries(1)
        .overall_response_timeout(None);
    if let Some(user) = url.user {
        builder = builder.username(user);
    }
    if let Some(password) = url.password {
        builder = builder.password(password);
    }
    builder.build().map(|client| Kind::Cluster(Box::new(client))).map_err(|error| error.to_string())
}

fn sentinel(url: &Url<'_>) -> Result<Kind, String> {
    let name = url.path.first().ok_or("the URL names no master: redis-sentinel://host:26379/name")?;
    let sentinels = url.hosts.iter().map(|host| match host.rsplit_once(':') {
        Some((host, port)) => (host.to_owned(), port.parse().unwrap_or(SENTINEL_PORT)),
        None => ((*host).to_owned(), SENTINEL_PORT),
    });
    let addresses: Vec<ConnectionAddr> = sentinels.map(|(host, port)| ConnectionAddr::Tcp(host, port)).collect();
    let failed = |error: redis::RedisError| error.to_string();
    let mut builder = SentinelClientBuilder::new(addresses, name, SentinelServerType::Master).map_err(failed)?;
    if url.tls {
        builder = builder.set_client_to_redis_tls_mode(TlsMode::Secure);
    }
    if let Some(user) = url.user {
        builder = builder.set_client_to_redis_username(user);
    }
    if let Some(password) = url.password {
        builder = builder.set_client_to_redis_password(password);
    }
    if let Some(database) = url.path.get(1) {
        let number = database.parse().map_err(|_| format!("the database {database:?} is no number"))?;
        builder = builder.set_client_to_redis_db(number);
    }
    Ok(Kind::Sentinel(Box::new(tokio::sync::Mutex::new(builder.build().map_err(failed)?))))
}

impl Connection {
    /// Tells one connection from another.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// Does it connect again by itself? Of a cluster, one server may fail and the others not.
    pub(crate) fn heals(&self) -> bool {
        matches!(self.to, To::Cluster(_))
    }

    /// Asks a server whether it is there.
    pub(crate) async fn ping(&mut self) -> RedisResult<Value> {
        let ping = redis::cmd("PING");
        match &mut self.to {
            To::One(one) => ping.query_async(one).await,
            To::Cluster(cluster) => {
                cluster.route_command(ping, RoutingInfo::SingleNode(SingleNodeRoutingInfo::RandomPrimary)).await
            }
        }
    }

    pub(crate) async fn ask(&mut self, command: &Cmd) -> RedisResult<Value> {
        match &mut self.to {
            To::One(one) => command.query_async(one).await,
            To::Cluster(cluster) => command.query_async(cluster).await,
        }
    }

    /// The servers that keys lie on; one without an address is the one that is connected.
    pub(crate) async fn servers(&mut self) -> Result<Vec<Option<(String, u16)>>, StoreError> {
        if let To::One(_) = self.to {
            return Ok(vec![None]);
        }
        let mut command = redis::cmd("CLUSTER");
        command.arg("SLOTS");
        let slots: Vec<Vec<Value>> =
            FromRedisValue::from_redis_value(self.ask(&command).await?).map_err(redis::RedisError::from)?;
        // First and last slot, then the master, then its replicas.
        let masters = slots.into_iter().filter_map(|slots| {
            let Value::Array(node) = slots.into_iter().nth(2)? else { return None };
            let mut node = node.into_iter();
            let host = FromRedisValue::from_redis_value(node.next()?).ok()?;
            Some((host, FromRedisValue::from_redis_value(node.next()?).ok()?))
        });
        Ok(masters.collect::<BTreeSet<_>>().into_iter().map(Some).collect())
    }

    /// Asks one of them.
    pub(crate) async fn ask_server(&mut self, server: Option<&(String, u16)>, command: &Cmd) -> RedisResult<Value> {
        match (&mut self.to, server) {
            (To::Cluster(cluster), Some((host, port))) => {
                let route = SingleNodeRoutingInfo::ByAddress { host: host.clone(), port: *port };
                cluster.route_command(command.clone(), RoutingInfo::SingleNode(route)).await
            }
            _ => self.ask(command).await,
        }
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not the URL: it has a password.
        let kind = match &self.kind {
            Kind::One(_) => "One",
            Kind::Sentinel(_) => "Sentinel",
            Kind::Cluster(_) => "Cluster",
        };
        f.debug_tuple("Server").field(&kind).finish()
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("number", &self.number).finish_non_exhaustive()
    }
}
