//! Who asks: API keys and the tenants behind them.
//!
//! Invariant: a tenant's name goes into the salt of its namespaces, so tenants share no KV,
//! whatever they ask. Only an operator sees or changes what is in the cache.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use axum::http::HeaderMap;
use axum::http::header::AUTHORIZATION;
use kvkeep::Namespace;
use rustix::process::geteuid;
use subtle::ConstantTimeEq;

use crate::error::{ApiError, ServerError};

/// The shortest key that is taken: what is shorter can be guessed.
const MIN_KEY_BYTES: usize = 16;

/// Keys and whom they belong to.
#[derive(Clone)]
pub struct ApiKeys {
    keys: Arc<[(String, Tenant)]>,
}

/// Somebody who asks.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Tenant {
    name: Option<Arc<str>>,
}

impl ApiKeys {
    /// Reads a file of keys, see [`ApiKeys::parse`].
    ///
    /// # Errors
    /// [`ServerError::KeyFile`] if it cannot be read, or somebody else than its owner, or whoever
    /// runs this, could; [`ServerError::BadKeys`].
    pub fn read(path: impl AsRef<Path>) -> Result<Self, ServerError> {
        let path = path.as_ref();
        let refused = |reason: String| ServerError::KeyFile { path: path.to_owned(), reason };
        let mut file = File::open(path).map_err(|error| refused(error.to_string()))?;
        let metadata = file.metadata().map_err(|error| refused(error.to_string()))?;
        if metadata.mode() & 0o077 != 0 {
            let mode = metadata.mode() & 0o777;
            return Err(refused(format!("its mode is {mode:03o}, so others could read it: chmod 600 it")));
        }
        if ![0, geteuid().as_raw()].contains(&metadata.uid()) {
            return Err(refused("it belongs to somebody else: chown it to the user who runs the server".to_owned()));
        }
        let mut text = String::new();
        file.read_to_string(&mut text).map_err(|error| refused(error.to_string()))?;
        Self::parse(&text)
    }

    /// Reads `KEY` or `KEY TENANT` from each line; empty lines and those with `#` in front are
    /// left out. A key without a tenant is the operator's.
    ///
    /// # Errors
    /// [`ServerError::BadKeys`] with the line that is wrong, or if there is no key at all.
    pub fn parse(text: &str) -> Result<Self, ServerError> {
        let mut keys: Vec<(String, Tenant)> = Vec::new();
        for (number, line) in (1..).zip(text.lines()) {
            let bad = |reason: &str| ServerError::BadKeys(format!("line {number}: {reason}"));
            let mut words = line.split_whitespace();
            let Some(key) = words.next().filter(|word| !word.starts_with('#')) else { continue };
            if key.len() < MIN_KEY_BYTES {
                return Err(bad("a key needs at least 16 characters, such as those of: openssl rand -hex 24"));
            }
            if keys.iter().any(|(other, _)| other == key) {
                return Err(bad("this key stands in an earlier line too"));
            }
            let tenant = Tenant { name: words.next().map(Arc::from) };
            if words.next().is_some() {
                return Err(bad("a line is a key and perhaps the name of its tenant, nothing more"));
            }
            keys.push((key.to_owned(), tenant));
        }
        if keys.is_empty() {
            return Err(ServerError::BadKeys("there is no key in it".to_owned()));
        }
        Ok(Self { keys: keys.into() })
    }

    /// The tenant of this name, if there is a key for it.
    pub(crate) fn named(&self, name: &str) -> Option<Tenant> {
        self.tenants().find(|tenant| tenant.name() == Some(name)).cloned()
    }

    /// Whoever has a key; somebody with two keys comes twice.
    pub(crate) fn tenants(&self) -> impl Iterator<Item = &Tenant> {
        self.keys.iter().map(|(_, tenant)| tenant)
    }

    /// Whom the key in these headers belongs to. Every key is compared, in constant time.
    pub(crate) fn tenant(&self, headers: &HeaderMap) -> Result<Tenant, ApiError> {
        let given = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok());
        let given = given.and_then(bearer).unwrap_or_default();
        let mut found = None;
        for (key, tenant) in self.keys.iter() {
            if bool::from(key.as_bytes().ct_eq(given.as_bytes())) {
                found = Some(tenant.clone());
            }
        }
        found.ok_or(ApiError::Unauthorized)
    }
}

