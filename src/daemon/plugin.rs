//! `culvert cni`: the CNI plugin, which container runtimes run for each pod. It asks the daemon, decides nothing
//! itself, and fails while no daemon runs, so that no pod that should be captured starts uncaptured.

use crate::config::plugin::Call;
use crate::node::cni::install::OURS;
use crate::node::cni::{self, AskError, PluginRequest, Verb};
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Write};
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Supported versions of the CNI specification.
const VERSIONS: [&str; 6] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0", "0.2.0"];
/// The version that a configuration without one means.
const DEFAULT_VERSION: &str = "1.0.0";
/// Size limit of a configuration, in bytes.
const CONFIGURATION_MAX: u64 = 4 << 20;

/// Name of the control plane's Deployment, in the namespace of the daemon.
const CONTROL: &str = "culvert-control";

// Error codes (CNI specification, section 5).
const INVALID_ENVIRONMENT: u64 = 4;
const CANNOT_DECODE: u64 = 6;
const INVALID_CONFIGURATION: u64 = 7;
const TRY_AGAIN_LATER: u64 = 11;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Configuration {
    #[serde(default)]
    cni_version: Option<String>,
    #[serde(default)]
    socket: PathBuf,
    #[serde(default)]
    exclude_namespaces: BTreeSet<String>,
    #[serde(default)]
    own_namespace: String,
    #[serde(default)]
    own_name: String,
    #[serde(default)]
    node: String,
    #[serde(default)]
    prev_result: Option<Value>,
}

struct Refusal {
    code: u64,
    message: String,
}

/// Carries out one call of the runtime.
pub(super) fn run(call: &Call) -> ExitCode {
    let mut text = String::new();
    let read = std::io::stdin().take(CONFIGURATION_MAX).read_to_string(&mut text);
    let parsed = read.map_err(|error| error.to_string()).and_then(|_| {
        serde_json::from_str::<Configuration>(&text).map_err(|error| format!("the configuration is not valid: {error}"))
    });
    let version = match &parsed {
        Ok(configuration) => configuration.cni_version.clone(),
        // VERSION may come without a configuration.
        Err(_) => None,
    };
    let version = version.unwrap_or_else(|| DEFAULT_VERSION.into());
    if call.command == "VERSION" {
        return print(&json!({"cniVersion": version, "supportedVersions": VERSIONS}), ExitCode::SUCCESS);
    }
    let result = match parsed {
        Err(message) => Err(Refusal { code: CANNOT_DECODE, message }),
        Ok(configuration) => perform(call, &configuration),
    };
    match result {
        Ok(Some(value)) => print(&value, ExitCode::SUCCESS),
        Ok(None) => ExitCode::SUCCESS,
        Err(Refusal { code, message }) => {
            let message = format!("culvert: {message}");
            print(&json!({"cniVersion": version, "code": code, "msg": message}), ExitCode::FAILURE)
        }
    }
}

fn print(value: &Value, code: ExitCode) -> ExitCode {
    match writeln!(std::io::stdout(), "{value}") {
        Ok(()) => code,
        Err(_) => ExitCode::FAILURE,
    }
}

fn perform(call: &Call, configuration: &Configuration) -> Result<Option<Value>, Refusal> {
    let invalid = |code, message: &str| Refusal { code, message: message.to_owned() };
    if configuration.socket.as_os_str().is_empty() {
        return Err(invalid(INVALID_CONFIGURATION, "the configuration names no socket"));
    }
    let (verb, needs_pod) = match call.command.as_str() {
        "ADD" => (Verb::Add, true),
        "DEL" => (Verb::Del, false),
        "CHECK" => (Verb::Check, true),
        "STATUS" => (Verb::Status, false),
        "GC" => return Ok(None),
        other => return Err(invalid(INVALID_ENVIRONMENT, &format!("CNI_COMMAND {other:?} is not known"))),
    };
    if needs_pod && (call.pod.is_empty() || call.namespace.is_empty()) {
        // The container is not a pod.
        return Ok(result(verb, configuration));
    }
    let netns = match (&call.netns, verb) {
        (Some(path), Verb::Add) => Some(
            File::open(path)
                .map_err(|error| invalid(INVALID_ENVIRONMENT, &format!("CNI_NETNS {}: {error}", path.display())))?,
        ),
        (Some(path), _) => File::open(path).ok(),
        (None, Verb::Add) => return Err(invalid(INVALID_ENVIRONMENT, "CNI_NETNS is not set")),
        (None, _) => None,
    };
    // STATUS always succeeds: while the daemon is away, the node must still be able to start the daemon's own pod. ADD
    // fails instead.
    if !configuration.is_exempt(call) && verb != Verb::Status {
        let request = PluginRequest {
            verb,
            name: call.pod.clone(),
            namespace: call.namespace.clone(),
            uid: call.uid.clone(),
            ips: configuration.addresses(),
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| invalid(TRY_AGAIN_LATER, &error.to_string()))?;
        let asked = runtime.block_on(cni::ask(&configuration.socket, &request, netns.as_ref()));
        match (verb, asked) {
            // Removing a pod must not wait for a daemon that is away. The daemon detects by itself that the pod is
            // gone.
            (Verb::Del, _) | (_, Ok(())) => {}
            (_, Err(AskError::Refused(message))) => return Err(Refusal { code: TRY_AGAIN_LATER, message }),
            (_, Err(AskError::Away(why))) => {
                return Err(Refusal { code: TRY_AGAIN_LATER, message: configuration.away(&why) });
            }
        }
    }
    Ok(result(verb, configuration))
}

