//! Settings of a node in an Istio mesh: Istio's proxy configuration, the control plane, the CA, the daemon's own pod,
//! and DNS.

use super::checker::Checker;
use super::environment::{CA_HEADER, Environment, MESH_CONFIG, META, META_JSON, XDS_HEADER};
use super::kind::Custom;
use super::parse;
use super::setting::Setting;
use super::settings::{certificates, dns, mesh, node, pods};
use super::{CaSource, MeshSource, OwnPod};
use crate::control::xds;
use crate::ports;
use crate::rpc;
use crate::task::files::from_yaml;
use http::header::HeaderName;
use http::{HeaderValue, Uri};
use serde::Deserialize;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Istio's proxy configuration, as far as it concerns a node.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct ProxyConfig {
    discovery_address: Option<String>,
    pub(super) proxy_admin_port: Option<u16>,
    pub(super) stats_port: Option<u16>,
    pub(super) concurrency: Option<usize>,
    proxy_metadata: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct MeshConfig {
    #[serde(default)]
    default_config: ProxyConfig,
}

/// Reads Istio's mesh configuration and `PROXY_CONFIG`, which takes precedence field by field.
pub(super) fn proxy_config(c: &mut Checker<'_>, environment: &Environment) -> ProxyConfig {
    let (mesh_text, unreadable) = match environment.mesh_config() {
        Some(Ok(text)) => (Some(text), None),
        Some(Err(error)) => (None, Some(format!("{MESH_CONFIG}: {error}"))),
        None => (None, None),
    };
    let own_text = c.given(&mesh::PROXY_CONFIG);
    let mut read = |name: &str, text: Option<&str>, parse: fn(&str) -> Result<ProxyConfig, String>| {
        let Some(text) = text.filter(|text| !text.trim().is_empty()) else { return ProxyConfig::default() };
        parse(text).unwrap_or_else(|error| {
            c.faults.push(format!("{name}: {error}"));
            ProxyConfig::default()
        })
    };
    let of_mesh = read(MESH_CONFIG, mesh_text, |text| from_yaml::<MeshConfig>(text).map(|mesh| mesh.default_config));
    let own = read(&mesh::PROXY_CONFIG.about.names(), own_text, from_yaml);
    c.faults.extend(unreadable);
    ProxyConfig {
        discovery_address: own.discovery_address.or(of_mesh.discovery_address),
        proxy_admin_port: own.proxy_admin_port.or(of_mesh.proxy_admin_port),
        stats_port: own.stats_port.or(of_mesh.stats_port),
        concurrency: own.concurrency.or(of_mesh.concurrency),
        proxy_metadata: of_mesh.proxy_metadata.into_iter().chain(own.proxy_metadata).collect(),
    }
}

/// Name of this node's cluster, which may be the default.
pub(super) fn cluster_id(c: &Checker<'_>, environment: &Environment) -> String {
    let id = environment.get("ISTIO_META_CLUSTER_ID").or_else(|| c.text(&node::CLUSTER_ID));
    id.unwrap_or_default().to_owned()
}

/// Name of this node's cluster, where it is set.
pub(super) fn given_cluster_id(c: &Checker<'_>, environment: &Environment) -> Option<String> {
    let set = c.given(&node::CLUSTER_ID).filter(|id| !id.is_empty());
    environment.get("ISTIO_META_CLUSTER_ID").or(set).map(str::to_owned)
}

/// The daemon's own pod, where all of it is set.
pub(super) fn own_pod(c: &Checker<'_>) -> Option<OwnPod> {
    let text = |setting| c.text(setting).map(str::to_owned);
    let (name, namespace) = (text(&node::POD_NAME)?, text(&node::POD_NAMESPACE)?);
    Some(OwnPod { name, namespace, service_account: text(&node::SERVICE_ACCOUNT)? })
}

/// Where mesh facts come from: the file, if one is set, else the control plane.
pub(super) fn mesh_source(c: &mut Checker<'_>, environment: &Environment, proxy: &ProxyConfig) -> MeshSource {
    let given = c.given(&mesh::XDS_ADDRESS);
    if let Some(path) = c.path(&mesh::MESH_FILE) {
        if given.is_some_and(|address| !address.is_empty()) {
            c.fault(&mesh::MESH_FILE.about, "is set together with XDS_ADDRESS; facts come from only one of them");
        }
        return MeshSource::File(path);
    }
    if given == Some("") {
        c.fault(&mesh::XDS_ADDRESS.about, "is empty, and LOCAL_XDS_PATH is not set: there is no source of mesh facts");
    }
    let server = Server {
        setting: &mesh::XDS_ADDRESS,
        address: given.or(proxy.discovery_address.as_deref()),
        roots: c.read(&mesh::XDS_ROOT_CA),
        alt_host: c.text(&mesh::ALT_XDS_HOSTNAME),
        header_prefix: XDS_HEADER,
    };
    let rpc = rpc_config(c, environment, server);
    let (pod, namespace) =
        (c.text(&node::POD_NAME).unwrap_or_default(), c.text(&node::POD_NAMESPACE).unwrap_or_default());
    let ip = c.read(&node::INSTANCE_IP);
    let on_demand = c.read(&mesh::XDS_ON_DEMAND);
    let mut metadata = Map::new();
    let node_name = c.text(&node::NODE_NAME).unwrap_or_default();
    for (name, value) in [("NAME", pod), ("NAMESPACE", namespace), ("INSTANCE_IPS", &ip), ("NODE_NAME", node_name)] {
        metadata.insert(name.into(), Value::from(value));
    }
    for (name, value) in &proxy.proxy_metadata {
        let name = name.strip_prefix(META).unwrap_or(name);
        metadata.insert(name.into(), Value::from(value.clone()));
    }
    metadata.extend(environment.below(META).map(|(name, value)| (name.to_owned(), Value::from(value))));
    for (name, value) in environment.below(META_JSON) {
        match serde_json::from_str(value) {
            Ok(value) => drop(metadata.insert(name.to_owned(), value)),
            Err(error) => c.faults.push(format!("{META_JSON}{name}: is not JSON: {error}")),
        }
    }
    let node_id = format!("ztunnel~{ip}~{pod}.{namespace}~{namespace}.svc.cluster.local");
    let (state_file, state_max_age) = (c.path(&mesh::STATE_FILE), c.read(&mesh::STATE_FILE_MAX_AGE));
    MeshSource::Xds(Box::new(xds::Config { rpc, node_id, metadata, on_demand, state_file, state_max_age }))
}

