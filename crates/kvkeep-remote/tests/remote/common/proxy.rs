//! A TCP proxy that breaks what goes through it.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

/// What it does to what the server says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Pass,
    /// Each piece comes so much later.
    Delay(Duration),
    /// Nothing comes any more, and the connections stay.
    Drop,
    /// Connections end, in the middle of what they carry, and new ones end at once.
    Cut,
    /// Now and then a connection falls silent, for good.
    Stall,
    /// Of every fourth piece one bit is wrong.
    Corrupt,
}

pub(crate) struct Proxy {
    pub(crate) port: u16,
    mode: Arc<Mutex<Mode>>,
    open: Arc<Mutex<Vec<TcpStream>>>,
}

impl Proxy {
    pub(crate) fn to(server_port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (mode, open) = (Arc::new(Mutex::new(Mode::Pass)), Arc::<Mutex<Vec<TcpStream>>>::default());
        let (its_mode, its_open) = (Arc::clone(&mode), Arc::clone(&open));
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if *its_mode.lock().unwrap() == Mode::Cut {
                    continue;
                }
                let Ok(server) = TcpStream::connect(("127.0.0.1", server_port)) else { continue };
                // Else small pieces wait for each other, 40 ms at a time.
                [&client, &server].into_iter().for_each(|stream| stream.set_nodelay(true).unwrap());
                let clones = || (client.try_clone().unwrap(), server.try_clone().unwrap());
                let ((to_client, from_server), (from_client, to_server)) = (clones(), clones());
                its_open.lock().unwrap().extend([client, server]);
                let mode = Arc::clone(&its_mode);
                thread::spawn(move || pump(from_server, to_client, Some(&mode)));
                thread::spawn(move || pump(from_client, to_server, None));
            }
        });
        Self { port, mode, open }
    }

    pub(crate) fn set(&self, mode: Mode) {
        *self.mode.lock().unwrap() = mode;
        if mode == Mode::Cut {
            self.open.lock().unwrap().drain(..).for_each(|stream| _ = stream.shutdown(Shutdown::Both));
        }
    }
}

fn pump(mut from: TcpStream, mut to: TcpStream, mode: Option<&Mutex<Mode>>) {
    // Each connection has a chance of its own.
    let mut at = usize::from(to.peer_addr().map_or(7, |peer| peer.port()));
    let mut bytes = vec![0; 64 << 10];
    loop {
        let read = match from.read(&mut bytes) {
            Ok(0) | Err(_) => break,
            Ok(read) => read,
        };
        let piece = &mut bytes[..read];
        match mode.map_or(Mode::Pass, |mode| *mode.lock().unwrap()) {
            Mode::Pass | Mode::Cut => {}
            Mode::Delay(by) => thread::sleep(by),
            Mode::Stall if !one_in(&mut at, 16) => {}
            // What came is gone, for good: the connection is of no use any more.
            Mode::Drop | Mode::Stall => loop {
                match from.read(&mut bytes) {
                    Ok(0) | Err(_) => return,
                    Ok(_) => {}
                }
            },
            Mode::Corrupt => {
                if one_in(&mut at, 4) {
                    piece[(at >> 33) % read] ^= 1 << (at >> 60 & 7);
                }
                if to.write_all(piece).is_err() {
                    break;
                }
                continue;
            }
        }
        if to.write_all(&bytes[..read]).is_err() {
            break;
        }
    }
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}

/// A number by chance, and whether this is one time of so many.
fn one_in(at: &mut usize, times: usize) -> bool {
    *at = at.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
    (*at >> 40).is_multiple_of(times)
}
