//! What no client can do to another one, or to the daemon.

use std::io::Read as _;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;

use kvkeep::Tier;
use kvkeep::tiers::{Forget, ReadTarget};

use super::*;
use crate::link::{Welcomed, connect};
use crate::memory::Mapping;
use crate::wire::{Answer, Fate, Message, PIECE_BYTES, PIECES, Purpose, Request};

const TOKEN: &str = "0123456789abcdef";

fn soon() -> Deadline {
    Deadline::after(PATIENCE)
}

/// A block that is being written: its connection, and the memory that its bytes go through.
fn begun(place: &Place, seed: u32) -> (Welcomed, Mapping) {
    let mut writer = connect(&place.tier_config(), Purpose::Write).unwrap();
    let staging = Mapping::of_writer(writer.file.as_ref().unwrap(), (PIECES * PIECE_BYTES) as u64).unwrap();
    let begun = writer.channel.ask(&Request::Begin(vec![meta(seed)]), soon()).unwrap();
    assert_eq!(begun, Answer::Begun(vec![Fate::Room]));
    (writer, staging)
}

fn piece(sum: u64) -> Request {
    Request::Piece { room: 0, slot: 0, bytes: u32::try_from(BLOCK_BYTES).unwrap(), sum }
}

#[test]
fn what_a_client_writes_after_it_said_sealed_changes_nothing() {
    let place = Place::new();
    let _daemon = Daemon::start(&place.config(16 << 20)).unwrap();
    let (mut writer, staging) = begun(&place, 1);
    let sum = staging.copy_in_summed(0, &content(1, 0)).unwrap();
    assert_eq!(writer.channel.ask(&piece(sum), soon()).unwrap(), Answer::Took { slot: 0, is_right: true });
    staging.copy_in_summed(0, &vec![0xff; BLOCK_BYTES]).unwrap();
    assert_eq!(writer.channel.ask(&Request::Seal(vec![true]), soon()).unwrap(), Answer::Sealed(vec![Some(true)]));
    staging.copy_in_summed(0, &vec![0xee; BLOCK_BYTES]).unwrap();
    assert_eq!(found(&place.cache(), 1, 1), 1);
}

#[test]
fn a_block_whose_bytes_are_not_those_of_its_sum_is_not_there() {
    let place = Place::new();
    let daemon = Daemon::start(&place.config(16 << 20)).unwrap();
    let (mut writer, staging) = begun(&place, 1);
    let sum = staging.copy_in_summed(0, &content(1, 0)).unwrap();
    staging.copy_in_summed(100, &[1, 2, 3]).unwrap();
    assert_eq!(writer.channel.ask(&piece(sum), soon()).unwrap(), Answer::Took { slot: 0, is_right: false });
    assert_eq!(writer.channel.ask(&Request::Seal(vec![true]), soon()).unwrap(), Answer::Sealed(vec![None]));
    assert_eq!((found(&place.cache(), 1, 1), daemon.stats()[0].1.used_bytes), (0, 0));
}

#[test]
fn a_block_that_is_not_whole_or_reaches_beyond_its_end_is_not_there() {
    let place = Place::new();
    let _daemon = Daemon::start(&place.config(16 << 20)).unwrap();
    let (mut writer, staging) = begun(&place, 1);
    let half = staging.copy_in_summed(0, &content(1, 0)[..BLOCK_BYTES / 2]).unwrap();
    let bytes = u32::try_from(BLOCK_BYTES / 2).unwrap();
    let half = Request::Piece { room: 0, slot: 0, bytes, sum: half };
    assert_eq!(writer.channel.ask(&half, soon()).unwrap(), Answer::Took { slot: 0, is_right: true });
    assert_eq!(writer.channel.ask(&Request::Seal(vec![true]), soon()).unwrap(), Answer::Sealed(vec![None]));
    for (room, slot, bytes) in
        [(0, 0, u32::MAX), (7, 0, 1), (0, 99, 1), (0, 7, u32::try_from(PIECE_BYTES).unwrap() + 1)]
    {
        let (mut writer, _) = begun(&place, 1);
        let wrong = Request::Piece { room, slot, bytes, sum: 0 };
        assert_eq!(writer.channel.ask(&wrong, soon()).unwrap(), Answer::Took { slot, is_right: false });
        let sealed = writer.channel.ask(&Request::Seal(vec![true, true]), soon()).unwrap();
        assert_eq!(sealed, Answer::Sealed(vec![None, None]));
    }
    assert_eq!(found(&place.cache(), 1, 1), 0);
}

