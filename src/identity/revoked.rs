//! Revoked certificates, by issuer and serial number, from all revocation lists in the CRL file together.
//!
//! A certificate is revoked if any list names it, and not otherwise. This also holds for lists that are one part of
//! several (with an issuing distribution point). The whole chain of a peer is checked: at the handshake, and again for
//! open tunnels when the file changes. If the file cannot be read, the last usable one stays in force.

use crate::task::files::FileWatch;
use crate::task::thread::run_blocking;
use crate::telemetry::changes::{Changes, What};
use parking_lot::Mutex;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer};
use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::watch;
use x509_parser::prelude::{CertificateRevocationList, FromDer, X509Certificate};
use x509_parser::x509::ReasonCode;

/// Largest file that is read.
const BYTES_MAX: u64 = 256 << 20;

/// How long connections with a peer may continue after its certificate has expired. A peer that renews in time has
/// moved to a new tunnel by then, so this only lets short requests finish.
const EXPIRY_GRACE: Duration = Duration::from_secs(5);

/// Longest time between checks of the clock while waiting for a certificate to expire.
const CLOCK_CHECK: Duration = Duration::from_secs(30);

/// The identity of a certificate in revocation lists: its issuer's name and its serial number.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct CertificateId {
    issuer: Box<[u8]>,
    serial: Box<[u8]>,
}

impl CertificateId {
    fn new(issuer: &[u8], serial: &[u8]) -> Self {
        let zeros = serial.iter().take_while(|byte| **byte == 0).count();
        Self { issuer: issuer.into(), serial: serial.get(zeros..).unwrap_or_default().into() }
    }
}

/// The revoked certificates.
pub type RevocationList = HashSet<CertificateId>;

/// Reads a CRL file: PEM with any number of lists (other items are skipped), or one list in DER. An empty file is a
/// list without entries.
pub fn parse(bytes: &[u8]) -> Result<RevocationList, String> {
    let mut listed = RevocationList::new();
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Ok(listed);
    }
    let is_pem = bytes.windows(11).any(|window| window == b"-----BEGIN ");
    let lists: Vec<CertificateRevocationListDer<'static>> = if is_pem {
        let parsed = CertificateRevocationListDer::pem_slice_iter(bytes).collect::<Result<_, _>>();
        parsed.map_err(|error| format!("not PEM: {error}"))?
    } else {
        vec![bytes.to_vec().into()]
    };
    if lists.is_empty() {
        return Err("contains no revocation list".into());
    }
    for list in &lists {
        let (rest, list) = CertificateRevocationList::from_der(list).map_err(|error| format!("not a CRL: {error}"))?;
        if !rest.is_empty() {
            return Err("has unexpected bytes after a revocation list".into());
        }
        let issuer = list.issuer().as_raw();
        for revoked in list.iter_revoked_certificates() {
            let again_valid = revoked.reason_code().is_some_and(|(_, code)| code == ReasonCode::RemoveFromCRL);
            if !again_valid {
                listed.insert(CertificateId::new(issuer, revoked.raw_serial()));
            }
        }
    }
    Ok(listed)
}

/// Metrics of revocation.
#[derive(Debug, Default)]
pub struct Metrics {
    entries: Gauge,
    stale: Gauge,
    refused: Counter,
    /// Where changes are noted.
    noted: Arc<Changes>,
}

impl Metrics {
    /// Metrics at zero, with a place where changes are noted.
    pub fn noting(noted: Arc<Changes>) -> Self {
        Self { noted, ..Self::default() }
    }

    /// Registers the metrics.
    pub fn register(&self, registry: &mut Registry) {
        registry.register("culvert_crl_entries", "Certificates that the CRL in force revokes", self.entries.clone());
        let help = "1 while the CRL file cannot be used and an older version, or none, is in force. Alert above 0";
        registry.register("culvert_crl_stale", help, self.stale.clone());
        let help = "Versions of the CRL file that could not be used";
        registry.register("culvert_crl_refused", help, self.refused.clone());
    }
}

/// The revocation list in force.
#[derive(Debug)]
pub struct Revocations {
    current: watch::Sender<Arc<RevocationList>>,
    error: Mutex<Option<String>>,
}

impl Default for Revocations {
    fn default() -> Self {
        Self { current: watch::Sender::new(Arc::default()), error: Mutex::default() }
    }
}

