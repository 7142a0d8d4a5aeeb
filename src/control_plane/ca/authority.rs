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
    /// Notified of each new key.
    changed: watch::Sender<u64>,
    serving: Arc<Serving>,
    server_config: Arc<ServerConfig>,
    metrics: Arc<Metrics>,
    /// Loads that have begun, and the last one that has ended.
    begun: AtomicU64,
    ended: watch::Sender<Loaded>,
    wanted: Notify,
    /// The roots that are in every namespace.
    published: Mutex<Option<Arc<str>>>,
    /// What was said last about a key that cannot be loaded, and when.
    said: Mutex<Option<(String, Instant)>>,
}

impl Authority {
    /// An authority without a key. It has one once [`Authority::run`] has loaded it.
    pub fn new(client: Client, config: &Config, metrics: Arc<Metrics>) -> Result<Arc<Self>, rustls::Error> {
        let place = match &config.source {
            Source::Secrets => Place::Secrets(Box::new(Kept::new(Secrets::new(client, &config.namespace)))),
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
        let material = match &self.place {
            Place::Secrets(kept) => kept.load().await?,
            Place::Folder(path) => folder::load(path)?,
            Place::CertManager(cert_manager) => cert_manager.load(wanted).await?,
        };
        self.put(&material)?;
        let Some(issuing) = self.current.load_full() else { return Ok(()) };
        let serving = self.serving.renew(&issuing, &self.config.names, SystemTime::now())?;
        self.metrics.set_expiry("serving", serving);
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
        self.changed.send_modify(|number| *number += 1);
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
        tracing::warn!(error, in_force, "the CA's signing key cannot be loaded; the last good one stays in force");
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

    /// A notice of each new key.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Loads the key anew. Returns whether what is in force now is what its source said after this call began.
    pub async fn confirm(&self) -> bool {
        let (begun, mut ended) = (self.begun.load(Ordering::SeqCst), self.ended.subscribe());
        self.wanted.notify_one();
        let later = ended.wait_for(|(number, _)| *number > begun);
        matches!(tokio::time::timeout(CONFIRMED_WITHIN, later).await, Ok(Ok(loaded)) if loaded.1)
    }

    /// Says that these roots are in every namespace.
    pub fn set_published(&self, roots: Option<Arc<str>>) {
        *self.published.lock() = roots;
    }

    fn is_published(&self) -> bool {
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
