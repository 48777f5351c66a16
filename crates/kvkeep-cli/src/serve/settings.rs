//! What `kvkeep serve` can be told: by a flag, by the environment, by a file, or not at all.
//!
//! Invariant: one struct is all of them. So a setting has one name everywhere, the printed
//! settings can be read back, and the order (flag, environment, file, default) is one function.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::builder::PossibleValuesParser;
use clap::{Args, ValueEnum};
use kvkeep::tiers::Codecs;
use kvkeep_server::{Endpoint, Origin};
use serde::{Deserialize, Serialize};

use crate::cli::gib;

/// Every setting, if it was made.
#[derive(Debug, Clone, Default, PartialEq, Args, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Settings {
    /// Address or name to listen at; any but this machine's own needs --api-key-file [default: 127.0.0.1]
    #[arg(long, env = "KVKEEP_SERVE_HOST", value_name = "ADDRESS", help_heading = "Listening")]
    pub(crate) host: Option<String>,
    /// Port to listen at; 0 takes a free one [default: 8080]
    #[arg(long, env = "KVKEEP_SERVE_PORT", value_name = "PORT", help_heading = "Listening")]
    pub(crate) port: Option<u16>,
    /// Who may ask: lines of KEY (the operator's) or KEY TENANT, readable by its owner alone
    #[arg(long, env = "KVKEEP_SERVE_API_KEY_FILE", value_name = "FILE", help_heading = "Listening")]
    pub(crate) api_key_file: Option<PathBuf>,
    /// Origins of web pages, apps or extensions that may ask from a browser, such as `http://localhost:3000`
    #[arg(
        long,
        env = "KVKEEP_SERVE_ALLOW_ORIGIN",
        value_name = "ORIGIN",
        help_heading = "Listening",
        value_delimiter = ','
    )]
    pub(crate) allow_origin: Option<Vec<Origin>>,
    /// Connections at the same time; one more takes the place of the idlest [default: 256]
    #[arg(long, env = "KVKEEP_SERVE_CONNECTIONS", value_name = "N", help_heading = "Listening",
          value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub(crate) connections: Option<u32>,
    /// Largest body of a request, in MiB [default: 4]
    #[arg(long, alias = "max-body-mb", env = "KVKEEP_SERVE_MAX_BODY_MIB", value_name = "MIB", help_heading = "Listening",
          value_parser = clap::value_parser!(u32).range(1..=1024))]
    #[serde(alias = "max_body_mb")]
    pub(crate) max_body_mib: Option<u32>,
    /// Seconds that a client may keep the server waiting: for headers, for a body, to read an answer [default: 30]
    #[arg(long, env = "KVKEEP_SERVE_CLIENT_TIMEOUT_S", value_name = "S", help_heading = "Listening",
          value_parser = clap::value_parser!(u32).range(1..=3600))]
    pub(crate) client_timeout_s: Option<u32>,

    /// A model of your own, in GGUF format [default: SmolLM2-135M-Instruct.Q4_1, downloaded on first use]
    #[arg(long, env = "KVKEEP_SERVE_MODEL", value_name = "PATH.gguf", help_heading = "Model")]
    pub(crate) model: Option<PathBuf>,
    /// What clients call it [default: the file's name without .gguf]
    #[arg(long, env = "KVKEEP_SERVE_MODEL_NAME", value_name = "NAME", help_heading = "Model")]
    pub(crate) model_name: Option<String>,
    /// What clients may call it too
    #[arg(long, env = "KVKEEP_SERVE_MODEL_ALIAS", value_name = "NAME", help_heading = "Model", value_delimiter = ',')]
    pub(crate) model_alias: Option<Vec<String>>,
    /// Compute threads [default: one for each core]
    #[arg(long, env = "KVKEEP_SERVE_THREADS", value_name = "N", help_heading = "Model",
          value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) threads: Option<u16>,
    /// The most tokens of a prompt and its answer together [default: 4096, or what the model can]
    #[arg(long, env = "KVKEEP_SERVE_CONTEXT_TOKENS", value_name = "N", help_heading = "Model",
          value_parser = clap::value_parser!(u32).range(16..))]
    pub(crate) context_tokens: Option<u32>,

    /// Memory that the cache may use, in GiB [default: 1]
    #[arg(long, alias = "ram-gb", env = "KVKEEP_SERVE_RAM_GIB", value_name = "GIB", help_heading = "Cache", value_parser = gib)]
    #[serde(alias = "ram_gb")]
    pub(crate) ram_gib: Option<f64>,
    /// Directory of the cache's disk tier [default: kvkeep/serve in the user's cache directory]
    #[arg(long, env = "KVKEEP_SERVE_DISK", value_name = "DIR", help_heading = "Cache")]
    pub(crate) disk: Option<PathBuf>,
    /// What the disk tier may use, in GiB [default: 8]
    #[arg(long, alias = "disk-gb", env = "KVKEEP_SERVE_DISK_GIB", value_name = "GIB", help_heading = "Cache", value_parser = gib)]
    #[serde(alias = "disk_gb")]
    pub(crate) disk_gib: Option<f64>,
    /// Encrypt the disk tier with this key: 32 bytes or 64 hexadecimal digits, readable by its owner alone
    #[arg(long, env = "KVKEEP_SERVE_DISK_KEY_FILE", value_name = "FILE", help_heading = "Cache")]
    pub(crate) disk_key_file: Option<PathBuf>,
    /// How blocks are written to the disk: as they are, or the same bits in fewer bytes [default: auto, which is lossless where that makes loads faster]
    #[arg(long, env = "KVKEEP_SERVE_DISK_CODEC", value_name = "CODEC", help_heading = "Cache",
          value_parser = PossibleValuesParser::new([Codecs::AUTO].into_iter().chain(Codecs::names())))]
    pub(crate) disk_codec: Option<String>,
    /// Keep nothing on the disk
    #[arg(long, env = "KVKEEP_SERVE_NO_DISK", value_name = "BOOL", help_heading = "Cache", num_args = 0..=1,
          require_equals = true, default_missing_value = "true")]
    pub(crate) no_disk: Option<bool>,
    /// A store behind disk and RAM that several servers share, such as `redis://host:6379`; see docs/remote.md
    #[arg(long, env = "KVKEEP_SERVE_REMOTE", hide_env_values = true, value_name = "URL", help_heading = "Cache")]
    pub(crate) remote: Option<String>,
    /// What every name in that store begins with; servers with the same one share what they have [default: kvkeep]
    #[arg(long, env = "KVKEEP_SERVE_REMOTE_PREFIX", value_name = "NAME", help_heading = "Cache")]
    pub(crate) remote_prefix: Option<String>,
    /// What all of them may use in that store, in GiB [default: 10]
    #[arg(long, env = "KVKEEP_SERVE_REMOTE_GIB", value_name = "GIB", help_heading = "Cache", value_parser = gib)]
    pub(crate) remote_gib: Option<f64>,
    /// Milliseconds that a lookup waits for that store, and for the next block while blocks come [default: 50]
    #[arg(long, env = "KVKEEP_SERVE_REMOTE_DEADLINE_MS", value_name = "MS", help_heading = "Cache",
          value_parser = clap::value_parser!(u32).range(1..=60_000))]
    pub(crate) remote_deadline_ms: Option<u32>,
    /// Seconds after which what was written there is gone, where the store knows time [default: never]
    #[arg(long, env = "KVKEEP_SERVE_REMOTE_TTL_S", value_name = "S", help_heading = "Cache",
          value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) remote_ttl_s: Option<u32>,
    /// Encrypt what is written there with this key, as --disk-key-file does; the same one on every server
    #[arg(long, env = "KVKEEP_SERVE_REMOTE_KEY_FILE", value_name = "FILE", help_heading = "Cache")]
    pub(crate) remote_key_file: Option<PathBuf>,
    /// How blocks are written there [default: raw]
    #[arg(long, env = "KVKEEP_SERVE_REMOTE_CODEC", value_name = "CODEC", help_heading = "Cache",
          value_parser = PossibleValuesParser::new(Codecs::names()))]
    pub(crate) remote_codec: Option<String>,
    /// RAM that the processes of this host share: the socket of a `kvkeep daemon`; then there is no disk of this server's own
    /// unless --disk names one
    #[arg(long, env = "KVKEEP_SERVE_DAEMON", value_name = "SOCKET", help_heading = "Cache")]
    pub(crate) daemon: Option<PathBuf>,
    /// Who this server is to the daemon: a file with a line NAME TOKEN, readable by its owner alone [default: everybody]
    #[arg(long, env = "KVKEEP_SERVE_DAEMON_TOKEN_FILE", value_name = "FILE", help_heading = "Cache")]
    pub(crate) daemon_token_file: Option<PathBuf>,
    /// Tokens of a cache block; a prompt's last, partial block is computed again [default: 16]
    #[arg(long, env = "KVKEEP_SERVE_BLOCK_TOKENS", value_name = "N", help_heading = "Cache",
          value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) block_tokens: Option<u32>,

    /// Requests that are answered at once; each has memory for --context-tokens [default: 4]
    #[arg(long, env = "KVKEEP_SERVE_PARALLEL", value_name = "N", help_heading = "Requests",
          value_parser = clap::value_parser!(u16).range(1..=256))]
    pub(crate) parallel: Option<u16>,
    /// Requests that may wait; one more is told to come back later [default: 64]
    #[arg(long, env = "KVKEEP_SERVE_QUEUE", value_name = "N", help_heading = "Requests",
          value_parser = clap::value_parser!(u32).range(0..=65_536))]
    pub(crate) queue: Option<u32>,
    /// Seconds that a request may take, waiting included [default: 600]
    #[arg(long, env = "KVKEEP_SERVE_REQUEST_TIMEOUT_S", value_name = "S", help_heading = "Requests",
          value_parser = clap::value_parser!(u32).range(1..=86_400))]
    pub(crate) request_timeout_s: Option<u32>,
    /// Seconds that a stream waits for its first token, so that what goes wrong until then has a status of its own;
    /// then its headers are sent [default: 3]
    #[arg(long, env = "KVKEEP_SERVE_STREAM_ERROR_WINDOW_S", value_name = "S", help_heading = "Requests",
          value_parser = clap::value_parser!(u32).range(0..=86_400))]
    pub(crate) stream_error_window_s: Option<u32>,
    /// Seconds that requests under way may take once the server is told to end [default: 30]
    #[arg(long, env = "KVKEEP_SERVE_SHUTDOWN_GRACE_S", value_name = "S", help_heading = "Requests",
          value_parser = clap::value_parser!(u32).range(0..=3600))]
    pub(crate) shutdown_grace_s: Option<u32>,

    /// Publish which blocks come and go to routers over ZeroMQ, as vLLM does, at this endpoint, such as `tcp://127.0.0.1:5557`
    #[arg(long, env = "KVKEEP_SERVE_KV_EVENTS", value_name = "ENDPOINT", help_heading = "KV events")]
    pub(crate) kv_events: Option<Endpoint>,
    /// Where routers ask for events that they missed, such as `tcp://127.0.0.1:5558`
    #[arg(long, env = "KVKEEP_SERVE_KV_EVENTS_REPLAY", value_name = "ENDPOINT", help_heading = "KV events")]
    pub(crate) kv_events_replay: Option<Endpoint>,
    /// The topic that routers subscribe to [default: an empty one]
    #[arg(long, env = "KVKEEP_SERVE_KV_EVENTS_TOPIC", value_name = "TOPIC", help_heading = "KV events")]
    pub(crate) kv_events_topic: Option<String>,
    /// Publish the tokens of blocks too, of all tenants: what they wrote. Routers that match prompts by tokens need them
    #[arg(long, env = "KVKEEP_SERVE_KV_EVENTS_TOKENS", value_name = "BOOL", help_heading = "KV events", num_args = 0..=1,
          require_equals = true, default_missing_value = "true")]
    pub(crate) kv_events_tokens: Option<bool>,
    /// Let whoever reaches the endpoints read: needed where other machines do, as ZeroMQ asks for no key
    #[arg(long, env = "KVKEEP_SERVE_KV_EVENTS_ANYONE", value_name = "BOOL", help_heading = "KV events", num_args = 0..=1,
          require_equals = true, default_missing_value = "true")]
    pub(crate) kv_events_anyone: Option<bool>,

    /// How the log is written, on standard error [default: text]
    #[arg(long, env = "KVKEEP_SERVE_LOG_FORMAT", value_name = "FORMAT", help_heading = "Log")]
    pub(crate) log_format: Option<LogFormat>,
    /// The least that is worth a line [default: info]
    #[arg(long, env = "KVKEEP_SERVE_LOG_LEVEL", value_name = "LEVEL", help_heading = "Log")]
    pub(crate) log_level: Option<LogLevel>,
    /// Write what was asked into the log too
    #[arg(long, env = "KVKEEP_SERVE_LOG_PROMPTS", value_name = "BOOL", help_heading = "Log", num_args = 0..=1,
          require_equals = true, default_missing_value = "true")]
    pub(crate) log_prompts: Option<bool>,
}

