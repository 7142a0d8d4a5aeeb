//! Writes statuses to the API.

use super::queue::{Outcome, Queue, WAITING_MAX};
use super::{Said, Wanted, merged};
use crate::telemetry::limit::{LogLimit, shortened};
use crate::telemetry::log::{brief, with_causes};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams};
use kube::core::DynamicObject;
use kube::{Api, Client};
use serde_json::{Value, json};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout};

/// Deadline of one status: a read and a write.
const DEADLINE: Duration = Duration::from_secs(10);
/// Most statuses in flight.
const AT_ONCE: usize = 4;
/// The name under which the API notes who has written.
const FIELD_MANAGER: &str = "culvert-control";

/// Why a status could not be written.
#[derive(Debug, thiserror::Error)]
enum WriteError {
    /// The API says no, or does not answer properly.
    #[error("the Kubernetes API")]
    Api(#[from] kube::Error),
    /// No answer.
    #[error("no answer within {} s", DEADLINE.as_secs())]
    Late,
}

/// Writes the statuses that arrive, until no more can arrive. Each is written only if the object says something else.
///
/// A write is bound to the version of the object that was read, so two replicas that want the same write once, and
/// conditions of others are never lost.
pub async fn write(client: Client, mut receiver: mpsc::Receiver<Wanted>) {
    let (mut queue, limit) = (Queue::default(), LogLimit::default());
    let mut running = FuturesUnordered::new();
    loop {
        while running.len() < AT_ONCE
            && let Some(wanted) = queue.next(Instant::now())
        {
            running.push(attempt(&client, wanted));
        }
        let due = queue.due().filter(|_| running.len() < AT_ONCE);
        tokio::select! {
            wanted = receiver.recv() => {
                let Some(wanted) = wanted else { return };
                if !queue.add(wanted, Instant::now()) && let Some(suppressed) = limit.allow() {
                    tracing::warn!(suppressed, "{WAITING_MAX} statuses of policies wait to be written; more are left out");
                }
            }
            Some((wanted, result)) = running.next() => ended(&mut queue, wanted, result, &limit),
            () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
        }
    }
}

async fn attempt(client: &Client, wanted: Wanted) -> (Wanted, Result<Outcome, WriteError>) {
    let result = timeout(DEADLINE, one(client, &wanted)).await.unwrap_or(Err(WriteError::Late));
    (wanted, result)
}

fn ended(queue: &mut Queue, wanted: Wanted, result: Result<Outcome, WriteError>, limit: &LogLimit) {
    let (kind, namespace, name) = (wanted.kind.name(), wanted.namespace.clone(), wanted.name.clone());
    let (outcome, error) = match result {
        Ok(outcome) => (outcome, None),
        Err(error) => (Outcome::Failed, Some(error)),
    };
    let wait = queue.ended(wanted, &outcome, Instant::now());
    if let (Some(wait), Some(error)) = (wait, error)
        && let Some(suppressed) = limit.allow()
    {
        let (error, retry) = (shortened(with_causes(&error)), brief(wait));
        tracing::warn!(kind, %namespace, %name, error, %retry, suppressed, "cannot write the status of a policy");
    }
}

/// Writes one status, if the object says something else.
async fn one(client: &Client, wanted: &Wanted) -> Result<Outcome, WriteError> {
    let api: Api<DynamicObject> = Api::namespaced_with(client.clone(), &wanted.namespace, &wanted.kind.resource());
    let object = match api.get(&wanted.name).await {
        Ok(object) => object,
        // The object is gone, or the definition of its kind.
        Err(kube::Error::Api(status)) if status.code == 404 => return Ok(Outcome::Needless),
        Err(error) => return Err(error.into()),
    };
    let Some(patch) = patch(&object, wanted) else { return Ok(Outcome::Needless) };
    let params = PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..PatchParams::default() };
    match api.patch_status(&wanted.name, &params, &Patch::Merge(patch)).await {
        Ok(_) => Ok(Outcome::Written),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(Outcome::Needless),
        // Somebody else has written; it is read again.
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(Outcome::Failed),
        Err(error) => Err(error.into()),
    }
}

