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
use super::secrets::{Data, Entries, Secret};
use rcgen::{BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, KeyPair, KeyUsagePurpose};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use time::OffsetDateTime;
use zeroize::{Zeroize, Zeroizing};

/// A replica that has not read the Secret for this long signs nothing.
pub const LEASE: Duration = Duration::from_secs(30);
/// By how much two clocks may differ. Where no certificate may live for longer than minutes, clocks must be better: half
/// of that life.
const CLOCKS: Duration = Duration::from_secs(150);
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

    /// How long each step lasts, where certificates may live for `max_life`.
    pub fn wait(&self, max_life: Duration) -> Duration {
        let longest = Duration::from_secs(self.longest_life);
        // Twice: between who begins a step and who ends it, and between who signs a certificate and who verifies it.
        longest.saturating_add(LEASE).saturating_add((max_life / 2).min(CLOCKS) * 2)
    }

    /// When the next step may be taken, in seconds since 1970; `None` while there is nothing to wait for.
    pub fn next_at(&self, max_life: Duration) -> Option<u64> {
        match self.step {
            Step::Settled { .. } => None,
            Step::Announced { since } | Step::Signing { since } => {
                Some(since.saturating_add(self.wait(max_life).as_secs()))
            }
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
        let next = match entry(data, NEXT_KEY) {
            Ok(key) => Some(Pair { certificate: entry(data, NEXT_CERTIFICATE)?, key }),
            Err(_) => None,
        };
        let state: State = serde_json::from_slice(&entry(data, STATE)?)?;
        if matches!(state.step, Step::Announced { .. }) && next.is_none() {
            return Err(OwnRootError::Missing(NEXT_KEY));
        }
        Ok(Self { signing, roots: entry(data, ROOTS)?, next, state })
    }

    /// The entries of the Secret; `None` for one that is to be removed.
    pub fn entries(&self) -> Result<Entries, OwnRootError> {
        let next = self.next.as_ref();
        Ok(Entries::from([
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
    pub fn advance(&mut self, now: SystemTime, max_life: Duration) -> bool {
        if self.state.next_at(max_life).is_none_or(|at| seconds(now) < at) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const DAY: Duration = Duration::from_secs(86_400);

    /// A root that is only a name.
    fn named(number: usize) -> Pair {
        let name = |kind: &str| Zeroizing::new(format!("{kind}{number}\n").into_bytes());
        Pair { certificate: name("root"), key: name("key") }
    }

    fn settled(number: usize) -> OwnRoot {
        let signing = named(number);
        OwnRoot { roots: signing.certificate.clone(), signing, next: None, state: State::NEW }
    }

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn a_rotation_has_three_steps_and_keeps_one_key_at_the_end() {
        let mut root = settled(0);
        root.state.longest_life = 86_400;
        assert!(!root.advance(at(1_000_000), DAY), "nothing to do");
        assert!(root.begin(named(1), at(1_000_000)) && !root.begin(named(2), at(1_000_001)), "one at a time");
        let wait = 86_400 + 30 + 300;
        assert_eq!(root.state.wait(Duration::from_secs(16)).as_secs(), 86_400 + 30 + 16);
        for (signs, before, step) in [("root0\n", 1_000_000, "announced"), ("root1\n", 1_000_000 + wait, "signing")] {
            let material = root.material(String::new(), String::new());
            assert_eq!((&*material.certificate, &*material.roots), (signs.as_bytes(), &b"root0\nroot1\n"[..]));
            let kept = OwnRoot::read(&root.data().unwrap()).unwrap();
            assert!(kept == root && String::from_utf8_lossy(&root.data().unwrap()[STATE]).contains(step));
            assert!(!root.advance(at(before + wait - 1), DAY) && root.advance(at(before + wait), DAY), "{step}");
        }
        let entries = root.entries().unwrap();
        let of = |name| entries[name].as_ref().map(|entry| String::from_utf8_lossy(entry).into_owned());
        assert_eq!((of(ROOTS).unwrap(), of(KEY).unwrap()), ("root1\n".into(), "key1\n".into()));
        assert_eq!((of(NEXT_KEY), of(NEXT_CERTIFICATE)), (None, None), "removed");
        assert_eq!(root.state.step, Step::Settled { finished: Some(1_000_000 + 2 * wait) });
    }

    #[test]
    fn a_secret_that_lacks_something_is_refused_by_name() {
        let mut root = settled(0);
        root.begin(named(1), at(0));
        for name in [CERTIFICATE, KEY, ROOTS, STATE, NEXT_CERTIFICATE, NEXT_KEY] {
            for empty in [false, true] {
                let mut data = root.data().unwrap();
                if empty {
                    drop(data.insert(name.into(), Zeroizing::default()))
                } else {
                    drop(data.remove(name))
                }
                let error = OwnRoot::read(&data).unwrap_err().to_string();
                assert!(error.contains("is missing"), "{name}: {error}");
            }
        }
        for state in ["", "{}", "[1]", r#"{"longestLife":-1,"step":{"name":"settled","finished":null}}"#] {
            let mut data = root.data().unwrap();
            data.insert(STATE.into(), state.as_bytes().to_vec().into());
            OwnRoot::read(&data).unwrap_err();
        }
        assert!(!format!("{root:?}").contains("key"), "{root:?}");
    }

    /// What happens in a mesh while roots are replaced.
    #[derive(Clone, Debug)]
    enum Happens {
        /// Time passes, in hundredths of the longest life.
        Time(u64),
        /// A daemon asks a replica for a certificate with a life, in hundredths of the longest one.
        Renew(usize, usize, u64),
        /// A replica reads the Secret.
        Read(usize),
        /// A replica looks whether a step is due.
        Look(usize),
        /// Somebody runs the command.
        Rotate(usize),
    }

    fn happens() -> impl Strategy<Value = Happens> {
        prop_oneof![
            4 => (1..60_u64).prop_map(Happens::Time),
            6 => (0..4_usize, 0..3_usize, 1..=100_u64).prop_map(|(n, r, l)| Happens::Renew(n, r, l)),
            3 => (0..3_usize).prop_map(Happens::Read),
            3 => (0..3_usize).prop_map(Happens::Look),
            1 => (0..3_usize).prop_map(Happens::Rotate),
        ]
    }

    struct Replica {
        copy: OwnRoot,
        read: u64,
    }

    struct Daemon {
        signer: String,
        roots: BTreeSet<String>,
        /// By the clock of the replica that signed.
        until: u64,
    }

    /// A mesh of three replicas and four daemons, whose clocks differ.
    struct Mesh {
        now: u64,
        life: u64,
        secret: OwnRoot,
        replicas: Vec<Replica>,
        daemons: Vec<Option<Daemon>>,
        /// Difference of each clock from the true time: replicas, then daemons.
        clocks: Vec<i64>,
        made: usize,
    }

    impl Mesh {
        fn clock(&self, of: usize) -> u64 {
            self.now.saturating_add_signed(self.clocks[of])
        }

        fn step(&mut self, what: &Happens) {
            match *what {
                Happens::Time(part) => self.now += (self.life * part / 100).max(1),
                Happens::Read(replica) => {
                    self.replicas[replica] = Replica { copy: self.secret.clone(), read: self.now };
                }
                Happens::Renew(daemon, replica, part) => {
                    let life = (self.life * part / 100).max(1);
                    if self.now - self.replicas[replica].read > LEASE.as_secs() {
                        return;
                    }
                    // Kept first, whatever the replica's copy of the rest is.
                    self.secret.state.longest_life = self.secret.state.longest_life.max(life);
                    let issued = self.replicas[replica].copy.material(String::new(), String::new());
                    let names = |pem: &[u8]| String::from_utf8_lossy(pem).lines().map(str::to_owned).collect();
                    let signer = String::from_utf8_lossy(&issued.certificate).trim().to_owned();
                    let until = self.clock(replica) + life;
                    self.daemons[daemon] = Some(Daemon { signer, roots: names(&issued.roots), until });
                }
                Happens::Look(replica) => {
                    let now = at(self.clock(replica));
                    self.secret.advance(now, Duration::from_secs(self.life));
                }
                Happens::Rotate(replica) => {
                    self.made += 1;
                    let now = at(self.clock(replica));
                    self.secret.begin(named(self.made), now);
                }
            }
        }

        /// Two daemons that cannot verify each other, although both have a valid certificate.
        fn strangers(&self) -> Option<(usize, usize)> {
            let sees = |of: usize, peer: usize| {
                let (own, other) = (self.daemons[of].as_ref()?, self.daemons[peer].as_ref()?);
                let clock = self.clock(self.replicas.len() + of);
                let both_valid = own.until > clock && other.until > clock;
                (both_valid && !own.roots.contains(&other.signer)).then_some((of, peer))
            };
            (0..4).flat_map(|of| (0..4).map(move |peer| (of, peer))).find_map(|(of, peer)| sees(of, peer))
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]
        #[test]
        fn at_no_time_do_two_daemons_hold_certificates_that_they_cannot_verify(
            life in prop_oneof![4..400_u64, Just(86_400)],
            offsets in prop::collection::vec(-100..=100_i64, 7),
            story in prop::collection::vec(happens(), 1..300),
        ) {
            // Any two clocks differ by at most what the wait allows for.
            let most = i64::try_from((life / 2).min(CLOCKS.as_secs())).unwrap() / 2;
            let clocks = offsets.iter().map(|offset| offset * most / 100).collect();
            let secret = settled(0);
            let replicas = (0..3).map(|_| Replica { copy: secret.clone(), read: 1_000_000 }).collect();
            let daemons = (0..4).map(|_| None).collect();
            let mut mesh = Mesh { now: 1_000_000, life, secret, replicas, daemons, clocks, made: 0 };
            for what in &story {
                mesh.step(what);
                prop_assert_eq!(mesh.strangers(), None, "after {:?} at {}", what, mesh.now);
            }
        }
    }
}
