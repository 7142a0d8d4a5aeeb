//! A whole tunnel whose peer is authenticated and hostile, for the fuzzer: what it writes is plaintext that was sealed
//! with the right keys.

use super::{CarryError, Config, Ended, Engine, Owner, Role, State, StreamId, TunnelId};
use crate::hbone::Buffers;
use crate::hbone::buffers::Account;
use crate::hbone::carry::Meter;
use crate::hbone::error::TunnelError;
use crate::hbone::fuzz::{CONFIG, choices, connect, opening, role};
use crate::hbone::tls::{HEAD, Handshaken, PLAIN_MAX, SLOT, Tls, fuzz};
use nix::sys::epoll::EpollEvent;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Memory that one stream wastes at most, and that a tunnel uses for what its socket does not take.
const WASTE: usize = CONFIG.max_streams as usize * 2 * 4096 + 400 * 1024;

/// Turns until nothing happens any more, or too much.
const TURNS: usize = 32;

/// An owner that counts, and checks that a connection which ended in order has delivered everything.
struct Counter(AtomicU64);

impl Meter for Counter {
    fn up(&self, bytes: usize) {
        self.0.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn down(&self, bytes: usize) {
        self.up(bytes);
    }

    fn total(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Owner for Counter {
    fn ended(self: Box<Self>, mut ended: Ended) {
        let rest = ended.rest.take().map(|piece| piece.len()).sum::<usize>();
        let in_order = ended.result.is_ok();
        assert!(!in_order || rest == 0, "a connection that ended in order has nothing left");
        assert!(!matches!(ended.result, Err(CarryError::Stopped)), "nobody has stopped it");
    }
}

/// Two ends of a connection in memory. Nothing here depends on the kind of socket.
fn sockets() -> Option<(TcpStream, TcpStream)> {
    let (one, two) = UnixStream::pair().ok()?;
    let (one, two) = (TcpStream::from(OwnedFd::from(one)), TcpStream::from(OwnedFd::from(two)));
    one.set_nonblocking(true).ok()?;
    two.set_nonblocking(true).ok()?;
    Some((one, two))
}

struct World {
    engine: Engine,
    id: TunnelId,
    account: Arc<Account>,
    far: TcpStream,
    tls: Tls,
    flags: u8,
    /// Streams that this node has opened.
    opened: Vec<StreamId>,
    /// The applications.
    apps: Vec<TcpStream>,
}

impl World {
    fn new(flags: u8, config: &Config, buffers: &Arc<Buffers>) -> Option<Self> {
        let engine = Engine::new(config).ok()?;
        let (near, far) = sockets()?;
        let (own, tls) = fuzz::ends()?;
        let handshaken = Handshaken {
            socket: tokio::net::TcpStream::from_std(near).ok()?,
            tls: own,
            early: Vec::new(),
            peer_certificates: Vec::new(),
            version: "",
            key_exchange: "",
            cipher: "",
        };
        let account = buffers.account("peer");
        let id = engine.add(role(flags), handshaken, config, &account).ok()?;
        let mut world = Self { engine, id, account, far, tls, flags, opened: Vec::new(), apps: Vec::new() };
        for _ in 0..3 {
            if role(flags) == Role::Client {
                world.open();
            }
        }
        Some(world)
    }

    fn open(&mut self) {
        let id = self.id;
        let opened = self.engine.with(id, |tunnel, work| {
            let key = tunnel.session.open(&connect(), super::App::default())?;
            tunnel.mark(work);
            Some(StreamId { tunnel: id, key, id: tunnel.session.get(key)?.id })
        });
        self.opened.extend(opened.flatten());
    }

    /// Writes bytes as one record. `None`: the tunnel takes no more.
    fn write(&mut self, bytes: &[u8]) -> Option<()> {
        let mut record = [0; SLOT];
        record.get_mut(HEAD..HEAD + bytes.len())?.copy_from_slice(bytes);
        let length = self.tls.seal(&mut record, bytes.len()).ok()?;
        self.far.write_all(record.get(..length)?).ok()
    }

    /// Runs turns until nothing happens any more.
    fn turns(&mut self) -> Option<()> {
        let mut events = [EpollEvent::empty(); 64];
        for _ in 0..TURNS {
            let count = self.engine.shared.poller.take(&mut events).ok()?;
            let (finished, pending) = {
                let mut inner = self.engine.shared.inner.lock();
                inner.turn(events.get(..count)?, Vec::new());
                (std::mem::take(&mut inner.work.finished), inner.work.is_pending())
            };
            for (owner, ended) in finished {
                owner.ended(ended);
            }
            self.serve()?;
            self.play();
            if count == 0 && !pending {
                break;
            }
        }
        Some(())
    }

    /// Does what the owner of a tunnel does.
    fn serve(&mut self) -> Option<()> {
        let id = self.id;
        let mut ready = Vec::new();
        let opened = std::mem::take(&mut self.opened);
        let waiting = self.engine.with(id, |tunnel, work| {
            while let Some((key, _, request)) = tunnel.requests.pop_front() {
                let Some(stream) = tunnel.session.get(key) else { continue };
                ready.push(StreamId { tunnel: id, key, id: stream.id });
                tunnel.session.answer(key, if request.is_ok() { 200 } else { 400 }, None, request.is_err());
                tunnel.mark(work);
            }
            let mut waiting = Vec::new();
            for stream in opened {
                match tunnel.session.get(stream.key).map(|stream| &stream.app.state) {
                    Some(State::Asked) => waiting.push(stream),
                    Some(State::Answered(200)) => ready.push(stream),
                    Some(_) => tunnel.drop_stream(stream.key, work),
                    None => {}
                }
            }
            waiting
        });
        self.opened = waiting.unwrap_or_default();
        for stream in ready {
            let (inner, app) = sockets()?;
            self.engine.carry(stream, inner, Box::new(Counter(AtomicU64::new(0))), Duration::from_secs(1000));
            self.apps.push(app);
        }
        Some(())
    }

    /// Does what the applications and the peer's kernel do.
    fn play(&mut self) {
        let mut buffer = [0; 4096];
        for app in &mut self.apps {
            if self.flags & 4 != 0 {
                while app.read(&mut buffer).is_ok_and(|length| length > 0) {}
            }
            if self.flags & 8 != 0 {
                let _ = app.write(&buffer);
            }
            if self.flags & 16 != 0 {
                let _ = app.shutdown(std::net::Shutdown::Write);
            }
        }
        if self.flags & 32 != 0 {
            self.apps.clear();
        }
        if self.flags & 64 == 0 {
            while self.far.read(&mut buffer).is_ok_and(|length| length > 0) {}
        }
    }
}

/// A tunnel. The flags choose the role, and what the applications and the peer do besides.
pub fn tunnel(data: &[u8]) {
    let Some((flags, size, rest)) = choices(data) else { return };
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
    let _context = runtime.enter();
    let buffers = Buffers::new(1 << 30);
    let world = World::new(flags, &CONFIG, &buffers);
    assert!(world.is_some(), "without a tunnel nothing would be tested");
    let Some(mut world) = world else { return };
    let bytes = [opening(flags), rest.to_vec()].concat();
    for piece in bytes.chunks(size.min(PLAIN_MAX)) {
        if world.write(piece).is_none() || world.turns().is_none() {
            break;
        }
        let held = world.account.bytes();
        assert!(held <= 4 * bytes.len() + WASTE, "{held} bytes are held after {} bytes", bytes.len());
    }
    world.engine.remove(world.id, TunnelError::Closed);
    let _ = world.turns();
    assert!(world.engine.shared.inner.lock().tunnels.is_empty());
    drop(world);
    assert_eq!(buffers.held(), 0, "nothing is left");
}
