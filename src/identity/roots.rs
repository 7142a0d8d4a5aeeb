//! The known roots of each trust domain, and how long they are trusted.
//!
//! Every root that an answer of the CA brings is trusted. A root that the CA no longer names stays trusted for the life
//! of a certificate, because one may have been signed by it just before. So during a rotation both the old and the new
//! root are trusted.

use super::credentials::Credentials;
use crate::mesh::Text;
use parking_lot::Mutex;
use rustls::pki_types::CertificateDer;
use std::collections::BTreeSet;
use std::time::SystemTime;

/// A known root.
#[derive(Debug)]
struct Root {
    trust_domain: Text,
    der: CertificateDer<'static>,
    /// When it is dropped.
    until: SystemTime,
    /// Whether the CA no longer names it.
    retired: bool,
}

/// The known roots.
#[derive(Debug, Default)]
pub struct Roots {
    all: Mutex<Vec<Root>>,
}

impl Roots {
    /// Adds the roots that came with a certificate, and drops those whose time is over. Returns the trust domains whose
    /// roots have changed.
    pub fn learn(&self, new: &Credentials) -> BTreeSet<Text> {
        let mut all = self.all.lock();
        let (now, trust_domain) = (SystemTime::now(), &new.identity.trust_domain);
        let mut changed: BTreeSet<Text> =
            all.iter().filter(|root| root.until <= now).map(|root| root.trust_domain.clone()).collect();
        all.retain(|root| root.until > now);
        let life = new.signed.life;
        for root in all.iter_mut().filter(|root| root.trust_domain == *trust_domain) {
            if new.signed.roots.contains(&root.der) {
                (root.until, root.retired) = (root.until.max(new.not_after + life), false);
            } else if !root.retired {
                // Another workload may have received a certificate of this root just before.
                (root.until, root.retired) = (now + life, true);
            }
        }
        for der in &new.signed.roots {
            if !all.iter().any(|root| root.trust_domain == *trust_domain && root.der == *der) {
                changed.insert(trust_domain.clone());
                let (der, until) = (der.clone(), new.not_after + life);
                all.push(Root { trust_domain: trust_domain.clone(), der, until, retired: false });
            }
        }
        changed
    }

    /// The roots of a trust domain.
    pub fn of(&self, trust_domain: &Text) -> Vec<CertificateDer<'static>> {
        let all = self.all.lock();
        all.iter().filter(|root| root.trust_domain == *trust_domain).map(|root| root.der.clone()).collect()
    }
}
