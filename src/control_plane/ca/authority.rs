//! Keeps the signing key that is in force, and follows where it comes from.
//!
//! A new key that cannot be used leaves the last good one in force: it is named in the log and in a metric, until it is
//! mended.

use super::cert_manager::{CertManager, CertManagerError};
use super::csr::{self, CsrError};
use super::folder::{self, FolderError};
use super::issuing::{Issuing, Leaf, Material, MaterialError};
use super::kept::{Kept, KeptError};
use super::metrics::Metrics;
use super::own_root::{State, Step};
use super::secrets::Secrets;
use super::serving::{Serving, ServingError};
use super::{Config, Source};
use crate::mesh::SpiffeName;
use arc_swap::ArcSwapOption;
use kube::Client;
use parking_lot::Mutex;
use rustls::ServerConfig;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

/// How often the key is loaded.
const LOAD_EVERY: Duration = Duration::from_secs(5);
/// Time between log lines about a key that stays bad.
const SAY_AGAIN: Duration = Duration::from_secs(60);
/// How long [`Authority::confirm`] waits.
const CONFIRMED_WITHIN: Duration = Duration::from_secs(90);

/// Why a certificate is not signed.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    /// The request.
    #[error(transparent)]
    Csr(#[from] CsrError),
    /// The life that is asked for.
    #[error("a life of {asked} s is asked for, {max} s at most")]
    TooLong {
        /// What is asked for, in seconds.
        asked: u64,
        /// The longest, in seconds.
        max: u64,
    },
    /// There is no key, or it may be replaced.
    #[error("the CA is not ready: {0}")]
    NotReady(String),
    /// The signature fails.
    #[error("signing fails: {0}")]
    Failed(#[from] rcgen::Error),
}

/// Why the key cannot be loaded.
#[derive(Debug, thiserror::Error)]
enum LoadError {
    #[error(transparent)]
    Kept(#[from] KeptError),
    #[error(transparent)]
    Folder(#[from] FolderError),
    #[error(transparent)]
    CertManager(#[from] CertManagerError),
    #[error("{origin}: {source}")]
    Material { origin: String, source: MaterialError },
    #[error(transparent)]
    Serving(#[from] ServingError),
}

/// Where the key comes from.
#[derive(Debug)]
enum Place {
    Secrets(Box<Kept>),
    Folder(PathBuf),
    CertManager(Box<CertManager>),
}

/// The number of a load, and whether it was good.
type Loaded = (u64, bool);

/// The certificate authority.
#[derive(Debug)]
pub struct Authority {
    config: Config,
    place: Place,
    current: ArcSwapOption<Issuing>,
    /// The key for which everything is ready.
    changed: watch::Sender<String>,
    serving: Arc<Serving>,
    server_config: Arc<ServerConfig>,
    metrics: Arc<Metrics>,
    /// Loads that have begun, and the last one that has ended.
    begun: AtomicU64,
    ended: watch::Sender<Loaded>,
    wanted: Notify,
    /// The roots that are in every namespace, except in those that refuse them.
    published: Mutex<Option<Arc<str>>>,
    /// What was said last about a key that cannot be loaded, and when.
    said: Mutex<Option<(String, Instant)>>,
}

impl Authority {
    /// An authority without a key. It has one once [`Authority::run`] has loaded it.
    pub fn new(client: Client, config: &Config, metrics: Arc<Metrics>) -> Result<Arc<Self>, rustls::Error> {
        let place = match &config.source {
            Source::Secrets => {
                let secrets = Secrets::new(client, &config.namespace);
                Place::Secrets(Box::new(Kept::new(secrets, config.max_life)))
            }
            Source::Folder(folder) => Place::Folder(folder.clone()),
            Source::CertManager(issuer) => {
                Place::CertManager(Box::new(CertManager::new(client, &config.namespace, issuer.clone())))
            }
        };
        let serving = Arc::<Serving>::default();
        let server_config = serving.server_config()?;
        Ok(Arc::new(Self {
            config: config.clone(),
            place,
            current: ArcSwapOption::empty(),
            changed: watch::Sender::default(),
            serving,
            server_config,
            metrics,
            begun: AtomicU64::default(),
            ended: watch::Sender::default(),
            wanted: Notify::new(),
            published: Mutex::default(),
            said: Mutex::default(),
        }))
    }

    /// Loads the key, follows its changes, takes the steps of a rotation and renews the serving certificate, for as long
    /// as it is awaited.
    pub async fn run(self: Arc<Self>) {
        let mut wanted = false;
        loop {
            let number = self.begun.fetch_add(1, Ordering::SeqCst) + 1;
            let loaded = self.load(wanted).await;
            self.report(loaded.as_ref().err());
            self.ended.send_replace((number, loaded.is_ok()));
            if loaded.is_ok() && self.advance().await {
                continue;
            }
            wanted = tokio::select! {
                () = tokio::time::sleep(LOAD_EVERY) => false,
                () = self.wanted.notified() => true,
            };
        }
    }

    async fn load(&self, wanted: bool) -> Result<(), LoadError> {
        let loaded = match self.fetch(wanted).await {
            Ok(material) => self.put(&material),
            Err(error) => Err(error),
        };
        // Also where the key could not be loaded: the one in force stays, and so must the port that serves it.
        let served = self.renew_serving();
        loaded.and(served)
    }

    async fn fetch(&self, wanted: bool) -> Result<Material, LoadError> {
        Ok(match &self.place {
            Place::Secrets(kept) => kept.load().await?,
            Place::Folder(path) => folder::load(path)?,
            Place::CertManager(cert_manager) => cert_manager.load(wanted).await?,
        })
    }

    fn renew_serving(&self) -> Result<(), LoadError> {
        let Some(issuing) = self.current.load_full() else { return Ok(()) };
        let serving = self.serving.renew(&issuing, &self.config.names, SystemTime::now())?;
        self.metrics.set_expiry("serving", serving);
        // Only now: whoever waits for this finds the server ready.
        let key = format!("{} {}", issuing.origin, issuing.version);
        self.changed.send_if_modified(|seen| std::mem::replace(seen, key.clone()) != key);
        Ok(())
    }

    /// Puts a key in force, if it is another one and good.
    fn put(&self, material: &Material) -> Result<(), LoadError> {
        let held = self.current.load_full();
        let is_same = |held: &Arc<Issuing>| held.origin == material.origin && held.version == material.version;
        if held.as_ref().is_some_and(is_same) {
            return Ok(());
        }
        let bad = |source| LoadError::Material { origin: material.origin.clone(), source };
        let issuing = Issuing::new(material, SystemTime::now()).map_err(bad)?;
        match &held {
            Some(held) if !held.shares_a_root(&issuing) => tracing::warn!(
                origin = issuing.origin,
                "the new roots have none in common with the old ones: until all daemons have renewed their certificates, \
                 some cannot verify each other"
            ),
            _ => tracing::info!(origin = issuing.origin, "a signing key is in force"),
        }
        self.metrics.set_expiry("signing", issuing.not_after);
        self.metrics.set_expiry("root", issuing.roots_not_after);
        self.current.store(Some(Arc::new(issuing)));
        Ok(())
    }

    /// Says why the key cannot be loaded, not too often, and that it can be loaded again.
    fn report(&self, error: Option<&LoadError>) {
        self.metrics.set_loaded(error.is_none());
        let mut said = self.said.lock();
        let Some(error) = error else {
            if said.take().is_some() {
                tracing::info!("the CA's signing key can be loaded again");
            }
            return;
        };
        self.metrics.load_failures.inc();
        let error = error.to_string();
        if said.as_ref().is_some_and(|(text, at)| *text == error && at.elapsed() < SAY_AGAIN) {
            return;
        }
        let in_force = self.current.load().as_ref().map_or_else(|| "none".to_owned(), |held| held.origin.clone());
        tracing::warn!(
            error,
            in_force,
            "the CA's signing key cannot be loaded, or the serving certificate not renewed; what is in force stays"
        );
        *said = Some((error, Instant::now()));
    }

    /// Takes the next step of a rotation, once its time has come and the roots are in every namespace. Returns whether it
    /// has, so that the key is to be loaded again.
    async fn advance(&self) -> bool {
        let Place::Secrets(kept) = &self.place else { return false };
        if !self.is_published() {
            return false;
        }
        match kept.advance(SystemTime::now()).await {
            Ok(Some(state)) => {
                tracing::info!(step = step(&state), "the rotation of the root has taken a step");
                true
            }
            Ok(None) => false,
            Err(error) => {
                tracing::warn!(%error, "the rotation of the root cannot take a step; it is tried again");
                false
            }
        }
    }

    /// Signs a certificate for `identity`. Returns the chain as Istio's CA does: the leaf, each intermediate, and all
    /// roots in the last element.
    pub async fn sign(
        &self,
        csr: &str,
        identity: &SpiffeName,
        life: Option<Duration>,
    ) -> Result<Vec<String>, SignError> {
        let key = csr::public_key(csr)?;
        let (life, max) = (life.unwrap_or(self.config.default_life), self.config.max_life);
        if life > max {
            return Err(SignError::TooLong { asked: life.as_secs(), max: max.as_secs() });
        }
        let not_ready = |reason: &str| SignError::NotReady(reason.to_owned());
        if let Place::Secrets(kept) = &self.place {
            kept.grant(life).await.map_err(|error| not_ready(&error.to_string()))?;
        }
        let now = SystemTime::now();
        let issuing = self.current.load_full().ok_or_else(|| not_ready("it has no signing key"))?;
        if issuing.not_after <= now {
            return Err(not_ready("its signing certificate has expired"));
        }
        let (leaf, _) = issuing.leaf(&key, Leaf::Workload(identity), life, now)?;
        Ok(issuing.answer(&leaf))
    }

    /// Settings of the control plane's server: TLS 1.3, HTTP/2, and always the current certificate.
    pub fn server_config(&self) -> Arc<ServerConfig> {
        self.server_config.clone()
    }

    /// Its settings.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Whether there is a key, and a serving certificate.
    pub fn is_ready(&self) -> bool {
        self.current.load().is_some() && self.serving.is_ready()
    }

    /// The roots in PEM, once there are some.
    pub fn roots_pem(&self) -> Option<Arc<str>> {
        self.current.load().as_ref().map(|issuing| issuing.roots_pem.clone())
    }

    /// The revoked certificates in PEM, if some came with the key.
    pub fn crl_pem(&self) -> Option<Arc<str>> {
        self.current.load().as_ref().and_then(|issuing| issuing.crl.clone())
    }

    /// A notice of each new key, once the server is ready with it.
    pub fn changes(&self) -> watch::Receiver<String> {
        self.changed.subscribe()
    }

    /// Loads the key anew. Returns whether what is in force now is what its source said after this call began.
    pub async fn confirm(&self) -> bool {
        let (begun, mut ended) = (self.begun.load(Ordering::SeqCst), self.ended.subscribe());
        self.wanted.notify_one();
        let later = ended.wait_for(|(number, _)| *number > begun);
        matches!(tokio::time::timeout(CONFIRMED_WITHIN, later).await, Ok(Ok(loaded)) if loaded.1)
    }

    /// Says that these roots are in every namespace, except in those that refuse them.
    pub fn set_published(&self, roots: Option<Arc<str>>) {
        *self.published.lock() = roots;
    }

    pub(super) fn is_published(&self) -> bool {
        let roots = self.roots_pem();
        roots.is_some() && *self.published.lock() == roots
    }
}

/// A step in words.
fn step(state: &State) -> &'static str {
    match state.step {
        Step::Settled { .. } => "done: only the new root is given out",
        Step::Announced { .. } => "both roots are given out, the old one signs",
        Step::Signing { .. } => "both roots are given out, the new one signs",
    }
}

#[cfg(test)]
mod tests {
    use super::super::fake_api::{Answer, FakeApi};
    use super::super::rotate;
    use super::*;
    use crate::crypto::certificates_from_pem;
    use crate::rpc::tls;
    use crate::task::Group;
    use rcgen::{CertificateParams, KeyPair};
    use rustls::pki_types::CertificateDer;
    use serde_json::json;
    use tokio_rustls::{TlsAcceptor, TlsConnector};

    const OWN: &str = "/api/v1/namespaces/istio-system/secrets/culvert-ca";
    const DAY: Duration = Duration::from_secs(24 * 3600);

    fn config(source: Source) -> Config {
        Config {
            source,
            namespace: "istio-system".into(),
            trust_domain: "cluster.local".into(),
            names: vec!["culvert-control.istio-system.svc".into(), "localhost".into()],
            audiences: vec!["istio-ca".into()],
            trusted: Vec::new(),
            default_life: DAY,
            max_life: DAY * 90,
        }
    }

    fn authority(api: &FakeApi, source: Source, metrics: &Arc<Metrics>) -> Arc<Authority> {
        Authority::new(api.client(), &config(source), metrics.clone()).unwrap()
    }

    fn csr() -> String {
        CertificateParams::default().serialize_request(&KeyPair::generate().unwrap()).unwrap().pem().unwrap()
    }

    fn identity() -> SpiffeName {
        SpiffeName::new("cluster.local", "shop", "web").unwrap()
    }

    fn folder(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("culvert-authority-{name}-{}", std::process::id()));
        drop(std::fs::remove_dir_all(&path));
        std::fs::create_dir_all(&path).unwrap();
        path
    }

    /// Writes a root of its own into a directory.
    fn fill(folder: &std::path::Path) {
        let data = super::super::own_root::OwnRoot::make(SystemTime::now()).unwrap().data().unwrap();
        for name in ["ca-cert.pem", "ca-key.pem", "root-cert.pem"] {
            std::fs::write(folder.join(name), &*data[name]).unwrap();
        }
    }

    /// The certificate that a client sees who trusts `roots` and calls the server `host`.
    async fn served(authority: &Authority, roots: &str, host: &str) -> Result<CertificateDer<'static>, String> {
        let client = tls::client(&tls::Roots::Inline(roots.into()), host, None, b"h2").unwrap();
        let (near, far) = tokio::io::duplex(1 << 16);
        let server = TlsAcceptor::from(authority.server_config()).accept(far);
        let client = TlsConnector::from(client.config).connect(client.name, near);
        let (server, client) = tokio::join!(server, client);
        let (client, _) = (client.map_err(|error| error.to_string())?, server.map_err(|error| error.to_string())?);
        assert_eq!(client.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
        Ok(client.get_ref().1.peer_certificates().unwrap()[0].clone())
    }

    #[tokio::test]
    async fn it_signs_and_serves_once_it_has_a_key() {
        let (api, metrics) = (FakeApi::default(), Arc::<Metrics>::default());
        let authority = authority(&api, Source::Secrets, &metrics);
        assert!(!authority.is_ready() && authority.roots_pem().is_none());
        let changes = authority.changes();
        let refused = authority.sign(&csr(), &identity(), None).await;
        assert!(matches!(refused, Err(SignError::NotReady(_))), "{refused:?}");
        authority.load(false).await.unwrap();
        assert!(authority.is_ready() && changes.has_changed().unwrap());
        let changes = authority.changes();
        authority.load(false).await.unwrap();
        assert!(!changes.has_changed().unwrap(), "it is the same key");
        let roots = authority.roots_pem().unwrap();
        let answer = authority.sign(&csr(), &identity(), None).await.unwrap();
        assert_eq!((answer.len(), &*answer[1]), (2, &*roots));
        for host in ["culvert-control.istio-system.svc", "localhost"] {
            served(&authority, &roots, host).await.unwrap();
        }
        let error = served(&authority, &roots, "other.istio-system.svc").await.unwrap_err();
        assert!(error.contains("not valid for name"), "{error}");
        for (life, good) in [(DAY * 90, true), (DAY * 90 + Duration::from_secs(1), false), (Duration::MAX, false)] {
            let signed = authority.sign(&csr(), &identity(), Some(life)).await;
            assert_eq!(signed.is_ok(), good, "{life:?}");
            assert!(good || matches!(signed, Err(SignError::TooLong { .. })));
        }
        assert!(matches!(authority.sign("x", &identity(), None).await, Err(SignError::Csr(_))));
    }

    #[tokio::test]
    async fn a_bad_key_leaves_the_last_good_one_in_force_and_is_told() {
        let (folder, metrics) = (folder("bad"), Arc::<Metrics>::default());
        let authority = authority(&FakeApi::default(), Source::Folder(folder.clone()), &metrics);
        let load = async || {
            let loaded = authority.load(false).await;
            authority.report(loaded.as_ref().err());
            loaded.map_err(|error| error.to_string())
        };
        assert!(load().await.unwrap_err().contains("ca-cert.pem is missing"));
        fill(&folder);
        load().await.unwrap();
        let first = authority.roots_pem().unwrap();
        let before = metrics.load_failures.get();
        std::fs::write(folder.join("ca-key.pem"), KeyPair::generate().unwrap().serialize_pem()).unwrap();
        let error = load().await.unwrap_err();
        assert!(error.contains("ca-key.pem is not the key of ca-cert.pem"), "{error}");
        assert!(error.contains(&folder.display().to_string()) && !error.contains("PRIVATE"), "{error}");
        assert_eq!((metrics.load_failures.get() - before, authority.roots_pem().unwrap()), (1, first.clone()));
        authority.sign(&csr(), &identity(), None).await.unwrap();
        served(&authority, &first, "localhost").await.unwrap();
        // A good one is taken, and the server presents one from it without a restart.
        let served_before = served(&authority, &first, "localhost").await.unwrap();
        fill(&folder);
        load().await.unwrap();
        let second = authority.roots_pem().unwrap();
        assert_ne!(first, second);
        assert_ne!(served(&authority, &second, "localhost").await.unwrap(), served_before);
        served(&authority, &first, "localhost").await.unwrap_err();
        std::fs::remove_dir_all(&folder).unwrap();
        load().await.unwrap_err();
        assert!(authority.is_ready());
    }

    #[tokio::test]
    async fn the_serving_certificate_is_renewed_at_half_of_its_life() {
        let api = FakeApi::default();
        let authority = authority(&api, Source::Secrets, &Arc::default());
        authority.load(false).await.unwrap();
        let (issuing, roots) = (authority.current.load_full().unwrap(), authority.roots_pem().unwrap());
        let (names, now) = (&authority.config.names, SystemTime::now());
        let first = served(&authority, &roots, "localhost").await.unwrap();
        authority.serving.renew(&issuing, names, now + DAY / 2 - Duration::from_secs(5)).unwrap();
        assert_eq!(served(&authority, &roots, "localhost").await.unwrap(), first);
        authority.serving.renew(&issuing, names, now + DAY / 2 + Duration::from_secs(5)).unwrap();
        assert_ne!(certificates_from_pem(roots.as_bytes()).unwrap()[0], first);
        let renewed = authority.serving.renew(&issuing, names, now + DAY / 2 + Duration::from_secs(6)).unwrap();
        assert!(renewed > now + DAY, "{renewed:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn it_follows_its_source_and_confirms_what_is_in_force() {
        let (api, tasks) = (FakeApi::default(), Group::default());
        let (authority, metrics) = (authority(&api, Source::Secrets, &Arc::default()), Arc::<Metrics>::default());
        let other = Authority::new(api.client(), &config(Source::Secrets), metrics).unwrap();
        tasks.spawn(authority.clone().run());
        assert!(authority.confirm().await);
        other.load(false).await.unwrap();
        let changes = authority.changes();
        // Another replica begins to replace the root: whoever confirms after that has both roots.
        rotate::run(api.client(), &config(Source::Secrets), false).await.unwrap();
        assert!(authority.confirm().await && changes.has_changed().unwrap());
        let both = authority.roots_pem().unwrap();
        assert_eq!(certificates_from_pem(both.as_bytes()).unwrap().len(), 2);
        assert_ne!(other.roots_pem().unwrap(), both);
        api.hook(|_, _, _| Answer::Is(503, json!({"kind": "Status", "code": 503, "message": "away"})));
        assert!(!authority.confirm().await, "nobody has said that it is still so");
        tokio::time::sleep(Duration::from_secs(60)).await;
        let refused = authority.sign(&csr(), &identity(), None).await.unwrap_err().to_string();
        assert!(refused.contains("has not been read for 30 s"), "{refused}");
        api.hook(|_, _, _| Answer::Go);
        tokio::time::sleep(LOAD_EVERY * 2).await;
        authority.sign(&csr(), &identity(), None).await.unwrap();
        tasks.cut();
    }

    #[tokio::test]
    async fn a_rotation_waits_until_the_roots_are_everywhere() {
        let api = FakeApi::default();
        let mut config = config(Source::Secrets);
        config.max_life = Duration::from_secs(10);
        let authority = Authority::new(api.client(), &config, Arc::default()).unwrap();
        authority.load(false).await.unwrap();
        rotate::run(api.client(), &config, false).await.unwrap();
        // As if it had begun long ago.
        let since = |seconds: u64| {
            use base64::Engine as _;
            let state = json!({"longestLife": 10, "step": {"name": "announced", "since": seconds}}).to_string();
            let mut secret = api.get(OWN).unwrap();
            secret["data"]["rotation.json"] = base64::engine::general_purpose::STANDARD.encode(state).into();
            api.put(OWN, secret);
        };
        since(1);
        authority.load(false).await.unwrap();
        assert!(!authority.advance().await, "they are nowhere");
        authority.set_published(Some("old".into()));
        assert!(!authority.advance().await, "others are everywhere");
        let said = rotate::run(api.client(), &config, false).await.unwrap();
        assert!(
            said.contains("Step 1 of 3") && said.contains("waits until the roots are in every namespace"),
            "{said}"
        );
        authority.set_published(authority.roots_pem());
        assert!(authority.advance().await);
        authority.load(false).await.unwrap();
        let said = rotate::run(api.client(), &config, false).await.unwrap();
        assert!(said.contains("Step 2 of 3"), "{said}");
        assert!(!authority.advance().await, "its time has not come");
    }
}