/// How a line of the log looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum LogFormat {
    Text,
    Json,
}

/// How much is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

/// Variables whose names said GB and MB and meant GiB and MiB. As flags and in files the old names still do.
const RENAMED: [(&str, &str); 3] = [
    ("KVKEEP_SERVE_RAM_GB", "KVKEEP_SERVE_RAM_GIB"),
    ("KVKEEP_SERVE_DISK_GB", "KVKEEP_SERVE_DISK_GIB"),
    ("KVKEEP_SERVE_MAX_BODY_MB", "KVKEEP_SERVE_MAX_BODY_MIB"),
];

/// Refuses variables that nobody reads any more: left unread, a cap would not be the one that was meant.
pub(crate) fn refuse_renamed(is_set: impl Fn(&str) -> bool) -> Result<()> {
    match RENAMED.iter().find(|(old, _)| is_set(old)) {
        Some((old, new)) => bail!("{old} is now called {new}: the number means the same"),
        None => Ok(()),
    }
}

macro_rules! first_made {
    ($($field:ident),* $(,)?) => {
        /// These settings, and the others' where nothing is said here.
        fn or(self, others: Self) -> Self {
            Self { $($field: self.$field.or(others.$field)),* }
        }
    };
}

impl Settings {
    first_made!(
        host,
        port,
        api_key_file,
        allow_origin,
        connections,
        max_body_mib,
        client_timeout_s,
        model,
        model_name,
        model_alias,
        threads,
        context_tokens,
        ram_gib,
        disk,
        disk_gib,
        disk_key_file,
        disk_codec,
        no_disk,
        remote,
        remote_prefix,
        remote_gib,
        remote_deadline_ms,
        remote_ttl_s,
        remote_key_file,
        remote_codec,
        daemon,
        daemon_token_file,
        block_tokens,
        parallel,
        queue,
        request_timeout_s,
        stream_error_window_s,
        shutdown_grace_s,
        kv_events,
        kv_events_replay,
        kv_events_topic,
        kv_events_tokens,
        kv_events_anyone,
        log_format,
        log_level,
        log_prompts,
    );

