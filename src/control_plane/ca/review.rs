//! Asks the Kubernetes API to whom a token belongs.
//!
//! A review that the API does not answer says nothing about the token: the caller is told to come back, and gets nothing.
//! Answers are remembered for a short time by a hash of the token, because a daemon asks for many certificates in a row
//! when it starts.

use super::metrics::Metrics;
use crate::control_plane::Caller;
use crate::control_plane::caller::CallerPod;
use crate::mesh::Text;
use crate::telemetry::limit::shortened;
use crate::telemetry::log::with_causes;
use aws_lc_rs::digest::{SHA256, digest};
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus, UserInfo};
use kube::api::PostParams;
use kube::{Api, Client};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout_at};

/// How long one review may take, with waiting for its turn.
const DEADLINE: Duration = Duration::from_secs(5);
/// Reviews that are open at the API at the same time.
const AT_ONCE: usize = 16;
/// Reviews that wait for their turn. Further ones are told to come back.
const WAITING_MAX: usize = 512;
/// How long an answer is remembered: a good one, and a refusal.
const REMEMBERED: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(5));
/// Answers that are remembered, good ones and refusals apart, so that bad tokens cannot displace good ones.
const REMEMBERED_MAX: usize = 4096;
/// Longest token.
const TOKEN_BYTES_MAX: usize = 16 << 10;
/// What the API puts before the name of a service account.
const SERVICE_ACCOUNT: &str = "system:serviceaccount:";
/// The group of all service accounts.
const SERVICE_ACCOUNTS: &str = "system:serviceaccounts";

/// Why it is not known to whom a token belongs.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReviewError {
    /// The token is not good, or not for this control plane.
    #[error("the token is refused: {0}")]
    Refused(String),
    /// The API has not said it.
    #[error("the Kubernetes API cannot be asked about the token: {0}")]
    Unavailable(String),
}

/// Answers by the hash of the token, and until when they hold.
type Remembered<T> = Mutex<HashMap<[u8; 32], (T, Instant)>>;

/// Asks the Kubernetes API about tokens.
pub struct Reviewer {
    api: Api<TokenReview>,
    audiences: Vec<String>,
    turns: Semaphore,
    places: Semaphore,
    good: Remembered<Caller>,
    bad: Remembered<String>,
    metrics: Arc<Metrics>,
}

impl std::fmt::Debug for Reviewer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Reviewer({})", self.audiences.join(", "))
    }
}

impl Reviewer {
    /// Accepts tokens for one of these audiences.
    pub fn new(client: Client, audiences: Vec<String>, metrics: Arc<Metrics>) -> Self {
        Self {
            api: Api::all(client),
            audiences,
            turns: Semaphore::new(AT_ONCE),
            places: Semaphore::new(AT_ONCE + WAITING_MAX),
            good: Mutex::default(),
            bad: Mutex::default(),
            metrics,
        }
    }

