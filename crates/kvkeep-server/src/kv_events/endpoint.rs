//! An endpoint as ZeroMQ writes it, such as `tcp://127.0.0.1:5557`.

use std::fmt;
use std::net::{SocketAddr, ToSocketAddrs};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Where to listen. A name is looked up once, when it is read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Endpoint {
    text: String,
    address: SocketAddr,
}

impl Endpoint {
    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }
}

impl FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let form = || format!("{text}: give an endpoint such as tcp://127.0.0.1:5557");
        let place = text.strip_prefix("tcp://").ok_or_else(form)?;
        // ZeroMQ's word for every address of this machine.
        let found = match place.strip_prefix("*:") {
            Some(port) => format!("0.0.0.0:{port}").to_socket_addrs(),
            None => place.to_socket_addrs(),
        };
        let addresses: Vec<SocketAddr> = found.map_err(|error| format!("{} ({error})", form()))?.collect();
        let address = addresses.iter().find(|address| address.is_ipv4()).or(addresses.first());
        Ok(Self { text: text.to_owned(), address: *address.ok_or_else(form)? })
    }
}

impl TryFrom<String> for Endpoint {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Endpoint> for String {
    fn from(endpoint: Endpoint) -> Self {
        endpoint.text
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_read_as_zeromq_writes_them_and_others_say_what_to_give() {
        for (text, address) in [
            ("tcp://127.0.0.1:5557", "127.0.0.1:5557"),
            ("tcp://localhost:1", "127.0.0.1:1"),
            ("tcp://[::1]:5557", "[::1]:5557"),
            ("tcp://*:5557", "0.0.0.0:5557"),
        ] {
            let endpoint: Endpoint = text.parse().unwrap();
            assert_eq!((endpoint.address(), endpoint.to_string().as_str()), (address.parse().unwrap(), text));
        }
        for text in ["127.0.0.1:5557", "ipc:///tmp/x", "tcp://", "tcp://127.0.0.1", "tcp://127.0.0.1:70000", "tcp://*"]
        {
            let error = text.parse::<Endpoint>().unwrap_err();
            assert!(error.contains("tcp://127.0.0.1:5557"), "{error}");
        }
    }
}
