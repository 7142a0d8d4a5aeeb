//! Handshakes that are unusual, slow, or fail.

use super::*;
use rustls::crypto::aws_lc_rs::kx_group::{SECP256R1, X25519, X25519MLKEM768};
use rustls::{AlertDescription, CertificateError, InvalidMessage};
use std::io::{Read as _, Write as _};
use tokio_rustls::{TlsAcceptor, TlsConnector};

const AES: CipherSuite = CipherSuite::TLS13_AES_256_GCM_SHA384;

/// Bytes that a peer may send before it is authenticated.
const UNTRUSTED: usize = 32 * 1024;

/// Copies byte by byte, each in a write of its own.
async fn trickle(mut from: tokio::net::tcp::ReadHalf<'_>, mut to: tokio::net::tcp::WriteHalf<'_>) -> io::Result<()> {
    loop {
        let mut bytes = [0; 100];
        let read = from.read(&mut bytes).await?;
        if read == 0 {
            return to.shutdown().await;
        }
        for byte in &bytes[..read] {
            to.write_all(&[*byte]).await?;
            tokio::task::yield_now().await;
        }
    }
}

#[tokio::test]
async fn every_suite_and_key_exchange_is_reported() {
    let groups: [&'static dyn SupportedKxGroup; 3] = [X25519MLKEM768, X25519, SECP256R1];
    for (suite, group) in SUITES.into_iter().zip(groups) {
        let (near, far) = sockets().await;
        let server = accept(far, server_config(suite, &[group], 1));
        let (client, server) =
            tokio::try_join!(connect(near, client_config(suite, &[group]), localhost()), server).unwrap();
        for side in [&client, &server] {
            assert_eq!(side.version, "TLSv1_3");
            assert_eq!(Some(side.cipher), suite.as_str());
            assert_eq!(Some(side.key_exchange), group.name().as_str());
            assert_eq!(side.peer_certificates, PKI.chain);
        }
        let (mut client, mut server) = (Owner::new(client), Owner::new(server));
        server.send(b"after one ticket").await;
        assert_eq!(client.receive_data(16).await, (b"after one ticket".to_vec(), 1));
    }
}

#[tokio::test]
async fn a_large_hello_in_single_bytes_is_understood() {
    let ((near, mut near_relay), (mut far_relay, far)) = (sockets().await, sockets().await);
    let relay = async {
        let ((near_read, near_write), (far_read, far_write)) = (near_relay.split(), far_relay.split());
        tokio::join!(trickle(near_read, far_write), trickle(far_read, near_write))
    };
    let config = client_config(AES, &[X25519MLKEM768]);
    let talk = async {
        let server = accept(far, server_config(AES, &[], 2));
        let (client, server) = tokio::try_join!(connect(near, config, localhost()), server).unwrap();
        assert_eq!(client.key_exchange, "X25519MLKEM768");
        let (mut client, mut server) = (Owner::new(client), Owner::new(server));
        client.send(b"request").await;
        assert_eq!(server.receive_data(7).await.0, b"request");
        server.send(b"response").await;
        assert_eq!(client.receive_data(8).await, (b"response".to_vec(), 1));
    };
    tokio::select! { _ = relay => panic!("the relay ended"), () = talk => {} }
}

#[tokio::test]
async fn a_hello_retry_request_is_handled_by_both_sides() {
    // The client offers a share of its first group, which the server does not have.
    let client_groups: [&'static dyn SupportedKxGroup; 2] = [X25519, SECP256R1];
    let (near, far) = sockets().await;
    let server = accept(far, server_config(AES, &[SECP256R1], 0));
    let config = client_config(AES, &client_groups);
    let (client, server) = tokio::try_join!(connect(near, config, localhost()), server).unwrap();
    assert_eq!((client.key_exchange, server.key_exchange), ("secp256r1", "secp256r1"));
    let (mut client, mut server) = (Owner::new(client), Owner::new(server));
    client.send(b"hello").await;
    assert_eq!(server.receive_data(5).await.0, b"hello");
}

#[tokio::test]
async fn a_long_chain_of_certificates_takes_several_records() {
    let mut own = Pki::new("long");
    let client_roots = own.roots();
    own.chain.extend(vec![own.chain[0].clone(); 50]);
    let length: usize = own.chain.iter().map(|certificate| certificate.len()).sum();
    assert!((PLAIN_MAX..UNTRUSTED).contains(&length), "{length} bytes");
    let provider = provider(AES, &[]);
    let verifier = WebPkiClientVerifier::builder_with_provider(client_roots, provider.clone()).build().unwrap();
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_single_cert(PKI.chain.clone(), PKI.key.clone_key())
        .unwrap();
    config.enable_secret_extraction = true;
    let (near, far) = sockets().await;
    let client = connect(near, client_config_of(&own, PKI.roots(), AES, &[]), localhost());
    let (client, server) = tokio::try_join!(client, accept(far, Arc::new(config))).unwrap();
    assert_eq!(server.peer_certificates.len(), 51);
    let (mut client, mut server) = (Owner::new(client), Owner::new(server));
    client.send(b"hello").await;
    // rustls has sent its tickets.
    server.send(b"hello").await;
    assert_eq!(server.receive_data(5).await, (b"hello".to_vec(), 0));
    assert_eq!(client.receive_data(5).await, (b"hello".to_vec(), 1));
}

/// A client of rustls up to where its last flight and its first data are ready, which are returned.
async fn last_flight_with(data: &[u8], socket: &mut TcpStream) -> (rustls::ClientConnection, Vec<u8>) {
    let mut client = rustls::ClientConnection::new(client_config(AES, &[]), localhost()).unwrap();
    let mut flight = Vec::new();
    client.write_tls(&mut flight).unwrap();
    socket.write_all(&flight).await.unwrap();
    while client.is_handshaking() {
        let mut bytes = [0; 4096];
        let read = socket.read(&mut bytes).await.unwrap();
        client.read_tls(&mut &bytes[..read]).unwrap();
        client.process_new_packets().unwrap();
    }
    client.writer().write_all(data).unwrap();
    let mut flight = Vec::new();
    while client.wants_write() {
        client.write_tls(&mut flight).unwrap();
    }
    (client, flight)
}

#[tokio::test]
async fn data_in_one_segment_with_the_last_flight_is_not_lost() {
    // With the second length, more data follows than is read in the handshake, and the last record read is cut.
    for (length, tickets) in [(5, 0), (20_000, 0), (5, 2)] {
        let (mut near, far) = sockets().await;
        let data = vec![7; length];
        let client = async {
            let (mut client, flight) = last_flight_with(&data, &mut near).await;
            near.write_all(&flight).await.unwrap();
            let mut bytes = [0; 1024];
            while client.process_new_packets().unwrap().plaintext_bytes_to_read() == 0 {
                let read = near.read(&mut bytes).await.unwrap();
                client.read_tls(&mut &bytes[..read]).unwrap();
            }
            let mut answer = [0; 6];
            client.reader().read_exact(&mut answer).unwrap();
            assert_eq!(&answer, b"answer");
        };
        let server = async {
            let done = accept(far, server_config(AES, &[], tickets)).await.unwrap();
            assert!(!done.early.is_empty(), "the data came with the last flight");
            let mut server = Owner::new(done);
            assert!(server.receive_data(length).await == (vec![7; length], 0));
            server.send(b"answer").await;
        };
        tokio::join!(client, server);
    }
}

#[tokio::test]
async fn a_refused_client_learns_why_from_its_first_record() {
    let (near, far) = sockets().await;
    let config = client_config_of(&STRANGER, PKI.roots(), AES, &[]);
    let (client, server) = tokio::join!(connect(near, config, localhost()), accept(far, server_config(AES, &[], 0)));
    let refused = rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer);
    let (kind, text, inner) = words(server);
    assert_eq!((kind, &text, inner), (io::ErrorKind::InvalidData, &refused.to_string(), Some(refused)));
    let error = Owner::new(client.unwrap()).receive().await.unwrap_err();
    assert_eq!(error, TlsError::Alert(AlertDescription::UnknownCA));
    assert_eq!(error.to_string(), "received fatal alert: UnknownCA");
}

#[tokio::test]
async fn a_refused_server_learns_why() {
    let (near, far) = sockets().await;
    let config = client_config_of(&PKI, STRANGER.roots(), AES, &[]);
    let (client, server) = tokio::join!(connect(near, config, localhost()), accept(far, server_config(AES, &[], 0)));
    let refused = rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer);
    assert_eq!(words(client).2, Some(refused));
    assert_eq!(words(server).2, Some(rustls::Error::AlertReceived(AlertDescription::UnknownCA)));
}