/// The result of a call. Results of earlier plugins in the chain are passed on.
fn result(verb: Verb, configuration: &Configuration) -> Option<Value> {
    let version = configuration.cni_version.as_deref().unwrap_or(DEFAULT_VERSION);
    (verb == Verb::Add).then(|| configuration.prev_result.clone().unwrap_or_else(|| json!({"cniVersion": version})))
}

impl Configuration {
    /// Whether a pod is never captured and so need not wait for the daemon. The daemon's own pods are exempt, because
    /// they would wait for themselves, and so are those of the control plane, because daemons wait for it.
    fn is_exempt(&self, call: &Call) -> bool {
        let named = |name: &str| call.pod.strip_prefix(name).is_some_and(|rest| rest.starts_with('-'));
        let own = call.namespace == self.own_namespace
            && !self.own_name.is_empty()
            && (named(&self.own_name) || named(CONTROL));
        own || self.exclude_namespaces.contains(&call.namespace)
    }

    /// The text of the pod's event while no daemon answers: on which node, since when, and what can be done.
    fn away(&self, why: &str) -> String {
        let (namespace, set, socket) = (&self.own_namespace, &self.own_name, &self.socket);
        let (of_node, on_node) = match self.node.as_str() {
            "" => ("of this node".to_owned(), String::new()),
            node => (format!("of node {node}"), format!(" --field-selector spec.nodeName={node}")),
        };
        let since = match cni::last_seen(socket) {
            Some((at, age)) => {
                let (at, age) = (humantime::format_rfc3339_seconds(at), Duration::from_secs(age.as_secs()));
                format!("it was last seen at {at}, {} ago", humantime::format_duration(age))
            }
            None => "it has not been seen since the node started".to_owned(),
        };
        format!(
            "the daemon {of_node} {why}; {since}. New pods of the node wait for it, because it decides which of them are captured: see \
             kubectl -n {namespace} get pods{on_node}. Pods of namespaces in EXCLUDE_NAMESPACES of DaemonSet {set} (chart: \
             excludeNamespaces) do not wait; while no daemon runs, add the namespace to excludeNamespaces of {OURS} on the node as well"
        )
    }

    fn addresses(&self) -> Vec<IpAddr> {
        let ips = self.prev_result.iter().filter_map(|result| result["ips"].as_array()).flatten();
        let address = |ip: &Value| ip["address"].as_str()?.split('/').next()?.parse().ok();
        ips.filter_map(address).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_that_the_daemon_needs_do_not_wait_for_it() {
        let text = r#"{"excludeNamespaces": ["kube-system"], "ownNamespace": "istio-system", "ownName": "ztunnel"}"#;
        let configuration: Configuration = serde_json::from_str(text).unwrap();
        for (namespace, pod, exempt) in [
            ("istio-system", "ztunnel-x2k9p", true),
            ("istio-system", "culvert-control-5c9d7-x2k9p", true),
            ("istio-system", "culvert-control", false),
            ("istio-system", "culvert-controller-x2k9p", false),
            ("istio-system", "web-1", false),
            ("shop", "ztunnel-x2k9p", false),
            ("shop", "culvert-control-5c9d7-x2k9p", false),
            ("kube-system", "web-1", true),
        ] {
            let call =
                Call { command: "ADD".into(), netns: None, pod: pod.into(), namespace: namespace.into(), uid: None };
            assert_eq!(configuration.is_exempt(&call), exempt, "{namespace}/{pod}");
        }
        // Without a name of the daemon nothing says which namespace is culvert's.
        let unnamed: Configuration = serde_json::from_str(r#"{"ownNamespace": ""}"#).unwrap();
        let call = Call {
            command: "ADD".into(),
            netns: None,
            pod: "culvert-control-1".into(),
            namespace: String::new(),
            uid: None,
        };
        assert!(!unnamed.is_exempt(&call));
    }
}