/// The key of an `Authorization` header. A scheme's name is the same in any case (RFC 9110, 11.1).
fn bearer(value: &str) -> Option<&str> {
    let (scheme, key) = value.trim().split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
}

impl fmt::Debug for ApiKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ApiKeys").field("keys", &self.keys.len()).finish_non_exhaustive()
    }
}

impl Tenant {
    /// Who runs the server.
    pub(crate) const OPERATOR: Self = Self { name: None };

    /// Its name; the operator has none.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    pub(crate) fn is_operator(&self) -> bool {
        self.name.is_none()
    }

    /// The engine's namespace, salted so that only this tenant with this `cache_salt` shares it.
    pub(crate) fn namespace(&self, of_engine: &Namespace, cache_salt: Option<&str>) -> Namespace {
        let cache_salt = cache_salt.unwrap_or_default();
        if self.is_operator() && cache_salt.is_empty() {
            return of_engine.clone();
        }
        // Lengths first: no name and salt run together into another pair.
        let name = self.name().unwrap_or_default();
        of_engine.clone().with_salt(format!("{}:{name}{cache_salt}", name.len()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "0123456789abcdef";

    fn headers(value: &str) -> HeaderMap {
        HeaderMap::from_iter([(AUTHORIZATION, value.parse().unwrap())])
    }

    #[test]
    fn a_key_without_a_tenant_is_the_operators_and_others_are_refused() {
        let keys = ApiKeys::parse(&format!("# ours\n{KEY}\n\nfedcba9876543210 alice\n")).unwrap();
        assert!(keys.tenant(&headers(&format!("Bearer {KEY}"))).unwrap().is_operator());
        assert_eq!(keys.tenant(&headers("Bearer fedcba9876543210")).unwrap().name(), Some("alice"));
        for wrong in ["Bearer 0123456789abcde", "Bearer ", "Basic 0123456789abcdef", ""] {
            assert!(keys.tenant(&headers(wrong)).is_err(), "{wrong}");
        }
        assert!(!format!("{keys:?}").contains(KEY));
    }

    /// Clients that write `bearer` in lower case were told that their key is wrong.
    #[test]
    fn the_schemes_name_is_the_same_in_any_case() {
        let keys = ApiKeys::parse(KEY).unwrap();
        for scheme in ["Bearer", "bearer", "BEARER", "  bearer  "] {
            assert!(keys.tenant(&headers(&format!("{scheme} {KEY} "))).is_ok(), "{scheme}");
        }
        for wrong in [format!("bearer{KEY}"), format!("Token {KEY}"), KEY.to_owned(), format!("Bearer {KEY} x")] {
            assert!(keys.tenant(&headers(&wrong)).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_bad_key_file_says_which_line_and_why() {
        for (text, says) in [
            ("", "no key"),
            ("short", "line 1: a key needs"),
            ("# a\n0123456789abcdef a\n0123456789abcdef b", "line 3: this key"),
            ("0123456789abcdef a b", "line 1: a line is"),
        ] {
            assert!(ApiKeys::parse(text).unwrap_err().to_string().contains(says), "{text}");
        }
    }

    #[test]
    fn a_key_file_that_others_can_read_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), KEY).unwrap();
        for (mode, fine) in [(0o600, true), (0o400, true), (0o640, false), (0o604, false), (0o666, false)] {
            std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(ApiKeys::read(file.path()).is_ok(), fine, "{mode:o}");
        }
        assert!(ApiKeys::read("/no/such/file").unwrap_err().to_string().contains("No such file"));
    }

    #[test]
    fn no_tenant_and_salt_run_together_into_another_pair() {
        let layout = kvkeep::KvLayout::new(1, 1, 8, kvkeep::DType::F16).unwrap();
        let engine = Namespace::new("m", layout);
        let id =
            |name: Option<&str>, salt: &str| Tenant { name: name.map(Arc::from) }.namespace(&engine, Some(salt)).id();
        let pairs = [(None, ""), (None, "a"), (Some("a"), ""), (Some("ab"), ""), (Some("a"), "b"), (Some("b"), "a")];
        let ids: std::collections::HashSet<_> = pairs.iter().map(|(name, salt)| id(*name, salt)).collect();
        assert_eq!(ids.len(), pairs.len());
    }
}