/// The errors of both our sides, and of both sides of tokio-rustls, for the same mistake.
async fn compare(client: Arc<ClientConfig>, server: Arc<ServerConfig>) {
    let (near, far) = sockets().await;
    let (connector, acceptor) = (TlsConnector::from(client.clone()), TlsAcceptor::from(server.clone()));
    let theirs = tokio::join!(connector.connect(localhost(), near), acceptor.accept(far));
    let (near, far) = sockets().await;
    let ours = tokio::join!(connect(near, client, localhost()), accept(far, server));
    let text = |error: io::Error| (error.kind(), error.to_string());
    assert_eq!(ours.0.err().map(text), theirs.0.err().map(text));
    assert_eq!(ours.1.err().map(text), theirs.1.err().map(text));
}

#[tokio::test]
async fn failures_have_the_errors_of_tokio_rustls() {
    // No common suite, no common group, a refused client, a refused server.
    compare(client_config(SUITES[0], &[]), server_config(SUITES[1], &[], 0)).await;
    compare(client_config(AES, &[X25519]), server_config(AES, &[SECP256R1], 0)).await;
    compare(client_config_of(&STRANGER, PKI.roots(), AES, &[]), server_config(AES, &[], 0)).await;
    compare(client_config_of(&PKI, STRANGER.roots(), AES, &[]), server_config(AES, &[], 0)).await;
}

