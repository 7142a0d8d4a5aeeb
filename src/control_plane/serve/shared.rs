//! What all connections share.

use super::difference::Differences;
use super::editions::Editions;
use super::grpc;
use super::index::Index;
use super::metrics::Metrics;
use super::nodes::Nodes;
use crate::control_plane::Caller;
use crate::mesh::Text;
use crate::proto::istio::v1::auth::{IstioCertificateRequest, IstioCertificateResponse};
use crate::task::slots::Slots;
use parking_lot::RwLock;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use tokio::sync::Semaphore;
use tonic::Status;

/// Calls whose token or request is being looked at: of all, and of one address.
const ASKING: usize = 512;
const ASKING_OF_ONE: usize = 64;
/// How many first answers are made at the same time.
const HEAVY: usize = 2;

/// The service accounts that may have mesh facts, and the cluster that is served.
#[derive(Clone, Debug)]
pub struct Config {
    /// Service accounts of daemons: namespace and name.
    pub trusted: Vec<(Text, Text)>,
    /// Name of the cluster. Clients that name another one are refused.
    pub cluster_id: Text,
}

/// A future that has been boxed.
pub type Later<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// Why it is not known whose a token is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Denied {
    /// It is not good.
    Refused(String),
    /// It cannot be checked now.
    Unavailable(String),
}

impl From<Denied> for Status {
    fn from(denied: Denied) -> Self {
        match denied {
            Denied::Refused(why) => Status::unauthenticated(why),
            Denied::Unavailable(why) => Status::unavailable(why),
        }
    }
}

/// Says whose a token is. It has a deadline of its own.
pub type Review = Box<dyn Fn(String) -> Later<Result<Caller, Denied>> + Send + Sync>;

/// A request for a certificate that is read once it is known who asks.
pub type Asked = Later<Result<IstioCertificateRequest, Status>>;

/// Signs a certificate for the owner of a token. It has a deadline of its own.
pub type Sign = Box<dyn Fn(Option<String>, Asked) -> Later<Result<IstioCertificateResponse, Status>> + Send + Sync>;

/// TLS of the port, by the certificate that is valid now; `None` while there is none.
pub type Tls = Box<dyn Fn() -> Option<Arc<rustls::ServerConfig>> + Send + Sync>;

/// Who decides about callers, and signs.
pub struct Authority {
    /// Whose a token is.
    pub review: Review,
    /// Signs certificates.
    pub sign: Sign,
    /// The port's own certificate.
    pub tls: Tls,
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Authority")
    }
}

/// What all connections share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) config: Config,
    pub(super) authority: Authority,
    pub(super) metrics: Arc<Metrics>,
    pub(super) editions: Editions,
    pub(super) differences: Differences,
    pub(super) index: RwLock<Index>,
    pub(super) nodes: Arc<Nodes>,
    /// Calls whose token or request is being looked at, so that bad tokens from one address leave room for others.
    pub(super) asking: Arc<Slots>,
    /// Turns of those who make a first answer.
    pub(super) heavy: Arc<Semaphore>,
    /// Memory for large requests.
    pub(super) budget: Arc<Semaphore>,
}

impl Shared {
    pub(super) fn new(config: Config, authority: Authority, metrics: Arc<Metrics>) -> Self {
        Self {
            config,
            authority,
            metrics,
            editions: Editions::default(),
            differences: Differences::default(),
            index: RwLock::default(),
            nodes: Arc::default(),
            asking: Slots::new(ASKING, ASKING_OF_ONE),
            heavy: Arc::new(Semaphore::new(HEAVY)),
            budget: Arc::new(Semaphore::new(grpc::BUDGET)),
        }
    }
}
