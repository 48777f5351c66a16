//! What a tier needs of a store: objects under the keys of blocks, and a little more. One small trait; the tier above
//! it is the same for all stores.
//!
//! Invariant: nothing here waits for ever: whoever awaits an answer gives it a time, and dropping it is allowed at any
//! moment. A crate that speaks to every store was the alternative: it has no pipelining, and hides what a store can do
//! that others cannot.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use kvkeep::tiers::BlockKey;

/// An answer to come.
pub(crate) type Reply<'a, T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send + 'a>>;

/// Why a store did not do what it was to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// There is no connection now.
    #[error("the store is not connected")]
    Away,
    /// It took longer than anybody waits.
    #[error("the store does not answer in time")]
    Late,
    /// It answered, and does not do it: it is full, or nobody is allowed to.
    #[error("the store refuses: {0}")]
    Refused(String),
    /// The connection failed, or what came over it makes no sense.
    #[error("the connection failed: {0}")]
    Broken(String),
}

/// A part of what is asked of a store. Each has connections of its own, so that a lookup does not wait behind blocks
/// that are being moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lane {
    Ask,
    Read,
    Write,
    Follow,
}

/// An object as a list shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Listed {
    pub(crate) key: BlockKey,
    pub(crate) bytes: u64,
}

/// What others have written lately.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum News {
    /// These, since it was last asked.
    Written(Vec<Listed>),
    /// The store does not tell: its objects have to be listed.
    Untold,
}

/// Keeps objects under keys.
pub(crate) trait Store: Send + Sync + fmt::Debug + 'static {
    /// What it is called in statistics.
    fn name(&self) -> &'static str;

    /// Connects what is not connected. The store is there if this ends well.
    fn mend(&self) -> Reply<'_, ()>;

    /// The connections of this lane are given up, with all that is still to come over them.
    fn give_up(&self, lane: Lane);

    /// The first bytes of an object, as many as a message's header has, and its whole length.
    fn head<'a>(&'a self, key: &'a BlockKey) -> Reply<'a, Option<(Bytes, u64)>>;

    /// An object.
    fn get<'a>(&'a self, key: &'a BlockKey) -> Reply<'a, Option<Bytes>>;

    /// Writes an object of these parts, in place of an older one; it is gone after this time, if the store knows time.
    fn put<'a>(&'a self, key: &'a BlockKey, parts: [&'a [u8]; 2], ttl: Option<Duration>) -> Reply<'a, ()>;

    /// These objects are gone when this has ended well.
    fn remove<'a>(&'a self, keys: &'a [BlockKey]) -> Reply<'a, ()>;

    /// Every object of the prefix, in any order, in parts.
    fn list<'a>(&'a self, each: &'a mut (dyn FnMut(Vec<Listed>) + Send)) -> Reply<'a, ()>;

    /// Begins to follow what is written: what is written after this is told by [`Store::news`].
    fn follow(&self) -> Reply<'_, ()>;

    /// Waits a little for what others have written.
    fn news(&self) -> Reply<'_, News>;

    /// Tells others what was written.
    fn tell<'a>(&'a self, written: &'a [Listed]) -> Reply<'a, ()>;
}

/// The name of a key under a prefix: `prefix:` and the 64 digits of its hash, and `.layer` of a layer.
pub(crate) fn name_of(prefix: &str, separator: char, key: &BlockKey) -> String {
    use std::fmt::Write;
    let mut name = String::with_capacity(prefix.len() + 80);
    name.push_str(prefix);
    name.push(separator);
    key.hash().iter().for_each(|byte| _ = write!(name, "{byte:02x}"));
    if key.layer() > 0 {
        let _ = write!(name, ".{}", key.layer());
    }
    name
}

/// The key that has this name.
pub(crate) fn key_of(prefix: &str, separator: char, name: &str) -> Option<BlockKey> {
    let rest = name.strip_prefix(prefix)?.strip_prefix(separator)?;
    let (digits, layer) = match rest.split_once('.') {
        Some((digits, layer)) => (digits, layer.parse().ok()?),
        None => (rest, 0),
    };
    let mut hash = [0; 32];
    for (byte, digits) in hash.iter_mut().zip(digits.as_bytes().as_chunks::<2>().0) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    let key = BlockKey::new(hash, layer);
    (name_of(prefix, separator, &key) == name).then_some(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_that_of_one_key_and_nothing_else_is_a_name() {
        for layer in [0, 1, 31] {
            let key = BlockKey::new([0xa7; 32], layer);
            let name = name_of("a:b", ':', &key);
            assert_eq!(key_of("a:b", ':', &name), Some(key));
            for wrong in [name.to_uppercase(), format!("{name}0"), format!("{name}.0"), name[1..].into(), String::new()]
            {
                assert_eq!(key_of("a:b", ':', &wrong), None, "{wrong}");
            }
        }
    }
}