/// What has to be written to an object: nothing if it says so already, or has changed, which the watch will tell.
fn patch(object: &DynamicObject, wanted: &Wanted) -> Option<Value> {
    let status = object.data.get("status").unwrap_or(&Value::Null);
    let is_said = Said::of(status).is_some_and(|said| said.is(&wanted.condition, wanted.generation));
    if is_said || object.metadata.generation.unwrap_or_default() != wanted.generation {
        return None;
    }
    let now = serde_json::to_value(Time(Timestamp::now())).unwrap_or_default();
    let meta = json!({"uid": object.metadata.uid, "resourceVersion": object.metadata.resource_version});
    Some(json!({"metadata": meta, "status": merged(status, wanted, &now)}))
}

#[cfg(test)]
mod tests {
    use super::super::{Condition, Reason};
    use super::*;
    use crate::control_plane::policies::object::Kind;
    use http::{Request, Response, StatusCode};
    use kube::client::Body;
    use parking_lot::Mutex;
    use std::collections::BTreeMap;
    use std::convert::Infallible;
    use std::future::Future;
    use std::pin::Pin;
    use std::sync::Arc;
    use std::task::{Context, Poll};

    /// An API server with statuses only.
    #[derive(Clone, Default)]
    struct Api(Arc<Mutex<State>>);

    #[derive(Default)]
    struct State {
        /// Objects by path.
        objects: BTreeMap<String, Value>,
        /// Patches that were accepted, with their query.
        written: Vec<(String, Value)>,
        /// All requests.
        requests: usize,
        /// How many requests are answered with 500.
        failing: usize,
    }

    const PATH: &str = "/apis/security.istio.io/v1/namespaces/a/authorizationpolicies/p";

    impl State {
        fn answer(&mut self, path: &str, query: &str, body: Option<Value>) -> (u16, Value) {
            self.requests += 1;
            let failure =
                |code: u16| (code, json!({"kind": "Status", "status": "Failure", "code": code, "message": "no"}));
            if self.failing > 0 {
                self.failing -= 1;
                return failure(500);
            }
            let Some(object) = self.objects.get_mut(path.trim_end_matches("/status")) else { return failure(404) };
            let Some(patch) = body else { return (200, object.clone()) };
            assert!(path.ends_with("/status") && query.contains("fieldManager=culvert-control"), "{path}?{query}");
            let version = &object["metadata"]["resourceVersion"];
            if patch["metadata"]["resourceVersion"] != *version || patch["metadata"]["uid"] != object["metadata"]["uid"]
            {
                return failure(409);
            }
            let next = version.as_str().unwrap().parse::<u64>().unwrap() + 1;
            object["metadata"]["resourceVersion"] = json!(next.to_string());
            for (name, value) in patch["status"].as_object().unwrap() {
                object["status"][name] = value.clone();
            }
            self.written.push((query.to_owned(), patch));
            (200, object.clone())
        }
    }

