//! The signing key in Secrets: the user's `cacerts`, or our own root in `culvert-ca`.
//!
//! Secrets are read by name and nothing else, so the control plane needs neither to list nor to watch them. Which one is
//! in force:
//! - `cacerts`, if there is one. A bad one is an error: nothing else is used in its place.
//! - else `culvert-ca`. If there is none when the control plane starts, it is made: from istiod's `istio-ca-secret` if
//!   that is there, so that a mesh that comes from Istio keeps its root, else from a new key. Of replicas that start at
//!   the same time, one makes it and the others read it.

use super::issuing::Material;
use super::own_root::{self, LEASE, OwnRoot, OwnRootError, Pair, State, Step};
use super::secrets::{Data, Secret, SecretError, Secrets, Written};
use parking_lot::Mutex;
use std::time::{Duration, SystemTime};
use tokio::time::Instant;
use zeroize::Zeroizing;

/// The user's Secret.
const PLUGGED: &str = "cacerts";
/// Our own.
pub const OWN: &str = "culvert-ca";
/// istiod's, where it has made its own root.
const OF_ISTIOD: &str = "istio-ca-secret";
/// Life of certificates that istiod signs, unless it is told otherwise.
const LIFE_OF_ISTIOD: Duration = Duration::from_secs(24 * 3600);
/// How often a write is tried again because somebody else was faster.
const ATTEMPTS: usize = 5;

/// Why there is no signing key.
#[derive(Debug, thiserror::Error)]
pub enum KeptError {
    /// The API.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// The content of our own Secret.
    #[error("the Secret {0}: {1}")]
    OwnRoot(String, #[source] OwnRootError),
    /// The content of the user's Secret.
    #[error("the Secret {0}: {1} is missing")]
    Missing(String, &'static str),
    /// The Secret in force is gone.
    #[error("the Secret {0} is gone; what it held stays in force until the control plane starts anew")]
    Gone(String),
    /// The root is the user's.
    #[error("the root is in the Secret {0}, which is not culvert's own")]
    NotOwn(String),
    /// There is no root yet.
    #[error("there is no Secret {0}")]
    None(String),
    /// Others change the Secret all the time.
    #[error("the Secret {0} is changed by others again and again")]
    Contended(String),
    /// The Secret has not been read for too long.
    #[error("the Secret has not been read for {} s", LEASE.as_secs())]
    Stale,
}

/// Our own root as it was read.
#[derive(Clone)]
struct Held {
    version: String,
    root: OwnRoot,
}

/// What a rotation did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rotation {
    /// It began.
    Begun(State),
    /// It goes on, or there is none.
    Stands(State),
}

/// The Secrets that hold the signing key.
pub struct Kept {
    secrets: Secrets,
    /// The name of the Secret in force.
    in_force: Mutex<Option<&'static str>>,
    held: Mutex<Option<Held>>,
    /// When the API answered last.
    read: Mutex<Option<Instant>>,
    /// The longest life that certificates may have.
    max_life: Duration,
    /// Writes, one at a time.
    writing: tokio::sync::Mutex<()>,
}

impl std::fmt::Debug for Kept {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Kept({:?})", self.secrets)
    }
}

impl Kept {
    /// The Secrets of a namespace, for certificates that may live for `max_life`.
    pub fn new(secrets: Secrets, max_life: Duration) -> Self {
        let (in_force, held, read) = Default::default();
        Self { secrets, in_force, held, read, max_life, writing: tokio::sync::Mutex::default() }
    }

    /// Reads what is in force. What is returned is unchecked.
    pub async fn load(&self) -> Result<Material, KeptError> {
        let loaded = self.load_any().await;
        // A Secret that is bad or gone is an answer too: what is in force then does not depend on it.
        if !matches!(loaded, Err(KeptError::Secret(_))) {
            *self.read.lock() = Some(Instant::now());
        }
        loaded
    }

