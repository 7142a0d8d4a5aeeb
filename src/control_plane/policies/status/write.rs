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
    let Some(object) = api.get_opt(&wanted.name).await? else { return Ok(Outcome::Needless) };
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
