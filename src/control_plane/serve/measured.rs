//! A server for measurements and tests: it listens on loopback, has a certificate of its own, and takes every token for
//! that of a daemon's pod whose uid the token is.

use super::{Authority, Config, Denied, Metrics, Server};
use crate::control_plane::Caller;
use crate::control_plane::Catalog;
use crate::control_plane::caller::CallerPod;
use crate::control_plane::catalog::{Change, Kind, Resource};
use crate::crypto::{ALPN_H2, provider};
use crate::mesh::Text;
use crate::proto::istio::v1::auth::IstioCertificateResponse;
use crate::proto::istio::workload as wire;
use crate::task::{Drain, Group};
use prost::Message;
use rustls::pki_types::PrivatePkcs8KeyDer;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use tokio::net::TcpListener;
use tonic::Status;

/// The server.
#[derive(Debug)]
pub struct Measured {
    /// Where it listens.
    pub address: SocketAddr,
    /// Its root certificate, in PEM. It is for `localhost`.
    pub root: String,
    catalog: Arc<Catalog>,
    server: Server,
    drain: Drain,
    tasks: Group,
}

fn tls() -> io::Result<(String, Arc<rustls::ServerConfig>)> {
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).map_err(io::Error::other)?;
    let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()).into();
    let mut config = rustls::ServerConfig::builder_with_provider(Arc::new(provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(io::Error::other)?
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .map_err(io::Error::other)?;
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    Ok((made.cert.pem(), Arc::new(config)))
}

/// Tokens that begin with this are refused.
const BAD: &str = "bad";
/// With this token, nobody ever signs.
const HANGS: &str = "hangs";
/// Tokens that begin with this are of another service account.
const OTHER: &str = "other";

fn authority(tls: Arc<rustls::ServerConfig>) -> Authority {
    let caller = |token: &str| Caller {
        namespace: "istio-system".into(),
        service_account: if token.starts_with(OTHER) { "other".into() } else { "ztunnel".into() },
        pod: Some(CallerPod { name: "ztunnel".into(), uid: token.into(), node: None }),
    };
    Authority {
        review: Box::new(move |token| {
            let reviewed = match token.starts_with(BAD) {
                true => Err(Denied::Refused("the token is not accepted".into())),
                false => Ok(caller(&token)),
            };
            Box::pin(std::future::ready(reviewed))
        }),
        sign: Box::new(|token, request| {
            Box::pin(async move {
                match token {
                    Some(token) if token == HANGS => std::future::pending().await,
                    Some(token) if !token.starts_with(BAD) => {
                        Ok(IstioCertificateResponse { cert_chain: vec![request.await?.csr, "root".into()] })
                    }
                    _ => Err(Status::unauthenticated("the token is not accepted")),
                }
            })
        }),
        tls: Box::new(move || Some(tls.clone())),
    }
}

impl Measured {
    /// Starts on the runtime of the calling task.
    pub async fn start() -> io::Result<Self> {
        let (root, tls) = tls()?;
        let config = Config { trusted: vec![("istio-system".into(), "ztunnel".into())], cluster_id: "c1".into() };
        let server = Server::new(config, authority(tls), Arc::<Metrics>::default());
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let (catalog, drain, tasks) = (Arc::<Catalog>::default(), Drain::default(), Group::default());
        tasks.spawn(server.clone().serve(listener, catalog.clone(), drain.signal()));
        Ok(Self { address, root, catalog, server, drain, tasks })
    }

    /// Sets workloads, in one batch. The version of each is what the function says.
    pub fn set(&self, workloads: impl Iterator<Item = u32>, version: impl Fn(u32) -> u64) {
        self.catalog.apply(workloads.map(|id| workload(id, version(id))).collect());
    }

    /// How many clients are connected.
    pub fn connected(&self) -> usize {
        self.server.nodes().list().len()
    }

    /// Asks everything to end in order.
    pub fn end(&self) {
        self.drain.gently();
    }

    /// Completes once everything has ended.
    pub async fn ended(&self) {
        self.tasks.finished().await;
    }

    /// Says that everything has been listed.
    pub fn set_complete(&self) {
        self.catalog.set_complete();
    }
}

/// A workload as a Deployment's pod has it.
fn workload(id: u32, version: u64) -> Change {
    let [a, b, c, d] = (0x0a00_0000 + id).to_be_bytes();
    let (namespace, service) = (format!("team-{}", id % 50), format!("service-{}", id % 500));
    let hostname = format!("{service}.{namespace}.svc.cluster.local");
    let key = format!("{namespace}/{hostname}");
    let ports = vec![wire::Port { service_port: 80, target_port: 8080, ..Default::default() }];
    let name = format!("{service}-7d9c5b8f6-{id:05}");
    let uid = format!("c1//Pod/{namespace}/{name}");
    let node = format!("node-{}", id % 1000);
    let workload = wire::Workload {
        uid: uid.clone(),
        name,
        namespace: namespace.clone(),
        addresses: vec![vec![a, b, c, d].into()],
        tunnel_protocol: wire::TunnelProtocol::Hbone as i32,
        service_account: service.clone(),
        canonical_name: service.clone(),
        canonical_revision: format!("v{}", version % 10),
        workload_name: service,
        node: node.clone(),
        cluster_id: "c1".into(),
        services: [(key.clone(), wire::PortList { ports })].into(),
        ..Default::default()
    };
    let content = wire::Address { r#type: Some(wire::address::Type::Workload(workload)) }.encode_to_vec();
    let aliases: Vec<Text> = vec![format!("/{a}.{b}.{c}.{d}").into()];
    let (version, services) = (version.to_string().into(), vec![key.into()]);
    let resource = Resource { content: content.into(), version, aliases, services, node: node.into() };
    (Kind::Address, uid.into(), Some(Arc::new(resource)))
}