    async fn load_any(&self) -> Result<Material, KeptError> {
        if let Some(secret) = self.secrets.get(PLUGGED).await? {
            let material = self.plugged(&secret)?;
            (*self.in_force.lock(), *self.held.lock()) = (Some(PLUGGED), None);
            return Ok(material);
        }
        let in_force = *self.in_force.lock();
        if in_force == Some(PLUGGED) {
            return Err(KeptError::Gone(self.secrets.path(PLUGGED)));
        }
        let held = match self.own().await? {
            Some(held) => held,
            None if in_force.is_some() => return Err(KeptError::Gone(self.secrets.path(OWN))),
            None => self.make().await?,
        };
        let material = held.root.material(self.origin(OWN), held.version.clone());
        (*self.in_force.lock(), *self.held.lock()) = (Some(OWN), Some(held));
        Ok(material)
    }

    fn origin(&self, name: &str) -> String {
        format!("Secret {}", self.secrets.path(name))
    }

    /// The user's Secret, in Istio's layout or in that of a TLS Secret.
    fn plugged(&self, secret: &Secret) -> Result<Material, KeptError> {
        let missing = |name| KeptError::Missing(self.secrets.path(PLUGGED), name);
        material(&secret.data, self.origin(PLUGGED), secret.version.clone()).map_err(missing)
    }

    async fn own(&self) -> Result<Option<Held>, KeptError> {
        let Some(secret) = self.secrets.get(OWN).await? else { return Ok(None) };
        let root = OwnRoot::read(&secret.data).map_err(|error| self.bad(error))?;
        Ok(Some(Held { version: secret.version, root }))
    }

    fn bad(&self, error: OwnRootError) -> KeptError {
        KeptError::OwnRoot(self.secrets.path(OWN), error)
    }

    /// Makes our own root.
    async fn make(&self) -> Result<Held, KeptError> {
        let of_istiod = self.secrets.get(OF_ISTIOD).await?;
        let root = match &of_istiod {
            Some(secret) => OwnRoot::adopt(secret, LIFE_OF_ISTIOD)
                .map_err(|error| KeptError::OwnRoot(self.secrets.path(OF_ISTIOD), error))?,
            None => OwnRoot::make(SystemTime::now()).map_err(|error| self.bad(error))?,
        };
        let data = root.data().map_err(|error| self.bad(error))?;
        if self.secrets.create(OWN, &data).await? == Written::Done {
            let from = if of_istiod.is_some() { "the root of istio-ca-secret" } else { "a new key" };
            tracing::info!(secret = self.secrets.path(OWN), from, "the mesh's root is made");
        }
        // Whoever made it, this is what holds.
        self.own().await?.ok_or_else(|| KeptError::Gone(self.secrets.path(OWN)))
    }

    /// Keeps that a certificate of this life is going to be signed. Fails if that cannot be said, or if the Secret has not
    /// been read for so long that its content may be another one.
    pub async fn grant(&self, life: Duration) -> Result<(), KeptError> {
        if self.read.lock().is_none_or(|read| read.elapsed() > LEASE) {
            return Err(KeptError::Stale);
        }
        let needs = |root: &OwnRoot| root.state.longest_life < life.as_secs();
        if !self.held.lock().as_ref().is_some_and(|held| needs(&held.root)) {
            return Ok(());
        }
        let change = |root: &mut OwnRoot| {
            let needed = needs(root);
            root.state.longest_life = root.state.longest_life.max(life.as_secs());
            needed
        };
        self.change(change).await.map(drop)
    }

    /// Takes the next step of a rotation if its time has come. Returns the new state if it has.
    pub async fn advance(&self, now: SystemTime) -> Result<Option<State>, KeptError> {
        let due = |root: &OwnRoot| root.state.next_at(self.max_life).is_some_and(|at| own_root::seconds(now) >= at);
        if !self.held.lock().as_ref().is_some_and(|held| due(&held.root)) {
            return Ok(None);
        }
        let mut advanced = false;
        let state = self.change(|root| {
            advanced = root.advance(now, self.max_life);
            advanced
        });
        let state = state.await?;
        Ok(advanced.then_some(state))
    }

    /// Begins a rotation, unless there is one, or `again` is not set and one has ended.
    pub async fn rotate(&self, again: bool, now: SystemTime) -> Result<Rotation, KeptError> {
        if self.secrets.get(PLUGGED).await?.is_some() {
            return Err(KeptError::NotOwn(self.secrets.path(PLUGGED)));
        }
        if self.own().await?.is_none() {
            return Err(KeptError::None(self.secrets.path(OWN)));
        }
        let next = Pair::make(now).map_err(|error| self.bad(error))?;
        let mut begun = false;
        let state = self.change(|root| {
            let ended = matches!(root.state.step, Step::Settled { finished: Some(_) });
            begun = (again || !ended) && root.begin(next.clone(), now);
            begun
        });
        let state = state.await?;
        Ok(if begun { Rotation::Begun(state) } else { Rotation::Stands(state) })
    }

