//! Ends of tunnels for unit tests: real sockets, and TLS with fixed keys instead of a handshake.

use super::tls::{HEAD, Handshaken, Next, Secrets, Suite, Tls};
use super::{Config, Engine};
use std::future::Future;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// Small windows.
pub const CONFIG: Config = Config {
    stream_window: 65_535,
    connection_window: 65_535,
    frame_size: 16_384,
    max_streams: 100,
    half_closed_silence: Duration::from_secs(1),
};

fn secrets(key: u8) -> Secrets {
    Secrets::new(Suite::Aes128Gcm, &[key; 16], &[key; 12], 0).unwrap()
}

/// Begins a task of a test.
pub fn spawn<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
    tokio::runtime::Handle::current().spawn(work)
}

/// Two connected sockets.
pub async fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (near, far) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
    (near.unwrap(), far.unwrap().0)
}

fn handshaken(socket: TcpStream, tls: Tls) -> Handshaken {
    Handshaken {
        socket,
        tls,
        early: Vec::new(),
        peer_certificates: Vec::new(),
        version: "",
        key_exchange: "",
        cipher: "",
    }
}

/// Both ends of a connection whose handshake is done.
pub async fn ends() -> (Handshaken, Handshaken) {
    let (near, far) = sockets().await;
    ends_on(near, far)
}

/// The same on sockets that are connected with each other.
pub fn ends_on(near: TcpStream, far: TcpStream) -> (Handshaken, Handshaken) {
    let (one, two) = (Tls::for_tests(secrets(1), secrets(2)), Tls::for_tests(secrets(2), secrets(1)));
    (handshaken(near, one), handshaken(far, two))
}

/// An engine that runs until the end of the test.
pub fn engine() -> Engine {
    let engine = Engine::new(&CONFIG).unwrap();
    let run = engine.clone();
    spawn(async move { run.run().await.unwrap() });
    engine
}

/// One end of a connection, and the plain bytes of the other one, for a peer that knows nothing of TLS.
pub async fn end_and_plain() -> (Handshaken, DuplexStream) {
    let (end, Handshaken { socket, tls, .. }) = ends().await;
    let (plain, inside) = tokio::io::duplex(1 << 20);
    spawn(pump(socket, tls, inside));
    (end, plain)
}

/// Seals what comes from `plain` and opens what comes from `socket`, until one of them ends.
async fn pump(mut socket: TcpStream, mut tls: Tls, mut plain: DuplexStream) {
    let (mut wire, mut record, mut bytes) = (Vec::new(), vec![0; 20_000], vec![0; 16_000]);
    loop {
        let mut more = vec![0; 65_536];
        tokio::select! {
            length = socket.read(&mut more) => match length {
                Ok(0) | Err(_) => return,
                Ok(length) => wire.extend_from_slice(&more[..length]),
            },
            length = plain.read(&mut bytes) => match length {
                Ok(0) | Err(_) => return,
                Ok(length) => {
                    record[HEAD..HEAD + length].copy_from_slice(&bytes[..length]);
                    let all = tls.seal(&mut record, length).unwrap();
                    if socket.write_all(&record[..all]).await.is_err() {
                        return;
                    }
                }
            },
        }
        while let Next::Data { used, plain: range } = tls.next(&mut wire).unwrap() {
            if plain.write_all(&wire[range]).await.is_err() {
                return;
            }
            wire.drain(..used);
        }
    }
}