impl Revocations {
    /// Reads the file now and at every change, for as long as it is awaited.
    pub async fn follow(self: Arc<Self>, path: PathBuf, metrics: Arc<Metrics>) {
        let mut watch = FileWatch::new(&path);
        loop {
            // On another thread, because reading a large list would delay enforcement on this one.
            let file = path.clone();
            let read = run_blocking(move || read(&file)).await.unwrap_or_else(|| Err("reading it failed".into()));
            match read {
                Ok(list) => {
                    let entries = list.len();
                    metrics.entries.set(i64::try_from(entries).unwrap_or(i64::MAX));
                    metrics.stale.set(0);
                    *self.error.lock() = None;
                    self.current.send_replace(Arc::new(list));
                    let text = format!("The revocation list was applied; it lists {entries} certificates.");
                    metrics.noted.note(What::Certificate, "revocation list", text);
                    tracing::info!(path = %path.display(), entries, "revocation list applied");
                }
                Err(reason) => {
                    metrics.stale.set(1);
                    metrics.refused.inc();
                    let text =
                        format!("The revocation list cannot be used, and the previous one stays in force: {reason}.");
                    metrics.noted.note(What::Certificate, "revocation list", text);
                    let entries = self.current.borrow().len();
                    *self.error.lock() = Some(reason.clone());
                    tracing::error!(
                        path = %path.display(), reason, entries,
                        "revocation list cannot be used; the previous one stays in force"
                    );
                }
            }
            watch.changed().await;
        }
    }

    /// A receiver that is notified of every later list.
    pub(super) fn changes(&self) -> watch::Receiver<Arc<RevocationList>> {
        self.current.subscribe()
    }

    /// The list in force. Comparing the pointer later shows whether it still is.
    pub(super) fn current(&self) -> Arc<RevocationList> {
        self.current.borrow().clone()
    }

    /// Replaces the list in force.
    #[cfg(test)]
    pub(super) fn put(&self, list: RevocationList) {
        self.current.send_replace(Arc::new(list));
    }

    /// Why the file on disk could not be used; `None` if it is in force.
    pub fn error(&self) -> Option<String> {
        self.error.lock().clone()
    }

    /// Whether a certificate of this chain is revoked. Certificates that cannot be parsed are refused elsewhere.
    pub fn is_revoked(&self, chain: &[CertificateDer<'_>]) -> bool {
        let current = self.current.borrow().clone();
        !current.is_empty() && certificate_ids(chain).iter().any(|id| current.contains(id))
    }

    /// A handle that reports when this chain is revoked or expires.
    pub fn watch(&self, chain: &[CertificateDer<'_>]) -> Chain {
        Chain { ids: certificate_ids(chain).into(), expires: first_expiry(chain), lists: self.current.subscribe() }
    }
}

fn read(path: &PathBuf) -> Result<RevocationList, String> {
    let size = std::fs::metadata(path).map_err(|error| error.to_string())?.len();
    if size > BYTES_MAX {
        return Err(format!("has {size} bytes, {BYTES_MAX} at most"));
    }
    parse(&std::fs::read(path).map_err(|error| error.to_string())?)
}

fn certificate_ids(chain: &[CertificateDer<'_>]) -> Vec<CertificateId> {
    let id = |der: &CertificateDer<'_>| {
        let (_, parsed) = X509Certificate::from_der(der).ok()?;
        Some(CertificateId::new(parsed.issuer().as_raw(), parsed.raw_serial()))
    };
    chain.iter().filter_map(id).collect()
}

/// When the first of these certificates expires. Those that cannot be parsed are refused elsewhere. Those that have
/// expired already are not part of the verified path, or the handshake would have failed, so they are ignored.
fn first_expiry(chain: &[CertificateDer<'_>]) -> Option<SystemTime> {
    let now = SystemTime::now();
    let end = |der: &CertificateDer<'_>| {
        let (_, parsed) = X509Certificate::from_der(der).ok()?;
        // The certificate is still valid in the second that it names (RFC 5280 section 4.1.2.5).
        let seconds = u64::try_from(parsed.validity().not_after.timestamp()).unwrap_or(0).saturating_add(1);
        SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
    };
    chain.iter().filter_map(end).filter(|end| *end > now).min()
}

/// Why a peer that passed its handshake is no longer trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Distrust {
    /// A certificate of its chain is revoked.
    Revoked,
    /// A certificate of its chain has expired.
    Expired,
}

/// The certificate chain of an open tunnel's peer.
#[derive(Clone, Debug)]
pub struct Chain {
    ids: Arc<[CertificateId]>,
    expires: Option<SystemTime>,
    lists: watch::Receiver<Arc<RevocationList>>,
}

impl Chain {
    /// Resolves once no new stream may be opened: a certificate of the chain is revoked or has expired.
    pub async fn ending(&self) {
        tokio::select! { () = self.revoked() => {}, () = self.expired(Duration::ZERO) => {} }
    }

    /// Resolves once the open streams must end too: a certificate of the chain is revoked, or has been expired for
    /// [`EXPIRY_GRACE`].
    pub async fn distrusted(&self) -> Distrust {
        tokio::select! {
            biased;
            () = self.revoked() => Distrust::Revoked,
            () = self.expired(EXPIRY_GRACE) => Distrust::Expired,
        }
    }

