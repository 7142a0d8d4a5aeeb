//! The settings of a node in an Istio mesh: the control plane, the CA, who we are to them. Words → checked settings; the
//! environment's open-ended parts (`ISTIO_META_*`, `XDS_HEADER_*`, `CA_HEADER_*`) and Istio's proxy configuration.

use super::args::NodeArgs;
use super::check::{Checker, dns_ttl, integer};
use super::{CaSource, MeshSource, OwnPod};
use crate::control::xds;
use crate::dns;
use crate::ports;
use crate::rpc::{self, Token, tls::Roots};
use crate::task::files::from_yaml;
use http::header::HeaderName;
use http::{HeaderValue, Uri};
use serde::Deserialize;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

/// Age of a state file beyond which it is not used: the life of a certificate, without which its pods could prove nothing anyway.
const STATE_MAX_AGE: Duration = Duration::from_secs(24 * 3600);

/// Where Istio's chart mounts the control plane's roots.
const ROOTS: &str = "./var/run/secrets/istio/root-cert.pem";
/// Where Istio's chart mounts the token.
const TOKEN: &str = "./var/run/secrets/tokens/istio-token";
/// Mesh configuration, of which `defaultConfig` is read.
const MESH_CONFIG: &str = "./etc/istio/config/mesh";

/// Where our manifests mount the host's procfs.
const HOST_PROC: &str = "/host/proc";

/// Variables of the reference that ask for something that is not there, and the value that does not.
const NOT_SUPPORTED: [(&str, &str, &str); 6] = [
    ("PROXY_MODE", "shared", "one daemon serves all pods of a node"),
    ("ENABLE_PROXY", "true", "there is nothing else that the daemon could do"),
    ("FAKE_CA", "false", "use CULVERT_CA_DIR for a CA without Istio"),
    ("LOCAL_XDS", "", "use LOCAL_XDS_PATH"),
    ("UNSTABLE_ENABLE_SOCKS5", "false", "SOCKS is not spoken"),
    ("TLS12_ENABLED", "false", "only TLS 1.3 is spoken"),
];

/// The parts of the environment that are no settings of their own.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    variables: BTreeMap<String, String>,
    mesh_config: Option<Result<String, String>>,
    /// The host's procfs, where one is mounted beside our own.
    host_proc: Option<PathBuf>,
}

impl Environment {
    /// Of this process.
    pub fn of_process() -> Self {
        // What is not Unicode is no setting of ours.
        let variables = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .collect();
        let mesh_config = match std::fs::read_to_string(MESH_CONFIG) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            read => Some(read.map_err(|error| error.to_string())),
        };
        let host_proc = Some(PathBuf::from(HOST_PROC)).filter(|path| path.join("1").is_dir());
        Self { variables, mesh_config, host_proc }
    }

    /// Of this machine alone, for settings that another process has read from its own.
    pub fn of_machine() -> Self {
        Self { host_proc: Self::of_process().host_proc, ..Self::default() }
    }

    fn below(&self, prefix: &str) -> impl Iterator<Item = (&str, &str)> {
        self.variables.iter().filter_map(move |(name, value)| Some((name.strip_prefix(prefix)?, value.as_str())))
    }
}

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

/// Reads the mesh configuration and `PROXY_CONFIG`, of which the latter wins field by field.
pub(super) fn proxy_config(c: &mut Checker, args: &NodeArgs, environment: &Environment) -> ProxyConfig {
    let mut read = |name: &str, text: Option<&String>, parse: &dyn Fn(&str) -> Result<ProxyConfig, String>| {
        let Some(text) = text.filter(|text| !text.trim().is_empty()) else { return ProxyConfig::default() };
        parse(text).unwrap_or_else(|error| {
            c.faults.push(format!("{name}: {error}"));
            ProxyConfig::default()
        })
    };
    let (mesh_text, unreadable) = match &environment.mesh_config {
        Some(Ok(text)) => (Some(text), None),
        Some(Err(error)) => (None, Some(format!("{MESH_CONFIG}: {error}"))),
        None => (None, None),
    };
    let mesh = read(MESH_CONFIG, mesh_text, &|text| from_yaml::<MeshConfig>(text).map(|mesh| mesh.default_config));
    let own = read("PROXY_CONFIG (--proxy-config)", args.proxy_config.as_ref(), &|text| from_yaml(text));
    c.faults.extend(unreadable);
    ProxyConfig {
        discovery_address: own.discovery_address.or(mesh.discovery_address),
        proxy_admin_port: own.proxy_admin_port.or(mesh.proxy_admin_port),
        stats_port: own.stats_port.or(mesh.stats_port),
        concurrency: own.concurrency.or(mesh.concurrency),
        proxy_metadata: mesh.proxy_metadata.into_iter().chain(own.proxy_metadata).collect(),
    }
}

