//! The calls of one connection: who may make them, and who answers.

use super::grpc::{Answer, Answered, FACTS_BYTES_MAX, Messages, Sender};
use super::metrics::CallLabel;
use super::shared::Shared;
use super::stream::{self, Origin};
use crate::control_plane::Caller;
use crate::proto::istio::v1::auth::{IstioCertificateRequest, IstioCertificateResponse};
use crate::task::slots::Slot;
use crate::task::{Group, Signal};
use crate::telemetry::limit::shortened;
use http::{HeaderMap, Method, Request, StatusCode, header};
use hyper::body::Incoming;
use prost::Message as _;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};

/// The call for mesh facts, and its name in metrics and logs.
const FACTS: (&str, &str) =
    ("/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources", "facts");
/// The call for a certificate.
const CERTIFICATE: (&str, &str) = ("/istio.v1.auth.IstioCertificateService/CreateCertificate", "certificate");
/// How long a call for a certificate may take.
const CERTIFICATE_DEADLINE: Duration = Duration::from_secs(20);
/// Largest request for a certificate. It is read before it is known who asks.
const CERTIFICATE_BYTES_MAX: usize = 64 << 10;
/// How many pieces of responses may wait to be read. At most one response of each type waits.
const PIECES: usize = 16;

/// What the calls of one connection have in common.
#[derive(Clone, Debug)]
pub(super) struct Calls {
    pub(super) shared: Arc<Shared>,
    pub(super) peer: SocketAddr,
    /// The tasks of the connection.
    pub(super) tasks: Group,
    /// Ends its streams.
    pub(super) stop: Signal,
    /// Cancelled once a caller has shown who it is.
    pub(super) known: CancellationToken,
}

impl Calls {
    /// Answers a call.
    pub(super) async fn call(self, request: Request<Incoming>) -> Answered {
        let kind = request.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
        if request.method() != Method::POST || !kind.starts_with("application/grpc") {
            return Ok(Answer::http(StatusCode::UNSUPPORTED_MEDIA_TYPE));
        }
        let path = request.uri().path().to_owned();
        Ok(match path.as_str() {
            path if path == FACTS.0 => self.facts(request).await,
            path if path == CERTIFICATE.0 => self.certificate(request).await,
            _ => {
                let text = "only DeltaAggregatedResources and CreateCertificate are served here";
                Answer::status(&Status::unimplemented(text))
            }
        })
    }

    async fn facts(self, request: Request<Incoming>) -> http::Response<Answer> {
        let (parts, body) = request.into_parts();
        let caller = match self.caller(&parts.headers).await {
            Ok(caller) => caller,
            Err(status) => {
                self.ended(FACTS.1, &status);
                return Answer::status(&status);
            }
        };
        self.known.cancel();
        let place = match self.shared.nodes.place(&caller) {
            Ok(place) => place,
            Err(error) => {
                let status = Status::resource_exhausted(error.to_string());
                self.ended(FACTS.1, &status);
                return Answer::status(&status);
            }
        };
        let (sender, response) = Answer::stream(PIECES);
        let messages = Messages::new(body, FACTS_BYTES_MAX, self.shared.budget.clone()).of_caller(place.large.clone());
        let (tasks, origin) = (self.tasks.clone(), Origin { caller, peer: self.peer, place });
        tasks.spawn(self.stream(origin, messages, sender));
        response
    }

    async fn stream(self, origin: Origin, messages: Messages, sender: Sender) {
        self.shared.metrics.streams.inc();
        // Also where the connection is cut.
        let _counted = Counted(self.shared.clone());
        let status = Box::pin(stream::serve(&self.shared, origin, messages, &sender, &self.stop)).await;
        self.ended(FACTS.1, &status);
        sender.end(&status);
    }

    async fn certificate(self, request: Request<Incoming>) -> http::Response<Answer> {
        let signed = match timeout(CERTIFICATE_DEADLINE, self.sign(request)).await {
            Ok(signed) => signed,
            Err(_) => Err(Status::deadline_exceeded("no certificate could be made in time")),
        };
        let status = signed.as_ref().err().cloned().unwrap_or_else(|| Status::ok(""));
        self.ended(CERTIFICATE.1, &status);
        match signed {
            Ok(response) => {
                self.known.cancel();
                Answer::message(&response)
            }
            Err(status) => Answer::status(&status),
        }
    }

