//! The server with real connections, called by the client of a node.

use super::measured::Measured;
use crate::control::xds;
use crate::control_plane::catalog::Kind;
use crate::mesh::Store;
use crate::proto::envoy::service::discovery::v3::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use crate::proto::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node};
use crate::proto::istio::v1::auth::IstioCertificateRequest;
use crate::proto::istio::v1::auth::istio_certificate_service_client::IstioCertificateServiceClient;
use crate::rpc::{self, Connection, MESSAGE_BYTES_MAX, Token, tls::Roots};
use crate::task::{Drain, Ready};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tonic::codegen::tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

/// The longest that a test waits for anything.
const PATIENCE: Duration = Duration::from_secs(30);
const ID: &str = "ztunnel~10.0.0.1~ztunnel-x.istio-system~istio-system.svc.cluster.local";

fn settings(server: &Measured, token: &str, cluster_id: &str) -> rpc::Config {
    rpc::Config {
        address: format!("https://localhost:{}", server.address.port()).parse().unwrap(),
        roots: Roots::Inline(server.root.clone()),
        alt_host: None,
        token: Token::Literal(token.into()),
        cluster_id: cluster_id.into(),
        headers: vec![],
    }
}

async fn connect(server: &Measured, token: &str, cluster_id: &str) -> Connection {
    rpc::connect(&settings(server, token, cluster_id)).await.unwrap()
}

fn first(kind: Kind, id: &str) -> DeltaDiscoveryRequest {
    let node = Some(Node { id: id.into(), ..Default::default() });
    DeltaDiscoveryRequest { node, type_url: kind.url().into(), ..Default::default() }
}

struct Stream {
    /// It is closed with its last handle.
    _client: AggregatedDiscoveryServiceClient<Connection>,
    send: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: tonic::Streaming<DeltaDiscoveryResponse>,
}

impl Stream {
    async fn open(connection: Connection) -> Result<Self, Status> {
        let (send, requests) = mpsc::channel(16);
        let origin = "https://localhost".parse().unwrap();
        let mut client = AggregatedDiscoveryServiceClient::with_origin(connection, origin)
            .max_decoding_message_size(MESSAGE_BYTES_MAX);
        let responses = client.delta_aggregated_resources(ReceiverStream::new(requests)).await?.into_inner();
        Ok(Self { _client: client, send, responses })
    }

    async fn next(&mut self) -> Result<Option<DeltaDiscoveryResponse>, Status> {
        timeout(PATIENCE, self.responses.message()).await.unwrap()
    }

    /// The next response, which is acknowledged: its type, and its resources.
    async fn take(&mut self) -> (String, usize) {
        let response = self.next().await.unwrap().unwrap();
        let (type_url, response_nonce) = (response.type_url.clone(), response.nonce);
        self.send.send(DeltaDiscoveryRequest { type_url, response_nonce, ..Default::default() }).await.unwrap();
        (response.type_url, response.resources.len())
    }

