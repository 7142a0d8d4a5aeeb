//! Interoperation with rustls, as it is used through tokio-rustls.

use super::*;
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

/// A client of rustls and a server of ours.
async fn our_server(suite: CipherSuite, tickets: usize) -> (client::TlsStream<TcpStream>, Owner) {
    let (near, far) = sockets().await;
    let connector = TlsConnector::from(client_config(suite, &[]));
    let server = accept(far, server_config(suite, &[], tickets));
    let (client, server) = tokio::try_join!(connector.connect(localhost(), near), server).unwrap();
    assert_eq!(server.peer_certificates, PKI.chain);
    (client, Owner::new(server))
}

/// A client of ours and a server of rustls.
async fn our_client(suite: CipherSuite, tickets: usize) -> (Owner, server::TlsStream<TcpStream>) {
    let (near, far) = sockets().await;
    let acceptor = TlsAcceptor::from(server_config(suite, &[], tickets));
    let client = connect(near, client_config(suite, &[]), localhost());
    let (client, server) = tokio::try_join!(client, acceptor.accept(far)).unwrap();
    assert_eq!(client.peer_certificates, PKI.chain);
    (Owner::new(client), server)
}

#[tokio::test]
async fn a_server_talks_to_rustls_and_both_update_keys() {
    for (suite, tickets) in SUITES.into_iter().zip([0, 2, 4]) {
        let (mut theirs, mut ours) = our_server(suite, tickets).await;
        for round in 0..3 {
            let sent = bulk();
            let received =
                tokio::join!(ours.receive_data(sent.len()), async { theirs.write_all(&sent).await.unwrap() });
            assert!(received.0 == (sent.clone(), usize::from(round > 0)), "{suite:?} {round}");
            assert_eq!(ours.tls.pending(), round > 0, "rustls requests an update in return");
            let mut received = vec![0; 100_000];
            tokio::join!(ours.send(&sent), async { theirs.read_exact(&mut received).await.unwrap() });
            assert!(received == sent, "{suite:?} {round}");
            theirs.get_mut().1.refresh_traffic_keys().unwrap();
        }
    }
}

#[tokio::test]
async fn a_client_talks_to_rustls_and_both_update_keys() {
    for (suite, tickets) in SUITES.into_iter().zip([2, 0, 3]) {
        let (mut ours, mut theirs) = our_client(suite, tickets).await;
        for round in 0..3 {
            let sent = bulk();
            let received =
                tokio::join!(ours.receive_data(sent.len()), async { theirs.write_all(&sent).await.unwrap() });
            // rustls puts all tickets into one record.
            let others = if round == 0 { tickets.min(1) } else { 1 };
            assert!(received.0 == (sent.clone(), others), "{suite:?} {round}");
            let mut received = vec![0; 100_000];
            tokio::join!(ours.send(&sent), async { theirs.read_exact(&mut received).await.unwrap() });
            assert!(received == sent, "{suite:?} {round}");
            theirs.get_mut().1.refresh_traffic_keys().unwrap();
        }
    }
}

#[tokio::test]
async fn several_requests_get_one_answer_and_a_flood_is_refused() {
    let (mut theirs, mut ours) = our_server(SUITES[1], 0).await;
    for _ in 0..32 {
        theirs.get_mut().1.refresh_traffic_keys().unwrap();
        theirs.flush().await.unwrap();
        assert_eq!(ours.receive().await, Ok(Event::Control));
    }
    let mut out = [0; CONTROL_MAX];
    let used = ours.tls.write_control(&mut out).unwrap();
    assert_eq!(used, HEAD + 5 + 17);
    ours.socket.write_all(&out[..used]).await.unwrap();
    assert_eq!(ours.tls.write_control(&mut out), Ok(0), "one answer");
    ours.send(b"in step").await;
    let mut received = [0; 7];
    theirs.read_exact(&mut received).await.unwrap();
    assert_eq!(&received, b"in step");
    theirs.get_mut().1.refresh_traffic_keys().unwrap();
    theirs.flush().await.unwrap();
    assert_eq!(ours.receive().await, Err(TlsError::Flood));
}

#[tokio::test]
async fn close_notify_is_understood_in_both_directions() {
    let (mut theirs, mut ours) = our_server(SUITES[0], 0).await;
    theirs.write_all(b"last").await.unwrap();
    theirs.shutdown().await.unwrap();
    assert_eq!(ours.receive().await, Ok(Event::Data(b"last".to_vec())));
    assert_eq!(ours.receive().await, Ok(Event::Closed));
    // The other direction is still open.
    ours.send(b"answer").await;
    ours.close().await;
    let mut received = Vec::new();
    theirs.read_to_end(&mut received).await.unwrap();
    assert_eq!(received, b"answer");
}

#[tokio::test]
async fn an_end_without_close_notify_is_noticed_on_both_sides() {
    let (theirs, mut ours) = our_server(SUITES[0], 0).await;
    drop(theirs);
    assert_eq!(ours.receive().await, Err(TlsError::Truncated));

    let (mut theirs, mut ours) = our_server(SUITES[0], 0).await;
    ours.send(b"cut").await;
    drop(ours);
    let error = theirs.read_to_end(&mut Vec::new()).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
}

#[tokio::test]
async fn a_fatal_alert_reaches_rustls() {
    let (mut theirs, mut ours) = our_server(SUITES[2], 0).await;
    // Not a record.
    theirs.get_mut().0.write_all(b"HTTP/1.1 200 OK").await.unwrap();
    let error = ours.receive().await.unwrap_err();
    let mut out = [0; CONTROL_MAX];
    let used = ours.tls.alert(error.alert().unwrap(), &mut out).unwrap();
    ours.socket.write_all(&out[..used]).await.unwrap();
    let error = theirs.read_to_end(&mut Vec::new()).await.unwrap_err();
    assert_eq!(error.to_string(), "received fatal alert: UnexpectedMessage");
}

#[tokio::test]
async fn a_changed_record_is_refused() {
    let (mut theirs, mut ours) = our_server(SUITES[1], 0).await;
    theirs.write_all(b"some data").await.unwrap();
    let mut wire = vec![0; HEAD + 9 + 17];
    ours.socket.read_exact(&mut wire).await.unwrap();
    wire[12] ^= 1;
    ours.wire = wire;
    assert_eq!(ours.receive().await.unwrap_err().alert(), Some(20));
}