#[test]
fn what_was_removed_while_it_was_written_does_not_come_back() {
    let place = Place::new();
    let _daemon = Daemon::start(&place.config(16 << 20)).unwrap();
    let (mut writer, staging) = begun(&place, 1);
    let sum = staging.copy_in_summed(0, &content(1, 0)).unwrap();
    writer.channel.ask(&piece(sum), soon()).unwrap();
    place.tier().forget(&Forget::All, 1);
    assert_eq!(writer.channel.ask(&Request::Seal(vec![true]), soon()).unwrap(), Answer::Sealed(vec![Some(false)]));
    assert_eq!(found(&place.cache(), 1, 1), 0);
}

#[expect(unsafe_code, reason = "what a hostile client would do")]
#[test]
fn a_client_cannot_write_to_what_others_read() {
    use rustix::mm::{MapFlags, MprotectFlags, ProtFlags};
    let place = Place::new();
    let _daemon = Daemon::start(&place.config(16 << 20)).unwrap();
    let reader = connect(&place.tier_config(), Purpose::Read).unwrap();
    let (file, bytes) = (reader.file.as_ref().unwrap(), usize::try_from(reader.region_bytes).unwrap());
    let map = |file: &std::os::fd::OwnedFd, access| {
        // SAFETY: a new mapping at an address of the kernel's choice.
        unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes, access, MapFlags::SHARED, file, 0) }
    };
    assert!(map(file, ProtFlags::READ | ProtFlags::WRITE).is_err());
    let mapped = map(file, ProtFlags::READ).unwrap();
    // SAFETY: the mapping just made.
    assert!(unsafe { rustix::mm::mprotect(mapped, bytes, MprotectFlags::READ | MprotectFlags::WRITE) }.is_err());
    assert!(rustix::io::write(file, &[1]).is_err() && rustix::fs::ftruncate(file, 1).is_err());
    // The kernel keeps to it even for a descriptor that was opened to write.
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file.as_fd()));
    let _ = std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o777));
    if let Ok(again) = std::fs::OpenOptions::new().read(true).write(true).open(&path) {
        assert!(map(&again.into(), ProtFlags::READ | ProtFlags::WRITE).is_err());
    }
}

#[test]
fn a_tenant_sees_nothing_of_anothers_region_and_gets_no_way_to_it() {
    let place = Place::new();
    let tenants = vec![
        Tenant::new("a", TOKEN, 16 << 20),
        Tenant::new("b", "fedcba9876543210", 16 << 20),
        Tenant::without_token(16 << 20),
    ];
    let _daemon = Daemon::start(&DaemonConfig::new(&place.socket, tenants)).unwrap();
    let tier = |name: &str, token: &str| DaemonTier::open(&place.tier_config().tenant(name, token));
    let a = cache(Arc::new(tier("a", TOKEN).unwrap()));
    store(&a, 1, 4);
    a.flush().unwrap();
    let b = cache(Arc::new(tier("b", "fedcba9876543210").unwrap()));
    assert_eq!((found(&b, 1, 4), found(&place.cache(), 1, 4)), (0, 0));
    let again = cache(Arc::new(tier("a", TOKEN).unwrap()));
    assert_eq!(found(&again, 1, 4), 4);
    for (name, token) in [("a", ""), ("a", "fedcba9876543210"), ("c", TOKEN), ("default", TOKEN), ("", "")] {
        let refused = tier(name, token).unwrap_err().to_string();
        assert!(refused.contains("no tenant has this name"), "{refused}");
        assert!(connect(&place.tier_config().tenant(name, token), Purpose::Read).is_err(), "and no region");
    }
    // The regions are different files.
    let file = |name: &str, token: &str| {
        connect(&place.tier_config().tenant(name, token), Purpose::Read).unwrap().file.unwrap()
    };
    let inode = |file: &std::os::fd::OwnedFd| rustix::fs::fstat(file).unwrap().st_ino;
    assert_ne!(inode(&file("a", TOKEN)), inode(&file("default", "")));
}

