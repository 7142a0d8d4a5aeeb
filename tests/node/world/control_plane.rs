//! A control plane that speaks istiod's protocols, delta xDS and the CA API over TLS on one port, and misbehaves on
//! demand.

use super::facts::Mesh;
use super::wire::{self, ADDRESS, AUTHORIZATION};
use super::{eventually, inside};
use bytes::{Bytes, BytesMut};
use culvert::proto::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource};
use culvert::proto::istio::v1::auth::{IstioCertificateRequest, IstioCertificateResponse};
use h2::server::SendResponse;
use h2::{RecvStream, SendStream};
use http::{HeaderMap, Response};
use prost::Message;
use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use time::{Duration, OffsetDateTime};
use tokio::sync::{mpsc, watch};
use tokio_rustls::TlsAcceptor;

/// The name in the control plane's certificate.
pub const HOST: &str = "istiod.istio-system.svc";
pub const PORT: u16 = 15012;

/// A root certificate of the mesh, and its signing key.
#[derive(Clone)]
pub struct Root {
    pub pem: String,
    issuer: Arc<Issuer<'static, KeyPair>>,
}

impl Root {
    pub fn new(name: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::OrganizationName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let pem = params.self_signed(&key).unwrap().pem();
        Self { pem, issuer: Arc::new(Issuer::new(params, key)) }
    }

    /// A list of revoked serials in PEM.
    pub fn crl(&self, serials: &[rcgen::SerialNumber]) -> String {
        signed_crl(&self.issuer, serials)
    }
}

/// A list of revoked certificates.
pub fn signed_crl(issuer: &Issuer<'_, KeyPair>, serials: &[rcgen::SerialNumber]) -> String {
    let now = OffsetDateTime::now_utc();
    let revoked = |serial: &rcgen::SerialNumber| rcgen::RevokedCertParams {
        serial_number: serial.clone(),
        revocation_time: now,
        reason_code: None,
        invalidity_date: None,
    };
    let params = rcgen::CertificateRevocationListParams {
        this_update: now,
        next_update: now + Duration::days(1),
        crl_number: rcgen::SerialNumber::from(1),
        issuing_distribution_point: None,
        revoked_certs: serials.iter().map(revoked).collect(),
        key_identifier_method: rcgen::KeyIdMethod::Sha256,
    };
    params.signed_by(issuer).unwrap().pem().unwrap()
}

/// How the CA answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ca {
    Sign,
    Refuse(i32),
    Hang,
}

/// Everything that a test can change.
pub struct State {
    /// Resources by type and name: version and bytes.
    pub resources: BTreeMap<&'static str, BTreeMap<String, (String, Vec<u8>)>>,
    /// Whether resources have versions, so that equal ones are not sent again (istiod since 1.31).
    pub versions: bool,
    /// Whether streams are accepted but never answered.
    pub stalled: bool,
    /// Requests of this type are not answered until this changes.
    pub silent: Option<&'static str>,
    /// Streams are refused with this status.
    pub refuse: Option<i32>,
    /// Requests longer than this are refused, as istiod does at 4 MiB.
    pub request_bytes_max: usize,
    pub ca: Ca,
    /// Signs certificates.
    pub signer: Root,
    /// The roots that are sent with each certificate, in order.
    pub bundle: Vec<Root>,
    /// Lifetime of certificates, and the offset of the CA's clock from this machine's, both in seconds.
    pub life: i64,
    pub clock: i64,
    /// The accepted tokens. If empty, any token is accepted.
    pub tokens: HashSet<String>,
    /// All requests so far.
    pub requests: Vec<DeltaDiscoveryRequest>,
    pub signed: Vec<(String, rcgen::SerialNumber)>,
    /// The account of a token that impersonates nobody. If it is not set, such requests fail the test.
    pub account: Option<String>,
    pub refused_tokens: usize,
    pub at_the_ca: usize,
    pub most_at_the_ca: usize,
    changes: u64,
}

