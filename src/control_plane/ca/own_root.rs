//! The mesh's own root, and how it is replaced. Pure, but for the key that is made.
//!
//! A root is replaced in steps, so that at no time two daemons hold certificates that they cannot verify with each other's
//! roots:
//!
//! | step | roots that are given out | signs | until |
//! |---|---|---|---|
//! | settled | old | old | `rotate-root` |
//! | announced | old, new | old | every certificate that came without the new root has ended |
//! | signing | old, new | new | every certificate that the old root has signed has ended |
//! | settled | new | new | |
//!
//! A certificate comes together with the roots. So whoever holds a valid one that was signed after a step has the roots
//! of that step, and nobody needs to be asked: the wait of a step is the longest life of any certificate. It is kept in
//! the Secret before the first certificate of that life is signed ([`State::longest_life`]). To it come the time in which
//! a replica may not have heard of the step ([`LEASE`]), and differences between clocks.

use super::issuing::Material;
use super::secrets::{Data, Secret};
use rcgen::{BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, KeyPair, KeyUsagePurpose};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use time::OffsetDateTime;
use zeroize::{Zeroize, Zeroizing};

/// A replica that has not read the Secret for this long signs nothing.
pub const LEASE: Duration = Duration::from_secs(30);
/// By how much clocks may differ, at most. Certificates that live shorter need better clocks.
const CLOCKS: Duration = Duration::from_secs(300);
/// Validity of a root.
const ROOT_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// How far in the past the validity of a root begins, because clocks differ.
const BACKDATE: Duration = Duration::from_secs(3600);

const CERTIFICATE: &str = "ca-cert.pem";
const KEY: &str = "ca-key.pem";
const CHAIN: &str = "cert-chain.pem";
const ROOTS: &str = "root-cert.pem";
const NEXT_CERTIFICATE: &str = "next-cert.pem";
const NEXT_KEY: &str = "next-key.pem";
const STATE: &str = "rotation.json";

/// Why the Secret of our own root cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OwnRootError {
    /// An entry is missing.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// The state of the rotation cannot be read.
    #[error("{STATE}: {0}")]
    State(#[from] serde_json::Error),
    /// A root cannot be made.
    #[error("a root cannot be made: {0}")]
    Make(#[from] rcgen::Error),
}

/// How far the replacement of the root is. Times are seconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "camelCase")]
pub enum Step {
    /// One root.
    Settled {
        /// When the last replacement ended.
        finished: Option<u64>,
    },
    /// The new root is given out, the old one signs.
    Announced {
        /// Since when.
        since: u64,
    },
    /// The new root signs, the old one is still given out.
    Signing {
        /// Since when.
        since: u64,
    },
}

/// What the Secret holds beside keys and certificates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct State {
    /// The longest life of any certificate that was signed, in seconds.
    pub longest_life: u64,
    /// The step of the rotation.
    pub step: Step,
}

impl State {
    /// One root, and nothing signed yet.
    const NEW: Self = Self { longest_life: 0, step: Step::Settled { finished: None } };

    /// How long each step lasts.
    pub fn wait(&self) -> Duration {
        let longest = Duration::from_secs(self.longest_life);
        longest.saturating_add(LEASE).saturating_add(longest.min(CLOCKS))
    }

    /// When the next step may be taken, in seconds since 1970; `None` while there is nothing to wait for.
    pub fn next_at(&self) -> Option<u64> {
        match self.step {
            Step::Settled { .. } => None,
            Step::Announced { since } | Step::Signing { since } => Some(since.saturating_add(self.wait().as_secs())),
        }
    }
}

/// A certificate with its key, in PEM.
#[derive(Clone, PartialEq, Eq)]
pub struct Pair {
    certificate: Zeroizing<Vec<u8>>,
    key: Zeroizing<Vec<u8>>,
}

impl Pair {
    /// Makes a root: P-256, ten years.
    pub fn make(now: SystemTime) -> Result<Self, OwnRootError> {
        let mut key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, "culvert");
        // A name of its own, so that the old and the new root of a rotation are told apart.
        params.distinguished_name.push(DnType::CommonName, format!("mesh root {:032x}", rand::random::<u128>()));
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.not_before = OffsetDateTime::from(now - BACKDATE);
        params.not_after = OffsetDateTime::from(now + ROOT_LIFE);
        let certificate = params.self_signed(&key)?.pem().into_bytes().into();
        let pem = Zeroizing::new(key.serialize_pem().into_bytes());
        key.zeroize();
        Ok(Self { certificate, key: pem })
    }
}

/// The content of the Secret of our own root. Beside the state of a rotation it has the layout of Istio's `cacerts`.
#[derive(Clone, PartialEq, Eq)]
pub struct OwnRoot {
    signing: Pair,
    roots: Zeroizing<Vec<u8>>,
    next: Option<Pair>,
    /// How far the replacement of the root is.
    pub state: State,
}

