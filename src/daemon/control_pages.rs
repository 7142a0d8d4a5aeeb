//! What the debug and metrics ports of `culvert control` serve.

use super::dump::{facts, time};
use super::{profile, version};
use crate::admin::{ControlPages, Query, Rendered};
use crate::control::xds::delta::Delta;
use crate::control_plane::catalog::{Edition, Kind};
use crate::control_plane::serve::nodes::{Connected, Nodes, Told};
use crate::control_plane::{Catalog, Config, ca};
use crate::mesh::Store;
use crate::proto::envoy::service::discovery::v3::{DeltaDiscoveryResponse, Resource};
use crate::task::Ready;
use crate::telemetry::log::LogControl;
use prometheus_client::registry::Registry;
use serde_json::{Map, Value, json};
use std::sync::Arc;
use std::time::SystemTime;

/// What the pages show.
pub(super) struct Shown {
    pub(super) config: Config,
    pub(super) catalog: Arc<Catalog>,
    pub(super) nodes: Arc<Nodes>,
    pub(super) authority: Arc<ca::Authority>,
}

/// The pages.
pub(super) fn pages(shown: Shown, log: LogControl, ready: Ready, registry: Registry) -> ControlPages {
    let nodes = shown.nodes.clone();
    let shown = Arc::new(shown);
    ControlPages {
        config_dump: Box::new(move || config_dump(&shown)),
        nodes: Box::new(move || nodes.list().iter().map(node).collect()),
        logging: Box::new(move |query| logging(&log, query)),
        cpu_profile: Box::new(|query| Box::pin(profile::cpu(query))),
        metrics: Rendered::new(registry),
        ready,
    }
}

/// Without the signing key, which is nowhere but in the authority.
fn config_dump(shown: &Shown) -> Value {
    let edition = shown.catalog.follow().borrow().clone();
    let cluster = &shown.config.cluster;
    let [workloads, services, policies] = as_a_node_knows(&edition);
    json!({
        "version": version::text(),
        "cluster": {
            "id": &*cluster.id,
            "domain": &*cluster.domain,
            "trustDomain": &*cluster.trust_domain,
            "namespace": &*cluster.namespace,
        },
        "settings": shown.config.settings,
        "edition": edition.number,
        "complete": edition.complete,
        "versions": {"addresses": versions(&edition, Kind::Address), "authorizations": versions(&edition, Kind::Authorization)},
        "workloads": workloads,
        "services": services,
        "policies": policies,
        "roots": shown.authority.roots_pem().as_deref(),
        "nodes": shown.nodes.list().len(),
    })
}

/// The versions of what is served, by name.
fn versions(edition: &Edition, kind: Kind) -> Value {
    let all = edition.of(kind).iter();
    let all: Map<String, Value> = all.map(|(name, resource)| (name.to_string(), json!(&*resource.version))).collect();
    Value::Object(all)
}

/// The facts that are served, read as a daemon reads them.
fn as_a_node_knows(edition: &Edition) -> [Value; 3] {
    let (mut delta, store) = (Delta::new(false, false), Store::new("".into(), "".into(), false));
    for kind in Kind::ALL {
        let resource = |(name, resource): (&crate::mesh::Text, &Arc<crate::control_plane::catalog::Resource>)| {
            let any = prost_types::Any { type_url: kind.url().into(), value: resource.content.to_vec() };
            Resource { name: name.to_string(), resource: Some(any), ..Resource::default() }
        };
        let resources = edition.of(kind).iter().map(resource).collect();
        let response = DeltaDiscoveryResponse { type_url: kind.url().into(), resources, ..Default::default() };
        store.update(delta.receive(response).update);
    }
    facts(&store.load())
}

/// A connected daemon.
fn node(node: &Connected) -> Value {
    let seconds = |at: SystemTime| SystemTime::now().duration_since(at).unwrap_or_default().as_secs();
    let told = |told: &Told| {
        json!({
            "sent": told.sent,
            "sentAt": told.sent_at.map(time),
            "acknowledged": told.acknowledged,
            "refused": told.refused,
            "lastRefusal": told.last_refusal,
        })
    };
    let [addresses, authorizations] = &node.told;
    json!({
        "id": &*node.client.id,
        "node": &*node.client.node,
        "version": &*node.client.version,
        "account": format!("{}/{}", node.caller.namespace, node.caller.service_account),
        "pod": node.caller.pod.as_ref().map(|pod| &*pod.name),
        "address": node.peer.to_string(),
        "since": time(node.since),
        "ageSeconds": seconds(node.since),
        "onDemand": node.on_demand,
        "addresses": told(addresses),
        "authorizations": told(authorizations),
    })
}

/// `/logging`: `level=<directives>` adds directives, `reset` restores the filter of the start, and no query shows the
/// filter.
fn logging(log: &LogControl, query: &Query) -> Result<String, String> {
    for (name, value) in query {
        let done = match (name.as_str(), value.as_str()) {
            ("reset", _) => log.reset(),
            ("level", "") => Ok(()),
            ("level", directives) => log.add(directives),
            _ => return Err(format!("{name:?} is not understood: use level=debug, or reset\n")),
        };
        done.map_err(|error| format!("{error}\n"))?;
    }
    Ok(format!("current log filter: {}\n", log.current()))
}
