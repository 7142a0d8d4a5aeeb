//! `/explain` and `/explain/policies` of the admin port: read the question, and find the pod and the address.

use crate::admin::Query;
use crate::connection::Shared;
use crate::connection::authorize::revoke::Previewed;
use crate::connection::journeys::explain::explain;
use crate::connection::pod::Pod;
use crate::control;
use crate::mesh::policy::PolicyScope;
use crate::mesh::{Policy, Snapshot, Text};
use serde_json::{Value, json};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

const USAGE: &str = "use from=NAMESPACE/POD and to=ADDRESS:PORT or to=NAME:PORT";

/// A question, read but not answered.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Question<'a> {
    /// Namespace of the pod that connects.
    pub(crate) namespace: &'a str,
    /// Name of the pod that connects.
    pub(crate) pod: &'a str,
    /// Where it connects to.
    pub(crate) to: Wanted<'a>,
}

/// Where the connection in a question goes.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Wanted<'a> {
    /// An address and a port.
    Address(SocketAddr),
    /// A name that the pod has to look up first, and a port.
    Name(&'a str, u16),
}

/// Reads the question in the query.
pub(crate) fn question(query: &Query) -> Result<Question<'_>, String> {
    let value = |name: &str| query.iter().find(|(other, _)| other == name).map(|(_, value)| value.as_str());
    if let Some((other, _)) = query.iter().find(|(name, _)| !["from", "to"].contains(&name.as_str())) {
        return Err(format!("{other:?} is not understood: {USAGE}"));
    }
    let (Some(from), Some(to)) = (value("from"), value("to")) else { return Err(USAGE.to_owned()) };
    let (namespace, pod) = from.split_once('/').ok_or_else(|| format!("{from:?} is not NAMESPACE/POD"))?;
    Ok(Question { namespace, pod, to: wanted(to)? })
}

fn wanted(to: &str) -> Result<Wanted<'_>, String> {
    if let Ok(address) = to.parse::<SocketAddr>() {
        return Ok(Wanted::Address(crate::mesh::address::canonical(address)));
    }
    let wrong = || format!("{to:?} is neither ADDRESS:PORT nor NAME:PORT; an IPv6 address is written [ADDRESS]:PORT");
    let (name, port) = to.rsplit_once(':').ok_or_else(wrong)?;
    let port: u16 = port.parse().map_err(|_| wrong())?;
    let is_name =
        !name.is_empty() && name.len() <= 253 && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    if is_name { Ok(Wanted::Name(name, port)) } else { Err(wrong()) }
}

/// Answers the question in the query.
pub(super) async fn answer(shared: &Arc<Shared>, query: &Query) -> Result<Value, String> {
    let Question { namespace, pod: name, to } = question(query)?;
    let pod = shared.pods.find(namespace, name).ok_or_else(|| {
        format!(
            "no pod {namespace}/{name} is captured on this node, so its connections do not pass here; `culvert pods` lists all pods"
        )
    })?;
    let (to, name) = match to {
        Wanted::Address(address) => (address, None),
        Wanted::Name(name, port) => {
            let (address, proven) = look_up(shared, &pod, name).await?;
            (SocketAddr::new(address, port), proven)
        }
    };
    serde_json::to_value(explain(shared, &pod, to, name).await).map_err(|error| error.to_string())
}

/// The address that is meant by a name, and the name that egress policies would then count. It is looked up as the pod's
/// own questions are, but does not count for the pod's connections: only its own questions do that.
async fn look_up(shared: &Arc<Shared>, pod: &Pod, name: &str) -> Result<(IpAddr, Option<Text>), String> {
    let (snapshot, workload) = pod.facts_now(&shared.mesh).ok_or("the pod's workload is not known yet")?;
    let found = pod.resolver.look_up((&snapshot, &workload), name).await.map_err(|error| error.to_string())?;
    let first = found.addresses.first().ok_or_else(|| format!("{name} has no address"))?;
    Ok((*first, found.proven.map(|(name, _)| name)))
}

/// The policies in a text that is written as in the mesh file, and contains nothing else.
pub(crate) fn policies_in(text: &str) -> Result<Vec<Policy>, String> {
    if text.lines().any(|line| line.trim_end() == "kind: AuthorizationPolicy") {
        return Err(
            "this is a Kubernetes object, whose selector only the control plane can evaluate: write the policy below `policies:`, as in the \
             mesh file"
                .to_owned(),
        );
    }
    let facts = control::yaml::facts(text).map_err(|error| error.to_string())?;
    if facts.policies.is_empty() {
        return Err("there is no policy in it: write them below `policies:`, as in the mesh file".to_owned());
    }
    if facts.workloads.len() + facts.services.len() + facts.egress.len() > 0 {
        return Err("only `policies:` can be explained".to_owned());
    }
    Ok(facts.policies)
}

/// Most connections that are listed.
const LISTED_MAX: usize = 1000;

/// What has to be known about the workloads that a policy selects by labels. A control plane evaluates the selector and
/// tells nodes only which policies a workload has.
fn attachment(snapshot: &Snapshot, policy: &Policy) -> Option<String> {
    if policy.scope != PolicyScope::WorkloadSelector {
        return None;
    }
    let key = &policy.key;
    let count = snapshot.workloads().filter(|workload| workload.policies.contains(key)).count();
    Some(match count {
        0 => format!(
            "policy {key} selects workloads by labels, which are not known here, and the mesh facts of no workload name it: nothing is \
             said about it"
        ),
        _ => format!(
            "policy {key} selects workloads by labels, which are not known here: it counts for those whose mesh facts name it now ({count} \
             in the mesh)"
        ),
    })
}

/// What the policies in a text, written as in the mesh file, would change for connections to pods of this node.
pub(super) fn policies(shared: &Shared, text: &str) -> Result<Value, String> {
    let policies = policies_in(text)?;
    let snapshot = shared.mesh.load();
    let notes: Vec<String> = policies.iter().filter_map(|policy| attachment(&snapshot, policy)).collect();
    let preview = shared.permits.preview(&snapshot, policies);
    let count = |is_open: bool, refused: bool| {
        preview.changes.iter().filter(|one| one.is_open == is_open && one.refusal.is_some() == refused).count()
    };
    let counts = [(true, true), (false, true), (false, false)].map(|(is_open, refused)| count(is_open, refused));
    let [cut, refused, allowed] = counts;
    let one = |Previewed { uid, subject, is_open, refusal }: &Previewed| {
        json!({
            "connection": if *is_open { "open" } else { "ended" },
            "source": subject.source.to_string(),
            "identity": subject.peer.as_ref().map(ToString::to_string),
            "destination": subject.destination.to_string(),
            "workload": &**uid,
            "then": refusal.as_ref().map_or_else(|| "would be allowed".to_owned(), |why| format!("would be refused: {why}")),
        })
    };
    Ok(json!({
        "open": preview.open,
        "recent": preview.recent,
        "wouldBeCut": cut,
        "wouldHaveBeenRefused": refused,
        "wouldHaveBeenAllowed": allowed,
        "notes": notes,
        "changes": preview.changes.iter().take(LISTED_MAX).map(one).collect::<Vec<_>>(),
    }))
}
