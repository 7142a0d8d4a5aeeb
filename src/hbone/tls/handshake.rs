//! TLS handshakes over TCP. rustls does them; what follows is up to [`Tls`].
//!
//! rustls gets one record at a time. Given more, it would also decrypt data that came right behind the handshake, which
//! is for [`Tls`] to do.

use super::connection::Tls;
use super::record::HEAD;
use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, EncodeTlsData, UnbufferedStatus};
use rustls::{ClientConfig, CommonState, ProtocolVersion, ServerConfig};
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Size of the buffer at the first read. Most handshakes need no more.
const SMALL_BYTES: usize = 4 * 1024;

/// Bytes that a peer may send before it is authenticated. A TLS handshake with a post-quantum key exchange and a chain
/// of certificates takes less than half of that.
const UNTRUSTED_BYTES: usize = 32 * 1024;

/// How long a peer whose handshake has failed may take to close the connection.
const DRAIN: Duration = Duration::from_secs(1);

/// A connection whose handshake is done.
#[derive(Debug)]
pub struct Handshaken {
    /// The socket. Nothing more is read from it or written to it here.
    pub socket: TcpStream,
    /// The state of TLS.
    pub tls: Tls,
    /// Bytes that came behind the handshake, still encrypted. They must be passed to [`Tls::next`] before all others.
    pub early: Vec<u8>,
    /// The peer's certificate and its chain, leaf first.
    pub peer_certificates: Vec<CertificateDer<'static>>,
    /// `TLSv1_3`.
    pub version: &'static str,
    /// Key exchange group, e.g. `X25519MLKEM768`.
    pub key_exchange: &'static str,
    /// Cipher suite.
    pub cipher: &'static str,
}

/// Does the server's part of a handshake. The settings must allow only TLS 1.3 and have `enable_secret_extraction` set.
///
/// The errors are those of tokio-rustls: a failure of TLS contains a [`rustls::Error`]. The peer gets an alert for it
/// if the socket accepts that at once. There is no time limit; to give up, drop the future, which closes the socket.
pub async fn accept(socket: TcpStream, config: Arc<ServerConfig>) -> io::Result<Handshaken> {
    check(config.enable_secret_extraction)?;
    run(socket, UnbufferedServerConnection::new(config).map_err(invalid)?).await
}

/// Does the client's part of a handshake. What [`accept`] says holds here, too.
///
/// A server checks the client's certificate after the client's handshake is done. If it refuses the certificate, its
/// alert is the first record that [`Tls::next`] gets.
pub async fn connect(
    socket: TcpStream,
    config: Arc<ClientConfig>,
    server: ServerName<'static>,
) -> io::Result<Handshaken> {
    check(config.enable_secret_extraction)?;
    run(socket, UnbufferedClientConnection::new(config, server).map_err(invalid)?).await
}

/// Without this, the mistake would show only after the handshake.
fn check(enable_secret_extraction: bool) -> io::Result<()> {
    let disabled = || invalid(rustls::Error::General("enable_secret_extraction is not set".into()));
    enable_secret_extraction.then_some(()).ok_or_else(disabled)
}