#[tokio::test]
async fn an_end_in_the_handshake_is_reported_in_the_words_of_tokio_rustls() {
    for sent in [&b""[..], &[22, 3, 1, 0, 100, 1]] {
        let (mut near, far) = sockets().await;
        near.write_all(sent).await.unwrap();
        drop(near);
        let (kind, text, _) = words(accept(far, server_config(AES, &[], 0)).await);
        assert_eq!((kind, text.as_str()), (io::ErrorKind::UnexpectedEof, "tls handshake eof"));
    }
}

#[tokio::test]
async fn nonsense_is_refused_at_once_with_an_alert() {
    let (mut near, far) = sockets().await;
    // Read as a header of TLS, this announces 12,064 bytes.
    near.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let (_, _, inner) = words(accept(far, server_config(AES, &[], 0)).await);
    assert_eq!(inner, Some(rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType)));
    let mut alert = Vec::new();
    let _ = near.read_to_end(&mut alert).await;
    assert_eq!(alert, [21, 3, 3, 0, 2, 2, 50], "decode_error");
}

#[tokio::test]
async fn an_unauthenticated_peer_may_send_little() {
    // One handshake message of 60,000 bytes, in records of 16,000.
    let mut message = vec![0; 60_000];
    message[..4].copy_from_slice(&[1, 0, 234, 92]);
    let records: Vec<u8> = message.chunks(16_000).flat_map(|part| [&[22, 3, 1, 62, 128], part].concat()).collect();
    for (length, expected) in [
        (UNTRUSTED, "tls handshake eof"),
        (UNTRUSTED + 1, "the peer sent more than 32768 bytes before it was authenticated"),
    ] {
        let (mut near, far) = sockets().await;
        let send = async {
            near.write_all(&records[..length]).await.unwrap();
            near.shutdown().await.unwrap();
        };
        let (server, ()) = tokio::join!(accept(far, server_config(AES, &[], 0)), send);
        assert_eq!(words(server).1, expected, "{length} bytes");
    }
}

#[tokio::test]
async fn settings_without_secret_extraction_are_refused_before_the_handshake() {
    let (near, far) = sockets().await;
    let mut config = client_config(AES, &[]);
    Arc::make_mut(&mut config).enable_secret_extraction = false;
    let (_, text, _) = words(connect(near, config, localhost()).await);
    assert!(text.contains("enable_secret_extraction"), "{text}");
    let mut config = server_config(AES, &[], 0);
    Arc::get_mut(&mut config).unwrap().enable_secret_extraction = false;
    let (_, text, _) = words(accept(far, config).await);
    assert!(text.contains("enable_secret_extraction"), "{text}");
}

#[test]
fn handshakes_can_move_between_threads() {
    fn check<T: Send>(_: fn(TcpStream, Arc<ServerConfig>) -> T) {}
    fn check_client<T: Send>(_: fn(TcpStream, Arc<ClientConfig>, ServerName<'static>) -> T) {}
    fn check_tls<T: Send + Sync>() {}
    check(accept);
    check_client(connect);
    check_tls::<Tls>();
}
