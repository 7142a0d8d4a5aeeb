//! Answers one request for a certificate, as Istio's `CreateCertificate` does.
//!
//! Whoever is refused learns nothing but that: the reason is in the log and in a metric of the control plane.

use super::authority::{Authority, SignError};
use super::authorize::{Refusal, Rules, may_have};
use super::metrics::Metrics;
use super::review::{ReviewError, Reviewer};
use crate::control_plane::{Caller, RunningPods};
use crate::mesh::SpiffeName;
use crate::proto::istio::v1::auth::{IstioCertificateRequest, IstioCertificateResponse};
use crate::telemetry::limit::LogLimit;
use std::sync::Arc;
use std::time::Duration;
use tonic::Status;

/// The entry of the request's metadata that names another identity than the caller's.
const IMPERSONATED: &str = "ImpersonatedIdentity";
/// The entry that names a signer of the Kubernetes API.
const SIGNER: &str = "CertSigner";
/// Longest identity that is repeated in the log, in characters.
const SHOWN_MAX: usize = 300;

/// The CA as a service.
#[derive(Debug)]
pub struct Service {
    authority: Arc<Authority>,
    reviewer: Arc<Reviewer>,
    pods: Arc<RunningPods>,
    rules: Rules,
    metrics: Arc<Metrics>,
    limit: LogLimit,
}

impl Service {
    /// Signs by `authority` what `rules` allow.
    pub fn new(
        authority: Arc<Authority>,
        reviewer: Arc<Reviewer>,
        pods: Arc<RunningPods>,
        rules: Rules,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self { authority, reviewer, pods, rules, metrics, limit: LogLimit::default() }
    }

    /// Signs a certificate. `token` is what follows `Bearer ` in the request's header.
    pub async fn create_certificate(
        &self,
        token: Option<&str>,
        request: IstioCertificateRequest,
    ) -> Result<IstioCertificateResponse, Status> {
        let caller = self.caller(token).await?;
        let asked = asked(&request).map_err(|reason| self.invalid(&caller, "metadata", reason))?;
        let identity = match &asked {
            Some(text) => SpiffeName::parse(text),
            None => SpiffeName::new(&self.rules.trust_domain, &caller.namespace, &caller.service_account),
        };
        let identity = match identity {
            Ok(identity) => identity,
            Err(error) => {
                return Err(self.refused(&caller, &asked.unwrap_or_default(), "identity", &error.to_string()));
            }
        };
        match may_have(&caller, &identity, &self.pods, &self.rules) {
            Ok(()) => {}
            Err(Refusal::NotYet) => {
                self.metrics.count_refused(Refusal::NotYet.label());
                return Err(Status::unavailable(Refusal::NotYet.to_string()));
            }
            Err(refusal) => {
                return Err(self.refused(&caller, &identity.to_string(), refusal.label(), &refusal.to_string()));
            }
        }
        // Zero and less mean the CA's default.
        let life = u64::try_from(request.validity_duration).ok().filter(|seconds| *seconds > 0);
        match self.authority.sign(&request.csr, &identity, life.map(Duration::from_secs)).await {
            Ok(cert_chain) => {
                self.metrics.signed.inc();
                Ok(IstioCertificateResponse { cert_chain })
            }
            Err(error @ (SignError::Csr(_) | SignError::TooLong { .. })) => {
                Err(self.invalid(&caller, "request", error.to_string()))
            }
            Err(error @ (SignError::NotReady(_) | SignError::Failed(_))) => {
                self.metrics.count_refused("not_ready");
                if let Some(suppressed) = self.limit.allow() {
                    tracing::warn!(%identity, %error, suppressed, "a certificate cannot be signed now");
                }
                Err(Status::unavailable("the CA cannot sign now"))
            }
        }
    }

    /// Who calls.
    async fn caller(&self, token: Option<&str>) -> Result<Caller, Status> {
        let Some(token) = token else {
            self.metrics.count_refused("no_token");
            return Err(Status::unauthenticated("a bearer token is needed"));
        };
        match self.reviewer.review(token).await {
            Ok(caller) => Ok(caller),
            Err(error @ ReviewError::Unavailable(_)) => {
                self.metrics.count_refused("review_unavailable");
                if let Some(suppressed) = self.limit.allow() {
                    tracing::warn!(%error, suppressed, "a request for a certificate is told to come back");
                }
                Err(Status::unavailable("tokens cannot be checked now"))
            }
            Err(error @ ReviewError::Refused(_)) => {
                self.metrics.count_refused("token");
                if let Some(suppressed) = self.limit.allow() {
                    tracing::warn!(%error, suppressed, "a request for a certificate is refused");
                }
                Err(Status::unauthenticated("the token is not accepted"))
            }
        }
    }

    /// Notes a refusal. The caller learns only that it is one.
    fn refused(&self, caller: &Caller, identity: &str, label: &'static str, reason: &str) -> Status {
        self.metrics.count_refused(label);
        if let Some(suppressed) = self.limit.allow() {
            let identity = shown(identity);
            let (account, pod) = (account(caller), pod(caller));
            tracing::warn!(account, pod, identity, reason, suppressed, "a request for a certificate is refused");
        }
        Status::unauthenticated("this certificate is not for the caller")
    }

    /// Notes a request that cannot be used, and says why: it comes from a caller that is known.
    fn invalid(&self, caller: &Caller, label: &'static str, reason: String) -> Status {
        self.metrics.count_refused(label);
        if let Some(suppressed) = self.limit.allow() {
            let (account, pod) = (account(caller), pod(caller));
            tracing::warn!(account, pod, reason, suppressed, "a request for a certificate cannot be used");
        }
        Status::invalid_argument(reason)
    }
}

fn account(caller: &Caller) -> String {
    format!("{}/{}", caller.namespace, caller.service_account)
}

fn pod(caller: &Caller) -> &str {
    caller.pod.as_ref().map_or("none", |pod| &pod.name)
}

/// A text of a caller, for the log.
fn shown(text: &str) -> String {
    text.chars().take(SHOWN_MAX).flat_map(char::escape_debug).collect()
}

/// The identity that a request asks for beside the caller's own.
fn asked(request: &IstioCertificateRequest) -> Result<Option<String>, String> {
    use prost_types::value::Kind;
    let Some(metadata) = &request.metadata else { return Ok(None) };
    let is_set = |name: &str| {
        let kind = metadata.fields.get(name).and_then(|value| value.kind.as_ref());
        kind.filter(|kind| !matches!(kind, Kind::NullValue(_)))
    };
    if is_set(SIGNER).is_some() {
        return Err(format!("{SIGNER}: this CA has no other signers"));
    }
    match is_set(IMPERSONATED) {
        None => Ok(None),
        Some(Kind::StringValue(text)) if text.is_empty() => Ok(None),
        Some(Kind::StringValue(text)) => Ok(Some(text.clone())),
        Some(_) => Err(format!("{IMPERSONATED}: is not a text")),
    }
}