impl fmt::Debug for OwnRoot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OwnRoot({:?})", self.state)
    }
}

impl OwnRoot {
    /// A new root.
    pub fn make(now: SystemTime) -> Result<Self, OwnRootError> {
        let signing = Pair::make(now)?;
        Ok(Self { roots: signing.certificate.clone(), signing, next: None, state: State::NEW })
    }

    /// Takes over the root of the Secret `istio-ca-secret`. `life` is that of the certificates that istiod has signed
    /// with it.
    pub fn adopt(secret: &Secret, life: Duration) -> Result<Self, OwnRootError> {
        let signing = Pair { certificate: entry(&secret.data, CERTIFICATE)?, key: entry(&secret.data, KEY)? };
        let roots = entry(&secret.data, ROOTS).unwrap_or_else(|_| signing.certificate.clone());
        Ok(Self { signing, roots, next: None, state: State { longest_life: life.as_secs(), ..State::NEW } })
    }

    /// Reads the Secret.
    pub fn read(data: &Data) -> Result<Self, OwnRootError> {
        let signing = Pair { certificate: entry(data, CERTIFICATE)?, key: entry(data, KEY)? };
        let next = match data.get(NEXT_KEY) {
            Some(key) => Some(Pair { certificate: entry(data, NEXT_CERTIFICATE)?, key: key.clone() }),
            None => None,
        };
        let state: State = serde_json::from_slice(&entry(data, STATE)?)?;
        if matches!(state.step, Step::Announced { .. }) && next.is_none() {
            return Err(OwnRootError::Missing(NEXT_KEY));
        }
        Ok(Self { signing, roots: entry(data, ROOTS)?, next, state })
    }

    /// The entries of the Secret; `None` for one that is to be removed.
    pub fn entries(&self) -> Result<BTreeMap<&'static str, Option<Zeroizing<Vec<u8>>>>, OwnRootError> {
        let next = self.next.as_ref();
        Ok(BTreeMap::from([
            (CERTIFICATE, Some(self.signing.certificate.clone())),
            (KEY, Some(self.signing.key.clone())),
            // istiod wants it, although it says nothing that the signing certificate does not say.
            (CHAIN, Some(self.signing.certificate.clone())),
            (ROOTS, Some(self.roots.clone())),
            (NEXT_CERTIFICATE, next.map(|next| next.certificate.clone())),
            (NEXT_KEY, next.map(|next| next.key.clone())),
            (STATE, Some(serde_json::to_vec(&self.state)?.into())),
        ]))
    }

    /// The same for a Secret that is made.
    pub fn data(&self) -> Result<Data, OwnRootError> {
        let entries = self.entries()?.into_iter();
        Ok(entries.filter_map(|(name, value)| Some((name.to_owned(), value?))).collect())
    }

    /// What is signed with now.
    pub fn material(&self, origin: String, version: String) -> Material {
        Material {
            origin,
            version,
            certificate: self.signing.certificate.to_vec(),
            key: self.signing.key.clone(),
            chain: Vec::new(),
            roots: self.roots.to_vec(),
            crl: None,
        }
    }

    /// Begins to replace the root by `next`. Returns whether it has: one replacement at a time.
    pub fn begin(&mut self, next: Pair, now: SystemTime) -> bool {
        if !matches!(self.state.step, Step::Settled { .. }) {
            return false;
        }
        if self.roots.last().is_some_and(|byte| *byte != b'\n') {
            self.roots.push(b'\n');
        }
        self.roots.extend_from_slice(&next.certificate);
        self.next = Some(next);
        self.state.step = Step::Announced { since: seconds(now) };
        true
    }

    /// Takes the next step, if its time has come. Returns whether it has.
    pub fn advance(&mut self, now: SystemTime) -> bool {
        if self.state.next_at().is_none_or(|at| seconds(now) < at) {
            return false;
        }
        match self.state.step {
            Step::Announced { .. } => {
                let Some(next) = self.next.take() else { return false };
                self.signing = next;
                self.state.step = Step::Signing { since: seconds(now) };
            }
            Step::Signing { .. } => {
                self.roots = self.signing.certificate.clone();
                self.state.step = Step::Settled { finished: Some(seconds(now)) };
            }
            Step::Settled { .. } => return false,
        }
        true
    }
}

fn entry(data: &Data, name: &'static str) -> Result<Zeroizing<Vec<u8>>, OwnRootError> {
    let entry = data.get(name).filter(|entry| !entry.is_empty());
    entry.cloned().ok_or(OwnRootError::Missing(name))
}

/// Whole seconds since 1970.
pub fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