pub struct ControlPlane {
    state: Arc<Mutex<State>>,
    /// Notifies the streams that the state has changed.
    changed: watch::Sender<u64>,
    /// Cuts all connections with a lower number.
    cut: watch::Sender<u64>,
    /// Ends all streams with a lower number in order.
    recycle: watch::Sender<u64>,
    /// Responses that are sent unchanged to all streams.
    inject: tokio::sync::broadcast::Sender<DeltaDiscoveryResponse>,
    running: Option<tokio::runtime::Runtime>,
    ns: String,
    /// Files for clients: roots and token.
    pub root_file: PathBuf,
    pub token_file: PathBuf,
}

impl ControlPlane {
    /// Listens in a namespace, with the files for its clients in `dir`.
    pub fn start(ns: &str, dir: &std::path::Path) -> Self {
        let root = Root::new("mesh root");
        let state = State {
            resources: BTreeMap::new(),
            versions: true,
            stalled: false,
            silent: None,
            refuse: None,
            request_bytes_max: 4 << 20,
            ca: Ca::Sign,
            signer: root.clone(),
            bundle: vec![root.clone()],
            life: 3600,
            clock: 0,
            tokens: HashSet::new(),
            requests: Vec::new(),
            account: None,
            signed: Vec::new(),
            refused_tokens: 0,
            at_the_ca: 0,
            most_at_the_ca: 0,
            changes: 0,
        };
        let (root_file, token_file) = (dir.join("root-cert.pem"), dir.join("istio-token"));
        std::fs::write(&root_file, &root.pem).unwrap();
        std::fs::write(&token_file, "token-1\n").unwrap();
        let mut plane = Self {
            state: Arc::new(Mutex::new(state)),
            changed: watch::Sender::new(0),
            cut: watch::Sender::new(0),
            recycle: watch::Sender::new(0),
            inject: tokio::sync::broadcast::channel(64).0,
            running: None,
            ns: ns.to_owned(),
            root_file,
            token_file,
        };
        plane.up();
        plane
    }

    /// Starts to listen, with a server certificate from the current root.
    pub fn up(&mut self) {
        let root = self.state().signer.clone();
        let tls = server_tls(&root, HOST);
        let listener = inside(&self.ns, || {
            let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
            socket.set_reuse_address(true).unwrap();
            let any: std::net::SocketAddr = ([0, 0, 0, 0], PORT).into();
            socket.bind(&any.into()).unwrap();
            socket.listen(128).unwrap();
            TcpListener::from(socket)
        });
        listener.set_nonblocking(true).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let shared = Shared {
            state: self.state.clone(),
            changed: self.changed.clone(),
            cut: self.cut.clone(),
            recycle: self.recycle.clone(),
            inject: self.inject.clone(),
        };
        runtime.spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            loop {
                let Ok((stream, _)) = listener.accept().await else { continue };
                tokio::spawn(connection(shared.clone(), tls.clone(), stream));
            }
        });
        self.running = Some(runtime);
    }

    /// Acts as if the process had been killed: nothing listens, and all connections are closed.
    pub fn down(&mut self) {
        if let Some(runtime) = self.running.take() {
            runtime.shutdown_background();
        }
        eventually("the port is free", || {
            inside(&self.ns, || {
                let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
                socket.set_reuse_address(true).unwrap();
                let any: std::net::SocketAddr = ([0, 0, 0, 0], PORT).into();
                socket.bind(&any.into()).is_ok()
            })
        });
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Changes the state and notifies the streams.
    pub fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.state();
        change(&mut state);
        state.changes += 1;
        self.changed.send_replace(state.changes);
    }

    /// Replaces the facts by those of `mesh`.
    pub fn set(&self, mesh: &Mesh) {
        let resources = wire::resources(mesh);
        self.change(|state| {
            for (type_url, new) in resources {
                let old = state.resources.entry(type_url).or_default();
                let version = |name: &String, bytes: &Vec<u8>| match old.get(name) {
                    Some((version, same)) if same == bytes => version.clone(),
                    Some((version, _)) => format!("{}", version.parse::<u64>().unwrap_or(0) + 1),
                    None => "1".to_owned(),
                };
                *old = new.into_iter().map(|(n, b)| (n.clone(), (version(&n, &b), b))).collect();
            }
        });
    }

    /// Breaks all connections.
    pub fn cut(&self) {
        self.cut.send_modify(|n| *n += 1);
    }

    /// Ends all streams in order, as istiod does with each stream every half hour.
    pub fn recycle(&self) {
        self.recycle.send_modify(|n| *n += 1);
    }

    /// Sends every stream a response without a request.
    pub fn inject(&self, response: DeltaDiscoveryResponse) {
        self.inject.send(response).unwrap();
    }

    /// The first request of each stream for a type.
    pub fn first_requests(&self, type_url: &str) -> Vec<DeltaDiscoveryRequest> {
        let state = self.state();
        state.requests.iter().filter(|r| r.type_url == type_url && r.node.is_some()).cloned().collect()
    }

    /// The error texts of all refused responses so far.
    pub fn refusals(&self) -> Vec<String> {
        let state = self.state();
        state.requests.iter().filter_map(|r| r.error_detail.as_ref().map(|e| e.message.clone())).collect()
    }

    /// How many certificates were signed for an account of namespace `ns`.
    pub fn signed_for(&self, account: &str) -> usize {
        let name = super::certs::spiffe(account);
        self.state().signed.iter().filter(|(identity, _)| *identity == name).count()
    }

    /// The serial of the last certificate that was signed for an account.
    pub fn serial_of(&self, account: &str) -> rcgen::SerialNumber {
        let name = super::certs::spiffe(account);
        self.state().signed.iter().rev().find(|(identity, _)| *identity == name).unwrap().1.clone()
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        if let Some(runtime) = self.running.take() {
            runtime.shutdown_background();
        }
    }
}