#[test]
fn another_user_is_refused() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: only root can be another user");
        return;
    }
    let place = Place::new();
    let _daemon = Daemon::start(&place.config(16 << 20)).unwrap();
    // As if the folder and the socket were open to all.
    let open = |path: &Path| std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777)).unwrap();
    open(&place.socket);
    open(place.socket.parent().unwrap());
    let exe = place.socket.with_file_name("program");
    std::fs::copy(std::env::current_exe().unwrap(), &exe).unwrap();
    open(&exe);
    let mut command = Command::new(&exe);
    command
        .args(["tests::child", "--exact", "--nocapture", "--ignored"])
        .env(ROLE, "stranger")
        .env(SOCKET, &place.socket)
        .current_dir("/")
        .stdin(Stdio::null());
    std::os::unix::process::CommandExt::uid(&mut command, 65534);
    let out = command.output().unwrap();
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(said.contains("serves its own user alone"), "{said} {}", String::from_utf8_lossy(&out.stderr));
}

#[test]
fn garbage_on_the_socket_is_an_error_for_its_sender_alone() {
    let place = Place::new();
    let _daemon = Daemon::start(&place.config(16 << 20)).unwrap();
    let cache = place.cache();
    let hello = Request::Hello { version: 1, purpose: Purpose::Write, tenant: "default".into(), token: String::new() };
    let framed = |body: &[u8]| [&u32::try_from(body.len()).unwrap().to_le_bytes(), body].concat();
    let other = Request::Hello { version: 99, purpose: Purpose::Ask, tenant: "default".into(), token: String::new() };
    let starts: Vec<Vec<u8>> = vec![
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        vec![0xff; 64],
        vec![0; 4],
        framed(&[99]),
        framed(&Request::Stats.encode()),
        framed(&other.encode()),
        [framed(&hello.encode()), framed(&[5, 1, 0, 0, 0, 3, 0, 0, 0, 1, 2, 3])].concat(),
        [framed(&hello.encode()), framed(&hello.encode())].concat(),
        [framed(&hello.encode()), vec![0xff; 8]].concat(),
    ];
    for bytes in starts {
        let mut stream = UnixStream::connect(&place.socket).unwrap();
        stream.write_all(&bytes).unwrap();
        let mut answer = Vec::new();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        // It is told why, and the connection ends.
        stream.read_to_end(&mut answer).unwrap();
        let last = answer.rsplit(|byte| *byte == 2).next().unwrap();
        assert!(!last.is_empty() && answer.len() > 8, "{bytes:?}: {answer:?}");
    }
    store(&cache, 1, 4);
    cache.flush().unwrap();
    assert_eq!(found(&place.cache(), 1, 4), 4);
}