    async fn sign(&self, request: Request<Incoming>) -> Result<IstioCertificateResponse, Status> {
        let _asking = self.asking()?;
        let (parts, body) = request.into_parts();
        self.check_cluster(&parts.headers)?;
        let token = token(&parts.headers);
        let mut messages = Messages::new(body, CERTIFICATE_BYTES_MAX, self.shared.budget.clone());
        // Nothing of a stranger's request is kept: it is read once the token is good.
        let request = async move {
            let message = messages.next().await?.ok_or_else(|| Status::invalid_argument("there is no request"))?;
            let request = IstioCertificateRequest::decode(message.bytes);
            request.map_err(|_| Status::invalid_argument("the request cannot be decoded"))
        };
        (self.shared.authority.sign)(token, Box::pin(request)).await
    }

    /// Who calls, if it may have mesh facts.
    async fn caller(&self, headers: &HeaderMap) -> Result<Caller, Status> {
        self.check_cluster(headers)?;
        let token = token(headers).ok_or_else(|| Status::unauthenticated("there is no bearer token"))?;
        let _asking = self.asking()?;
        let caller = (self.shared.authority.review)(token).await?;
        let is_caller =
            |(namespace, account): &(_, _)| *namespace == caller.namespace && *account == caller.service_account;
        if !self.shared.config.trusted.iter().any(is_caller) {
            let (namespace, account) = (&caller.namespace, &caller.service_account);
            return Err(Status::permission_denied(format!(
                "service account {namespace}/{account} may not have mesh facts: it is not one of the daemons'"
            )));
        }
        Ok(caller)
    }

    /// A slot for a call whose caller is not known yet.
    fn asking(&self) -> Result<Slot, Status> {
        let slot = self.shared.asking.take(self.peer.ip());
        slot.map_err(|error| Status::unavailable(format!("too many calls are being looked at: {error}")))
    }

    fn check_cluster(&self, headers: &HeaderMap) -> Result<(), Status> {
        let said = headers.get("clusterid").map(|id| id.to_str().unwrap_or("(not text)")).unwrap_or_default();
        let own = &*self.shared.config.cluster_id;
        if said.is_empty() || said == own {
            return Ok(());
        }
        let said: String = said.chars().take(64).collect();
        Err(Status::unauthenticated(format!("cluster {said} is not known here; this is {own} (CLUSTER_ID)")))
    }

    /// Counts a call that has ended, and logs one that was refused. The authority logs what it refuses itself.
    fn ended(&self, call: &'static str, status: &Status) {
        self.shared.metrics.calls.get_or_create(&CallLabel { call, status: word(status.code()) }).inc();
        let is_refused = !matches!(status.code(), Code::Ok | Code::Cancelled | Code::Unavailable);
        if call == FACTS.1
            && is_refused
            && let Some(suppressed) = self.shared.metrics.log.allow()
        {
            let (peer, error) = (self.peer, shortened(status.message().to_owned()));
            tracing::warn!(%peer, call, status = word(status.code()), error, suppressed, "a call was refused");
        } else {
            tracing::debug!(peer = %self.peer, call, status = word(status.code()), error = status.message(), "a call ended");
        }
    }
}

/// Counts a stream until it is dropped.
struct Counted(Arc<Shared>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.metrics.streams.dec();
    }
}

/// The bearer token of a request.
fn token(headers: &HeaderMap) -> Option<String> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let token = value.strip_prefix("Bearer ")?.trim();
    (!token.is_empty()).then(|| token.to_owned())
}

/// A code as metrics name it.
fn word(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "Cancelled",
        Code::Unknown => "Unknown",
        Code::InvalidArgument => "InvalidArgument",
        Code::DeadlineExceeded => "DeadlineExceeded",
        Code::NotFound => "NotFound",
        Code::AlreadyExists => "AlreadyExists",
        Code::PermissionDenied => "PermissionDenied",
        Code::ResourceExhausted => "ResourceExhausted",
        Code::FailedPrecondition => "FailedPrecondition",
        Code::Aborted => "Aborted",
        Code::OutOfRange => "OutOfRange",
        Code::Unimplemented => "Unimplemented",
        Code::Internal => "Internal",
        Code::Unavailable => "Unavailable",
        Code::DataLoss => "DataLoss",
        Code::Unauthenticated => "Unauthenticated",
    }
}