#[derive(Clone)]
struct Shared {
    state: Arc<Mutex<State>>,
    changed: watch::Sender<u64>,
    cut: watch::Sender<u64>,
    recycle: watch::Sender<u64>,
    inject: tokio::sync::broadcast::Sender<DeltaDiscoveryResponse>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// TLS of a server with this name.
pub fn server_tls(root: &Root, name: &str) -> TlsAcceptor {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let leaf = params.signed_by(&key, &root.issuer).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let key = rustls::pki_types::PrivatePkcs8KeyDer::from(key.serialize_der()).into();
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![leaf.der().clone()], key)
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    TlsAcceptor::from(Arc::new(config))
}

async fn connection(shared: Shared, tls: TlsAcceptor, stream: tokio::net::TcpStream) {
    let mut cut = shared.cut.subscribe();
    cut.mark_unchanged();
    let serve = async {
        let Ok(stream) = tls.accept(stream).await else { return };
        let mut builder = h2::server::Builder::new();
        builder.initial_window_size(16 << 20).initial_connection_window_size(64 << 20);
        let Ok(mut http) = builder.handshake::<_, Bytes>(stream).await else { return };
        while let Some(Ok((request, respond))) = http.accept().await {
            let shared = shared.clone();
            tokio::spawn(async move {
                let (parts, body) = request.into_parts();
                if !shared.takes_token(&parts.headers) {
                    return end(respond, None, 16, "authentication failure");
                }
                if parts.uri.path().ends_with("/DeltaAggregatedResources") {
                    discovery(shared, body, respond).await;
                } else {
                    certificate(shared, body, respond).await;
                }
            });
        }
    };
    tokio::select! { () = serve => {}, _ = cut.changed() => {} }
}

impl Shared {
    fn takes_token(&self, headers: &HeaderMap) -> bool {
        let mut state = self.state();
        let token = headers.get("authorization").and_then(|h| h.to_str().ok()?.strip_prefix("Bearer ")).unwrap_or("");
        let fine = state.tokens.is_empty() || state.tokens.contains(token);
        state.refused_tokens += usize::from(!fine);
        fine && headers.contains_key("clusterid")
    }
}

