//! The parts of the environment that are not settings with one name each: prefixes, refused variables, Istio's mesh
//! configuration, and where the host's procfs is mounted. Besides the command line (`args.rs`) and `plugin.rs`,
//! the only file that reads the environment.

use super::checker::Checker;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Istio's mesh configuration, whose `defaultConfig` is read.
pub(super) const MESH_CONFIG: &str = "./etc/istio/config/mesh";

/// Where the manifests mount the host's procfs.
const HOST_PROC: &str = "/host/proc";

/// Headers of requests to the control plane.
pub(super) const XDS_HEADER: &str = "XDS_HEADER_";
/// Headers of requests to the CA.
pub(super) const CA_HEADER: &str = "CA_HEADER_";
/// Metadata for the control plane, as text.
pub(super) const META: &str = "ISTIO_META_";
/// Metadata for the control plane, as JSON.
pub(super) const META_JSON: &str = "ISTIO_METAJSON_";

/// Prefixes of variables with names of the user's choice, and what such a variable does.
pub const PREFIXES: [(&str, &str); 4] = [
    (XDS_HEADER, "adds a header to every request to the control plane; its value is shown nowhere"),
    (CA_HEADER, "adds a header to every request to the CA; its value is shown nowhere"),
    (META, "adds metadata that is sent to the control plane"),
    (META_JSON, "adds metadata that is sent to the control plane, read as JSON"),
];

/// A variable of ztunnel that may ask for something that culvert does not do.
#[derive(Clone, Copy, Debug)]
pub struct Refused {
    /// The variable.
    pub variable: &'static str,
    /// The only accepted value. Empty: the variable must not be set.
    pub accepted: &'static str,
    /// Why, or what to use instead.
    pub instead: &'static str,
}

/// Variables of ztunnel that are refused where they ask for something that culvert does not do.
pub const REFUSED: [Refused; 4] = [
    Refused { variable: "ENABLE_PROXY", accepted: "true", instead: "the daemon always carries connections" },
    Refused { variable: "FAKE_CA", accepted: "false", instead: "use CULVERT_CA_DIR for a CA without Istio" },
    Refused { variable: "LOCAL_XDS", accepted: "", instead: "use LOCAL_XDS_PATH" },
    Refused { variable: "TLS12_ENABLED", accepted: "false", instead: "TLS 1.3 is the only version" },
];

/// The environment of a process, and what it can see of its machine.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    variables: BTreeMap<String, String>,
    mesh_config: Option<Result<String, String>>,
    /// The host's procfs, where one is mounted beside the container's own.
    host_proc: Option<PathBuf>,
}

impl Environment {
    /// The environment of this process.
    pub fn of_process() -> Self {
        // A variable that is not Unicode is no setting.
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

    /// Only what belongs to the machine, for settings that another process has read from its own environment.
    pub fn of_machine() -> Self {
        Self { host_proc: Self::of_process().host_proc, ..Self::default() }
    }

    /// A variable, unless it is empty.
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.variables.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// Whether a variable is set, to whatever value.
    pub(super) fn is_set(&self, name: &str) -> bool {
        self.variables.contains_key(name)
    }

    /// Whether the process runs in a pod of a cluster.
    pub(super) fn is_in_cluster(&self) -> bool {
        self.variables.contains_key("KUBERNETES_SERVICE_HOST")
    }

    /// Variables with a prefix, by the rest of their names.
    pub(super) fn below(&self, prefix: &str) -> impl Iterator<Item = (&str, &str)> {
        self.variables.iter().filter_map(move |(name, value)| Some((name.strip_prefix(prefix)?, value.as_str())))
    }

    /// The text of Istio's mesh configuration, where there is one, or why it cannot be read.
    pub(super) fn mesh_config(&self) -> Option<Result<&str, &str>> {
        self.mesh_config.as_ref().map(|read| read.as_deref().map_err(String::as_str))
    }

    /// The procfs that shows the host's processes.
    pub(super) fn host_proc(&self) -> PathBuf {
        self.host_proc.clone().unwrap_or_else(|| "/proc".into())
    }

    /// Adds a fault for each variable that asks for something that culvert does not do.
    pub(super) fn check_refused(&self, c: &mut Checker<'_>) {
        for Refused { variable, accepted, instead } in REFUSED {
            if let Some(value) = self.get(variable).filter(|value| *value != accepted) {
                c.faults.push(format!("{variable}: {value:?} is not supported: {instead}"));
            }
        }
    }
}

#[cfg(test)]
impl From<&[(&str, &str)]> for Environment {
    fn from(variables: &[(&str, &str)]) -> Self {
        let own = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        Self { variables: variables.iter().map(own).collect(), mesh_config: None, host_proc: None }
    }
}