/// Names what the environment asks for and is not there.
pub(super) fn not_supported(c: &mut Checker, environment: &Environment) {
    for (name, fine, instead) in NOT_SUPPORTED {
        let asked = environment.variables.get(name).filter(|value| !value.is_empty() && *value != fine);
        if let Some(value) = asked {
            c.faults.push(format!("{name}: {value:?} is not supported: {instead}"));
        }
    }
}

/// The procfs that shows the host's processes.
pub(super) fn host_proc(environment: &Environment) -> PathBuf {
    environment.host_proc.clone().unwrap_or_else(|| "/proc".into())
}

/// Name of this node's cluster.
pub(super) fn cluster_id(args: &NodeArgs, environment: &Environment) -> String {
    said_cluster_id(args, environment).unwrap_or_else(|| "Kubernetes".into())
}

/// The same, where somebody said it.
pub(super) fn said_cluster_id(args: &NodeArgs, environment: &Environment) -> Option<String> {
    let meta = environment.variables.get("ISTIO_META_CLUSTER_ID").filter(|id| !id.is_empty());
    meta.or(args.cluster_id.as_ref().filter(|id| !id.is_empty())).cloned()
}

/// The daemon's own pod, if all of it is said.
pub(super) fn own_pod(args: &NodeArgs) -> Option<OwnPod> {
    let said = |value: &Option<String>| value.clone().filter(|value| !value.is_empty());
    let (name, namespace) = (said(&args.pod_name)?, said(&args.pod_namespace)?);
    Some(OwnPod { name, namespace, service_account: said(&args.service_account)? })
}