    /// Changes our own root as it is now, whoever has changed it before. Nothing is written if `change` says that there is
    /// nothing to write.
    async fn change(&self, mut change: impl FnMut(&mut OwnRoot) -> bool) -> Result<State, KeptError> {
        let _turn = self.writing.lock().await;
        for attempt in 0..ATTEMPTS {
            let held = self.held.lock().clone().filter(|_| attempt == 0);
            let held = match held {
                Some(held) => held,
                None => self.own().await?.ok_or_else(|| KeptError::Gone(self.secrets.path(OWN)))?,
            };
            let mut changed = held.clone();
            if !change(&mut changed.root) {
                *self.held.lock() = Some(held);
                return Ok(changed.root.state);
            }
            let entries = changed.root.entries().map_err(|error| self.bad(error))?;
            if self.secrets.patch(OWN, &held.version, &entries).await? == Written::Done {
                let state = changed.root.state;
                // Read back, for its new version.
                let read = self.own().await?.ok_or_else(|| KeptError::Gone(self.secrets.path(OWN)))?;
                *self.held.lock() = Some(read);
                return Ok(state);
            }
        }
        Err(KeptError::Contended(self.secrets.path(OWN)))
    }
}

/// Reads the layout of `cacerts`, or that of a TLS Secret. The error is the entry that is missing.
pub fn material(data: &Data, origin: String, version: String) -> Result<Material, &'static str> {
    let take = |name: &str| data.get(name).filter(|entry| !entry.is_empty());
    let public = |name: &str| take(name).map(|entry| entry.to_vec()).unwrap_or_default();
    let (certificate, key, roots) = match take("ca-cert.pem") {
        None if take("tls.crt").is_some() => ("tls.crt", "tls.key", "ca.crt"),
        _ => ("ca-cert.pem", "ca-key.pem", "root-cert.pem"),
    };
    let needed = |name: &'static str| take(name).ok_or(name);
    let certificate = needed(certificate)?.to_vec();
    let key: Zeroizing<Vec<u8>> = needed(key)?.clone();
    let roots = needed(roots)?.to_vec();
    let crl = take("ca-crl.pem").map(|crl| crl.to_vec());
    Ok(Material { origin, version, certificate, key, chain: public("cert-chain.pem"), roots, crl })
}

#[cfg(test)]
mod tests {
    use super::super::fake_api::{Answer, FakeApi};
    use super::super::issuing::Issuing;
    use super::*;
    use serde_json::{Value, json};

    const FOLDER: &str = "/api/v1/namespaces/istio-system/secrets";

    fn kept(api: &FakeApi) -> Kept {
        Kept::new(Secrets::new(api.client(), "istio-system"), Duration::from_secs(24 * 3600))
    }

    fn object(data: &Data) -> Value {
        use base64::Engine as _;
        let encode = |value: &Zeroizing<Vec<u8>>| base64::engine::general_purpose::STANDARD.encode(value);
        let data: serde_json::Map<String, Value> =
            data.iter().map(|(key, value)| (key.clone(), encode(value).into())).collect();
        json!({"data": data})
    }

    /// Entries in istiod's layout, with a root that only they have.
    fn layout() -> Data {
        let mut data = OwnRoot::make(SystemTime::now()).unwrap().data().unwrap();
        data.remove("rotation.json");
        data
    }

    fn path(name: &str) -> String {
        format!("{FOLDER}/{name}")
    }

    #[tokio::test]
    async fn replicas_that_start_at_once_have_one_root() {
        let api = FakeApi::default();
        let replicas = [kept(&api), kept(&api), kept(&api)];
        let loaded = futures_util::future::join_all(replicas.iter().map(Kept::load)).await;
        let loaded: Vec<Material> = loaded.into_iter().map(Result::unwrap).collect();
        assert!(loaded.iter().all(|material| *material == loaded[0]));
        assert_eq!(api.count("POST", FOLDER), 3, "all of them have tried");
        assert_eq!(loaded[0].origin, "Secret istio-system/culvert-ca");
        let issuing = Issuing::new(&loaded[0], SystemTime::now()).unwrap();
        let years = issuing.not_after.duration_since(SystemTime::now()).unwrap().as_secs() / (365 * 24 * 3600);
        assert!((9..=10).contains(&years), "{years}");
        // A replica that comes later finds it.
        assert_eq!(kept(&api).load().await.unwrap(), loaded[0]);
    }