    /// The owner of a token.
    pub async fn review(&self, token: &str) -> Result<Caller, ReviewError> {
        let is_plausible = !token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic());
        if token.len() > TOKEN_BYTES_MAX || !is_plausible {
            return Err(ReviewError::Refused("it is not a token".into()));
        }
        let hash = hash(token);
        if let Some(caller) = recall(&self.good, &hash) {
            return Ok(caller);
        }
        if let Some(reason) = recall(&self.bad, &hash) {
            return Err(ReviewError::Refused(reason));
        }
        let reviewed = self.ask(token).await;
        match &reviewed {
            Ok(caller) => remember(&self.good, hash, caller.clone(), REMEMBERED.0),
            Err(ReviewError::Refused(reason)) => remember(&self.bad, hash, reason.clone(), REMEMBERED.1),
            Err(ReviewError::Unavailable(_)) => {}
        }
        reviewed
    }

    async fn ask(&self, token: &str) -> Result<Caller, ReviewError> {
        let unavailable = |reason: &str| ReviewError::Unavailable(reason.to_owned());
        let deadline = Instant::now() + DEADLINE;
        let late = |_| unavailable(&format!("no answer within {} s", DEADLINE.as_secs()));
        let _place = self.places.try_acquire().map_err(|_| unavailable("too many reviews wait"))?;
        let turn = timeout_at(deadline, self.turns.acquire()).await.map_err(late)?;
        let _turn = turn.map_err(|_| unavailable("the control plane ends"))?;
        let spec = TokenReviewSpec { token: Some(token.to_owned()), audiences: Some(self.audiences.clone()) };
        let review = TokenReview { spec, ..TokenReview::default() };
        self.metrics.reviews.inc();
        let answer = timeout_at(deadline, self.api.create(&PostParams::default(), &review)).await.map_err(late)?;
        let answer = answer.map_err(|error| unavailable(&shortened(with_causes(&error))))?;
        let status = answer.status.ok_or_else(|| unavailable("the answer has no status"))?;
        caller(status, &self.audiences).map_err(ReviewError::Refused)
    }
}

fn hash(token: &str) -> [u8; 32] {
    let mut hash = [0; 32];
    hash.copy_from_slice(digest(&SHA256, token.as_bytes()).as_ref());
    hash
}

fn recall<T: Clone>(remembered: &Remembered<T>, hash: &[u8; 32]) -> Option<T> {
    let remembered = remembered.lock();
    remembered.get(hash).filter(|(_, until)| *until > Instant::now()).map(|(answer, _)| answer.clone())
}

fn remember<T>(remembered: &Remembered<T>, hash: [u8; 32], answer: T, life: Duration) {
    let (mut remembered, now) = (remembered.lock(), Instant::now());
    if remembered.len() >= REMEMBERED_MAX {
        remembered.retain(|_, (_, until)| *until > now);
    }
    if remembered.len() < REMEMBERED_MAX {
        remembered.insert(hash, (answer, now + life));
    }
}

/// The owner of a token, from the API's answer. The error says why there is none.
fn caller(status: TokenReviewStatus, audiences: &[String]) -> Result<Caller, String> {
    if status.authenticated != Some(true) {
        return Err(shortened(status.error.unwrap_or_else(|| "the API does not accept it".into())));
    }
    // An API server that does not know audiences names none, and has not checked them.
    if !status.audiences.unwrap_or_default().iter().any(|audience| audiences.contains(audience)) {
        return Err(format!("it is not for the audience {}", audiences.join(" or ")));
    }
    let user = status.user.unwrap_or_default();
    let owner = service_account(&user).ok_or("it is not a service account's")?;
    let one = |key: &str| match user.extra.as_ref().and_then(|extra| extra.get(key)).map(Vec::as_slice) {
        Some([one]) if !one.is_empty() => Some(Text::from(one.as_str())),
        _ => None,
    };
    let (name, uid) = (one("authentication.kubernetes.io/pod-name"), one("authentication.kubernetes.io/pod-uid"));
    let node = one("authentication.kubernetes.io/node-name");
    let pod = name.zip(uid).map(|(name, uid)| CallerPod { name, uid, node });
    Ok(Caller { namespace: owner.0.into(), service_account: owner.1.into(), pod })
}

/// Namespace and name of a service account. Nobody else may be in its group, whatever another authenticator calls him.
fn service_account(user: &UserInfo) -> Option<(&str, &str)> {
    let in_group = user.groups.as_ref().is_some_and(|groups| groups.iter().any(|group| group == SERVICE_ACCOUNTS));
    let (namespace, name) = user.username.as_ref()?.strip_prefix(SERVICE_ACCOUNT)?.split_once(':')?;
    (in_group && !namespace.is_empty() && !name.is_empty() && !name.contains(':')).then_some((namespace, name))
}