#[test]
fn the_socket_of_a_dead_daemon_is_replaced_and_that_of_a_living_one_is_not() {
    let place = Place::new();
    let dead = Process::start("daemon", &place.socket);
    let refused = Daemon::start(&place.config(16 << 20)).unwrap_err().to_string();
    assert!(refused.contains("another daemon has it"), "{refused}");
    dead.kill();
    assert!(place.socket.exists(), "it had no time to clean up");
    let daemon = Daemon::start(&place.config(16 << 20)).unwrap();
    assert!(place.tier().works());
    let mode = std::fs::metadata(&place.socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    daemon.stop().unwrap();
    assert!(!place.socket.exists());
    std::fs::write(&place.socket, "somebody's").unwrap();
    let refused = Daemon::start(&place.config(16 << 20)).unwrap_err().to_string();
    assert!(refused.contains("no socket"), "{refused}");
    assert_eq!(std::fs::read_to_string(&place.socket).unwrap(), "somebody's");
}

#[test]
fn a_lease_ends_with_its_time_and_whoever_held_it_is_told() {
    let place = Place::new();
    let daemon = Daemon::start(&place.config(16 << 20).lease(Duration::from_millis(200))).unwrap();
    let cache = place.cache();
    store(&cache, 1, 4);
    cache.flush().unwrap();
    let mut reader = connect(&place.tier_config(), Purpose::Read).unwrap();
    let wanted: Vec<_> = chain(1, 4).hashes().map(|hash| (key(&hash), namespace().id())).collect();
    let hold = |reader: &mut Welcomed| {
        assert!(matches!(reader.channel.ask(&Request::Hold(wanted.clone()), soon()).unwrap(), Answer::Held(_)));
    };
    hold(&mut reader);
    assert_eq!(reader.channel.ask(&Request::Release, soon()).unwrap(), Answer::Released(true));
    hold(&mut reader);
    assert!(daemon.stats()[0].1.held_bytes > 0);
    until("the lease ends", || daemon.stats()[0].1.held_bytes == 0);
    assert_eq!(reader.channel.ask(&Request::Release, soon()).unwrap(), Answer::Released(false));
    // A writer's, too.
    let (mut writer, staging) = begun(&place, 9);
    assert!(daemon.stats()[0].1.held_bytes > 0);
    until("the lease ends", || daemon.stats()[0].1.held_bytes == 0);
    let sum = staging.copy_in_summed(0, &content(9, 0)).unwrap();
    assert_eq!(writer.channel.ask(&piece(sum), soon()).unwrap(), Answer::Took { slot: 0, is_right: false });
}

/// A reader that is stopped while it copies.
struct Slow {
    bytes: Vec<u8>,
    waits: Duration,
    answer: std::sync::mpsc::Sender<bool>,
}

impl ReadTarget for Slow {
    fn bytes_mut(&mut self) -> &mut [u8] {
        std::thread::sleep(self.waits);
        &mut self.bytes
    }

    fn complete(self: Box<Self>, read: Option<BlockMeta>) {
        let is_right = self.bytes == content(1, 0);
        assert!(read.is_none() || is_right, "a hit with wrong bytes");
        self.answer.send(read.is_some()).unwrap();
    }
}

/// A reader was slower than its lease, and its pages had been given to another block: it must not take those for its own.
#[test]
fn a_reader_that_is_slower_than_its_lease_has_a_miss_and_never_other_bytes() {
    let place = Place::new();
    let _daemon = Daemon::start(&place.config(2 << 20).lease(Duration::from_millis(300))).unwrap();
    let (tier, other) = (place.tier(), place.cache());
    store(&other, 1, 1);
    other.flush().unwrap();
    let (sender, answers) = std::sync::mpsc::channel();
    let engine = KvCache::new(CacheConfig::without_ram().tier(Arc::clone(&tier) as Arc<dyn Tier>)).unwrap();
    let read = |waits| {
        let target = Box::new(Slow { bytes: vec![0; BLOCK_BYTES], waits, answer: sender.clone() });
        assert_eq!(engine.read_lent(&chain(1, 1), 0, vec![target]), 1);
    };
    read(Duration::ZERO);
    assert!(answers.recv_timeout(PATIENCE).unwrap());
    read(Duration::from_millis(1500));
    std::thread::sleep(Duration::from_millis(600));
    // Its lease is over: everything there is driven out.
    (10..50).for_each(|seed| store(&other, seed, 1));
    other.flush().unwrap();
    assert!(!answers.recv_timeout(PATIENCE).unwrap());
    assert!(tier.works(), "the daemon said so, and is there");
}

/// A question of 233,017 keys was longer than a frame, and the daemon was taken for lost.
#[test]
fn a_question_of_any_length_is_answered() {
    let place = Place::new();
    let _daemon = Daemon::start(&place.config(16 << 20)).unwrap();
    let (tier, cache) = (place.tier(), place.cache());
    store(&cache, 1, 4);
    cache.flush().unwrap();
    let unknown = |number: u32| {
        let mut hash = [0xff; 32];
        hash[..4].copy_from_slice(&number.to_le_bytes());
        kvkeep::tiers::BlockKey::new(hash, 0)
    };
    let keys: Vec<_> = (0..300_000).map(unknown).chain([key(&chain(1, 4).hashes().next().unwrap())]).collect();
    let located = tier.locate(namespace().id(), &keys, soon());
    assert_eq!((located.len(), located.iter().flatten().count()), (300_001, 1));
    let forgotten = tier.forget(&Forget::Keys(namespace().id(), &keys), 1);
    assert_eq!((forgotten.found.len(), forgotten.entries), (300_001, 1));
    assert!(tier.works() && forgotten.found.ends_with(&[false, true]));
}