    #[tokio::test]
    async fn a_mesh_that_comes_from_istio_keeps_its_root() {
        let (api, mut of_istiod) = (FakeApi::default(), layout());
        of_istiod.insert("root-cert.pem".into(), Zeroizing::default());
        of_istiod.insert("cert-chain.pem".into(), Zeroizing::default());
        api.put(&path(OF_ISTIOD), object(&of_istiod));
        let taken = kept(&api).load().await.unwrap();
        assert_eq!((&taken.certificate, &taken.key), (&of_istiod["ca-cert.pem"].to_vec(), &of_istiod["ca-key.pem"]));
        assert_eq!((taken.roots, taken.origin), (taken.certificate, "Secret istio-system/culvert-ca".into()));
        // Its own Secret counts from now on.
        api.delete(&path(OF_ISTIOD));
        assert_eq!(kept(&api).load().await.unwrap().key, of_istiod["ca-key.pem"]);
        api.put(&path(OF_ISTIOD), object(&layout()));
        assert_eq!(kept(&api).load().await.unwrap().key, of_istiod["ca-key.pem"]);
    }

    #[tokio::test]
    async fn the_users_secret_counts_first_and_nothing_takes_its_place() {
        let (api, plugged) = (FakeApi::default(), layout());
        let kept = kept(&api);
        let own = kept.load().await.unwrap();
        api.put(&path(PLUGGED), object(&plugged));
        let loaded = kept.load().await.unwrap();
        assert_eq!((&loaded.key, &*loaded.origin), (&plugged["ca-key.pem"], "Secret istio-system/cacerts"));
        assert_ne!(loaded.key, own.key);
        // As cert-manager writes it.
        let names = [("ca-cert.pem", "tls.crt"), ("ca-key.pem", "tls.key"), ("root-cert.pem", "ca.crt")];
        let tls: Data = names.map(|(from, to)| (to.to_owned(), plugged[from].clone())).into();
        api.put(&path(PLUGGED), object(&tls));
        let as_tls = kept.load().await.unwrap();
        assert_eq!((as_tls.certificate, as_tls.key, as_tls.roots), (loaded.certificate, loaded.key, loaded.roots));
        for name in ["ca-cert.pem", "ca-key.pem", "root-cert.pem"] {
            let mut lacking = plugged.clone();
            lacking.remove(name);
            api.put(&path(PLUGGED), object(&lacking));
            let error = kept.load().await.unwrap_err().to_string();
            assert_eq!(error, format!("the Secret istio-system/cacerts: {name} is missing"));
        }
        api.delete(&path(PLUGGED));
        let error = kept.load().await.unwrap_err().to_string();
        assert!(error.contains("istio-system/cacerts is gone"), "{error}");
    }

    #[tokio::test]
    async fn a_root_that_is_deleted_while_it_is_in_force_is_not_made_anew() {
        let api = FakeApi::default();
        let kept = kept(&api);
        kept.load().await.unwrap();
        api.delete(&path(OWN));
        for _ in 0..2 {
            let error = kept.load().await.unwrap_err().to_string();
            assert!(error.contains("istio-system/culvert-ca is gone"), "{error}");
        }
        assert_eq!(api.count("POST", FOLDER), 1);
    }

    #[tokio::test]
    async fn an_answer_that_is_no_secret_is_not_repeated() {
        let api = FakeApi::default();
        for (body, part) in [
            (json!({"metadata": {}, "data": {"ca-key.pem": 7}}), "line 1"),
            (json!({"metadata": {}, "data": "hunter2"}), "line 1"),
            (json!({"metadata": {}, "data": {"ca-key.pem": "hunter2!"}}), "cannot be read"),
        ] {
            api.hook(move |_, _, _| Answer::Is(200, body.clone()));
            let error = kept(&api).load().await.unwrap_err().to_string();
            assert!(error.contains(part) && !error.contains("hunter2"), "{error}");
        }
    }

