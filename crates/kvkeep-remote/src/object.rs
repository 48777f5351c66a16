//! Objects in S3 and what speaks as it does, and files in a directory that several machines share.
//!
//! - An object is a block. It is written whole or not at all, so nobody reads a part.
//! - These stores do not tell what others write: they are listed now and then.
//!
//! Many blocks in one object were the alternative: fewer requests, and then whoever evicts one block has to write the
//! others again.

use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{StreamExt, TryStreamExt};
use kvkeep::NamespaceId;
use kvkeep::tiers::{BlockKey, Messages};
use object_store::path::Path;
use object_store::{Error, GetOptions, GetRange, ObjectStore, ObjectStoreExt, PutPayload};
use tokio::sync::Semaphore;

use crate::RemoteConfig;
use crate::store::{Lane, Listed, Name, News, Reply, Store, StoreError, namespace_text};

/// Requests at a time: each has a connection.
const AT_ONCE: usize = 32;
/// Objects that a part of a list has.
const LIST_PART: usize = 1000;
#[cfg(feature = "http")]
const CONNECT: Duration = Duration::from_secs(2);
/// What a request may take that is not given up before.
#[cfg(feature = "http")]
const PATIENCE: Duration = Duration::from_secs(10);

/// Objects under a path.
#[derive(Debug)]
pub(crate) struct Objects {
    name: &'static str,
    store: Box<dyn ObjectStore>,
    turns: Semaphore,
    /// Where all of ours are, without a slash at its end.
    prefix: String,
    /// How long the store may take to say that it is there.
    deadline: Duration,
    /// From the time on that the store says it was written.
    ttl_ms: Option<u64>,
}

impl From<Error> for StoreError {
    fn from(error: Error) -> Self {
        match error {
            Error::PermissionDenied { .. } | Error::Unauthenticated { .. } | Error::NotSupported { .. } => {
                Self::Refused(error.to_string())
            }
            error => Self::Broken(error.to_string()),
        }
    }
}

impl Objects {
    /// The store at a URL; `None` if it is none of these.
    pub(crate) fn open(config: &RemoteConfig) -> Option<Result<Self, String>> {
        let (scheme, rest) = config.url.split_once("://")?;
        let opened = match scheme {
            #[cfg(feature = "s3")]
            "s3" | "s3a" => s3(config, rest).map(|(store, path)| ("s3", store, path)),
            #[cfg(feature = "gs")]
            "gs" => gs(config, rest).map(|(store, path)| ("gs", store, path)),
            #[cfg(feature = "az")]
            "az" => az(config, rest).map(|(store, path)| ("az", store, path)),
            #[cfg(feature = "file")]
            "file" => file(rest).map(|store| ("file", store, String::new())),
            _ => return None,
        };
        Some(opened.map(|(name, store, path)| {
            let ttl_ms = config.ttl.map(|ttl| u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX));
            let prefix = [path.trim_matches('/'), config.prefix.as_str()].join("/").trim_matches('/').to_owned();
            Self { name, store, turns: Semaphore::new(AT_ONCE), prefix, deadline: config.deadline, ttl_ms }
        }))
    }

    fn path(&self, name: &Name) -> Path {
        Path::from(name.text(&self.prefix, '/'))
    }

    async fn list_all(
        &self,
        namespace: Option<NamespaceId>,
        each: &mut (dyn FnMut(Vec<Listed>) + Send),
    ) -> Result<(), StoreError> {
        let begin = namespace.map_or_else(|| self.prefix.clone(), |id| namespace_text(&self.prefix, '/', id));
        let prefix = Path::from(begin);
        let listed = self.store.list(Some(&prefix)).map_ok(|object| {
            let name = Name::parse(&self.prefix, '/', object.location.as_ref())?;
            let written_at_ms = u64::try_from(object.last_modified.timestamp_millis()).unwrap_or(0);
            let expires_at_ms = self.ttl_ms.map_or(u64::MAX, |ttl_ms| written_at_ms.saturating_add(ttl_ms));
            Some(Listed { name, bytes: object.size, expires_at_ms })
        });
        let mut parts = listed.try_chunks(LIST_PART);
        while let Some(part) = parts.next().await {
            each(part.map_err(|error| error.1)?.into_iter().flatten().collect());
        }
        Ok(())
    }

    async fn get_part(&self, name: &Name, range: Option<GetRange>) -> Result<Option<(Bytes, u64)>, StoreError> {
        let _turn = self.turns.acquire().await;
        match self.store.get_opts(&self.path(name), GetOptions { range, ..GetOptions::default() }).await {
            Ok(object) => {
                let size = object.meta.size;
                Ok(Some((object.bytes().await?, size)))
            }
            Err(Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

impl Store for Objects {
    fn name(&self) -> &'static str {
        self.name
    }

    fn mend(&self) -> Reply<'_, ()> {
        let nothing = Name { namespace: NamespaceId::from_bytes([0; 32]), key: BlockKey::new([0; 32], u32::MAX) };
        Box::pin(async move {
            // A first request connects, and may take longer.
            let _ = self.get_part(&nothing, None).await?;
            let asked = tokio::time::timeout(self.deadline, self.get_part(&nothing, None)).await;
            asked.unwrap_or(Err(StoreError::Late)).map(drop)
        })
    }

    /// Each request has a connection for itself.
    fn give_up(&self, _lane: Lane) {}

    fn head<'a>(&'a self, name: &'a Name) -> Reply<'a, Option<(Bytes, u64)>> {
        Box::pin(self.get_part(name, Some(GetRange::Bounded(0..Messages::HEADER_BYTES as u64))))
    }

    fn get<'a>(&'a self, name: &'a Name) -> Reply<'a, Option<Bytes>> {
        Box::pin(async move { Ok(self.get_part(name, None).await?.map(|(bytes, _)| bytes)) })
    }

    fn put<'a>(&'a self, name: &'a Name, parts: [&'a [u8]; 2], _ttl: Option<Duration>) -> Reply<'a, ()> {
        let payload: PutPayload = parts.into_iter().map(Bytes::copy_from_slice).collect();
        Box::pin(async move {
            let _turn = self.turns.acquire().await;
            Ok(self.store.put(&self.path(name), payload).await.map(drop)?)
        })
    }

    fn remove<'a>(&'a self, names: &'a [Name]) -> Reply<'a, ()> {
        let paths: Vec<_> = names.iter().map(|name| Ok(self.path(name))).collect();
        Box::pin(async move {
            let mut removed = self.store.delete_stream(futures_util::stream::iter(paths).boxed());
            while let Some(one) = removed.next().await {
                match one {
                    Ok(_) | Err(Error::NotFound { .. }) => {}
                    Err(error) => return Err(error.into()),
                }
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
        false
    }

    fn follow(&self) -> Reply<'_, ()> {
        Box::pin(async { Ok(()) })
    }

    fn news(&self) -> Reply<'_, News> {
        Box::pin(async { Ok(News::Untold) })
    }

    fn tell<'a>(&'a self, _written: &'a [Listed]) -> Reply<'a, ()> {
        Box::pin(async { Ok(()) })
    }
}

