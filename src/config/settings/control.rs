//! Settings of `culvert control`.

use crate::config::kind::{Custom, File, Number, Text, Time};
use crate::config::parse;
use crate::config::setting::{Described, Setting};
use crate::control_plane::ca::{Account, Issuer};

settings! {
    KUBECONFIG: Text = Setting::new("kubeconfig", "KUBECONFIG", Text)
        .or_else("the account of the control plane's own pod")
        .help("Kubeconfig file for the Kubernetes API.");
    NAMESPACE: Text = Setting::new("namespace", "POD_NAMESPACE", Text)
        .or("istio-system")
        .help("Namespace of the control plane. Policies of this namespace without a selector apply to the whole mesh.");
    TRUST_DOMAIN: Text = Setting::new("trust-domain", "TRUST_DOMAIN", Text)
        .or("cluster.local")
        .help("Trust domain of the mesh's identities.");
    CLUSTER_ID: Text = Setting::new("cluster-id", "CLUSTER_ID", Text)
        .or("Kubernetes")
        .help("Name of the cluster in the uids of workloads. The daemons' CLUSTER_ID must be the same.");
    CLUSTER_DOMAIN: Text = Setting::new("cluster-domain", "CLUSTER_DOMAIN", Text)
        .or("cluster.local")
        .help("Domain of the cluster's DNS names.");
    PORT: Number<u16> = Setting::new("control-port", "CULVERT_CONTROL_PORT", Number(1, u16::MAX))
        .or("15012")
        .help("Port for daemons: mesh facts and certificates, by TLS.");
    CA_DIR: File = Setting::new("control-ca-dir", "CULVERT_CONTROL_CA_DIR", File)
        .or_else("the Secret `cacerts`, else the mesh's own root in the Secret `culvert-ca`")
        .help(
            "Directory with the signing key of the CA: `ca-cert.pem`, `ca-key.pem`, `root-cert.pem`, and where needed \
             `cert-chain.pem` and `ca-crl.pem`. The control plane follows its changes.",
        );
    CA_ISSUER: Custom<Option<Issuer>> = Setting::new("control-ca-issuer", "CULVERT_CONTROL_CA_ISSUER", ISSUER)
        .help(
            "An issuer of cert-manager, `Issuer/name` or `ClusterIssuer/name`, or `kind.group/name` for one of another group. \
             Each replica gets an intermediate certificate from it, with which it signs.",
        );
    TRUSTED: Custom<Vec<Account>> = Setting::new("trusted-node-accounts", "CA_TRUSTED_NODE_ACCOUNTS", ACCOUNTS)
        .or_else("`ztunnel` in the namespace of the control plane")
        .help(
            "Service accounts of daemons, `namespace/name`, comma-joined. They may have certificates for the pods that run on \
             their own node; every other service account only for itself.",
        );
    AUDIENCES: Custom<Vec<String>> = Setting::new("token-audiences", "TOKEN_AUDIENCES", AUDIENCES_KIND)
        .or("istio-ca")
        .help("Audiences of the tokens that daemons show, comma-joined. One of them must be the token's.");
    SERVICE: Text = Setting::new("control-service", "CULVERT_CONTROL_SERVICE", Text)
        .or("culvert-control")
        .help("Name of the control plane's Service, which its certificate is for.");
    NAMES: Custom<Vec<String>> = Setting::new("control-names", "CULVERT_CONTROL_NAMES", NAMES_KIND)
        .or("istiod.istio-system.svc")
        .help(
            "Further DNS names that its certificate is for, comma-joined. With the default, daemons that look for istiod \
             need no other settings, once a Service of that name leads here.",
        );
    DEFAULT_TTL: Time = Setting::new("default-workload-cert-ttl", "DEFAULT_WORKLOAD_CERT_TTL", Time::CERTIFICATE)
        .or("24h")
        .help("Life of certificates for which the request does not say it.");
    MAX_TTL: Time = Setting::new("max-workload-cert-ttl", "MAX_WORKLOAD_CERT_TTL", Time::CERTIFICATE)
        .or("2160h")
        .help(
            "Longest life of certificates that daemons may ask for; any other pod gets at most DEFAULT_WORKLOAD_CERT_TTL. A rotation of the root takes twice the longest life that was \
             ever asked for.",
        );
}

/// An issuer of cert-manager.
const ISSUER: Custom<Option<Issuer>> = Custom { expected: "kind/name or kind.group/name", read: issuer };

fn issuer(text: &str) -> Result<Option<Issuer>, String> {
    let expected = || ISSUER.expected.to_owned();
    let (kind, name) = text.split_once('/').ok_or_else(expected)?;
    let (kind, group) = kind.split_once('.').unwrap_or((kind, "cert-manager.io"));
    let is_word =
        |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-.".contains(&b));
    match [kind, name, group].into_iter().all(is_word) {
        true => Ok(Some(Issuer { kind: kind.into(), name: name.into(), group: group.into() })),
        false => Err(expected()),
    }
}

/// Service accounts.
const ACCOUNTS: Custom<Vec<Account>> = Custom { expected: "namespace/name, comma-joined", read: accounts };

fn accounts(text: &str) -> Result<Vec<Account>, String> {
    let account = |text: &str| {
        let (namespace, name) = text.trim().split_once('/')?;
        let is_valid = |part: &str| crate::mesh::SpiffeName::is_part(part);
        (is_valid(namespace) && is_valid(name)).then(|| Account { namespace: namespace.into(), name: name.into() })
    };
    text.split(',').map(account).collect::<Option<_>>().ok_or_else(|| ACCOUNTS.expected.into())
}

/// Audiences of tokens.
const AUDIENCES_KIND: Custom<Vec<String>> = Custom { expected: "audiences, comma-joined", read: audiences };

fn audiences(text: &str) -> Result<Vec<String>, String> {
    let all: Vec<String> = text.split(',').map(|audience| audience.trim().to_owned()).collect();
    if all.iter().any(String::is_empty) { Err(AUDIENCES_KIND.expected.into()) } else { Ok(all) }
}

/// DNS names.
const NAMES_KIND: Custom<Vec<String>> = Custom { expected: "DNS names, comma-joined", read: names };

fn names(text: &str) -> Result<Vec<String>, String> {
    let all: Result<Vec<String>, String> = text.split(',').map(|name| (parse::DOMAIN.read)(name.trim())).collect();
    all.map_err(|_| NAMES_KIND.expected.into())
}
