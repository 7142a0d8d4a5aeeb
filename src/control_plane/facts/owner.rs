//! The name of the workload that a pod belongs to, from its labels and its owner.

use super::api::Metadata;

/// The name of a pod's workload: what its label says, else what its controller is called without what the controller's
/// own controller has added, else the pod's own name.
pub fn workload_name(metadata: &Metadata) -> String {
    if let Some(said) = metadata.label("service.istio.io/workload-name") {
        return said.to_owned();
    }
    let own = || metadata.name.clone().unwrap_or_default();
    let is_generated = metadata.generate_name.as_deref().is_some_and(|name| !name.is_empty());
    let owner = metadata.owner_references.iter().flatten().find(|owner| owner.controller == Some(true));
    let Some(owner) = owner.filter(|owner| is_generated && !owner.name.is_empty()) else { return own() };
    let without = |label: &str| {
        let hash = metadata.label(label)?;
        owner.name.strip_suffix(hash)?.strip_suffix('-')
    };
    let shorter = match owner.kind.as_str() {
        "ReplicaSet" => without("pod-template-hash").or_else(|| without("rollouts-pod-template-hash")),
        "ReplicationController" => metadata.label("deploymentconfig"),
        "Job" => without_time(&owner.name),
        _ => None,
    };
    shorter.filter(|name| !name.is_empty()).unwrap_or(&owner.name).to_owned()
}

/// The name of a Job without the time that its CronJob has added: 8 to 10 digits after a dash.
fn without_time(name: &str) -> Option<&str> {
    let (front, time) = name.rsplit_once('-')?;
    ((8..=10).contains(&time.len()) && time.bytes().all(|b| b.is_ascii_digit())).then_some(front)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[test]
    fn workloads_are_named_after_what_people_have_made() {
        let pod = |labels: Value, kind: &str, owner: &str, generated: bool| {
            let generate = if generated { "pod-" } else { "" };
            let metadata = json!({"name": "pod-x", "labels": labels, "generateName": generate,
                "ownerReferences": [{"kind": "Other", "name": "no"}, {"kind": kind, "name": owner, "controller": true}]});
            workload_name(&serde_json::from_value(metadata).unwrap())
        };
        let hash = json!({"pod-template-hash": "abc12"});
        let rollout = json!({"rollouts-pod-template-hash": "abc12"});
        for (labels, kind, owner, generated, expected) in [
            (hash.clone(), "ReplicaSet", "web-abc12", true, "web"),
            (hash.clone(), "ReplicaSet", "web-other", true, "web-other"),
            (hash.clone(), "ReplicaSet", "abc12", true, "abc12"),
            (hash.clone(), "ReplicaSet", "-abc12", true, "-abc12"),
            (hash.clone(), "ReplicaSet", "web-abc12", false, "pod-x"),
            (rollout, "ReplicaSet", "web-abc12", true, "web"),
            (json!({}), "ReplicaSet", "web", true, "web"),
            (json!({"deploymentconfig": "dc"}), "ReplicationController", "dc-1", true, "dc"),
            (json!({}), "ReplicationController", "rc-1", true, "rc-1"),
            (json!({}), "Job", "report-28012345", true, "report"),
            (json!({}), "Job", "report-1234567", true, "report-1234567"),
            (json!({}), "Job", "report-12345678901", true, "report-12345678901"),
            (json!({}), "Job", "report-2801234x", true, "report-2801234x"),
            (json!({}), "DaemonSet", "agent", true, "agent"),
            (json!({"service.istio.io/workload-name": "own"}), "DaemonSet", "agent", true, "own"),
            (json!({}), "DaemonSet", "", true, "pod-x"),
        ] {
            assert_eq!(pod(labels, kind, owner, generated), expected, "{kind} {owner}");
        }
        assert_eq!(workload_name(&Metadata { name: Some("alone".into()), ..Metadata::default() }), "alone");
    }
}
