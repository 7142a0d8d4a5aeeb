//! `/snapshot`: what the live page shows of this node, in one answer.

use super::parts::Parts;
use super::{dump, history, status};
use crate::connection::report::Direction;
use crate::connection::report::live::Connection;
use crate::hbone::Authority;
use crate::mesh::{Snapshot, SpiffeName, Text, Workload};
use crate::task::Ready;
use serde_json::{Value, json};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// Most connections that are listed, the newest.
const CONNECTIONS_MAX: usize = 5_000;

/// This node's part of the live page.
pub(super) fn snapshot(parts: &Parts, ready: &Ready) -> Value {
    let names = Names { mesh: parts.mesh.load(), network: parts.config.network.as_str().into() };
    let (live, pods) = (parts.reporter.live.list(), dump::pod_names(parts));
    let one = |(id, connection): &(u64, Arc<Connection>)| {
        let mut shown = dump::connection(*id, connection, &pods);
        let [source, destination] = names.of(connection);
        if let Some(shown) = shown.as_object_mut() {
            shown.insert("srcWorkload".to_owned(), source.into());
            shown.insert("dstWorkload".to_owned(), destination.into());
        }
        shown
    };
    json!({
        "node": node_name(parts),
        "reachable": true,
        "error": null,
        "status": status::status(parts, ready),
        "pods": dump::pods(parts),
        "connections": live.iter().rev().take(CONNECTIONS_MAX).map(one).collect::<Vec<_>>(),
        "connectionsTotal": live.len(),
        "certificates": dump::certificates_without_text(parts),
        "history": recent(parts, &names),
    })
}

/// The name of this node on the page. Without Kubernetes a node need not have a name.
pub(super) fn node_name(parts: &Parts) -> &str {
    let name = parts.config.node_name.as_str();
    if name.is_empty() { "this node" } else { name }
}

/// What was refused, failed and changed lately, at most this many of each.
const RECENT_MAX: [(&str, &str, usize); 3] =
    [("outcome", "refused", 200), ("outcome", "failed", 100), ("kind", "change", 100)];

fn recent(parts: &Parts, names: &Names) -> Value {
    let mut all = Vec::new();
    for (name, value, max) in RECENT_MAX {
        let query = [(name, value.to_owned()), ("limit", max.to_string())];
        let query = query.map(|(name, value)| (name.to_owned(), value)).into();
        if let Ok(Value::Object(mut answer)) = history::history(parts, &query)
            && let Some(Value::Array(entries)) = answer.remove("entries")
        {
            all.extend(entries);
        }
    }
    for entry in &mut all {
        for end in ["source", "destination"] {
            if let Some(end) = entry.get_mut(end).and_then(Value::as_object_mut) {
                let named = names.of_end(end.get("workload"), end.get("address"));
                named.and_then(|named| end.insert("workload".to_owned(), named.into()));
            }
        }
    }
    all.into()
}

/// Names of workloads for both ends of connections.
struct Names {
    mesh: Arc<Snapshot>,
    network: Text,
}

impl Names {
    /// The source and the destination, each as `namespace/workload`, where it is known.
    fn of(&self, c: &Connection) -> [Option<String>; 2] {
        let source = self.workload(c.source.ip()).filter(|found| fits(found, c.details.source_identity.as_ref()));
        let destination = match c.direction {
            Direction::Inbound => self.workload(c.destination.ip()).map(|found| name(found)),
            Direction::Outbound => self.far_end(c),
        };
        [source.map(|found| name(found)), destination]
    }

    /// The workload of a pod, or of an address.
    fn of_end(&self, pod: Option<&Value>, address: Option<&Value>) -> Option<String> {
        let pod = pod.and_then(Value::as_str).and_then(|pod| pod.split_once('/'));
        let at = || self.workload(address?.as_str()?.parse::<SocketAddr>().ok()?.ip());
        match pod {
            Some((namespace, pod)) => self.mesh.workload_of_pod(namespace, pod).map(|found| name(found)),
            None => at().map(|found| name(found)),
        }
    }

    /// The workload that an outbound connection reaches, or else its service.
    fn far_end(&self, c: &Connection) -> Option<String> {
        let at = match &c.details.authority {
            Some(Authority::Address(address)) => Some(address.ip()).filter(|_| c.details.gateway.is_none()),
            Some(Authority::Host(..)) => None,
            None => Some(c.details.actual.ip()),
        };
        let service = || {
            let service = self.mesh.services_by_hostname(&c.details.service.as_ref()?.key.hostname).first()?;
            Some(format!("{}/{}", service.key.namespace, service.name))
        };
        at.and_then(|ip| self.workload(ip)).map(|found| name(found)).or_else(service)
    }

    fn workload(&self, ip: IpAddr) -> Option<&Arc<Workload>> {
        self.mesh.workload_at(&self.network, ip.to_canonical())
    }
}

/// Whether a workload may have this identity. An address can belong to something that stands in between.
fn fits(workload: &Workload, identity: Option<&SpiffeName>) -> bool {
    identity.is_none_or(|identity| workload.identity().is_ok_and(|own| own == *identity))
}

fn name(workload: &Workload) -> String {
    let own = if workload.workload_name.is_empty() { &workload.name } else { &workload.workload_name };
    format!("{}/{own}", workload.namespace)
}
