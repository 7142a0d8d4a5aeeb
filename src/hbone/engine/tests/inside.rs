//! A tunnel inside a stream of another one.

use super::*;
use crate::hbone::carrier::carry_tunnel;
use crate::task::Group;

#[tokio::test]
async fn a_tunnel_inside_a_stream_carries_connections_and_ends_with_the_stream_and_its_reason() {
    let Pair { tunnel, near, far, mut streams } = pair(1 << 30).await;
    let (stream, held) = (tunnel.open(&connect()).await.unwrap(), Arc::new(()));
    let Side { app: far_socket, ended: _outer_ended, stopper } = carry(streams.recv().await.unwrap(), SILENCE).await;
    let (near_socket, carrier) = carry_tunnel(stream, held.clone(), &Group::default(), SILENCE).unwrap();
    let (one, two) = testing::ends_on(near_socket, far_socket);
    let (account, far_account) = (near.buffers.account("inside"), far.buffers.account("inside"));
    let (inner, mut driver) = client::start(&near.engine, one, &CONFIG, &account).unwrap();
    driver.carried_by(&carrier);
    let server = Server::start(&far.engine, two, &CONFIG, &far_account).unwrap();
    let (sender, mut inner_streams) = mpsc::unbounded_channel();
    spawn(accept_all(server, sender));
    driver.settled().await.unwrap();
    let run = spawn(async move { driver.run().await });

    let mut client = carry(inner.open(&connect()).await.unwrap(), SILENCE).await;
    let mut server = carry(inner_streams.recv().await.unwrap(), SILENCE).await;
    let body = vec![7; 3_000_000];
    let (sent, mut received) = (body.clone(), vec![0; body.len()]);
    let (written, read) = tokio::join!(client.app.write_all(&sent), server.app.read_exact(&mut received));
    assert!(written.is_ok() && read.is_ok() && received == body);
    assert_eq!((carrier.reason(), Arc::strong_count(&held)), (None, 2));

    // The far end of the outer tunnel resets the stream.
    stopper.stop();
    let Err(CarryError::Tunnel(error)) = client.ended.await.unwrap().result else { panic!("the tunnel breaks") };
    assert!(error.to_string().starts_with("the stream that carried it ended: the peer reset the stream"), "{error}");
    assert!(matches!(run.await.unwrap(), Err(TunnelError::Carrier(_))));
    assert!(server.ended.await.unwrap().result.is_err());
    assert_eq!(Arc::strong_count(&held), 1, "what is held for the stream ends with it");
}

#[tokio::test]
async fn a_stream_ends_in_order_with_the_tunnel_inside_and_is_reset_if_that_is_given_up() {
    let Pair { tunnel, mut streams, .. } = pair(1 << 30).await;
    for in_order in [true, false] {
        let (stream, held) = (tunnel.open(&connect()).await.unwrap(), Arc::new(()));
        let Side { mut app, ended, .. } = carry(streams.recv().await.unwrap(), SILENCE).await;
        let (mut socket, carrier) = carry_tunnel(stream, held.clone(), &Group::default(), SILENCE).unwrap();
        socket.write_all(b"last").await.unwrap();
        app.read_exact(&mut [0; 4]).await.unwrap();
        if in_order {
            drop(socket);
            assert_eq!(app.read(&mut [0]).await.unwrap(), 0);
            drop(app);
            assert!(ended.await.unwrap().result.is_ok());
        } else {
            carrier.stop();
            assert!(matches!(ended.await.unwrap().result, Err(CarryError::Reset(_))));
            assert_eq!(socket.read(&mut [0]).await.unwrap(), 0);
            assert!(carrier.reason().is_some());
        }
        while Arc::strong_count(&held) > 1 {
            tokio::task::yield_now().await;
        }
    }
}
