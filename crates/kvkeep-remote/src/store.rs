//! What a tier needs of a store: objects under the keys of blocks, and a little more. One small trait; the tier above
//! it is the same for all stores.
//!
//! Invariant: nothing here waits for ever: whoever awaits an answer gives it a time, and dropping it is allowed at any
//! moment. A crate that speaks to every store was the alternative: it has no pipelining, and hides what a store can do
//! that others cannot.

use std::fmt;
use std::fmt::Write as _;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use kvkeep::NamespaceId;
use kvkeep::tiers::{BlockKey, BlockMeta};

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
    #[cfg_attr(not(feature = "redis"), expect(dead_code, reason = "Redis alone has lanes"))]
    Follow,
}

/// What an object is called by: the namespace of its block, and the block's key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Name {
    pub(crate) namespace: NamespaceId,
    pub(crate) key: BlockKey,
}

/// An object as a list shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Listed {
    pub(crate) name: Name,
    pub(crate) bytes: u64,
    /// As far as the store knows; `u64::MAX` where it does not.
    pub(crate) expires_at_ms: u64,
}

/// What others have written lately.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum News {
    /// These, since it was last asked.
    #[cfg_attr(not(feature = "redis"), expect(dead_code, reason = "Redis alone tells"))]
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
    fn head<'a>(&'a self, name: &'a Name) -> Reply<'a, Option<(Bytes, u64)>>;

    /// An object.
    fn get<'a>(&'a self, name: &'a Name) -> Reply<'a, Option<Bytes>>;

    /// Writes an object of these parts, in place of an older one; it is gone after this time, if the store knows time.
    fn put<'a>(&'a self, name: &'a Name, parts: [&'a [u8]; 2], ttl: Option<Duration>) -> Reply<'a, ()>;

    /// These objects are gone when this has ended well.
    fn remove<'a>(&'a self, names: &'a [Name]) -> Reply<'a, ()>;

    /// Every object of a namespace, or of the prefix, in any order, in parts.
    fn list<'a>(
        &'a self,
        namespace: Option<NamespaceId>,
        each: &'a mut (dyn FnMut(Vec<Listed>) + Send),
    ) -> Reply<'a, ()>;

    /// Does it drop by itself what has expired?
    fn knows_time(&self) -> bool;

    /// Begins to follow what is written: what is written after this is told by [`Store::news`].
    fn follow(&self) -> Reply<'_, ()>;

    /// Waits a little for what others have written.
    fn news(&self) -> Reply<'_, News>;

    /// Tells others what was written.
    fn tell<'a>(&'a self, written: &'a [Listed]) -> Reply<'a, ()>;
}

impl Name {
    pub(crate) fn of(meta: &BlockMeta) -> Self {
        Self { namespace: meta.namespace, key: meta.key }
    }

    /// Under a prefix: the 64 digits of the namespace, those of the block's hash, and `.layer` of a layer.
    pub(crate) fn text(&self, prefix: &str, separator: char) -> String {
        let mut text = namespace_text(prefix, separator, self.namespace);
        push_digits(&mut text, self.key.hash());
        if self.key.layer() > 0 {
            let _ = write!(text, ".{}", self.key.layer());
        }
        text
    }

    /// The one that has this text.
    pub(crate) fn parse(prefix: &str, separator: char, text: &str) -> Option<Self> {
        let rest = text.strip_prefix(prefix)?.strip_prefix(separator)?;
        let (namespace, rest) = rest.split_once(separator)?;
        let (hash, layer) = match rest.split_once('.') {
            Some((hash, layer)) => (hash, layer.parse().ok()?),
            None => (rest, 0),
        };
        let namespace = NamespaceId::from_bytes(bytes_of(namespace)?);
        let name = Self { namespace, key: BlockKey::new(bytes_of(hash)?, layer) };
        (name.text(prefix, separator) == text).then_some(name)
    }
}

/// What all names of a namespace begin with.
pub(crate) fn namespace_text(prefix: &str, separator: char, namespace: NamespaceId) -> String {
    let mut text = String::with_capacity(prefix.len() + 140);
    text.push_str(prefix);
    text.push(separator);
    push_digits(&mut text, namespace.as_bytes());
    text.push(separator);
    text
}

fn push_digits(text: &mut String, bytes: &[u8; 32]) {
    bytes.iter().for_each(|byte| _ = write!(text, "{byte:02x}"));
}

fn bytes_of(digits: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    for (byte, digits) in bytes.iter_mut().zip(digits.as_bytes().as_chunks::<2>().0) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_that_of_one_block_of_one_namespace_and_nothing_else_is_a_name() {
        for layer in [0, 1, 31] {
            let namespace = NamespaceId::from_bytes([0x1b; 32]);
            let name = Name { namespace, key: BlockKey::new([0xa7; 32], layer) };
            let text = name.text("a:b", ':');
            assert!(text.starts_with(&namespace_text("a:b", ':', namespace)), "{text}");
            assert_eq!(Name::parse("a:b", ':', &text), Some(name));
            for wrong in
                [text.to_uppercase(), format!("{text}x"), format!("{text}.0x"), text[1..].into(), String::new()]
            {
                assert_eq!(Name::parse("a:b", ':', &wrong), None, "{wrong}");
            }
            assert_eq!(Name::parse("a:b", ':', &text.replacen(':', "/", 3)), None, "another separator");
        }
    }
}