fn frame(message: &impl Message) -> Bytes {
    let bytes = message.encode_to_vec();
    let mut framed = vec![0];
    framed.extend_from_slice(&u32::try_from(bytes.len()).unwrap().to_be_bytes());
    framed.extend_from_slice(&bytes);
    framed.into()
}

/// Reads gRPC messages. Returns `None` at the end of the stream.
async fn next<M: Message + Default>(body: &mut RecvStream, buffer: &mut BytesMut) -> Option<(usize, M)> {
    loop {
        if buffer.len() >= 5 {
            let length = u32::from_be_bytes([buffer[1], buffer[2], buffer[3], buffer[4]]) as usize;
            if buffer.len() >= 5 + length {
                let message = buffer.split_to(5 + length).split_off(5);
                return Some((length, M::decode(message.freeze()).unwrap()));
            }
        }
        let data = body.data().await?.ok()?;
        let _ = body.flow_control().release_capacity(data.len());
        buffer.extend_from_slice(&data);
    }
}

fn grpc_head() -> Response<()> {
    Response::builder().header("content-type", "application/grpc").body(()).unwrap()
}

fn trailers(code: i32, text: &str) -> HeaderMap {
    let mut map = HeaderMap::new();
    map.insert("grpc-status", code.to_string().parse().unwrap());
    map.insert("grpc-message", text.parse().unwrap());
    map
}

/// Ends a call with a status.
fn end(mut respond: SendResponse<Bytes>, message: Option<Bytes>, code: i32, text: &str) {
    let Ok(mut send) = respond.send_response(grpc_head(), false) else { return };
    if let Some(message) = message {
        let _ = send.send_data(message, false);
    }
    let _ = send.send_trailers(trailers(code, text));
}

/// What one stream has been sent of one type.
#[derive(Default)]
struct Told {
    known: HashMap<String, String>,
    wildcard: bool,
    names: HashSet<String>,
}

async fn discovery(shared: Shared, mut body: RecvStream, mut respond: SendResponse<Bytes>) {
    if let Some(code) = shared.state().refuse {
        return end(respond, None, code, "refused by the test");
    }
    let (mut changed, mut recycle) = (shared.changed.subscribe(), shared.recycle.subscribe());
    let mut injected = shared.inject.subscribe();
    recycle.mark_unchanged();
    let (queue, mut requests) = mpsc::channel(16);
    tokio::spawn(async move {
        let mut buffer = BytesMut::new();
        while let Some(request) = next::<DeltaDiscoveryRequest>(&mut body, &mut buffer).await {
            if queue.send(request).await.is_err() {
                return;
            }
        }
    });
    let mut send: Option<SendStream<Bytes>> = None;
    let mut told: BTreeMap<&'static str, Told> = BTreeMap::new();
    let (mut nonce, mut held) = (0, Vec::new());
    loop {
        let mut due = Vec::new();
        tokio::select! {
            request = requests.recv() => {
                let Some((length, request)) = request else { return };
                let (max, stalled) = { let state = shared.state(); (state.request_bytes_max, state.stalled) };
                if length > max {
                    return end(respond, None, 8, "grpc: received message larger than max");
                }
                shared.state().requests.push(request.clone());
                if stalled {
                    continue;
                }
                if shared.state().silent.is_some_and(|silent| silent == request.type_url) {
                    held.push(request);
                    continue;
                }
                due.extend(shared.take(&mut told, &request));
            }
            _ = changed.changed() => {
                if shared.state().stalled {
                    continue;
                }
                let silent = shared.state().silent;
                let (waits, answered) = std::mem::take(&mut held)
                    .into_iter()
                    .partition(|request: &DeltaDiscoveryRequest| silent.is_some_and(|silent| silent == request.type_url));
                held = waits;
                for request in answered {
                    due.extend(shared.take(&mut told, &request));
                }
                for type_url in [ADDRESS, AUTHORIZATION] {
                    due.extend(told.get_mut(type_url).and_then(|told| shared.response(type_url, told, false)));
                }
            }
            Ok(response) = injected.recv() => due.push(response),
            _ = recycle.changed() => {
                match send {
                    Some(mut send) => drop(send.send_trailers(trailers(14, "transport is closing"))),
                    None => end(respond, None, 14, "transport is closing"),
                }
                return;
            }
        }
        for mut response in due {
            nonce += 1;
            response.nonce = format!("n{nonce}");
            if send.is_none() {
                send = respond.send_response(grpc_head(), false).ok();
            }
            let Some(send) = &mut send else { return };
            if send.send_data(frame(&response), false).is_err() {
                return;
            }
        }
    }
}

