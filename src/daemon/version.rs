//! Which version of culvert this is.

use crate::config::Config;
use serde_json::{Value, json};

/// Name and version, for people.
pub(super) fn text() -> String {
    format!("culvert {}", env!("CARGO_PKG_VERSION"))
}

/// The version as `/config_dump` shows it, under ztunnel's keys. A fact that was not known when the binary was built is
/// `unknown`.
pub(super) fn shown(config: &Config) -> Value {
    let istio = config.xds().and_then(|xds| xds.metadata.get("ISTIO_VERSION")).and_then(Value::as_str);
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "gitRevision": option_env!("CULVERT_GIT_REVISION").unwrap_or("unknown"),
        "rustVersion": option_env!("CULVERT_RUST_VERSION").unwrap_or("unknown"),
        "buildProfile": if cfg!(debug_assertions) { "debug" } else { "release" },
        "buildStatus": "culvert",
        "istioVersion": istio.unwrap_or("unknown"),
        "cryptoProvider": "aws-lc-rs",
    })
}