    /// Resolves this long after the first certificate has expired.
    async fn expired(&self, after: Duration) {
        let Some(ends) = self.expires.and_then(|ends| ends.checked_add(after)) else {
            return std::future::pending().await;
        };
        while let Ok(left) = ends.duration_since(SystemTime::now()) {
            // In steps, because the clock may be set meanwhile.
            tokio::time::sleep((left + Duration::from_millis(1)).min(CLOCK_CHECK)).await;
        }
    }

    /// Resolves once a certificate of the chain is revoked.
    pub async fn revoked(&self) {
        let mut lists = self.lists.clone();
        let listed = |list: &Arc<RevocationList>| self.ids.iter().any(|id| list.contains(id));
        if lists.wait_for(listed).await.is_err() {
            // The list does not change any more.
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rcgen::{BasicConstraints, CertificateParams, Issuer, KeyPair, RevokedCertParams, SerialNumber};
    use time::OffsetDateTime;

    struct Ca {
        issuer: Issuer<'static, KeyPair>,
    }

    fn ca(name: &str) -> Ca {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.is_ca = rcgen::IsCa::Ca(BasicConstraints::Unconstrained);
        Ca { issuer: Issuer::new(params, key) }
    }

    impl Ca {
        fn leaf(&self, serial: u64) -> CertificateDer<'static> {
            let mut params = CertificateParams::default();
            params.serial_number = Some(SerialNumber::from(serial));
            params.signed_by(&KeyPair::generate().unwrap(), &self.issuer).unwrap().der().clone()
        }

        fn crl(&self, serials: &[u64], part: Option<&str>) -> String {
            let now = OffsetDateTime::now_utc();
            let revoked = |serial: &u64| RevokedCertParams {
                serial_number: SerialNumber::from(*serial),
                revocation_time: now,
                reason_code: None,
                invalidity_date: None,
            };
            let point = part.map(|uri| rcgen::CrlIssuingDistributionPoint {
                distribution_point: rcgen::CrlDistributionPoint { uris: vec![uri.to_owned()] },
                scope: None,
            });
            let params = rcgen::CertificateRevocationListParams {
                this_update: now,
                next_update: now + time::Duration::days(1),
                crl_number: SerialNumber::from(1),
                issuing_distribution_point: point,
                revoked_certs: serials.iter().map(revoked).collect(),
                key_identifier_method: rcgen::KeyIdMethod::Sha256,
            };
            params.signed_by(&self.issuer).unwrap().pem().unwrap()
        }
    }

    #[tokio::test]
    async fn certificates_in_any_part_of_a_list_are_revoked_and_no_others() {
        let (one, other) = (ca("one"), ca("other"));
        // Two parts of one issuer's list, and the list of another issuer. Only the second part names 300.
        let file =
            one.crl(&[7, 128], Some("http://a/1")) + &one.crl(&[300], Some("http://a/2")) + &other.crl(&[9], None);
        let revocations = Revocations::default();
        let live = revocations.watch(&[one.leaf(300), one.leaf(1)]);
        let unconcerned = revocations.watch(&[one.leaf(9), other.leaf(7)]);
        assert!(!revocations.is_revoked(&[one.leaf(7)]));
        revocations.current.send_replace(Arc::new(parse(file.as_bytes()).unwrap()));
        for (certificate, revoked) in [
            (one.leaf(7), true),
            (one.leaf(128), true),
            (one.leaf(300), true),
            (one.leaf(9), false),
            (other.leaf(9), true),
            (other.leaf(7), false),
        ] {
            assert_eq!(revocations.is_revoked(&[certificate]), revoked);
        }
        assert!(revocations.is_revoked(&[other.leaf(1), one.leaf(7)]), "an intermediate");
        live.revoked().await;
        tokio::select! { biased; () = unconcerned.revoked() => panic!("is not listed"), () = std::future::ready(()) => {} }
    }

    #[test]
    fn a_file_with_a_damaged_list_is_refused_as_a_whole() {
        let ca = ca("one");
        assert!(parse(b" \n").unwrap().is_empty());
        assert_eq!(parse(ca.crl(&[1], None).as_bytes()).unwrap().len(), 1);
        let der = CertificateRevocationListDer::from_pem_slice(ca.crl(&[1, 2], None).as_bytes()).unwrap();
        assert_eq!(parse(&der).unwrap().len(), 2);
        let damaged = ca.crl(&[1], None) + "-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n";
        for bad in [damaged.as_bytes(), b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", b"x"] {
            assert!(parse(bad).is_err(), "{}", String::from_utf8_lossy(bad));
        }
    }

    proptest! {
        #[test]
        fn parsing_is_total(bytes: Vec<u8>) {
            drop(parse(&bytes));
        }
    }
}