fn invalid(error: rustls::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// One side of a handshake. rustls has a type for each, with the same methods.
trait Side {
    type Data;
    fn process<'c, 'i>(&'c mut self, wire: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data>;
    fn common(&self) -> &CommonState;
    fn into_tls(self) -> io::Result<Tls>;
}

impl Side for UnbufferedClientConnection {
    type Data = ClientConnectionData;

    fn process<'c, 'i>(&'c mut self, wire: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(wire)
    }

    fn common(&self) -> &CommonState {
        self
    }

    fn into_tls(self) -> io::Result<Tls> {
        let (secrets, kernel) = self.dangerous_into_kernel_connection().map_err(invalid)?;
        Ok(Tls::client(secrets, kernel)?)
    }
}

impl Side for UnbufferedServerConnection {
    type Data = ServerConnectionData;

    fn process<'c, 'i>(&'c mut self, wire: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(wire)
    }

    fn common(&self) -> &CommonState {
        self
    }

    fn into_tls(self) -> io::Result<Tls> {
        let (secrets, kernel) = self.dangerous_into_kernel_connection().map_err(invalid)?;
        Ok(Tls::server(secrets, kernel)?)
    }
}

async fn run<S: Side>(mut socket: TcpStream, mut side: S) -> io::Result<Handshaken> {
    let (mut incoming, mut out) = (Incoming::new(), Vec::new());
    loop {
        let done = match step(&mut side, &mut incoming, &mut out) {
            Ok(done) => done,
            Err(error) => {
                send_alert(&socket, &mut side, out);
                drain(&mut socket).await;
                return Err(invalid(error));
            }
        };
        if !out.is_empty() {
            socket.write_all(&out).await?;
            out.clear();
        }
        if done {
            break;
        }
        incoming.read(&mut socket).await?;
    }
    let common = side.common();
    if common.protocol_version() != Some(ProtocolVersion::TLSv1_3) {
        return Err(invalid(rustls::Error::General("the handshake agreed on another version than TLS 1.3".into())));
    }
    let name = |text: Option<&'static str>| text.unwrap_or("unknown");
    Ok(Handshaken {
        version: name(common.protocol_version().and_then(|version| version.as_str())),
        key_exchange: name(common.negotiated_key_exchange_group().and_then(|group| group.name().as_str())),
        cipher: name(common.negotiated_cipher_suite().and_then(|suite| suite.suite().as_str())),
        peer_certificates: common.peer_certificates().map(<[_]>::to_vec).unwrap_or_default(),
        early: incoming.into_rest(),
        tls: side.into_tls()?,
        socket,
    })
}

/// Goes as far as it is possible with the bytes that are there. Returns whether the handshake is done. What must be
/// sent is added to `out`.
fn step<S: Side>(side: &mut S, incoming: &mut Incoming, out: &mut Vec<u8>) -> Result<bool, rustls::Error> {
    loop {
        let UnbufferedStatus { discard, state } = side.process(incoming.shown());
        let is_waiting = match state? {
            ConnectionState::EncodeTlsData(data) => {
                encode(data, out)?;
                false
            }
            // `out` is sent before the next read.
            ConnectionState::TransmitTlsData(data) => {
                data.done();
                false
            }
            ConnectionState::BlockedHandshake | ConnectionState::WriteTraffic(_) => true,
            // The settings allow no early data, and other data is not decrypted here.
            _ => return Err(rustls::Error::General("unexpected state of the handshake".into())),
        };
        incoming.discard(discard);
        if is_waiting && !side.common().is_handshaking() {
            return Ok(true);
        }
        if is_waiting && !incoming.show_more() {
            return Ok(false);
        }
    }
}

fn encode<D>(mut data: EncodeTlsData<'_, D>, out: &mut Vec<u8>) -> Result<(), rustls::Error> {
    // Without room it tells how much it needs.
    let Err(EncodeError::InsufficientSize(size)) = data.encode(&mut []) else { return Ok(()) };
    let start = out.len();
    out.resize(start + size.required_size, 0);
    let place = out.get_mut(start..).unwrap_or_default();
    data.encode(place).map_err(|error| rustls::Error::General(error.to_string()))?;
    Ok(())
}

/// Tells the peer why the handshake fails, unless the socket would block.
fn send_alert<S: Side>(socket: &TcpStream, side: &mut S, mut out: Vec<u8>) {
    // While there is something to send, rustls returns it without looking at what was received.
    while side.common().wants_write() {
        let UnbufferedStatus { state: Ok(ConnectionState::EncodeTlsData(data)), .. } = side.process(&mut []) else {
            break;
        };
        if encode(data, &mut out).is_err() {
            break;
        }
    }
    // The error that the caller gets is about the handshake, whether the peer learns of it or not.
    let _ = socket.try_write(&out);
}

/// Discards what the peer sends until it closes. If the socket were closed while there is something to read, the peer
/// would get a reset, and not the alert. A client sends its first data before it can know of an alert.
async fn drain(socket: &mut TcpStream) {
    let read = async {
        socket.shutdown().await?;
        let (mut rest, mut left) = (vec![0; SMALL_BYTES], UNTRUSTED_BYTES);
        while left > 0 {
            match socket.read(&mut rest).await? {
                0 => break,
                length => left = left.saturating_sub(length),
            }
        }
        io::Result::Ok(())
    };
    // The error that matters is the one before.
    let _ = tokio::time::timeout(DRAIN, read).await;
}

/// What was received and is not yet used up.
struct Incoming {
    buffer: Vec<u8>,
    /// Bytes in the buffer.
    filled: usize,
    /// Bytes of them that rustls may see: whole records, and a part of the next one if no more of it is there.
    shown: usize,
    /// End of the whole records among them.
    whole: usize,
    /// Bytes that the peer may still send.
    allowed: usize,
}

impl Incoming {
    fn new() -> Self {
        Self { buffer: Vec::new(), filled: 0, shown: 0, whole: 0, allowed: UNTRUSTED_BYTES }
    }

    fn shown(&mut self) -> &mut [u8] {
        self.buffer.get_mut(..self.shown).unwrap_or_default()
    }

    /// Shows one more record. The part of a record that is there is shown, too, so that nonsense is recognised before
    /// it is complete. Returns whether that was more than before.
    fn show_more(&mut self) -> bool {
        let before = self.shown;
        let rest = self.buffer.get(self.whole..self.filled).unwrap_or_default();
        let length = rest.first_chunk::<HEAD>().map(|[.., high, low]| usize::from(u16::from_be_bytes([*high, *low])));
        match length {
            Some(length) if rest.len() >= HEAD + length => {
                self.whole += HEAD + length;
                self.shown = self.whole;
            }
            _ => self.shown = self.filled,
        }
        self.shown > before
    }

    /// Forgets the first bytes.
    fn discard(&mut self, bytes: usize) {
        let bytes = bytes.min(self.filled);
        self.buffer.copy_within(bytes..self.filled, 0);
        self.filled -= bytes;
        self.shown = self.shown.saturating_sub(bytes);
        self.whole = self.whole.saturating_sub(bytes);
    }

    async fn read(&mut self, socket: &mut TcpStream) -> io::Result<()> {
        if self.filled == self.buffer.len() {
            self.buffer.resize((self.filled * 2).clamp(SMALL_BYTES, UNTRUSTED_BYTES), 0);
        }
        // Even if no byte is allowed, read one to see whether there is one.
        let (mut one, filled) = ([0], self.filled);
        let place = match self.buffer.get_mut(filled..) {
            Some(free) if self.allowed > 0 && !free.is_empty() => {
                let most = free.len().min(self.allowed);
                free.get_mut(..most).unwrap_or_default()
            }
            _ => &mut one,
        };
        let read = socket.read(place).await?;
        if read == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "tls handshake eof"));
        }
        let Some(allowed) = self.allowed.checked_sub(read) else {
            let error = format!("the peer sent more than {UNTRUSTED_BYTES} bytes before it was authenticated");
            return Err(io::Error::other(error));
        };
        self.allowed = allowed;
        self.filled += read;
        Ok(())
    }

    /// The bytes that rustls has not used.
    fn into_rest(mut self) -> Vec<u8> {
        self.buffer.truncate(self.filled);
        self.buffer.shrink_to_fit();
        self.buffer
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{SUITES, client_config, localhost, server_config};
    use super::super::{HEAD, Next, TAIL};
    use super::*;
    use proptest::prelude::*;

    /// Gives a side some bytes. Returns whether its handshake is done.
    fn give<S: Side>(side: &mut S, incoming: &mut Incoming, bytes: &[u8], out: &mut Vec<u8>) -> bool {
        incoming.buffer.truncate(incoming.filled);
        incoming.buffer.extend(bytes);
        incoming.filled = incoming.buffer.len();
        step(side, incoming, out).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn a_handshake_and_the_data_behind_it_may_be_cut_anywhere(
            pieces in prop::collection::vec(prop_oneof![1..8usize, 1..900usize], 1..20),
            suite in prop::sample::select(&SUITES[..]),
            tickets in 0..3usize,
        ) {
            let mut client = UnbufferedClientConnection::new(client_config(suite, &[]), localhost()).unwrap();
            let mut server = UnbufferedServerConnection::new(server_config(suite, &[], tickets)).unwrap();
            let (mut to_server, mut to_client) = (Vec::new(), Vec::new());
            let (mut server_in, mut client_in) = (Incoming::new(), Incoming::new());
            let mut pieces = pieces.into_iter().cycle();
            let mut take = |from: &mut Vec<u8>| -> Vec<u8> {
                let most = from.len();
                from.drain(..pieces.next().unwrap_or(1).min(most)).collect()
            };
            while !give(&mut client, &mut client_in, &take(&mut to_client), &mut to_server) {
                let bytes = take(&mut to_server);
                prop_assert!(!give(&mut server, &mut server_in, &bytes, &mut to_client));
            }
            // Nothing of the server's is left or kept: its next records come after the client's last flight.
            prop_assert!(to_client.is_empty() && client_in.into_rest().is_empty());
            let mut client = client.into_tls().unwrap();
            for data in [&b"one"[..], b"two"] {
                let mut record = [&[0; HEAD][..], data, &[0; TAIL]].concat();
                client.seal(&mut record, 3).unwrap();
                to_server.extend(record);
            }
            while !give(&mut server, &mut server_in, &take(&mut to_server), &mut to_client) {
                prop_assert!(!to_server.is_empty(), "the server has everything");
            }
            let (mut server, mut wire) = (server.into_tls().unwrap(), server_in.into_rest());
            wire.extend(to_server);
            for data in [b"one", b"two"] {
                let Ok(Next::Data { used, plain }) = server.next(&mut wire) else { panic!("no data") };
                prop_assert_eq!(&wire[plain], data);
                wire.drain(..used);
            }
            prop_assert!(wire.is_empty());
            // The numbers of the server's records count its tickets.
            let mut record = [&[0; HEAD][..], b"answer", &[0; TAIL]].concat();
            server.seal(&mut record, 6).unwrap();
            to_client.extend(record);
            while let Ok(Next::Control { used }) = client.next(&mut to_client) {
                to_client.drain(..used);
            }
            // The loop has opened the record of data.
            prop_assert_eq!(&to_client[HEAD..HEAD + 6], b"answer");
        }
    }

    #[test]
    fn one_whole_record_more_is_shown_each_time_or_what_there_is_of_it() {
        let mut incoming = Incoming::new();
        assert!(!incoming.show_more());
        incoming.buffer = [&[22, 3, 1, 0, 2, 7, 7][..], &[22, 3, 1, 0, 1, 8], &[22, 3, 1]].concat();
        incoming.filled = incoming.buffer.len();
        let mut shown = Vec::new();
        while incoming.show_more() {
            shown.push(incoming.shown().len());
        }
        assert_eq!(shown, [7, 13, 16]);
        incoming.discard(7);
        assert_eq!((incoming.shown().len(), incoming.whole, incoming.filled), (9, 6, 9));
        incoming.buffer.truncate(9);
        incoming.buffer.extend([0, 1, 9, 22]);
        incoming.filled = incoming.buffer.len();
        assert!(incoming.show_more());
        assert_eq!(incoming.shown(), [22, 3, 1, 0, 1, 8, 22, 3, 1, 0, 1, 9]);
    }
}