/// Where facts about the mesh come from: the file, if there is one, else the control plane.
pub(super) fn mesh_source(
    c: &mut Checker,
    args: &NodeArgs,
    environment: &Environment,
    proxy: &ProxyConfig,
) -> MeshSource {
    if let Some(path) = args.mesh_file.as_ref().filter(|path| !path.is_empty()) {
        if args.xds_address.as_ref().is_some_and(|address| !address.is_empty()) {
            c.faults
                .push("LOCAL_XDS_PATH (--mesh-file): is set beside XDS_ADDRESS; facts come from one of them".into());
        }
        return MeshSource::File(path.into());
    }
    if args.xds_address.as_deref() == Some("") {
        c.faults
            .push("XDS_ADDRESS (--xds-address): is empty, and LOCAL_XDS_PATH is not set: there are no facts".into());
    }
    let address = args.xds_address.as_ref().or(proxy.discovery_address.as_ref());
    let rpc = rpc_config(
        c,
        args,
        environment,
        &Plane {
            variable: "XDS_ADDRESS",
            address,
            roots: args.xds_root_ca.as_ref(),
            alt_host: args.alt_xds_hostname.as_ref(),
            header_prefix: "XDS_HEADER_",
        },
    );
    let (pod, namespace) = (text(&args.pod_name), text(&args.pod_namespace));
    let ip = args.instance_ip.clone().filter(|ip| !ip.is_empty()).unwrap_or_else(|| "1.1.1.1".into());
    if ip.parse::<std::net::IpAddr>().is_err() {
        c.faults.push(format!("INSTANCE_IP (--instance-ip): {ip:?} is not valid: expected an IP address"));
    }
    let on_demand = c.read("XDS_ON_DEMAND", args.xds_on_demand.as_ref(), false, super::check::boolean);
    let mut metadata = Map::new();
    for (name, value) in
        [("NAME", &pod), ("NAMESPACE", &namespace), ("INSTANCE_IPS", &ip), ("NODE_NAME", &text(&args.node_name))]
    {
        metadata.insert(name.into(), Value::from(value.clone()));
    }
    for (name, value) in &proxy.proxy_metadata {
        let name = name.strip_prefix("ISTIO_META_").unwrap_or(name);
        metadata.insert(name.into(), Value::from(value.clone()));
    }
    metadata.extend(environment.below("ISTIO_META_").map(|(name, value)| (name.to_owned(), Value::from(value))));
    for (name, value) in environment.below("ISTIO_METAJSON_") {
        match serde_json::from_str(value) {
            Ok(value) => drop(metadata.insert(name.to_owned(), value)),
            Err(error) => c.faults.push(format!("ISTIO_METAJSON_{name}: is not JSON: {error}")),
        }
    }
    let node_id = format!("ztunnel~{ip}~{pod}.{namespace}~{namespace}.svc.cluster.local");
    let state_file = args.state_file.as_ref().filter(|path| !path.is_empty()).map(PathBuf::from);
    let age = args.state_file_max_age.as_ref();
    let state_max_age = c.read("CULVERT_STATE_FILE_MAX_AGE", age, STATE_MAX_AGE, super::check::duration);
    MeshSource::Xds(Box::new(xds::Config { rpc, node_id, metadata, on_demand, state_file, state_max_age }))
}

/// DNS of pods. Whether it is taken is said by the reference's metadata, in the environment or in the proxy configuration.
pub(super) fn dns(
    c: &mut Checker,
    args: &NodeArgs,
    environment: &Environment,
    proxy: &ProxyConfig,
    socket: (bool, u32),
) -> dns::Config {
    let said = |name: &str| {
        let own = environment.variables.get(&format!("ISTIO_META_{name}"));
        let of_proxy = proxy.proxy_metadata.get(name).or(proxy.proxy_metadata.get(&format!("ISTIO_META_{name}")));
        own.or(of_proxy).filter(|value| !value.is_empty()).cloned()
    };
    let capture = args.dns_capture.clone().filter(|value| !value.is_empty()).or(said("DNS_CAPTURE"));
    if let Some(address) = said("DNS_PROXY_ADDR").filter(|address| *address != format!("localhost:{}", ports::DNS)) {
        c.faults
            .push(format!("ISTIO_META_DNS_PROXY_ADDR: {address:?} is not supported: it is localhost:{}", ports::DNS));
    }
    let domain = |text: &str| {
        let bare = text.trim_matches('.').to_ascii_lowercase();
        let fine = |label: &str| !label.is_empty() && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        if bare.split('.').all(fine) { Ok(bare.into()) } else { Err("a domain such as cluster.local".to_owned()) }
    };
    let (ipv6, mark) = socket;
    dns::Config {
        // As the reference reads it: anything but true is no.
        capture: capture.is_none_or(|value| value.eq_ignore_ascii_case("true")),
        cluster_domain: c.read("CLUSTER_DOMAIN", args.cluster_domain.as_ref(), "cluster.local".into(), domain),
        preferred_namespace: text(&args.preferred_namespace).as_str().into(),
        ttl: c.read("CULVERT_DNS_TTL", args.dns_ttl.as_ref(), Duration::from_secs(30), dns_ttl),
        cache_entries: c.read("CULVERT_DNS_CACHE_ENTRIES", args.dns_cache.as_ref(), 256, integer(0..=100_000)),
        ipv6,
        mark,
        proc: args.proc.as_ref().filter(|p| !p.is_empty()).map_or_else(|| host_proc(environment), PathBuf::from),
    }
}