#[cfg(feature = "file")]
fn file(path: &str) -> Result<Box<dyn ObjectStore>, String> {
    let refused = |error: &dyn std::fmt::Display| format!("the directory {path}: {error}");
    if !path.starts_with('/') {
        return Err(refused(&"give it from the root on, as in file:///srv/kvkeep"));
    }
    std::fs::create_dir_all(path).map_err(|error| refused(&error))?;
    let files = object_store::local::LocalFileSystem::new_with_prefix(path).map_err(|error| refused(&error))?;
    Ok(Box::new(files))
}

/// The bucket, and the path in it.
#[cfg(feature = "http")]
fn bucket_of(rest: &str) -> Result<(&str, &str), String> {
    let (bucket, path) = rest.split_once('/').unwrap_or((rest, ""));
    if bucket.is_empty() {
        return Err("the URL names no bucket: s3://bucket/path".to_owned());
    }
    // Whoever has chosen another one before keeps it.
    let _ = rustls::crypto::ring::default_provider().install_default();
    Ok((bucket, path))
}

/// Whoever waits does not wait for a second try.
#[cfg(feature = "http")]
fn no_retry() -> object_store::RetryConfig {
    object_store::RetryConfig {
        max_retries: 0,
        retry_timeout: PATIENCE,
        backoff: object_store::BackoffConfig::default(),
    }
}

#[cfg(feature = "http")]
fn client(config: &RemoteConfig) -> object_store::ClientOptions {
    let is_plain =
        |(name, value): &(String, String)| name.to_lowercase().contains("endpoint") && value.starts_with("http://");
    let is_plain = config.variables.iter().any(is_plain);
    object_store::ClientOptions::new().with_connect_timeout(CONNECT).with_timeout(PATIENCE).with_allow_http(is_plain)
}

/// The variables that this store knows.
#[cfg(feature = "http")]
fn known<K: std::str::FromStr>(config: &RemoteConfig) -> impl Iterator<Item = (K, &String)> {
    config.variables.iter().filter_map(|(name, value)| Some((name.to_lowercase().parse().ok()?, value)))
}

#[cfg(feature = "s3")]
fn s3(config: &RemoteConfig, rest: &str) -> Result<(Box<dyn ObjectStore>, String), String> {
    let (bucket, path) = bucket_of(rest)?;
    let mut builder = object_store::aws::AmazonS3Builder::new().with_bucket_name(bucket).with_retry(no_retry());
    for (key, value) in known(config) {
        builder = builder.with_config(key, value);
    }
    let store = builder.with_client_options(client(config)).build().map_err(|error| error.to_string())?;
    Ok((Box::new(store), path.to_owned()))
}

#[cfg(feature = "gs")]
fn gs(config: &RemoteConfig, rest: &str) -> Result<(Box<dyn ObjectStore>, String), String> {
    let (bucket, path) = bucket_of(rest)?;
    let mut builder = object_store::gcp::GoogleCloudStorageBuilder::new().with_bucket_name(bucket);
    for (key, value) in known(config) {
        builder = builder.with_config(key, value);
    }
    let builder = builder.with_retry(no_retry()).with_client_options(client(config));
    Ok((Box::new(builder.build().map_err(|error| error.to_string())?), path.to_owned()))
}

#[cfg(feature = "az")]
fn az(config: &RemoteConfig, rest: &str) -> Result<(Box<dyn ObjectStore>, String), String> {
    let (container, path) = bucket_of(rest)?;
    let mut builder = object_store::azure::MicrosoftAzureBuilder::new().with_container_name(container);
    for (key, value) in known(config) {
        builder = builder.with_config(key, value);
    }
    let builder = builder.with_retry(no_retry()).with_client_options(client(config));
    Ok((Box::new(builder.build().map_err(|error| error.to_string())?), path.to_owned()))
}
