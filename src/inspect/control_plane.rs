//! What is to be said of culvert's own control plane, where the daemons use it.

use super::nodes::Node;
use super::text::{at, printable};
use crate::cluster::control_plane::{self, NotEnforced, Replica};
use crate::cluster::{ClusterError, Daemons};
use serde_json::{Value, json};
use std::time::Duration;

/// What the API shows of it.
pub struct ControlPlane {
    namespace: String,
    replicas: Result<Vec<Replica>, String>,
    not_enforced: Vec<NotEnforced>,
}

/// Looks at the control plane that these daemons say they have their facts from; `None` if it is not culvert's.
pub async fn look(daemons: &Daemons, nodes: &[Node], timeout: Duration) -> Option<ControlPlane> {
    let addresses = nodes.iter().filter_map(|node| at(node.page.as_ref().ok()?, "/facts/from").as_str());
    let namespace = addresses.filter_map(control_plane::namespace_of).next()?.to_owned();
    let found = daemons.control_plane(&namespace, timeout).await?;
    Some(ControlPlane::new(namespace, found))
}

impl ControlPlane {
    fn new(namespace: String, found: Result<(Vec<Replica>, Vec<NotEnforced>), ClusterError>) -> Self {
        match found {
            Ok((replicas, not_enforced)) => Self { namespace, replicas: Ok(replicas), not_enforced },
            Err(error) => Self { namespace, replicas: Err(error.to_string()), not_enforced: Vec::new() },
        }
    }

    /// How many replicas are ready, in a line.
    pub fn summary(&self) -> String {
        let namespace = printable(&self.namespace);
        match &self.replicas {
            Err(error) => format!("{namespace}/culvert-control: {}", printable(error)),
            Ok(all) => {
                let ready = all.iter().filter(|replica| replica.ready).count();
                format!("{namespace}/culvert-control: {ready} of {} replicas are ready", all.len())
            }
        }
    }

    /// What is wrong with it.
    pub fn red(&self) -> Vec<String> {
        let none = self.replicas.as_ref().is_ok_and(|all| !all.iter().any(|replica| replica.ready));
        let why = "daemons go on with what they know, but new pods are not announced and certificates not renewed";
        if none { vec![format!("{}: {why}", self.summary())] } else { Vec::new() }
    }

    /// What is worth knowing: replicas that are not ready, and policies that are not enforced as they are written.
    pub fn notes(&self) -> Vec<String> {
        let replicas = self.replicas.as_ref().map(Vec::as_slice).unwrap_or_default();
        let waits = replicas.iter().filter(|replica| !replica.ready).map(|replica| {
            let (pod, node, phase) = (printable(&replica.pod), printable(&replica.node), printable(&replica.phase));
            let node = if node.is_empty() { "no node".to_owned() } else { node };
            format!("control plane: {pod} on {node} is not ready ({phase})")
        });
        let policies = self.not_enforced.iter().map(|policy| {
            let (name, reason, message) =
                (printable(&policy.name), printable(&policy.reason), printable(&policy.message));
            format!("{} {name} is not enforced as it is written ({reason}): {message}", policy.kind)
        });
        waits.chain(policies).collect()
    }

    /// For programs.
    pub fn json(&self) -> Value {
        let policy = |policy: &NotEnforced| json!({"kind": policy.kind, "name": policy.name, "reason": policy.reason, "message": policy.message});
        let replica = |replica: &Replica| json!({"pod": replica.pod, "node": replica.node, "ready": replica.ready, "phase": replica.phase});
        let policies: Vec<Value> = self.not_enforced.iter().map(policy).collect();
        match &self.replicas {
            Ok(all) => {
                let replicas: Vec<Value> = all.iter().map(replica).collect();
                json!({"namespace": self.namespace, "replicas": replicas, "policiesNotEnforced": policies})
            }
            Err(error) => json!({"namespace": self.namespace, "error": error, "policiesNotEnforced": policies}),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// One with these replicas, by whether they are ready, and a policy that is not enforced.
    pub fn with(ready: &[bool]) -> ControlPlane {
        let replica = |(at, ready): (usize, &bool)| Replica {
            pod: format!("culvert-control-{at}"),
            node: format!("n{at}"),
            ready: *ready,
            phase: "Running".into(),
        };
        let policy = NotEnforced {
            kind: "AuthorizationPolicy",
            name: "shop/p".into(),
            reason: "PartlyEnforced".into(),
            message: "rule 1 needs \u{1b}[1mHTTP".into(),
        };
        ControlPlane::new("istio-system".into(), Ok((ready.iter().enumerate().map(replica).collect(), vec![policy])))
    }

    #[test]
    fn it_is_wrong_if_no_replica_is_ready() {
        for (ready, red, notes) in
            [(&[true, true][..], 0, 1), (&[true, false], 0, 2), (&[false, false], 1, 3), (&[], 1, 1)]
        {
            let one = with(ready);
            assert_eq!(
                (one.red().len(), one.notes().len()),
                (red, notes),
                "{ready:?}: {:?} {:?}",
                one.red(),
                one.notes()
            );
        }
        assert!(
            with(&[]).red()[0].starts_with("istio-system/culvert-control: 0 of 0 replicas are ready: daemons go on")
        );
        let notes = with(&[true, false]).notes();
        assert_eq!(notes[0], "control plane: culvert-control-1 on n1 is not ready (Running)");
        assert_eq!(
            notes[1],
            "AuthorizationPolicy shop/p is not enforced as it is written (PartlyEnforced): rule 1 needs ?[1mHTTP"
        );
        // What cannot be seen is said, and is not wrong.
        let unseen = ControlPlane::new("mesh".into(), Err(ClusterError::Api("forbidden".into())));
        assert!(unseen.red().is_empty() && unseen.summary().contains("forbidden"));
        assert_eq!(unseen.json()["error"], "the Kubernetes API: forbidden");
        assert_eq!(with(&[true]).json()["replicas"][0]["ready"], true);
    }
}