    /// What holds where nothing is said.
    fn usual() -> Self {
        Self {
            host: Some("127.0.0.1".to_owned()),
            port: Some(8080),
            connections: Some(256),
            max_body_mib: Some(4),
            client_timeout_s: Some(30),
            context_tokens: Some(4096),
            ram_gib: Some(1.0),
            disk_gib: Some(8.0),
            disk_codec: Some(Codecs::AUTO.to_owned()),
            no_disk: Some(false),
            remote_prefix: Some("kvkeep".to_owned()),
            remote_gib: Some(10.0),
            remote_deadline_ms: Some(50),
            remote_codec: Some(Codecs::default().name().to_owned()),
            block_tokens: Some(16),
            parallel: Some(4),
            queue: Some(64),
            request_timeout_s: Some(600),
            stream_error_window_s: Some(3),
            shutdown_grace_s: Some(30),
            kv_events_tokens: Some(false),
            kv_events_anyone: Some(false),
            log_format: Some(LogFormat::Text),
            log_level: Some(LogLevel::Info),
            log_prompts: Some(false),
            ..Self::default()
        }
    }

    /// What holds: these settings (flags, then the environment), then the file's, then the usual.
    pub(crate) fn merged(self, file: Option<&Path>) -> Result<Self> {
        let from_file = file.map(Self::read).transpose()?.unwrap_or_default();
        Ok(self.or(from_file).or(Self::usual()))
    }

