//! Roots that the CA has told of, by trust domain, and how long they are trusted. One that the CA no longer tells of is
//! trusted for as long as a certificate that it signed last may live. In a rotation old and new are both among them.

use super::credentials::Credentials;
use crate::mesh::Text;
use parking_lot::Mutex;
use rustls::pki_types::CertificateDer;
use std::collections::BTreeSet;
use std::time::SystemTime;

#[derive(Debug)]
struct Root {
    trust_domain: Text,
    der: CertificateDer<'static>,
    until: SystemTime,
    /// Whether the CA no longer tells of it.
    retired: bool,
}

/// The roots that are known.
#[derive(Debug, Default)]
pub struct Roots {
    all: Mutex<Vec<Root>>,
}

impl Roots {
    /// Remembers the roots that came with a certificate, and forgets those whose time is over: the trust domains whose
    /// roots are others now.
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
                // Somebody may have got a certificate of it just before.
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
