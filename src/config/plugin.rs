//! The parameters that the container runtime passes to a CNI plugin in its environment (CNI specification 1.1, section
//! 2).

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;

/// One call of the plugin.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Call {
    /// `ADD`, `DEL`, `CHECK`, `STATUS`, `GC` or `VERSION`.
    pub command: String,
    /// The container's network namespace. It may be missing for `DEL`.
    pub netns: Option<PathBuf>,
    /// Name of the pod.
    pub pod: String,
    /// Its namespace.
    pub namespace: String,
    /// Its uid, where the runtime passes one.
    pub uid: Option<String>,
}

impl Call {
    /// The call that this process was started for; `None` if no container runtime started it as a plugin. Runtimes pass
    /// no arguments.
    pub fn of_process() -> Option<Self> {
        let unicode = |(name, value): (OsString, OsString)| Some((name.into_string().ok()?, value.into_string().ok()?));
        let variables: BTreeMap<String, String> = std::env::vars_os().filter_map(unicode).collect();
        let variable = |name: &str| variables.get(name).filter(|value| !value.is_empty()).cloned();
        Some(Self::read(&variable("CNI_COMMAND")?, variable("CNI_NETNS"), &variable("CNI_ARGS").unwrap_or_default()))
    }

    fn read(command: &str, netns: Option<String>, args: &str) -> Self {
        let args: BTreeMap<&str, &str> = args.split(';').filter_map(|pair| pair.split_once('=')).collect();
        let arg = |name: &str| args.get(name).filter(|value| !value.is_empty()).map(|value| (*value).to_owned());
        Self {
            command: command.to_owned(),
            netns: netns.map(PathBuf::from),
            pod: arg("K8S_POD_NAME").unwrap_or_default(),
            namespace: arg("K8S_POD_NAMESPACE").unwrap_or_default(),
            uid: arg("K8S_POD_UID"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pod_is_read_from_the_runtimes_arguments() {
        let args = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=a-0;K8S_POD_INFRA_CONTAINER_ID=ab;K8S_POD_UID=";
        let call = Call::read("ADD", Some("/run/netns/x".into()), args);
        assert_eq!((call.pod.as_str(), call.namespace.as_str(), call.uid), ("a-0", "shop", None));
        assert_eq!(Call::read("DEL", None, "").pod, "");
    }
}