    fn read(path: &Path) -> Result<Self> {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("cannot read the settings in {}", path.display()))?;
        let settings: Self =
            toml::from_str(&text).with_context(|| format!("the settings in {} are not right", path.display()))?;
        settings.check().with_context(|| format!("the settings in {} are not right", path.display()))?;
        Ok(settings)
    }

    /// What the command line would refuse, from a file: said by the command line itself.
    fn check(&self) -> Result<()> {
        let toml::Value::Table(made) = toml::Value::try_from(self)? else { return Ok(()) };
        let flag = |(name, value): (&String, &toml::Value)| format!("--{}={}", name.replace('_', "-"), as_flag(value));
        let command = Self::augment_args(clap::Command::new("settings").no_binary_name(true));
        command.try_get_matches_from(made.iter().map(flag)).map(drop).map_err(|error| {
            let text = error.to_string();
            anyhow::anyhow!(text.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned())
        })
    }

    /// As a file that can be read back.
    pub(crate) fn toml(&self) -> Result<String> {
        Ok(toml::to_string(self)?)
    }
}

/// A value as the command line takes it.
fn as_flag(value: &toml::Value) -> String {
    match value {
        toml::Value::String(text) => text.clone(),
        toml::Value::Array(values) => values.iter().map(as_flag).collect::<Vec<_>>().join(","),
        value => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use clap::{CommandFactory, FromArgMatches};

    use super::*;
    use crate::cli::Cli;

    fn file(text: &str) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file
    }

    fn flags(flags: &[&str]) -> Settings {
        let command = Settings::augment_args(clap::Command::new("test").no_binary_name(true));
        Settings::from_arg_matches(&command.get_matches_from(flags)).unwrap()
    }

    #[test]
    fn flags_win_over_the_file_and_the_file_over_what_is_usual() {
        let file = file("port = 1\nqueue = 2\nno_disk = true\n");
        let merged = flags(&["--port=9", "--no-disk=false"]).merged(Some(file.path())).unwrap();
        assert_eq!((merged.port, merged.queue, merged.parallel), (Some(9), Some(2), Some(4)));
        assert_eq!(merged.no_disk, Some(false));
        assert_eq!(flags(&["--no-disk", "--log-prompts"]).no_disk, Some(true));
    }

    #[test]
    fn what_is_printed_reads_back_as_the_same() {
        let made = flags(&[
            "--host=::1",
            "--model=a b.gguf",
            "--ram-gib=0.5",
            "--log-format=json",
            "--disk=/x",
            "--disk-codec=lossless",
            "--remote=redis://host:6379",
            "--remote-ttl-s=60",
            "--daemon=/run/kvkeep.sock",
            "--allow-origin=app://a,http://b:1",
            "--model-alias=c",
            "--kv-events=tcp://*:5557",
            "--kv-events-topic=kv-events",
            "--kv-events-tokens",
        ]);
        let merged = made.merged(None).unwrap();
        let file = file(&merged.toml().unwrap());
        assert_eq!(Settings::default().merged(Some(file.path())).unwrap(), merged);
    }

    #[test]
    fn a_wrong_file_says_what_is_wrong_in_it() {
        for (text, says) in [
            ("prot = 1", "unknown field `prot`"),
            ("port = 70000", "70000"),
            ("port = \"x\"", "port"),
            ("ram_gib = 0.0", "above 0"),
            ("parallel = 0", "1..=256"),
            ("log_format = \"xml\"", "xml"),
            ("disk_codec = \"zip\"", "zip"),
            ("allow_origin = [\"*\"]", "one by one"),
            ("kv_events = \"ipc:///x\"", "tcp://127.0.0.1:5557"),
            ("port = 1\nport = 2", "duplicate key"),
        ] {
            let file = file(text);
            let error = format!("{:#}", Settings::default().merged(Some(file.path())).unwrap_err());
            assert!(error.contains(says) && error.contains(file.path().to_str().unwrap()), "{error}");
        }
        assert!(Settings::default().merged(Some(Path::new("/no/such/file"))).is_err());
    }

    /// `--ram-gb` has always meant GiB.
    #[test]
    fn a_size_is_named_by_its_unit_and_the_old_names_mean_the_same() {
        let old = flags(&["--ram-gb=0.5", "--disk-gb=2", "--max-body-mb=3"]);
        assert_eq!(old, flags(&["--ram-gib=0.5", "--disk-gib=2", "--max-body-mib=3"]));
        let file = file("ram_gb = 0.5\ndisk_gb = 2.0\nmax_body_mb = 3\n");
        assert_eq!(Settings::default().merged(Some(file.path())).unwrap(), old.merged(None).unwrap());
        let help = Cli::command().find_subcommand_mut("serve").unwrap().render_long_help().to_string();
        assert!(help.contains("--ram-gib") && !help.contains("-gb") && !help.contains("_GB"));
        assert!(refuse_renamed(|_| false).is_ok());
        let error = refuse_renamed(|name| name == "KVKEEP_SERVE_DISK_GB").unwrap_err().to_string();
        assert!(error.contains("KVKEEP_SERVE_DISK_GIB"), "{error}");
    }

    #[test]
    fn the_help_names_what_is_usual_and_every_variable() {
        let mut command = Cli::command();
        let serve = command.find_subcommand_mut("serve").unwrap();
        let help = serve.render_long_help().to_string();
        let usual = toml::Table::try_from(Settings::usual()).unwrap();
        for (name, value) in usual.iter().filter(|(_, value)| value.as_bool().is_none()) {
            let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            let flag = help.split("\n\n").find(|part| part.contains(&format!("--{} ", name.replace('_', "-"))));
            let value = value.trim_end_matches(".0");
            // Lines may break anywhere between words.
            let words = flag.unwrap().split_whitespace().collect::<Vec<_>>().join(" ");
            assert!(words.contains(&format!("[default: {value}")), "{name} = {value}");
        }
        for name in toml::Table::try_from(Settings::usual()).unwrap().keys() {
            assert!(help.contains(&format!("KVKEEP_SERVE_{}", name.to_uppercase())), "{name}");
        }
    }
}