    #[tokio::test]
    async fn the_longest_life_is_kept_before_it_is_granted_whoever_else_writes() {
        let api = FakeApi::default();
        let (first, second) = (kept(&api), kept(&api));
        assert!(matches!(first.grant(Duration::from_secs(60)).await, Err(KeptError::Stale)), "nothing is known yet");
        for kept in [&first, &second] {
            kept.load().await.unwrap();
        }
        let longest = || {
            let secret = api.get(&path(OWN)).unwrap();
            use base64::Engine as _;
            let state = secret["data"]["rotation.json"].as_str().unwrap();
            let state = base64::engine::general_purpose::STANDARD.decode(state).unwrap();
            serde_json::from_slice::<State>(&state).unwrap().longest_life
        };
        for (kept, life, expected) in
            [(&first, 60, 60), (&first, 30, 60), (&second, 50, 60), (&second, 90, 90), (&first, 80, 90)]
        {
            let writes = api.count("PATCH", OWN);
            kept.grant(Duration::from_secs(life)).await.unwrap();
            assert_eq!(longest(), expected);
            assert!(life <= 60 || api.count("PATCH", OWN) > writes || life == 80, "{life}");
        }
        api.hook(|method, _, _| match method.as_str() {
            "PATCH" => Answer::Is(500, json!({"kind": "Status", "code": 500, "message": "no"})),
            _ => Answer::Go,
        });
        assert!(first.grant(Duration::from_secs(100)).await.is_err(), "what cannot be kept is not granted");
        first.grant(Duration::from_secs(90)).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_has_not_read_the_secret_for_long_grants_nothing() {
        let api = FakeApi::default();
        let kept = kept(&api);
        kept.load().await.unwrap();
        kept.grant(Duration::from_secs(60)).await.unwrap();
        api.hook(|_, _, _| Answer::Is(503, json!({"kind": "Status", "code": 503, "message": "away"})));
        tokio::time::sleep(LEASE).await;
        kept.grant(Duration::from_secs(60)).await.unwrap();
        tokio::time::sleep(Duration::from_millis(1)).await;
        kept.load().await.unwrap_err();
        assert!(matches!(kept.grant(Duration::from_secs(60)).await, Err(KeptError::Stale)));
        api.hook(|_, _, _| Answer::Go);
        kept.load().await.unwrap();
        kept.grant(Duration::from_secs(60)).await.unwrap();
    }

    #[tokio::test]
    async fn a_rotation_is_begun_once_and_each_step_is_taken_by_one_replica() {
        let api = FakeApi::default();
        let (first, second) = (kept(&api), kept(&api));
        let now = SystemTime::now();
        assert!(matches!(first.rotate(false, now).await, Err(KeptError::None(_))));
        let old = first.load().await.unwrap();
        first.grant(Duration::from_secs(3600)).await.unwrap();
        second.load().await.unwrap();
        // The command runs in a process of its own, here twice at once.
        let commands = [kept(&api), kept(&api)];
        let begun = futures_util::future::join_all(commands.iter().map(|kept| kept.rotate(false, now))).await;
        let begun: Vec<Rotation> = begun.into_iter().map(Result::unwrap).collect();
        assert_eq!(begun.iter().filter(|what| matches!(what, Rotation::Begun(_))).count(), 1, "{begun:?}");
        let later = |hours: u64| now + Duration::from_secs(3600 * hours);
        for (hours, steps) in [(0, 0), (2, 1), (3, 0), (4, 1), (9, 0)] {
            let mut taken = 0;
            for kept in [&first, &second] {
                kept.load().await.unwrap();
            }
            for kept in [&first, &second] {
                taken += usize::from(kept.advance(later(hours)).await.unwrap().is_some());
            }
            assert_eq!(taken, steps, "after {hours} h");
        }
        let new = second.load().await.unwrap();
        assert!(new.key != old.key && new.roots == new.certificate);
        assert!(matches!(kept(&api).rotate(false, now).await, Ok(Rotation::Stands(_))), "done is done");
        assert!(matches!(kept(&api).rotate(true, now).await, Ok(Rotation::Begun(_))));
        api.put(&path(PLUGGED), object(&layout()));
        assert!(matches!(kept(&api).rotate(true, now).await, Err(KeptError::NotOwn(_))));
    }
}
