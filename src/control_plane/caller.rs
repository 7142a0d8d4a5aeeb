//! Who calls, as the Kubernetes API says, never as the caller says.

use crate::mesh::Text;

/// The owner of a token, by the API's review of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Namespace of the service account.
    pub namespace: Text,
    /// The service account.
    pub service_account: Text,
    /// The pod that the token is bound to, if it is bound to one.
    pub pod: Option<CallerPod>,
}

/// The pod that a token is bound to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallerPod {
    /// Its name, in the namespace of the service account.
    pub name: Text,
    /// Its uid.
    pub uid: Text,
    /// The node that the token is bound to. Older API servers do not say it.
    pub node: Option<Text>,
}
