//! Both sides of connections against each other, against rustls and against OpenSSL.

mod handshakes;
mod openssl;
mod rustls_peer;
mod updates;

use super::{CONTROL_MAX, HEAD, Handshaken, Next, PLAIN_MAX, SLOT, Tls, TlsError, accept, connect};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use rustls::crypto::{CryptoProvider, SupportedKxGroup, aws_lc_rs};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{CipherSuite, ClientConfig, RootCertStore, ServerConfig};
use std::io;
use std::sync::{Arc, LazyLock};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

pub(super) const SUITES: [CipherSuite; 3] = [
    CipherSuite::TLS13_AES_128_GCM_SHA256,
    CipherSuite::TLS13_AES_256_GCM_SHA384,
    CipherSuite::TLS13_CHACHA20_POLY1305_SHA256,
];

/// A CA, and a certificate for `localhost` that both sides use.
struct Pki {
    ca: CertificateDer<'static>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    chain_pem: String,
    ca_pem: String,
    key_pem: String,
}

impl Pki {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let key = KeyPair::generate().unwrap();
        let leaf = CertificateParams::new(vec!["localhost".to_owned()]).unwrap().signed_by(&key, &ca).unwrap();
        Self {
            ca: ca.der().clone(),
            chain: vec![leaf.der().clone()],
            key: PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
            chain_pem: leaf.pem(),
            ca_pem: ca.pem(),
            key_pem: key.serialize_pem(),
        }
    }

    fn roots(&self) -> Arc<RootCertStore> {
        let mut roots = RootCertStore::empty();
        roots.add(self.ca.clone()).unwrap();
        Arc::new(roots)
    }
}

static PKI: LazyLock<Pki> = LazyLock::new(|| Pki::new("ours"));

/// A CA that nobody trusts.
static STRANGER: LazyLock<Pki> = LazyLock::new(|| Pki::new("stranger"));

fn provider(suite: CipherSuite, groups: &[&'static dyn SupportedKxGroup]) -> Arc<CryptoProvider> {
    let mut provider = aws_lc_rs::default_provider();
    provider.cipher_suites.retain(|supported| supported.suite() == suite);
    if !groups.is_empty() {
        provider.kx_groups = groups.to_vec();
    }
    Arc::new(provider)
}

/// Settings for a server that wants a certificate. No groups: those that rustls prefers.
pub(super) fn server_config(
    suite: CipherSuite,
    groups: &[&'static dyn SupportedKxGroup],
    tickets: usize,
) -> Arc<ServerConfig> {
    let provider = provider(suite, groups);
    let verifier = WebPkiClientVerifier::builder_with_provider(PKI.roots(), provider.clone()).build().unwrap();
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_single_cert(PKI.chain.clone(), PKI.key.clone_key())
        .unwrap();
    config.send_tls13_tickets = tickets;
    config.enable_secret_extraction = true;
    Arc::new(config)
}

pub(super) fn client_config(suite: CipherSuite, groups: &[&'static dyn SupportedKxGroup]) -> Arc<ClientConfig> {
    client_config_of(&PKI, PKI.roots(), suite, groups)
}

/// Settings for a client with the certificate of `own` that trusts `roots`.
fn client_config_of(
    own: &Pki,
    roots: Arc<RootCertStore>,
    suite: CipherSuite,
    groups: &[&'static dyn SupportedKxGroup],
) -> Arc<ClientConfig> {
    let mut config = ClientConfig::builder_with_provider(provider(suite, groups))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(own.chain.clone(), own.key.clone_key())
        .unwrap();
    config.enable_secret_extraction = true;
    Arc::new(config)
}

pub(super) fn localhost() -> ServerName<'static> {
    ServerName::try_from("localhost").unwrap()
}

/// Both ends of a TCP connection.
async fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (near, far) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
    let (near, far) = (near.unwrap(), far.unwrap().0);
    near.set_nodelay(true).unwrap();
    far.set_nodelay(true).unwrap();
    (near, far)
}

/// What an [`Owner`] receives.
#[derive(Debug, PartialEq, Eq)]
enum Event {
    Data(Vec<u8>),
    Control,
    Closed,
}

/// A socket with its TLS state, used as the data path uses it.
struct Owner {
    socket: TcpStream,
    tls: Tls,
    wire: Vec<u8>,
}

impl Owner {
    fn new(done: Handshaken) -> Self {
        Self { socket: done.socket, tls: done.tls, wire: done.early }
    }

    /// The next record.
    async fn receive(&mut self) -> Result<Event, TlsError> {
        loop {
            let (used, event) = match self.tls.next(&mut self.wire)? {
                Next::Incomplete { missing } => {
                    let start = self.wire.len();
                    self.wire.resize(start + missing, 0);
                    let read = self.socket.read(&mut self.wire[start..]).await.unwrap_or(0);
                    self.wire.truncate(start + read);
                    if read == 0 {
                        return Err(TlsError::Truncated);
                    }
                    continue;
                }
                Next::Data { used, plain } => (used, Event::Data(self.wire[plain].to_vec())),
                Next::Control { used } => (used, Event::Control),
                Next::Closed { used } => (used, Event::Closed),
            };
            self.wire.drain(..used);
            return Ok(event);
        }
    }

    /// That many bytes of data, whatever records they come in. Also returns how many other records there were.
    async fn receive_data(&mut self, length: usize) -> (Vec<u8>, usize) {
        let (mut data, mut others) = (Vec::new(), 0);
        while data.len() < length {
            match self.receive().await.unwrap() {
                Event::Data(bytes) => data.extend(bytes),
                Event::Control => others += 1,
                Event::Closed => panic!("closed after {} bytes", data.len()),
            }
        }
        (data, others)
    }

    /// Sends data, and before it what must come first.
    async fn send(&mut self, data: &[u8]) {
        self.send_control().await;
        let mut record = vec![0; SLOT];
        for part in data.chunks(PLAIN_MAX) {
            record[HEAD..HEAD + part.len()].copy_from_slice(part);
            let length = self.tls.seal(&mut record, part.len()).unwrap();
            self.socket.write_all(&record[..length]).await.unwrap();
        }
    }

    /// Sends a pending KeyUpdate.
    async fn send_control(&mut self) {
        let mut out = [0; CONTROL_MAX];
        let used = self.tls.write_control(&mut out).unwrap();
        assert!(!self.tls.pending());
        self.socket.write_all(&out[..used]).await.unwrap();
    }

    async fn close(&mut self) {
        let mut out = [0; CONTROL_MAX];
        let used = self.tls.close_notify(&mut out).unwrap();
        self.socket.write_all(&out[..used]).await.unwrap();
    }
}

/// Two owners that are connected to each other: client and server.
async fn owners(suite: CipherSuite) -> (Owner, Owner) {
    let (near, far) = sockets().await;
    let (client, server) = tokio::try_join!(
        connect(near, client_config(suite, &[]), localhost()),
        accept(far, server_config(suite, &[], 0))
    )
    .unwrap();
    (Owner::new(client), Owner::new(server))
}

/// Some bytes that fill several records.
fn bulk() -> Vec<u8> {
    (0..100_000u32).map(|n| (n % 251) as u8).collect()
}

/// Text and inner error of a failed handshake.
fn words(result: io::Result<Handshaken>) -> (io::ErrorKind, String, Option<rustls::Error>) {
    let error = result.err().unwrap();
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()).cloned();
    (error.kind(), error.to_string(), inner)
}