    impl tower_service::Service<Request<Body>> for Api {
        type Response = Response<Body>;
        type Error = Infallible;
        type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, request: Request<Body>) -> Self::Future {
            let state = self.0.clone();
            Box::pin(async move {
                let (head, body) = request.into_parts();
                let bytes = body.collect_bytes().await.unwrap();
                let body = (head.method == http::Method::PATCH).then(|| serde_json::from_slice(&bytes).unwrap());
                let (code, answer) = state.lock().answer(head.uri.path(), head.uri.query().unwrap_or_default(), body);
                let mut response = Response::new(Body::from(serde_json::to_vec(&answer).unwrap()));
                *response.status_mut() = StatusCode::from_u16(code).unwrap();
                Ok(response)
            })
        }
    }

    impl Api {
        /// With one object.
        fn new(status: Value) -> Self {
            let api = Self::default();
            let meta = json!({"namespace": "a", "name": "p", "uid": "u", "resourceVersion": "1", "generation": 1});
            let object = json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": meta, "status": status});
            api.0.lock().objects.insert(PATH.to_owned(), object);
            api
        }

        fn client(&self) -> Client {
            Client::new(self.clone(), "default")
        }

        fn said(&self) -> Option<Said> {
            Said::of(&self.0.lock().objects[PATH]["status"])
        }

        fn counts(&self) -> (usize, usize) {
            let state = self.0.lock();
            (state.requests, state.written.len())
        }
    }

    fn wanted(message: &str) -> Wanted {
        let condition = Condition::new(Reason::PartlyEnforced, message);
        Wanted { kind: Kind::Authorization, namespace: "a".into(), name: "p".into(), generation: 1, condition }
    }

    fn says(api: &Api, wanted: &Wanted) -> bool {
        api.said().is_some_and(|said| said.is(&wanted.condition, wanted.generation))
    }

    /// Runs writers until nothing has happened for a while, by the paused clock.
    async fn run(apis: &[&Api], all: &[Wanted]) {
        let mut senders = Vec::new();
        let mut writers = FuturesUnordered::new();
        for api in apis {
            let (sender, receiver) = mpsc::channel(8);
            for wanted in all {
                sender.try_send(wanted.clone()).unwrap();
            }
            senders.push(sender);
            writers.push(write(api.client(), receiver));
        }
        assert!(timeout(Duration::from_secs(600), writers.next()).await.is_err(), "a writer has ended");
    }

    #[tokio::test(start_paused = true)]
    async fn a_status_is_written_once_beside_those_of_others() {
        let api = Api::new(json!({"conditions": [{"type": "WaypointAccepted", "status": "True"}]}));
        run(&[&api], &[wanted("early"), wanted("m")]).await;
        assert!(says(&api, &wanted("m")));
        assert_eq!(api.counts(), (2, 1), "one read, one write");
        assert_eq!(api.0.lock().objects[PATH]["status"]["conditions"][0]["type"], "WaypointAccepted");
        run(&[&api], &[wanted("m")]).await;
        assert_eq!(api.counts(), (3, 1), "it says so already");
    }

    #[tokio::test(start_paused = true)]
    async fn two_replicas_write_once() {
        let api = Api::new(Value::Null);
        run(&[&api, &api], &[wanted("m")]).await;
        assert!(says(&api, &wanted("m")));
        assert_eq!(api.counts().1, 1);
    }

    #[tokio::test(start_paused = true)]
    async fn an_object_that_is_gone_or_newer_is_left_alone() {
        let api = Api::new(Value::Null);
        run(&[&api], &[Wanted { name: "other".into(), ..wanted("m") }]).await;
        run(&[&api], &[Wanted { generation: 2, ..wanted("m") }]).await;
        assert_eq!(api.counts(), (2, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn failures_are_tried_again() {
        let api = Api::new(Value::Null);
        api.0.lock().failing = 5;
        run(&[&api], &[wanted("m")]).await;
        assert!(says(&api, &wanted("m")));
        assert_eq!(api.counts(), (7, 1));
    }

    /// Replicas of two versions that disagree: each hears of the other's write and wants its own again.
    #[tokio::test(start_paused = true)]
    async fn replicas_that_disagree_write_seldom() {
        let api = Api::new(Value::Null);
        let (first, first_receiver) = mpsc::channel(8);
        let (second, second_receiver) = mpsc::channel(8);
        let watch = async {
            loop {
                for (sender, message) in [(&first, "1"), (&second, "2")] {
                    if !says(&api, &wanted(message)) {
                        sender.send(wanted(message)).await.unwrap();
                    }
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        let all = futures_util::future::join3(
            write(api.client(), first_receiver),
            write(api.client(), second_receiver),
            watch,
        );
        let hours = 6;
        assert!(timeout(Duration::from_secs(hours * 3600), all).await.is_err());
        let writes = api.counts().1;
        assert!((4..40).contains(&writes), "{writes} writes in {hours} hours");
    }
}
