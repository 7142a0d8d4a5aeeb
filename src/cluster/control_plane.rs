//! culvert's own control plane, as the Kubernetes API shows it: its replicas, and the policies of which it says that they
//! are not enforced as they are written.

use super::find::is_label;
use super::question::{AskError, ClusterError};
use crate::telemetry::log::with_causes;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, ApiResource, DynamicObject, ListParams};
use serde_json::Value;
use std::time::Duration;
use tokio::time::timeout;

/// Name of its Deployment and its Service, and the label of its pods.
const NAME: &str = "culvert-control";
/// Objects in one answer of the API.
const PAGE: u32 = 500;
/// Policies that are kept. There may be as many as users make.
const POLICIES_MAX: usize = 200;
/// Kinds of policies.
const KINDS: [(&str, &str); 2] =
    [("AuthorizationPolicy", "authorizationpolicies"), ("PeerAuthentication", "peerauthentications")];

/// One replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replica {
    /// Name of its pod.
    pub pod: String,
    /// Name of its node; empty before it has one.
    pub node: String,
    /// Whether daemons can use it.
    pub ready: bool,
    /// Phase of its pod.
    pub phase: String,
}

/// A policy that is not enforced as it is written, by its status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotEnforced {
    /// Kind of the object.
    pub kind: &'static str,
    /// Namespace and name.
    pub name: String,
    /// Why, in a word.
    pub reason: String,
    /// Why, in a sentence.
    pub message: String,
}

/// Policies that are not enforced as they are written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policies {
    /// Those that were found, a limited number.
    pub not_enforced: Vec<NotEnforced>,
    /// Why there may be more.
    pub incomplete: Option<String>,
}

/// The namespace of the control plane, if a daemon that has its facts from `address` uses culvert's.
pub fn namespace_of(address: &str) -> Option<&str> {
    let host = address.rsplit_once("://").map_or(address, |(_, host)| host);
    let mut parts = host.split([':', '/']).next()?.split('.');
    let is_ours = parts.next() == Some(NAME);
    parts.next().filter(|namespace| is_ours && is_label(namespace))
}

/// The replicas in a namespace, sorted by name. Those that are ending do not count.
pub(super) async fn replicas(client: &kube::Client, namespace: &str) -> Result<Vec<Replica>, ClusterError> {
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let label = format!("app={NAME}");
    let listed = pods.list(&ListParams::default().labels(&label).limit(PAGE)).await;
    let listed = listed.map_err(|error| ClusterError::Api(with_causes(&error)))?;
    let mut all: Vec<Replica> = listed.items.into_iter().filter_map(replica).collect();
    all.sort_by(|a, b| a.pod.cmp(&b.pod));
    Ok(all)
}

fn replica(pod: Pod) -> Option<Replica> {
    let labelled = pod.metadata.labels.as_ref().is_some_and(|all| all.get("app").is_some_and(|app| app == NAME));
    if !labelled || pod.metadata.deletion_timestamp.is_some() {
        return None;
    }
    let status = pod.status.unwrap_or_default();
    let phase = status.phase.unwrap_or_else(|| "unknown".to_owned());
    let conditions = status.conditions.unwrap_or_default();
    let ready = conditions.iter().any(|condition| condition.type_ == "Ready" && condition.status == "True");
    let node = pod.spec.and_then(|spec| spec.node_name).unwrap_or_default();
    Some(Replica { pod: pod.metadata.name.unwrap_or_default(), node, ready, phase })
}

/// The policies that are not enforced as they are written.
pub(super) async fn not_enforced(client: &kube::Client, deadline: Duration) -> Policies {
    let mut found = Vec::new();
    let incomplete = match timeout(deadline, find(client, &mut found)).await {
        Ok(Ok(())) if found.len() > POLICIES_MAX => Some(format!("only the first {POLICIES_MAX} are shown")),
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(with_causes(&error)),
        Err(_) => Some(AskError::Late(deadline).to_string()),
    };
    found.truncate(POLICIES_MAX);
    Policies { not_enforced: found, incomplete }
}

