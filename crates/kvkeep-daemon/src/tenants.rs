//! Who may use the daemon's memory, and how much of it: a name, a token that only the tenant knows, and bytes.

use std::collections::HashSet;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use kvkeep::{Error, Result};

/// A file of tokens is at most this long.
const MAX_FILE_BYTES: u64 = 1 << 20;
const GIB: f64 = 1024.0 * 1024.0 * 1024.0;
/// A name is a folder's too.
const MAX_NAME_BYTES: usize = 64;

/// One tenant: a region of RAM that nobody else can read.
#[derive(Clone, PartialEq, Eq)]
pub struct Tenant {
    pub(crate) name: String,
    /// `None` for one that whoever runs under the daemon's user may be.
    pub(crate) token: Option<String>,
    pub(crate) ram_bytes: u64,
}

impl Tenant {
    /// The tenant that needs no token.
    pub const DEFAULT: &'static str = "default";

    /// The tenant that needs no token, with so many bytes of RAM.
    #[must_use]
    pub fn without_token(ram_bytes: u64) -> Self {
        Self { name: Self::DEFAULT.to_owned(), token: None, ram_bytes }
    }

    /// A tenant with a token of its own.
    pub fn new(name: impl Into<String>, token: impl Into<String>, ram_bytes: u64) -> Self {
        Self { name: name.into(), token: Some(token.into()), ram_bytes }
    }

    /// What it is called.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes of its region.
    #[must_use]
    pub fn ram_bytes(&self) -> u64 {
        self.ram_bytes
    }

    /// Must one know a token to be it?
    #[must_use]
    pub fn needs_token(&self) -> bool {
        self.token.is_some()
    }

    /// Is this the token? Takes as long for a wrong one, whatever it begins with.
    pub(crate) fn knows(&self, token: &str) -> bool {
        let right = self.token.as_deref().unwrap_or_default().as_bytes();
        let differs = right.iter().zip(token.as_bytes()).fold(0, |differs, (one, other)| differs | (one ^ other));
        differs == 0 && right.len() == token.len()
    }
}

impl std::fmt::Debug for Tenant {
    /// Not the token: this is for logs.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tenant").field("name", &self.name).field("ram_bytes", &self.ram_bytes).finish_non_exhaustive()
    }
}

/// `kvkeep.sock` in the user's folder of sockets, if there is one.
#[must_use]
pub fn default_socket(runtime_dir: Option<&Path>) -> Option<PathBuf> {
    runtime_dir.map(|dir| dir.join("kvkeep.sock"))
}

/// The tenants of a file: `NAME TOKEN GIB` in each line, `#` begins a comment. Readable by its owner alone.
///
/// # Errors
/// [`Error::Config`] with the line that is not right.
pub fn read_tenants(file: &Path) -> Result<Vec<Tenant>> {
    let refused = |why: String| Error::Config(format!("the tenants in {}: {why}", file.display()));
    let text = read_secret(file)?;
    let mut tenants: Vec<Tenant> = Vec::new();
    for (number, line) in lines(&text) {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [name, token, gib] = fields.as_slice() else {
            return Err(refused(format!("line {number} must be NAME TOKEN GIB")));
        };
        let gib: f64 = gib.parse().map_err(|_| refused(format!("line {number}: {gib:?} is no size in GiB")))?;
        if !(gib > 0.0 && gib <= 16_384.0) {
            return Err(refused(format!("line {number}: a size is above 0 and up to 16384 GiB")));
        }
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked just above")]
        tenants.push(Tenant::new(*name, *token, (gib * GIB) as u64));
    }
    Ok(tenants)
}

/// The tenant of a client: a file with `NAME TOKEN` in one line, readable by its owner alone.
///
/// # Errors
/// [`Error::Config`] if it is no such file.
pub fn read_token(file: &Path) -> Result<(String, String)> {
    let text = read_secret(file)?;
    let first = lines(&text).next().and_then(|(_, line)| {
        let mut fields = line.split_whitespace();
        Some((fields.next()?.to_owned(), fields.next()?.to_owned()))
    });
    first.ok_or_else(|| Error::Config(format!("the token in {}: the file must have a line NAME TOKEN", file.display())))
}

