//! Settings of where mesh facts come from.

use crate::config::MeshSource;
use crate::config::kind::{Custom, File, Switch, Text, Time};
use crate::config::parse;
use crate::config::setting::{Described, Setting};
use crate::control::xds;
use http::Uri;
use serde_json::{Value, json};

/// Where Istio's chart mounts the root certificates of the control plane.
pub(super) const ROOT_CERTIFICATES: &str = "./var/run/secrets/istio/root-cert.pem";

settings! {
    MESH_FILE: File = Setting::new("mesh-file", "LOCAL_XDS_PATH", File)
        .or_else("facts come from the control plane")
        .help("YAML file of workloads, services and policies. It takes the place of the control plane, and the daemon follows its changes.")
        .shown("localXdsPath", |c| match &c.mesh {
            MeshSource::File(path) => json!(path.display().to_string()),
            MeshSource::Xds(_) => Value::Null,
        });
    EGRESS_FILE: File = Setting::new("egress-file", "CULVERT_EGRESS_FILE", File)
        .or_else("every destination outside the mesh is allowed")
        .help(
            "YAML file of egress policies beside a control plane, which announces none: the section `egress` of a mesh file, and nothing \
             else. The daemon follows its changes. It must exist and be valid when the daemon starts; afterwards the last good version stays \
             in force. With a mesh file, write the policies there.",
        )
        .shown("egressFile", |c| json!(c.egress_file.as_ref().map(|path| path.display().to_string())));
    XDS_ADDRESS: Custom<Uri> = Setting::new("xds-address", "XDS_ADDRESS", parse::ADDRESS)
        .or_else("https://istiod.istio-system.svc:15012 in a cluster, https://localhost:15012 elsewhere")
        .help("Address of the control plane. The connection always uses TLS.")
        .shown("xdsAddress", |c| json!(c.xds().map(|xds| xds.rpc.address.to_string())));
    XDS_ROOT_CA: Text = Setting::new("xds-root-ca", "XDS_ROOT_CA", Text)
        .or(ROOT_CERTIFICATES)
        .help("Root certificates that the control plane is verified against: a file, which may appear late, `SYSTEM`, or PEM text.");
    ALT_XDS_HOSTNAME: Text = Setting::new("alt-xds-hostname", "ALT_XDS_HOSTNAME", Text)
        .help("Another host name that the control plane's certificate may have.");
    XDS_ON_DEMAND: Switch = Setting::new("xds-on-demand", "XDS_ON_DEMAND", Switch)
        .or("false")
        .help(
            "Ask the control plane for addresses when they are needed, instead of receiving all of them. A service with a range of \
             addresses is then found by an address inside the range only if the range is /8 to /31, or in IPv6 /16 to /64, /80, /96, \
             /104, /112, /120 or /124. The log names services with other ranges when they are announced; connections to such a range may \
             be carried as if the service did not exist. Addresses that were in use before a range was announced are found in it within \
             a minute.",
        )
        .shown("xdsOnDemand", |c| json!(c.xds().is_some_and(|xds| xds.on_demand)));
    STATE_FILE: File = Setting::new("state-file", "CULVERT_STATE_FILE", File)
        .or_else("no facts are kept")
        .help(
            "File (mode 0600) in which the daemon keeps the last known mesh facts, and from which it starts while the control plane is \
             unreachable. A second file beside it, with `.pods` added to the name, keeps the enrolled pods for a start while the Kubernetes \
             API is unreachable.",
        )
        .shown("stateFile", |c| json!(c.xds().and_then(|xds| xds.state_file.as_ref()).map(|path| path.display().to_string())));
    STATE_FILE_MAX_AGE: Time = Setting::new("state-file-max-age", "CULVERT_STATE_FILE_MAX_AGE", Time::ANY)
        .or("24h")
        .help("Age beyond which the state file is not used; the log then says so. An address may belong to another pod by then.");
    PROXY_CONFIG: Text = Setting::new("proxy-config", "PROXY_CONFIG", Text)
        .help(
            "Istio's proxy configuration, in YAML or JSON. The daemon reads `discoveryAddress`, `proxyAdminPort`, `statsPort`, \
             `concurrency` and `proxyMetadata`; those that are missing come from `defaultConfig` in Istio's mesh configuration, \
             `./etc/istio/config/mesh`.",
        )
        .secret()
        .shown("proxyMetadata", |c| json!(c.xds().map(|xds: &xds::Config| &xds.metadata)));
}