    /// Asks for everything.
    async fn ask(&self) {
        for kind in Kind::ALL {
            self.send.send(first(kind, ID)).await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_are_refused_with_the_status_that_says_why() {
    let server = Measured::start().await.unwrap();
    server.set_complete();
    let cases = [
        ("bad", "c1", ID, Code::Unauthenticated, "the token is not accepted"),
        ("1", "c2", ID, Code::Unauthenticated, "cluster c2 is not known here"),
        ("other", "", ID, Code::PermissionDenied, "istio-system/other may not have mesh facts"),
        ("1", "c1", "ztunnel~10.0.0.1~x.shop~shop.svc", Code::PermissionDenied, "in namespace shop"),
        ("1", "c1", "", Code::InvalidArgument, "the node's id"),
        ("1", "", "router~10.0.0.1~x.istio-system~istio-system.svc", Code::InvalidArgument, "only ztunnel"),
    ];
    for (token, cluster, id, code, text) in cases {
        let refused = async {
            let mut stream = Stream::open(connect(&server, token, cluster).await).await?;
            stream.send.send(first(Kind::Address, id)).await.unwrap();
            stream.next().await.map(|_| ())
        };
        let status = refused.await.unwrap_err();
        assert!(status.code() == code && status.message().contains(text), "{token} {cluster} {id}: {status}");
    }
    let mut stream = Stream::open(connect(&server, "1", "").await).await.unwrap();
    let without_node = DeltaDiscoveryRequest { node: None, ..first(Kind::Address, "") };
    stream.send.send(without_node).await.unwrap();
    assert_eq!(stream.next().await.unwrap_err().code(), Code::InvalidArgument);
    assert_eq!(server.connected(), 0, "none of them is listed");
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_come_from_the_authority() {
    let server = Measured::start().await.unwrap();
    let ask = async |token: &str, csr: &str| {
        let origin = "https://localhost".parse().unwrap();
        let connection = connect(&server, token, "c1").await;
        let mut client = IstioCertificateServiceClient::with_origin(connection, origin);
        client.create_certificate(IstioCertificateRequest { csr: csr.into(), ..Default::default() }).await
    };
    assert_eq!(ask("1", "mine").await.unwrap().into_inner().cert_chain, ["mine", "root"]);
    assert_eq!(ask("bad", "mine").await.unwrap_err().code(), Code::Unauthenticated);
    let long = "x".repeat(100_000);
    assert_eq!(ask("1", &long).await.unwrap_err().code(), Code::ResourceExhausted);
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_that_wait_for_a_decision_are_limited_for_each_address() {
    let server = Measured::start().await.unwrap();
    let call = async |token: &str| {
        let origin = "https://localhost".parse().unwrap();
        let connection = connect(&server, token, "c1").await;
        let mut client = IstioCertificateServiceClient::with_origin(connection, origin);
        client.create_certificate(IstioCertificateRequest { csr: "mine".into(), ..Default::default() }).await
    };
    assert!(call("1").await.is_ok());
    let waiting = futures_util::future::join_all((0..64).map(|_| call("hangs")));
    let refused = async {
        loop {
            match call("1").await {
                Ok(_) => tokio::task::yield_now().await,
                Err(status) => break status,
            }
        }
    };
    let status = tokio::select! { status = refused => status, _ = waiting => panic!("nobody decides about them") };
    assert!(status.code() == Code::Unavailable && status.message().contains("too many calls"), "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_has_few_streams_and_the_others_have_theirs() {
    let server = Measured::start().await.unwrap();
    server.set_complete();
    let mut open = Vec::new();
    let refused = loop {
        // It is refused before anything that it asks is read.
        let mut stream = match Stream::open(connect(&server, "greedy", "").await).await {
            Ok(stream) => stream,
            Err(status) => break status,
        };
        stream.ask().await;
        stream.next().await.unwrap();
        open.push(stream);
        assert!(open.len() < 10);
    };
    assert_eq!(refused.code(), Code::ResourceExhausted);
    let mut other = Stream::open(connect(&server, "modest", "").await).await.unwrap();
    other.ask().await;
    other.take().await;
    assert_eq!(server.connected(), open.len() + 1);
}

/// A client that reads nothing, and one that acknowledges nothing, hold up nobody; both get what they missed in one
/// response.
#[tokio::test(flavor = "multi_thread")]
async fn slow_clients_hold_up_nobody() {
    let server = Measured::start().await.unwrap();
    server.set(0..3000, |_| 0);
    server.set_complete();
    let mut streams = Vec::new();
    for token in ["reads nothing", "acknowledges nothing", "quick"] {
        let stream = Stream::open(connect(&server, token, "").await).await.unwrap();
        stream.ask().await;
        streams.push(stream);
    }
    let [asleep, mute, quick] = streams.as_mut_slice() else { unreachable!() };
    let policies = mute.next().await.unwrap().unwrap();
    let addresses = mute.next().await.unwrap().unwrap();
    assert_eq!((policies.resources.len(), addresses.resources.len()), (0, 3000));
    assert_eq!((quick.take().await.1, quick.take().await.1), (0, 3000));
    for version in 1..=20 {
        server.set(0..1000, |_| version);
        assert_eq!(quick.take().await, (Kind::Address.url().to_owned(), 1000));
    }
    let answer = DeltaDiscoveryRequest {
        type_url: Kind::Address.url().into(),
        response_nonce: addresses.nonce,
        ..Default::default()
    };
    mute.send.send(DeltaDiscoveryRequest { response_nonce: "of another time".into(), ..answer.clone() }).await.unwrap();
    mute.send.send(answer).await.unwrap();
    let policies = DeltaDiscoveryRequest {
        type_url: Kind::Authorization.url().into(),
        response_nonce: policies.nonce,
        ..Default::default()
    };
    mute.send.send(policies).await.unwrap();
    let merged = mute.next().await.unwrap().unwrap();
    assert!(merged.resources.len() == 1000 && merged.resources.iter().all(|resource| resource.version == "20"));
    assert_eq!((asleep.take().await.1, asleep.take().await.1, asleep.take().await.1), (0, 3000, 1000));
}

#[tokio::test(flavor = "multi_thread")]
async fn at_the_end_streams_are_closed_in_order_and_nothing_is_accepted() {
    let server = Measured::start().await.unwrap();
    server.set_complete();
    let mut stream = Stream::open(connect(&server, "1", "").await).await.unwrap();
    stream.ask().await;
    stream.take().await;
    stream.take().await;
    server.end();
    let ended = stream.next().await.unwrap_err();
    assert_eq!((ended.code(), ended.message()), (Code::Unavailable, "transport is closing"));
    drop(stream);
    timeout(PATIENCE, server.ended()).await.unwrap();
    assert!(rpc::connect(&settings(&server, "1", "")).await.is_err());
    assert_eq!(server.connected(), 0);
}

/// The client of a node, as it is: it learns everything, what changes, and what has changed while it was away.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_is_kept_in_step() {
    let server = Measured::start().await.unwrap();
    server.set(0..2000, |_| 0);
    server.set_complete();
    for on_demand in [false, true] {
        let store = Arc::new(Store::new("node-7".into(), "c1".into(), on_demand));
        let config = xds::Config {
            rpc: settings(&server, if on_demand { "2" } else { "1" }, "c1"),
            node_id: ID.into(),
            metadata: [("NODE_NAME".to_owned(), "node-7".into())].into_iter().collect(),
            on_demand,
            state_file: None,
            state_max_age: Duration::MAX,
        };
        let ready = Ready::default();
        let pending = ready.wait_for("facts");
        let client = xds::Client::new(config, store.clone(), Arc::default(), Arc::default(), pending);
        let stop = Drain::default();
        let signal = stop.signal();
        let running = crate::task::Group::default();
        running.spawn(client.run(signal));
        timeout(PATIENCE, ready.until("facts")).await.unwrap();
        let expected = if on_demand { 2 } else { 2000 };
        assert_eq!(store.load().counts().0, expected, "on demand: its own node's");
        let mut changes = store.subscribe();
        server.set([7].into_iter(), |_| 3 + u64::from(on_demand));
        let revision = if on_demand { "v4" } else { "v3" };
        let is_new = || store.load().workloads().any(|w| &*w.canonical_revision == revision);
        let known = async {
            while !is_new() {
                changes.changed().await.unwrap();
            }
        };
        timeout(PATIENCE, known).await.unwrap();
        stop.at_once();
        running.finished().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_list_of_what_is_held_is_read_and_one_that_is_too_long_is_refused() {
    let server = Measured::start().await.unwrap();
    server.set(0..10, |_| 0);
    server.set_complete();
    let held = |name: &str, count: usize| DeltaDiscoveryRequest {
        initial_resource_versions: (0..count).map(|n| (format!("{name}-{n}"), "1".to_owned())).collect(),
        ..first(Kind::Address, ID)
    };
    let mut stream = Stream::open(connect(&server, "1", "").await).await.unwrap();
    stream.send.send(first(Kind::Authorization, ID)).await.unwrap();
    stream.send.send(held("gone", 50_000)).await.unwrap();
    stream.take().await;
    let response = stream.next().await.unwrap().unwrap();
    assert_eq!((response.resources.len(), response.removed_resources.len()), (10, 50_000));
    let mut stream = Stream::open(connect(&server, "2", "").await).await.unwrap();
    stream.send.send(first(Kind::Authorization, ID)).await.unwrap();
    stream.take().await;
    stream.send.send(held(&"x".repeat(33 << 20), 1)).await.unwrap();
    let refused = stream.next().await.unwrap_err();
    // The words by which a node knows that it should come back without the list.
    assert!(refused.code() == Code::ResourceExhausted && refused.message().contains("larger than max"), "{refused}");
    // What else a request may say is short, because its inner parts need far more memory than they have bytes.
    let mut stream = Stream::open(connect(&server, "3", "").await).await.unwrap();
    let list = prost_types::ListValue { values: vec![Default::default(); 600_000] };
    let list = prost_types::Value { kind: Some(prost_types::value::Kind::ListValue(list)) };
    let metadata = prost_types::Struct { fields: [("X".to_owned(), list)].into() };
    let node = Some(Node { id: ID.into(), metadata: Some(metadata), ..Default::default() });
    stream.send.send(DeltaDiscoveryRequest { node, ..first(Kind::Address, ID) }).await.unwrap();
    let refused = stream.next().await.unwrap_err();
    assert!(refused.code() == Code::InvalidArgument && refused.message().contains("too long"), "{refused}");
}