/// Names that no two tenants share and that are folders, tokens that are some, and somebody at all.
pub(crate) fn check(tenants: &[Tenant]) -> Result<()> {
    let refused = |why: String| Err(Error::Config(why));
    let mut names = HashSet::new();
    for Tenant { name, token, .. } in tenants {
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
        if name.is_empty() || name.len() > MAX_NAME_BYTES || !name.bytes().all(is_plain) {
            return refused(format!("the tenant {name:?}: a name is up to 64 letters, digits, - and _"));
        }
        if token.as_ref().is_some_and(|token| token.len() < 16) {
            return refused(format!("the tenant {name:?}: a token has 16 characters at least"));
        }
        if !names.insert(name) {
            return refused(format!("the tenant {name:?} is there twice: give each a name of its own"));
        }
    }
    if tenants.is_empty() { refused("a daemon without tenants serves nobody: give one".to_owned()) } else { Ok(()) }
}

fn lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let line = |(number, line): (usize, &'_ str)| (number + 1, line.split('#').next().unwrap_or_default().trim().len());
    text.lines().enumerate().filter_map(move |(at, whole)| {
        let (number, length) = line((at, whole));
        let text = whole.trim_start().get(..length)?;
        (length > 0).then_some((number, text))
    })
}

fn read_secret(file: &Path) -> Result<String> {
    let refused = |why: String| Error::Config(format!("the file {}: {why}", file.display()));
    let opened = std::fs::File::open(file).map_err(|error| refused(error.to_string()))?;
    let mode = opened.metadata().map_err(|error| refused(error.to_string()))?.permissions().mode();
    if mode & 0o077 != 0 {
        return Err(refused(format!("others may read it (mode {:o}): run chmod 600", mode & 0o777)));
    }
    let mut text = String::new();
    opened.take(MAX_FILE_BYTES).read_to_string(&mut text).map_err(|error| refused(error.to_string()))?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn file(text: &str, mode: u32) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file.as_file().set_permissions(std::fs::Permissions::from_mode(mode)).unwrap();
        file
    }

    #[test]
    fn tenants_are_read_line_by_line_and_a_wrong_line_says_which() {
        let right = file("# ours\n  a 0123456789abcdef 0.5 # half\n\nb fedcba9876543210 1\n", 0o600);
        let tenants = read_tenants(right.path()).unwrap();
        assert_eq!(
            tenants,
            [Tenant::new("a", "0123456789abcdef", 1 << 29), Tenant::new("b", "fedcba9876543210", 1 << 30)]
        );
        for (text, says) in
            [("a b", "line 1"), ("\na 0123456789abcdef x", "line 2"), ("a b 0", "above 0"), ("a b NaN", "above 0")]
        {
            let error = read_tenants(file(text, 0o600).path()).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
        assert_eq!(read_token(right.path()).unwrap(), ("a".to_owned(), "0123456789abcdef".to_owned()));
    }

    #[test]
    fn a_file_of_tokens_that_others_may_read_is_refused() {
        let error = read_tenants(file("a 0123456789abcdef 1", 0o640).path()).unwrap_err().to_string();
        assert!(error.contains("chmod 600"), "{error}");
    }

    #[test]
    fn names_are_folders_tokens_are_long_and_nobody_is_there_twice() {
        let token = "0123456789abcdef";
        for wrong in ["", "..", "a/b", "ä"] {
            assert!(check(&[Tenant::new(wrong, token, 1)]).is_err(), "{wrong}");
        }
        assert!(check(&[]).is_err() && check(&[Tenant::new("a", "short", 1)]).is_err());
        assert!(check(&[Tenant::new("a", token, 1), Tenant::new("a", token, 1)]).is_err());
        assert!(check(&[Tenant::new("a", token, 1), Tenant::without_token(1)]).is_ok());
    }

    #[test]
    fn a_token_is_right_only_whole() {
        let tenant = Tenant::new("a", "0123456789abcdef", 1);
        assert!(tenant.knows("0123456789abcdef"));
        for wrong in ["", "0123456789abcde", "0123456789abcdef0", "0123456789abcdeg"] {
            assert!(!tenant.knows(wrong));
        }
        assert!(Tenant::without_token(1).knows("") && !Tenant::without_token(1).knows("x"));
    }
}