impl Shared {
    /// The answer to a request.
    fn take(
        &self,
        told: &mut BTreeMap<&'static str, Told>,
        request: &DeltaDiscoveryRequest,
    ) -> Option<DeltaDiscoveryResponse> {
        let type_url = [ADDRESS, AUTHORIZATION].into_iter().find(|t| *t == request.type_url)?;
        let first = !told.contains_key(type_url);
        let told = told.entry(type_url).or_default();
        if !first && !request.response_nonce.is_empty() {
            return None;
        }
        let gives_up_all = request.resource_names_unsubscribe.iter().any(|name| name == "*");
        if first {
            told.wildcard = !gives_up_all;
            told.known = request.initial_resource_versions.clone();
        }
        for name in &request.resource_names_unsubscribe {
            told.names.remove(name);
            told.known.remove(name);
        }
        let new: Vec<String> = request.resource_names_subscribe.iter().filter(|name| *name != "*").cloned().collect();
        if !first && new.is_empty() {
            // As istiod does: a request that subscribes to nothing new is answered with everything as removed.
            let removed_resources = told.names.iter().chain(told.known.keys()).cloned().collect();
            return Some(DeltaDiscoveryResponse {
                type_url: type_url.to_owned(),
                removed_resources,
                ..Default::default()
            });
        }
        // As istiod does: a request for names that are subscribed or were sent already gets no answer.
        let known = |name: &String| told.known.contains_key(name) && !request.resource_names_unsubscribe.contains(name);
        let news: Vec<String> =
            new.into_iter().filter(|name| first || (!told.names.contains(name) && !known(name))).collect();
        told.names.extend(news.iter().cloned());
        if !first && news.is_empty() {
            return None;
        }
        if told.wildcard { self.response(type_url, told, first) } else { self.answer(type_url, told, &news) }
    }

    /// The changes that a stream has not been sent yet. With `always`, the response is sent even if it is empty.
    fn response(&self, type_url: &'static str, told: &mut Told, always: bool) -> Option<DeltaDiscoveryResponse> {
        let state = self.state();
        let nothing = BTreeMap::new();
        let all = state.resources.get(type_url).unwrap_or(&nothing);
        let mut response = DeltaDiscoveryResponse { type_url: type_url.to_owned(), ..Default::default() };
        let mut known = HashMap::new();
        // On demand: only resources that have been sent before or were requested by their own names, not by addresses.
        let concerned = |name: &String| told.wildcard || told.known.contains_key(name) || told.names.contains(name);
        for (name, (version, bytes)) in all.iter().filter(|(name, _)| concerned(name)) {
            known.insert(name.clone(), version.clone());
            let same = told.known.get(name) == Some(version);
            // Without versions, everything is sent again with the first response of a stream.
            if !same || (always && !state.versions) {
                response.resources.push(resource(type_url, name, version, bytes, state.versions));
            }
        }
        response.removed_resources = told.known.keys().filter(|name| !known.contains_key(*name)).cloned().collect();
        told.known = known;
        let nothing_new = response.resources.is_empty() && response.removed_resources.is_empty();
        (always || !nothing_new).then_some(response)
    }

