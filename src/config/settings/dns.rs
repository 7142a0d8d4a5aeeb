//! Settings of pods' DNS.

use crate::config::kind::{Custom, Number, Text, Time};
use crate::config::parse;
use crate::config::setting::{Described, Setting};
use serde_json::json;

settings! {
    DNS_CAPTURE: Text = Setting::new("dns-capture", "ISTIO_META_DNS_CAPTURE", Text)
        .or_else("`DNS_CAPTURE` of the proxy metadata, else true")
        .help(
            "Answer pods' DNS questions. As with ztunnel, every value but `true` means no. A pod's own setting takes precedence \
             (`dnsCapture` in the pods file, or its annotation). With an agent, the agent decides what is redirected.",
        )
        .shown("dnsProxy", |c| json!(c.dns.capture));
    CLUSTER_DOMAIN: Custom<String> = Setting::new("cluster-domain", "CLUSTER_DOMAIN", parse::DOMAIN)
        .or("cluster.local")
        .help("Domain of the cluster. A cluster domain that a pod's search domains reveal counts as well.")
        .shown("clusterDomain", |c| json!(&*c.dns.cluster_domain));
    PREFERRED_NAMESPACE: Text = Setting::new("preferred-service-namespace", "PREFERED_SERVICE_NAMESPACE", Text)
        .help(
            "Among services with the same host name, those of this namespace are preferred, after the pod's own namespace, canonical \
             services, and services that are named after their own namespace.",
        )
        .shown("preferedServiceNamespace", |c| {
            json!(Some(&*c.dns.preferred_namespace).filter(|name| !name.is_empty()))
        });
    DNS_TTL: Time = Setting::new("dns-ttl", "CULVERT_DNS_TTL", Time::DNS)
        .or("30s")
        .help("Time to live of answers for mesh names.");
    DNS_CACHE_ENTRIES: Number<usize> = Setting::new("dns-cache", "CULVERT_DNS_CACHE_ENTRIES", Number(0, 100_000))
        .or("256")
        .help("Resolvers' answers that are cached for each pod until their time to live ends. 0 turns the cache off.");
}
