//! KeyUpdate between two of our own connections (RFC 8446 section 4.6.3).

use super::*;

/// The first record number at which a key asks to be replaced.
const USED_UP: u64 = (1 << 24) - (1 << 16);

#[tokio::test]
async fn a_sending_key_is_replaced_before_its_limit() {
    for suite in &SUITES[..2] {
        let (mut client, mut server) = owners(*suite).await;
        for round in 0..3 {
            client.tls.skip_sending_to(USED_UP - 1);
            server.tls.skip_receiving_to(USED_UP - 1);
            assert!(!client.tls.pending());
            client.send(b"last quiet record").await;
            assert_eq!(server.receive_data(17).await, (b"last quiet record".to_vec(), 0), "{suite:?} {round}");
            assert!(client.tls.pending());
            client.send(b"new key").await;
            assert_eq!(server.receive_data(7).await, (b"new key".to_vec(), 1), "{suite:?} {round}");
            assert!(!server.tls.pending(), "no update in return was requested");
        }
        // The other direction still has its first key.
        server.send(&bulk()).await;
        assert!(client.receive_data(100_000).await == (bulk(), 0));
    }
}

#[tokio::test]
async fn a_server_replaces_its_key_too() {
    let (mut client, mut server) = owners(SUITES[1]).await;
    server.tls.skip_sending_to(USED_UP);
    client.tls.skip_receiving_to(USED_UP);
    server.send(b"new key").await;
    assert_eq!(client.receive_data(7).await, (b"new key".to_vec(), 1));
}

#[tokio::test]
async fn a_control_record_without_room_changes_no_key() {
    let (mut client, mut server) = owners(SUITES[0]).await;
    client.tls.skip_sending_to(USED_UP);
    server.tls.skip_receiving_to(USED_UP);
    assert!(client.tls.write_control(&mut [0; 26]).is_err());
    assert!(client.tls.pending());
    client.send(b"still in step").await;
    assert_eq!(server.receive_data(13).await.1, 1);
}

#[tokio::test]
async fn no_update_follows_close_notify() {
    let (mut client, mut server) = owners(SUITES[0]).await;
    client.tls.skip_sending_to(USED_UP);
    server.tls.skip_receiving_to(USED_UP);
    client.close().await;
    assert!(!client.tls.pending());
    assert_eq!(client.tls.write_control(&mut [0; CONTROL_MAX]), Ok(0));
    assert_eq!(server.receive().await, Ok(Event::Closed));
}
