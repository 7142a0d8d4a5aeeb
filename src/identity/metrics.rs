//! Metrics of certificates.

use crate::mesh::SpiffeName;
use crate::telemetry::changes::{Changes, What};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use std::sync::Arc;
use std::time::SystemTime;

/// Metrics of certificates.
#[derive(Debug, Default)]
pub struct Metrics {
    pub(super) failures: Counter,
    pub(super) fetched: Counter,
    expiry: Family<IdentityLabel, Gauge>,
    /// Where changes are noted.
    pub(super) noted: Arc<Changes>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct IdentityLabel {
    identity: String,
}

impl IdentityLabel {
    fn new(identity: &SpiffeName) -> Self {
        Self { identity: identity.to_string() }
    }
}

impl Metrics {
    /// Metrics at zero, with a place where changes are noted.
    pub fn noting(noted: Arc<Changes>) -> Self {
        Self { noted, ..Self::default() }
    }

    /// Notes a change of the certificate of an identity.
    pub(super) fn note(&self, identity: &SpiffeName, text: String) {
        self.noted.note(What::Certificate, identity.to_string(), text);
    }

    /// Sets when the certificate of an identity expires.
    pub(super) fn set_expiry(&self, identity: &SpiffeName, not_after: SystemTime) {
        let since_epoch = not_after.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.expiry.get_or_create_owned(&IdentityLabel::new(identity)).set(since_epoch.as_secs().cast_signed());
    }

    /// Drops the series of an identity that is no longer held.
    pub(super) fn remove_expiry(&self, identity: &SpiffeName) {
        self.expiry.remove(&IdentityLabel::new(identity));
    }

    /// Adds one series to each family, so that the document of all metrics can show its labels.
    pub fn fill_example(&self) {
        drop(self.expiry.get_or_create(&IdentityLabel { identity: String::new() }));
    }

    /// Registers the metrics.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "culvert_certificates_fetched",
            "Certificates that the CA issued to this node",
            self.fetched.clone(),
        );
        registry.register(
            "culvert_certificate_failures",
            "Certificate requests to the CA that failed",
            self.failures.clone(),
        );
        let help = "When the certificate in use expires, in seconds since 1970";
        registry.register("culvert_certificate_expiry_seconds", help, self.expiry.clone());
    }
}
