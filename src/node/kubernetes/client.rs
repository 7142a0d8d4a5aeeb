//! The client of the Kubernetes API.

use super::watch::WATCH_SECONDS;
use crate::node::config::KubernetesConfig;
use crate::telemetry::log::with_causes;
use std::path::Path;
use std::time::Duration;

/// Makes the client, from the kubeconfig or from the account of the daemon's own pod. The error names the setting.
pub async fn client(config: &KubernetesConfig) -> Result<kube::Client, String> {
    client_with(config.kubeconfig.as_deref(), Duration::from_secs(u64::from(WATCH_SECONDS) + 10)).await
}

/// The same, with a limit on silence that must be longer than any watch.
pub async fn client_with(kubeconfig: Option<&Path>, read_timeout: Duration) -> Result<kube::Client, String> {
    let mut settings = match kubeconfig {
        Some(path) => {
            let read = kube::config::Kubeconfig::read_from(path).map_err(|error| with_causes(&error));
            let options = kube::config::KubeConfigOptions::default();
            let settings = match read {
                Ok(file) => kube::Config::from_custom_kubeconfig(file, &options).await.map_err(|e| with_causes(&e)),
                Err(error) => Err(error),
            };
            settings.map_err(|error| format!("KUBECONFIG {}: {error}", path.display()))?
        }
        None => kube::Config::incluster_env().map_err(|error| {
            format!("not in a pod of a cluster ({}), and KUBECONFIG is not set", with_causes(&error))
        })?,
    };
    settings.connect_timeout = Some(Duration::from_secs(5));
    // It ends connections to a server that accepts them and sends nothing.
    settings.read_timeout = Some(read_timeout);
    kube::Client::try_from(settings).map_err(|error| with_causes(&error))
}
