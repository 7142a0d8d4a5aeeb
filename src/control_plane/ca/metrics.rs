//! Metrics of the CA.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use std::time::SystemTime;

/// Metrics of the CA.
#[derive(Debug, Default)]
pub struct Metrics {
    pub(super) signed: Counter,
    refused: Family<Reason, Counter>,
    expiry: Family<Which, Gauge>,
    pub(super) load_failures: Counter,
    load_failed: Gauge,
    pub(super) reviews: Counter,
    pub(super) publish_failures: Counter,
    pub(super) unpublished: Gauge,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Which {
    certificate: &'static str,
}

impl Metrics {
    /// Registers the metrics.
    pub fn register(&self, registry: &mut Registry) {
        let signed = "Certificates that the CA has signed";
        registry.register("culvert_control_certificates_signed", signed, self.signed.clone());
        let refused = "Requests for certificates that were not answered with one, by reason. Alert on a rise of other_node, \
                       not_on_node, not_trusted, old_pod and trust_domain: a node may ask for identities that are not its own";
        registry.register("culvert_control_certificates_refused", refused, self.refused.clone());
        let expiry = "When a certificate of the control plane expires, in seconds since 1970: root (of several the first \
                      that expires), signing, and serving. Alert on root and signing some months ahead";
        registry.register("culvert_control_certificate_expiry_seconds", expiry, self.expiry.clone());
        let failures = "Attempts to load the CA's signing key that failed; the last good one stays in force";
        registry.register("culvert_control_ca_load_failures", failures, self.load_failures.clone());
        let failed = "1 while the CA's signing key cannot be loaded from where it is kept, else 0. Alert on 1";
        registry.register("culvert_control_ca_load_failed", failed, self.load_failed.clone());
        let reviews = "Tokens that the Kubernetes API was asked about";
        registry.register("culvert_control_token_reviews", reviews, self.reviews.clone());
        let publish = "Writes of the roots into a namespace that failed";
        registry.register("culvert_control_publish_failures", publish, self.publish_failures.clone());
        let unpublished = "Namespaces without the current roots. Alert if it stays above 0";
        registry.register("culvert_control_namespaces_without_roots", unpublished, self.unpublished.clone());
    }

    /// Adds one series to each family, so that the document of all metrics can show its labels.
    pub fn fill_example(&self) {
        drop(self.refused.get_or_create(&Reason { reason: "not_on_node" }));
        drop(self.expiry.get_or_create(&Which { certificate: "root" }));
    }

    /// Counts a request that was not answered with a certificate.
    pub(super) fn count_refused(&self, reason: &'static str) {
        self.refused.get_or_create(&Reason { reason }).inc();
    }

    /// Sets when a certificate expires.
    pub(super) fn set_expiry(&self, certificate: &'static str, at: SystemTime) {
        let since_epoch = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.expiry.get_or_create(&Which { certificate }).set(since_epoch.as_secs().cast_signed());
    }

    /// Says whether the signing key could be loaded the last time.
    pub(super) fn set_loaded(&self, loaded: bool) {
        self.load_failed.set(i64::from(!loaded));
    }
}