#[cfg(test)]
mod tests {
    use super::super::fake_api::{Answer, FakeApi};
    use super::*;
    use serde_json::{Value, json};
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn status(account: &str, extra: Value) -> Value {
        let user = json!({"username": account, "groups": ["system:serviceaccounts"], "extra": extra});
        json!({"authenticated": true, "audiences": ["istio-ca"], "user": user})
    }

    fn bound() -> Value {
        let key = |name: &str| format!("authentication.kubernetes.io/{name}");
        json!({key("pod-name"): ["web-1"], key("pod-uid"): ["w1"], key("node-name"): ["n1"]})
    }

    fn reviewer(api: &FakeApi) -> Reviewer {
        Reviewer::new(api.client(), vec!["istio-ca".into()], Arc::default())
    }

    /// A reviewer of an API that gives each token the status of its name.
    fn with(statuses: Vec<(&'static str, Value)>) -> (FakeApi, Reviewer) {
        let api = FakeApi::default();
        api.hook(move |method, path, body| {
            assert_eq!((method.as_str(), path), ("POST", "/apis/authentication.k8s.io/v1/tokenreviews"));
            assert_eq!(body["spec"]["audiences"], json!(["istio-ca"]));
            let token = body["spec"]["token"].as_str().unwrap();
            let status = statuses.iter().find(|(name, _)| *name == token).map(|(_, status)| status.clone());
            Answer::Is(201, json!({"metadata": {}, "spec": {}, "status": status}))
        });
        let reviewer = reviewer(&api);
        (api, reviewer)
    }

    #[tokio::test]
    async fn a_token_belongs_to_whom_the_api_says_and_to_nobody_else() {
        let good = "system:serviceaccount:shop:web";
        let without = |key: &str| {
            let mut status = status(good, bound());
            status.as_object_mut().unwrap().remove(key);
            status
        };
        let mut stranger = status(good, bound());
        stranger["user"]["groups"] = json!(["system:authenticated"]);
        let mut other = status(good, bound());
        other["audiences"] = json!(["https://kubernetes.default.svc"]);
        let refused = json!({"authenticated": false, "error": "token has expired"});
        let node = "authentication.kubernetes.io/node-name";
        let mut no_node = bound();
        no_node.as_object_mut().unwrap().remove(node);
        let two =
            json!({"authentication.kubernetes.io/pod-name": ["a", "b"], "authentication.kubernetes.io/pod-uid": ["u"]});
        let (_, reviewer) = with(vec![
            ("good", status(good, bound())),
            ("no-node", status(good, no_node)),
            ("unbound", status(good, json!({}))),
            ("two-pods", status(good, two)),
            ("no-audiences", without("audiences")),
            ("other-audience", other),
            ("not-authenticated", without("authenticated")),
            ("no-user", without("user")),
            ("refused", refused),
            ("stranger", stranger),
            ("human", status("jane", bound())),
            ("node", status("system:node:n1", bound())),
            ("odd", status("system:serviceaccount:shop", bound())),
            ("odder", status("system:serviceaccount:shop:web:x", bound())),
        ]);
        let web = |pod| Caller { namespace: "shop".into(), service_account: "web".into(), pod };
        let pod = |node: Option<&str>| CallerPod { name: "web-1".into(), uid: "w1".into(), node: node.map(Text::from) };
        for (token, expected) in [
            ("good", Ok(web(Some(pod(Some("n1")))))),
            ("no-node", Ok(web(Some(pod(None))))),
            ("unbound", Ok(web(None))),
            ("two-pods", Ok(web(None))),
            ("no-audiences", Err("audience istio-ca")),
            ("other-audience", Err("audience istio-ca")),
            ("not-authenticated", Err("does not accept")),
            ("no-user", Err("not a service account's")),
            ("refused", Err("token has expired")),
            ("stranger", Err("not a service account's")),
            ("human", Err("not a service account's")),
            ("node", Err("not a service account's")),
            ("odd", Err("not a service account's")),
            ("odder", Err("not a service account's")),
            ("", Err("not a token")),
            ("with space", Err("not a token")),
            ("ünicode", Err("not a token")),
            (&*"x".repeat(TOKEN_BYTES_MAX + 1), Err("not a token")),
        ] {
            match (reviewer.review(token).await, expected) {
                (Ok(caller), Ok(expected)) => assert_eq!(caller, expected, "{token}"),
                (Err(ReviewError::Refused(reason)), Err(expected)) => {
                    assert!(reason.contains(expected), "{token}: {reason}")
                }
                (got, expected) => panic!("{token}: {got:?}, expected {expected:?}"),
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn answers_are_remembered_for_a_short_time_and_failures_are_not() {
        let (api, reviewer) = with(vec![("good", status("system:serviceaccount:shop:web", bound()))]);
        for (token, life) in [("good", REMEMBERED.0), ("bad", REMEMBERED.1)] {
            let before = api.count("POST", "tokenreviews");
            let ask = async || drop(reviewer.review(token).await);
            for _ in 0..5 {
                ask().await;
            }
            // Without a status the API has said nothing.
            let expected = if token == "good" { 1 } else { 5 };
            assert_eq!(api.count("POST", "tokenreviews") - before, expected, "{token}");
            tokio::time::sleep(life).await;
            ask().await;
            assert_eq!(api.count("POST", "tokenreviews") - before, expected + 1, "{token}");
        }
        let (api, reviewer) = with(vec![("bad", json!({"authenticated": false}))]);
        for _ in 0..5 {
            reviewer.review("bad").await.unwrap_err();
        }
        assert_eq!(api.count("POST", "tokenreviews"), 1, "a refusal is an answer");
        assert!(!format!("{:?}", reviewer.bad.lock()).contains("bad"), "no token is kept");
    }

    #[tokio::test]
    async fn bad_tokens_take_no_room_from_good_ones_and_little_room_at_all() {
        let (_, reviewer) = with(vec![("good", status("system:serviceaccount:shop:web", bound()))]);
        for number in 0..REMEMBERED_MAX + 10 {
            remember(&reviewer.bad, hash(&number.to_string()), String::new(), REMEMBERED.1);
        }
        assert_eq!(reviewer.bad.lock().len(), REMEMBERED_MAX);
        reviewer.review("good").await.unwrap();
        assert_eq!(reviewer.good.lock().len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn while_the_api_is_away_nobody_is_refused_and_nobody_gets_in() {
        let api = FakeApi::default();
        let reviewer = Arc::new(reviewer(&api));
        for code in [403, 500, 503] {
            api.hook(move |_, _, _| Answer::Is(code, json!({"kind": "Status", "code": code, "message": "no"})));
            assert!(matches!(reviewer.review("t").await, Err(ReviewError::Unavailable(_))), "{code}");
        }
        api.hook(|_, _, _| Answer::Is(201, json!("nonsense")));
        assert!(matches!(reviewer.review("t").await, Err(ReviewError::Unavailable(_))));
        let open = Arc::<AtomicUsize>::default();
        let counted = open.clone();
        api.hook(move |_, _, _| {
            counted.fetch_add(1, Ordering::Relaxed);
            Answer::Hang
        });
        let begun = Instant::now();
        let many = (0..AT_ONCE + WAITING_MAX + 5).map(|number| {
            let reviewer = reviewer.clone();
            async move { reviewer.review(&number.to_string()).await.unwrap_err().to_string() }
        });
        let errors = futures_util::future::join_all(many).await;
        assert!(begun.elapsed() <= DEADLINE, "{:?}", begun.elapsed());
        assert_eq!(open.load(Ordering::Relaxed), AT_ONCE, "the others waited");
        assert_eq!(errors.iter().filter(|error| error.contains("too many")).count(), 5);
        assert_eq!(errors.iter().filter(|error| error.contains("no answer within 5 s")).count(), AT_ONCE + WAITING_MAX);
    }
}
