//! Settings of certificates and trust.

use super::mesh::ROOT_CERTIFICATES;
use crate::config::CaSource;
use crate::config::kind::{Custom, File, Text, Time, Words};
use crate::config::parse;
use crate::config::setting::{Described, Setting};
use http::Uri;
use serde_json::{Value, json};

settings! {
    CA_DIR: File = Setting::new("ca-dir", "CULVERT_CA_DIR", File)
        .or_else("certificates come from Istio's CA")
        .help("Directory of the built-in CA, the same on all nodes. `culvert ca init` makes one.")
        .shown("caDir", |c| match &c.ca {
            CaSource::Builtin(dir) => json!(dir.display().to_string()),
            CaSource::Istio(_) => Value::Null,
        });
    CA_ADDRESS: Custom<Uri> = Setting::new("ca-address", "CA_ADDRESS", parse::ADDRESS)
        .or_else("the default of `XDS_ADDRESS`")
        .help("Address of Istio's CA.")
        .shown("caAddress", |c| match &c.ca {
            CaSource::Istio(rpc) => json!(rpc.address.to_string()),
            CaSource::Builtin(_) => Value::Null,
        });
    CA_ROOT_CA: Text = Setting::new("ca-root-ca", "CA_ROOT_CA", Text)
        .or(ROOT_CERTIFICATES)
        .help("Root certificates that the CA's server is verified against, in the same forms as `XDS_ROOT_CA`.");
    ALT_CA_HOSTNAME: Text = Setting::new("alt-ca-hostname", "ALT_CA_HOSTNAME", Text)
        .help("Another host name that the certificate of the CA's server may have.");
    AUTH_TOKEN: Text = Setting::new("auth-token", "AUTH_TOKEN", Text)
        .or("./var/run/secrets/tokens/istio-token")
        .help(
            "Token that authenticates the daemon to the control plane and the CA: a file, which is read for each request, or the token \
             itself. A value with a slash is a file.",
        )
        .secret();
    SECRET_TTL: Time = Setting::new("secret-ttl", "SECRET_TTL", Time::CERTIFICATE)
        .or("24h")
        .help("Life of the certificates that are requested. They are renewed at 40 to 46 % of their life.")
        .shown("secretTtl", |c| parse::shown_duration(c.secret_ttl));
    TRUST_DOMAIN: Custom<String> = Setting::new("trust-domain", "TRUST_DOMAIN", parse::TRUST_DOMAIN)
        .or("cluster.local")
        .help("Trust domain of the daemon's own pod. Certificates of pods are requested in it before their workloads are known.")
        .shown("trustDomain", |c| json!(c.trust_domain));
    TRUST_DOMAIN_ALIASES: Custom<Vec<String>> =
        Setting::new("trust-domain-aliases", "CULVERT_TRUST_DOMAIN_ALIASES", parse::TRUST_DOMAINS)
            .help(
                "Trust domains that are accepted beside a workload's own. Policies treat all of them as one, so that a DENY of one of \
                 them holds for all.",
            )
            .shown("trustDomainAliases", |c| json!(c.trust_domain_aliases));
    CRL_PATH: File = Setting::new("crl-path", "CRL_PATH", File)
        .help("File of CRLs. The daemon follows its changes; a version that cannot be read changes nothing.")
        .shown("crlPath", |c| json!(c.crl.as_ref().map(|path| path.display().to_string())));
    COMPLIANCE_POLICY: Words<bool> = Setting::new("compliance-policy", "COMPLIANCE_POLICY", Words(&[("pqc", true)]))
        .help("`pqc`: TLS offers and accepts post-quantum key exchange only.")
        .shown("onlyPostQuantum", |c| json!(c.only_post_quantum));
}