/// Where certificates come from: the directory, if there is one, else Istio's CA.
pub(super) fn ca_source(c: &mut Checker, args: &NodeArgs, environment: &Environment, proxy: &ProxyConfig) -> CaSource {
    if let Some(dir) = args.ca_dir.as_ref().filter(|dir| !dir.is_empty()) {
        return CaSource::Builtin(dir.into());
    }
    let address = args.ca_address.as_ref().filter(|address| !address.is_empty());
    CaSource::Istio(Box::new(rpc_config(
        c,
        args,
        environment,
        &Plane {
            variable: "CA_ADDRESS",
            address: address.or(proxy.discovery_address.as_ref()),
            roots: args.ca_root_ca.as_ref(),
            alt_host: args.alt_ca_hostname.as_ref(),
            header_prefix: "CA_HEADER_",
        },
    )))
}

struct Plane<'a> {
    variable: &'static str,
    address: Option<&'a String>,
    roots: Option<&'a String>,
    alt_host: Option<&'a String>,
    header_prefix: &'static str,
}

fn rpc_config(c: &mut Checker, args: &NodeArgs, environment: &Environment, plane: &Plane<'_>) -> rpc::Config {
    let in_cluster = environment.variables.contains_key("KUBERNETES_SERVICE_HOST");
    let host = if in_cluster { "istiod.istio-system.svc" } else { "localhost" };
    let default: Uri = format!("https://{host}:{}", ports::ISTIOD).parse().unwrap_or_default();
    let mut headers = Vec::new();
    for (name, value) in environment.below(plane.header_prefix) {
        match (HeaderName::try_from(name), HeaderValue::try_from(value)) {
            (Ok(name), Ok(mut value)) => {
                value.set_sensitive(true);
                headers.push((name, value));
            }
            // Its value may be a secret, and is not repeated.
            _ => c.faults.push(format!("{}{name}: is no HTTP header", plane.header_prefix)),
        }
    }
    rpc::Config {
        address: c.read(plane.variable, plane.address, default, address),
        roots: roots(plane.roots),
        alt_host: plane.alt_host.cloned().filter(|host| !host.is_empty()),
        token: token(args.auth_token.as_ref()),
        cluster_id: cluster_id(args, environment),
        headers,
    }
}

fn text(value: &Option<String>) -> String {
    value.clone().unwrap_or_default()
}

/// `https://host:port`; the scheme may be left out, and nothing but TLS is spoken: the token goes over this connection.
fn address(text: &str) -> Result<Uri, String> {
    let expected = || "https://host:port, or host:port".to_owned();
    let whole = if text.contains("://") { text.to_owned() } else { format!("https://{text}") };
    let uri: Uri = whole.parse().map_err(|_| expected())?;
    let bare = matches!(uri.path(), "" | "/") && uri.query().is_none();
    let fine = uri.scheme_str() == Some("https") && uri.host().is_some_and(|host| !host.is_empty()) && bare;
    if fine { Ok(uri) } else { Err(expected()) }
}

/// What the text is, is said by its form, never by what exists at the moment: a file may be mounted later.
fn roots(value: Option<&String>) -> Roots {
    match value.map(|value| value.trim()).filter(|value| !value.is_empty()) {
        None => Roots::File(ROOTS.into()),
        Some("SYSTEM") => Roots::System,
        Some(pem) if pem.starts_with("-----BEGIN") => Roots::Inline(pem.to_owned()),
        Some(path) => Roots::File(path.into()),
    }
}

/// A path has a slash, a token (a JWT) has none.
fn token(value: Option<&String>) -> Token {
    match value.map(|value| value.trim()).filter(|value| !value.is_empty()) {
        None => Token::File(TOKEN.into()),
        Some(path) if path.contains('/') => Token::File(path.into()),
        Some(literal) => Token::Literal(literal.to_owned()),
    }
}

#[cfg(test)]
impl From<&[(&str, &str)]> for Environment {
    fn from(variables: &[(&str, &str)]) -> Self {
        let own = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        Self { variables: variables.iter().map(own).collect(), mesh_config: None, host_proc: None }
    }
}