async fn find(client: &kube::Client, found: &mut Vec<NotEnforced>) -> Result<(), kube::Error> {
    for (kind, plural) in KINDS {
        let resource = ApiResource {
            group: "security.istio.io".into(),
            version: "v1".into(),
            api_version: "security.istio.io/v1".into(),
            kind: kind.into(),
            plural: plural.into(),
        };
        let api: Api<DynamicObject> = Api::all_with(client.clone(), &resource);
        let mut parameters = ListParams::default().limit(PAGE);
        while found.len() <= POLICIES_MAX {
            let page = match api.list(&parameters).await {
                Ok(page) => page,
                // Without the definition of the kind there are none.
                Err(kube::Error::Api(status)) if status.code == 404 => break,
                Err(error) => return Err(error),
            };
            found.extend(page.items.iter().filter_map(|object| said_of(kind, object)));
            match page.metadata.continue_.filter(|more| !more.is_empty()) {
                Some(more) => parameters = parameters.continue_token(&more),
                None => break,
            }
        }
    }
    Ok(())
}

fn said_of(kind: &'static str, object: &DynamicObject) -> Option<NotEnforced> {
    let conditions = object.data.pointer("/status/conditions").and_then(Value::as_array)?;
    let text = |condition: &Value, key: &str| condition[key].as_str().unwrap_or_default().to_owned();
    let condition = conditions.iter().find(|one| one["type"] == "Accepted" && one["status"] == "False")?;
    // What is said of an earlier version says nothing of this one.
    let said_of = condition["observedGeneration"].as_i64();
    if said_of.is_some_and(|said_of| object.metadata.generation.is_some_and(|generation| said_of != generation)) {
        return None;
    }
    let part = |part: &Option<String>| part.clone().unwrap_or_default();
    let name = format!("{}/{}", part(&object.metadata.namespace), part(&object.metadata.name));
    Some(NotEnforced { kind, name, reason: text(condition, "reason"), message: text(condition, "message") })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_daemon_says_by_the_address_of_its_facts_which_control_plane_it_uses() {
        for (address, expected) in [
            ("culvert-control.istio-system.svc:15012", Some("istio-system")),
            ("https://culvert-control.mesh.svc.cluster.local:15012", Some("mesh")),
            ("culvert-control:15012", None),
            ("culvert-control..svc:15012", None),
            ("culvert-control.a%2Fb.svc:15012", None),
            ("istiod.istio-system.svc:15012", None),
            ("culvert-control2.istio-system.svc:15012", None),
            ("/etc/culvert/mesh.yaml", None),
            ("", None),
        ] {
            assert_eq!(namespace_of(address), expected, "{address}");
        }
    }

    #[test]
    fn a_policy_is_named_if_its_status_says_that_it_is_not_enforced() {
        let object = |conditions: Value| -> DynamicObject {
            serde_json::from_value(
                json!({"metadata": {"namespace": "shop", "name": "p"}, "status": {"conditions": conditions}}),
            )
            .unwrap()
        };
        let no = json!({"type": "Accepted", "status": "False", "reason": "PartlyEnforced", "message": "rule 1"});
        let yes = json!({"type": "Accepted", "status": "True", "reason": "Accepted"});
        let of_istio = json!({"type": "ZtunnelAccepted", "status": "False", "reason": "x"});
        assert_eq!(said_of("K", &object(json!([of_istio, yes]))), None);
        assert_eq!(said_of("K", &object(json!(null))), None);
        let expected =
            NotEnforced { kind: "K", name: "shop/p".into(), reason: "PartlyEnforced".into(), message: "rule 1".into() };
        assert_eq!(said_of("K", &object(json!([of_istio, no]))), Some(expected));
        for (observed, is_said) in [(json!(2), true), (json!(1), false), (json!("2"), true)] {
            let mut no = no.clone();
            no["observedGeneration"] = observed;
            let mut object = object(json!([no]));
            object.metadata.generation = Some(2);
            assert_eq!(said_of("K", &object).is_some(), is_said, "{object:?}");
        }
    }

    #[test]
    fn a_replica_that_is_ending_does_not_count() {
        let pod = |metadata: Value, ready: &str| -> Pod {
            serde_json::from_value(json!({"metadata": metadata, "spec": {"nodeName": "n1", "containers": []},
                "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": ready}]}}))
            .unwrap()
        };
        let labels = json!({"app": "culvert-control"});
        let ready = replica(pod(json!({"name": "a", "labels": labels}), "True")).unwrap();
        assert!(ready.ready && ready.node == "n1");
        assert!(!replica(pod(json!({"name": "a", "labels": labels}), "False")).unwrap().ready);
        assert_eq!(replica(pod(json!({"name": "a", "labels": {"app": "ztunnel"}}), "True")), None);
        let ending = json!({"name": "a", "labels": labels, "deletionTimestamp": "2026-01-01T00:00:00Z"});
        assert_eq!(replica(pod(ending, "True")), None);
    }
}