    /// The answer to requested names: the resources that have them, with a service its workloads, and the names that do
    /// not exist.
    fn answer(&self, type_url: &'static str, told: &mut Told, asked: &[String]) -> Option<DeltaDiscoveryResponse> {
        let state = self.state();
        let nothing = BTreeMap::new();
        let all = state.resources.get(type_url).unwrap_or(&nothing);
        let mut response = DeltaDiscoveryResponse { type_url: type_url.to_owned(), ..Default::default() };
        let has = |name: &String, bytes: &[u8], wanted: &String| {
            name == wanted || wire::aliases(type_url, name, bytes).contains(wanted)
        };
        let mut found: HashSet<&String> = HashSet::new();
        for wanted in asked {
            let direct: Vec<&String> = all.iter().filter(|(n, (_, b))| has(n, b, wanted)).map(|(n, _)| n).collect();
            if direct.is_empty() {
                response.removed_resources.push(wanted.clone());
            }
            let behind = all.iter().filter(|(_, (_, b))| wire::services(b).iter().any(|key| direct.contains(&key)));
            found.extend(behind.map(|(name, _)| name));
            found.extend(direct);
        }
        for name in found {
            let (version, bytes) = &all[name];
            told.known.insert(name.clone(), version.clone());
            response.resources.push(resource(type_url, name, version, bytes, state.versions));
        }
        Some(response)
    }
}

fn resource(type_url: &str, name: &str, version: &str, bytes: &[u8], versions: bool) -> Resource {
    Resource {
        name: name.to_owned(),
        version: if versions { version.to_owned() } else { String::new() },
        aliases: wire::aliases(type_url, name, bytes),
        resource: Some(prost_types::Any { type_url: type_url.to_owned(), value: bytes.to_vec() }),
        ttl: None,
    }
}

async fn certificate(shared: Shared, mut body: RecvStream, respond: SendResponse<Bytes>) {
    let Some((_, request)) = next::<IstioCertificateRequest>(&mut body, &mut BytesMut::new()).await else { return };
    {
        let mut state = shared.state();
        state.at_the_ca += 1;
        state.most_at_the_ca = state.most_at_the_ca.max(state.at_the_ca);
    }
    let mut changed = shared.changed.subscribe();
    while shared.state().ca == Ca::Hang {
        let _ = changed.changed().await;
    }
    let ca = shared.state().ca.clone();
    match ca {
        Ca::Hang => {}
        Ca::Refuse(code) => end(respond, None, code, "request impersonation authentication failure"),
        Ca::Sign => {
            let answer = shared.sign(&request);
            end(respond, Some(frame(&answer)), 0, "");
        }
    }
    shared.state().at_the_ca -= 1;
}

impl Shared {
    fn sign(&self, request: &IstioCertificateRequest) -> IstioCertificateResponse {
        use prost_types::value::Kind;
        let mut state = self.state();
        let identity = request.metadata.as_ref().and_then(|m| m.fields.get("ImpersonatedIdentity")?.kind.clone());
        let identity = match (identity, &state.account) {
            (Some(Kind::StringValue(identity)), None) => identity,
            (None, Some(account)) => super::certs::spiffe(account),
            _ => panic!("impersonation where there should be none, or none where there should be: {request:?}"),
        };
        let csr = CertificateSigningRequestParams::from_pem(&request.csr).unwrap();
        let serial = rcgen::SerialNumber::from(rand::random::<u64>() >> 1);
        let mut params = CertificateParams::default();
        params.serial_number = Some(serial.clone());
        params.subject_alt_names = vec![SanType::URI(Ia5String::try_from(identity.as_str()).unwrap())];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let now = OffsetDateTime::now_utc() + Duration::seconds(state.clock);
        params.not_before = now - Duration::seconds(1);
        params.not_after = now + Duration::seconds(state.life);
        let leaf = params.signed_by(&csr.public_key, &state.signer.issuer).unwrap();
        state.signed.push((identity, serial));
        let roots = state.bundle.iter().map(|root| root.pem.as_str()).collect();
        IstioCertificateResponse { cert_chain: vec![leaf.pem(), roots] }
    }
}
