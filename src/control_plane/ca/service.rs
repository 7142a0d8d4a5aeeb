//! Answers one request for a certificate, as Istio's `CreateCertificate` does.
//!
//! Whoever is refused learns nothing but that: the reason is in the log and in a metric of the control plane.

use super::authority::{Authority, SignError};
use super::authorize::{Refusal, Rules, may_have};
use super::metrics::Metrics;
use super::quota::Quota;
use super::review::{ReviewError, Reviewer};
use crate::control_plane::{Caller, RunningPods};
use crate::mesh::SpiffeName;
use crate::proto::istio::v1::auth::{IstioCertificateRequest, IstioCertificateResponse};
use crate::telemetry::limit::LogLimit;
use std::future::Future;
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
    quota: Quota,
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
        Self { authority, reviewer, pods, rules, metrics, quota: Quota::default(), limit: LogLimit::default() }
    }

    /// Signs a certificate. `token` is what follows `Bearer ` in the request's header; the request itself is read once
    /// it is known whose that is.
    pub async fn create_certificate(
        &self,
        token: Option<&str>,
        request: impl Future<Output = Result<IstioCertificateRequest, Status>>,
    ) -> Result<IstioCertificateResponse, Status> {
        let caller = self.caller(token).await?;
        let request = request.await?;
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
        let is_daemon = self.rules.is_trusted(&caller);
        let who = caller.pod.as_ref().map_or_else(|| account(&caller).into(), |pod| pod.uid.clone());
        if !self.quota.take(&who, is_daemon) {
            return Err(self.too_often(&caller));
        }
        // Zero and less mean the CA's default.
        let life = u64::try_from(request.validity_duration).ok().filter(|seconds| *seconds > 0);
        let mut life = life.map(Duration::from_secs);
        if !is_daemon {
            // A rotation of the root waits for the longest life, which is not any pod's to choose.
            life = life.map(|life| life.min(self.authority.config().default_life));
        }
        match self.authority.sign(&request.csr, &identity, life).await {
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
            let (identity, reason) = (shown(identity), shown(reason));
            let (account, pod) = (account(caller), pod(caller));
            tracing::warn!(account, pod, identity, reason, suppressed, "a request for a certificate is refused");
        }
        Status::unauthenticated("this certificate is not for the caller")
    }

    /// Notes a request of a caller that has asked for too many.
    fn too_often(&self, caller: &Caller) -> Status {
        self.metrics.count_refused("too_often");
        if let Some(suppressed) = self.limit.allow() {
            let (account, pod) = (account(caller), pod(caller));
            tracing::warn!(account, pod, suppressed, "a pod asks for too many certificates and has to wait");
        }
        Status::resource_exhausted("too many certificates in this minute")
    }

    /// Notes a request that cannot be used, and says why: it comes from a caller that is known.
    fn invalid(&self, caller: &Caller, label: &'static str, reason: String) -> Status {
        self.metrics.count_refused(label);
        if let Some(suppressed) = self.limit.allow() {
            let (account, pod, reason) = (account(caller), pod(caller), shown(&reason));
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

#[cfg(test)]
mod tests {
    use super::super::fake_api::{Answer, FakeApi};
    use super::super::{Account, Config, Source};
    use super::*;
    use crate::control_plane::running_pods::RunningPod;
    use crate::crypto::certificates_from_pem;
    use crate::identity::verify::peer_name;
    use crate::task::Group;
    use prost_types::value::Kind;
    use rcgen::{CertificateParams, KeyPair};
    use serde_json::json;
    use tonic::Code;

    fn ready(request: IstioCertificateRequest) -> std::future::Ready<Result<IstioCertificateRequest, Status>> {
        std::future::ready(Ok(request))
    }

    fn config() -> Config {
        Config {
            source: Source::Secrets,
            namespace: "istio-system".into(),
            trust_domain: "cluster.local".into(),
            names: vec!["localhost".into()],
            audiences: vec!["istio-ca".into()],
            trusted: vec![Account { namespace: "istio-system".into(), name: "ztunnel".into() }],
            default_life: Duration::from_secs(24 * 3600),
            max_life: Duration::from_secs(90 * 24 * 3600),
        }
    }

    /// The reviews of an API that knows these tokens: `ztunnel` and `web`, and `other`, which is for another audience.
    fn review(token: &str) -> Answer {
        let extra = |pod: &str, uid: &str| json!({"authentication.kubernetes.io/pod-name": [pod], "authentication.kubernetes.io/pod-uid": [uid]});
        let (account, extra) = match token {
            "ztunnel" => ("istio-system:ztunnel", extra("ztunnel-1", "z1")),
            "old" => ("istio-system:ztunnel", extra("ztunnel-1", "z0")),
            "unbound" => ("istio-system:ztunnel", json!({})),
            "web" | "other" => ("shop:web", extra("web-1", "w1")),
            "away" => return Answer::Is(503, json!({"kind": "Status", "code": 503, "message": "away"})),
            _ => return Answer::Is(201, json!({"metadata": {}, "spec": {}, "status": {"authenticated": false}})),
        };
        let audience = if token == "other" { "vault" } else { "istio-ca" };
        let username = format!("system:serviceaccount:{account}");
        let user = json!({"username": username, "groups": ["system:serviceaccounts"], "extra": extra});
        let status = json!({"authenticated": true, "audiences": [audience], "user": user});
        Answer::Is(201, json!({"metadata": {}, "spec": {}, "status": status}))
    }

    struct Fixture {
        service: Service,
        authority: Arc<Authority>,
        pods: Arc<RunningPods>,
        tasks: Group,
    }

    impl Drop for Fixture {
        fn drop(&mut self) {
            self.tasks.cut();
        }
    }

    fn fixture() -> Fixture {
        let (api, config, metrics) = (FakeApi::default(), config(), Arc::<Metrics>::default());
        api.hook(|_, path, body| match path.ends_with("/tokenreviews") {
            true => review(body["spec"]["token"].as_str().unwrap_or_default()),
            false => Answer::Go,
        });
        let (pods, tasks) = (Arc::<RunningPods>::default(), Group::default());
        for (namespace, name, uid, account, node) in [
            ("istio-system", "ztunnel-1", "z1", "ztunnel", "n1"),
            ("shop", "web-1", "w1", "web", "n1"),
            ("shop", "cart-1", "c1", "cart", "n2"),
        ] {
            let [namespace, name, uid, service_account, node] = [namespace, name, uid, account, node].map(Into::into);
            pods.set(RunningPod { namespace, name, uid, service_account, node });
        }
        pods.set_complete();
        let authority = Authority::new(api.client(), &config, metrics.clone()).unwrap();
        let reviewer = Arc::new(Reviewer::new(api.client(), config.audiences.clone(), metrics.clone()));
        let rules = Rules { trusted: config.trusted, trust_domain: config.trust_domain };
        let service = Service::new(authority.clone(), reviewer, pods.clone(), rules, metrics);
        Fixture { service, authority, pods, tasks }
    }

    fn request(fields: Vec<(&str, Kind)>) -> IstioCertificateRequest {
        let csr = CertificateParams::default().serialize_request(&KeyPair::generate().unwrap()).unwrap().pem().unwrap();
        let value = |(name, kind): (&str, Kind)| (name.to_owned(), prost_types::Value { kind: Some(kind) });
        let metadata = Some(prost_types::Struct { fields: fields.into_iter().map(value).collect() });
        IstioCertificateRequest { csr, validity_duration: 0, metadata }
    }

    fn for_identity(identity: &str) -> IstioCertificateRequest {
        request(vec![(IMPERSONATED, Kind::StringValue(identity.into()))])
    }

    async fn running() -> Fixture {
        let fixture = fixture();
        fixture.tasks.spawn(fixture.authority.clone().run());
        assert!(fixture.authority.confirm().await);
        fixture
    }

    #[tokio::test]
    async fn who_may_have_a_certificate_gets_it() {
        let fixture = running().await;
        let web = "spiffe://cluster.local/ns/shop/sa/web";
        for (token, request, expected) in [
            ("ztunnel", for_identity(web), web),
            ("web", for_identity(web), web),
            ("web", for_identity(""), web),
            ("web", request(vec![]), web),
            ("web", IstioCertificateRequest { metadata: None, ..request(vec![]) }, web),
            ("web", request(vec![(IMPERSONATED, Kind::NullValue(0)), ("Other", Kind::BoolValue(true))]), web),
            ("ztunnel", request(vec![]), "spiffe://cluster.local/ns/istio-system/sa/ztunnel"),
        ] {
            let answer = fixture.service.create_certificate(Some(token), ready(request)).await.unwrap();
            let leaf = certificates_from_pem(answer.cert_chain[0].as_bytes()).unwrap().remove(0);
            assert_eq!(peer_name(&leaf).unwrap().to_string(), expected);
        }
        assert_eq!(fixture.service.metrics.signed.get(), 7);
    }

    #[tokio::test]
    async fn a_pod_that_asks_again_and_again_waits_and_its_daemon_does_not() {
        let fixture = running().await;
        let ask = async |token| fixture.service.create_certificate(Some(token), ready(request(vec![]))).await;
        for _ in 0..10 {
            ask("web").await.unwrap();
        }
        let status = ask("web").await.unwrap_err();
        assert_eq!(
            (status.code(), status.message()),
            (Code::ResourceExhausted, "too many certificates in this minute")
        );
        for _ in 0..20 {
            ask("ztunnel").await.unwrap();
        }
        assert_eq!(fixture.service.metrics.signed.get(), 30);
    }

    #[tokio::test]
    async fn everybody_else_gets_nothing_and_learns_nothing() {
        let fixture = running().await;
        let web = || for_identity("spiffe://cluster.local/ns/shop/sa/web");
        let text = |text: &str| request(vec![(IMPERSONATED, Kind::StringValue(text.into()))]);
        let mut unusable = web();
        unusable.csr = "x".into();
        let mut long = web();
        long.validity_duration = i64::MAX;
        for (token, request, code, word) in [
            (None, web(), Code::Unauthenticated, "bearer token"),
            (Some("nobody"), web(), Code::Unauthenticated, "not accepted"),
            (Some("other"), web(), Code::Unauthenticated, "not accepted"),
            (Some("away"), web(), Code::Unavailable, "cannot be checked"),
            (Some("old"), web(), Code::Unauthenticated, "not for the caller"),
            (Some("unbound"), web(), Code::Unauthenticated, "not for the caller"),
            (
                Some("ztunnel"),
                text("spiffe://cluster.local/ns/shop/sa/cart"),
                Code::Unauthenticated,
                "not for the caller",
            ),
            (Some("web"), text("spiffe://cluster.local/ns/shop/sa/cart"), Code::Unauthenticated, "not for the caller"),
            (Some("ztunnel"), text("spiffe://other/ns/shop/sa/web"), Code::Unauthenticated, "not for the caller"),
            (
                Some("ztunnel"),
                text("spiffe://cluster.local/ns/shop/sa/web/"),
                Code::Unauthenticated,
                "not for the caller",
            ),
            (
                Some("ztunnel"),
                text("spiffe://cluster.local/ns/shop/sa/web\n\u{202e}"),
                Code::Unauthenticated,
                "not for the caller",
            ),
            (Some("ztunnel"), text(&"x".repeat(1 << 20)), Code::Unauthenticated, "not for the caller"),
            (
                Some("ztunnel"),
                request(vec![(IMPERSONATED, Kind::BoolValue(true))]),
                Code::InvalidArgument,
                "is not a text",
            ),
            (
                Some("ztunnel"),
                request(vec![(SIGNER, Kind::StringValue("x".into()))]),
                Code::InvalidArgument,
                "no other signers",
            ),
            (Some("ztunnel"), unusable, Code::InvalidArgument, "not a CERTIFICATE REQUEST"),
            (Some("ztunnel"), long, Code::InvalidArgument, "7776000 s at most"),
        ] {
            let status = fixture.service.create_certificate(token, ready(request)).await.unwrap_err();
            assert_eq!(status.code(), code, "{token:?}: {status}");
            assert!(status.message().contains(word), "{token:?}: {status}");
        }
        assert_eq!(fixture.service.metrics.signed.get(), 0);
    }

    #[tokio::test]
    async fn whoever_comes_too_early_is_told_to_come_back() {
        let fixture = fixture();
        let web = || for_identity("spiffe://cluster.local/ns/shop/sa/web");
        let status = fixture.service.create_certificate(Some("ztunnel"), ready(web())).await.unwrap_err();
        assert_eq!((status.code(), status.message()), (Code::Unavailable, "the CA cannot sign now"));
        let empty = Service { pods: Arc::default(), ..fixture_service() };
        let status = empty.create_certificate(Some("ztunnel"), ready(web())).await.unwrap_err();
        assert_eq!(status.code(), Code::Unavailable);
        assert!(fixture.pods.is_complete() && !empty.pods.is_complete());
    }

    fn fixture_service() -> Service {
        let Fixture { service, .. } = &fixture();
        let Service { authority, reviewer, pods, rules, metrics, .. } = service;
        let (authority, reviewer, pods) = (authority.clone(), reviewer.clone(), pods.clone());
        Service::new(authority, reviewer, pods, rules.clone(), metrics.clone())
    }

    #[test]
    fn what_a_caller_wrote_is_logged_without_what_a_terminal_would_act_on() {
        let said = shown(&format!("a\n\u{1b}[31m\u{202e}{}", "b".repeat(1000)));
        assert!(said.starts_with("a\\n\\u{1b}[31m\\u{202e}bbb") && said.len() < SHOWN_MAX * 2, "{said}");
    }
}