/// DNS of pods. Whether it is answered is part of ztunnel's metadata, in the environment or in the proxy configuration.
pub(super) fn dns(
    c: &mut Checker<'_>,
    environment: &Environment,
    proxy: &ProxyConfig,
    ipv6: bool,
    mark: u32,
) -> crate::dns::Config {
    let metadata = |name: &str| {
        let full = format!("{META}{name}");
        // A variable takes precedence even if it is empty, which is how one gets the default.
        if environment.is_set(&full) {
            return environment.get(&full).map(str::to_owned);
        }
        let of_proxy = proxy.proxy_metadata.get(name).or(proxy.proxy_metadata.get(&full));
        of_proxy.filter(|value| !value.is_empty()).cloned()
    };
    let capture = c.text(&dns::DNS_CAPTURE).map(str::to_owned).or_else(|| metadata("DNS_CAPTURE"));
    let ours = format!("localhost:{}", ports::DNS);
    if let Some(address) = metadata("DNS_PROXY_ADDR").filter(|address| *address != ours) {
        c.faults.push(format!("{META}DNS_PROXY_ADDR: {address:?} is not supported: it is always {ours}"));
    }
    crate::dns::Config {
        capture: capture.is_none_or(|value| value.eq_ignore_ascii_case("true")),
        cluster_domain: c.read(&dns::CLUSTER_DOMAIN).as_str().into(),
        preferred_namespace: c.text(&dns::PREFERRED_NAMESPACE).unwrap_or_default().into(),
        ttl: c.read(&dns::DNS_TTL),
        cache_entries: c.read(&dns::DNS_CACHE_ENTRIES),
        ipv6,
        mark,
        proc: host_proc(c, environment),
    }
}

/// The procfs that shows the host's processes.
pub(super) fn host_proc(c: &Checker<'_>, environment: &Environment) -> PathBuf {
    c.path(&pods::PROC).unwrap_or_else(|| environment.host_proc())
}

/// Where certificates come from: the directory, if one is set, else Istio's CA.
pub(super) fn ca_source(c: &mut Checker<'_>, environment: &Environment, proxy: &ProxyConfig) -> CaSource {
    if let Some(dir) = c.path(&certificates::CA_DIR) {
        return CaSource::Builtin(dir);
    }
    let server = Server {
        setting: &certificates::CA_ADDRESS,
        address: c.text(&certificates::CA_ADDRESS).or(proxy.discovery_address.as_deref()),
        roots: c.read(&certificates::CA_ROOT_CA),
        alt_host: c.text(&certificates::ALT_CA_HOSTNAME),
        header_prefix: CA_HEADER,
    };
    CaSource::Istio(Box::new(rpc_config(c, environment, server)))
}

/// Settings of a server of the control plane.
struct Server<'a> {
    /// The setting that gives its address.
    setting: &'static Setting<Custom<Uri>>,
    address: Option<&'a str>,
    roots: String,
    alt_host: Option<&'a str>,
    header_prefix: &'static str,
}

fn rpc_config(c: &mut Checker<'_>, environment: &Environment, server: Server<'_>) -> rpc::Config {
    let host = if environment.is_in_cluster() { "istiod.istio-system.svc" } else { "localhost" };
    let default: Uri = format!("https://{host}:{}", ports::ISTIOD).parse().unwrap_or_default();
    let mut headers = Vec::new();
    for (name, value) in environment.below(server.header_prefix) {
        match (HeaderName::try_from(name), HeaderValue::try_from(value)) {
            (Ok(name), Ok(mut value)) => {
                value.set_sensitive(true);
                headers.push((name, value));
            }
            // The value may be a secret and is not repeated.
            _ => c.faults.push(format!("{}{name}: is not an HTTP header", server.header_prefix)),
        }
    }
    rpc::Config {
        address: c.parse(server.setting, server.address).unwrap_or(default),
        roots: parse::roots(&server.roots),
        alt_host: server.alt_host.map(str::to_owned),
        token: parse::token(&c.read(&certificates::AUTH_TOKEN)),
        cluster_id: cluster_id(c, environment),
        headers,
    }
}
