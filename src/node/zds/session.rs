//! The protocol of one connection to the agent: which requests are valid when, and what follows from them. Pure.
//!
//! ```text
//!   snapshot: add · keep · del ──snapshot_sent──► steady: add · del
//! ```
//! Pods that the snapshot does not name are released at its end. (Source: the agent's protocol, ZDS.)

use super::message::Request;
use std::collections::HashSet;

/// What a request leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Capture this pod.
    Add(Request),
    /// Nothing: the pod stays as it is.
    Keep,
    /// Release this pod.
    Del(String),
    /// Release all pods except these.
    Retain(HashSet<String>),
}

/// Why a request is not valid now.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// The snapshot is complete.
    #[error("request to keep pod {0} after the end of the snapshot")]
    LateKeep(String),
    /// A connection has one snapshot.
    #[error("the snapshot ended twice")]
    SecondSnapshot,
}

/// The state of one connection.
#[derive(Debug, Default)]
pub struct Session {
    named: HashSet<String>,
    /// Whether the snapshot is complete.
    complete: bool,
}

impl Session {
    /// Takes a request.
    pub fn take(&mut self, request: Request) -> Result<Step, SessionError> {
        match request {
            Request::Add { ref uid, .. } => {
                if !self.complete {
                    self.named.insert(uid.clone());
                }
                Ok(Step::Add(request))
            }
            Request::Keep(uid) if self.complete => Err(SessionError::LateKeep(uid)),
            Request::Keep(uid) => {
                self.named.insert(uid);
                Ok(Step::Keep)
            }
            Request::Del(uid) => {
                self.named.remove(&uid);
                Ok(Step::Del(uid))
            }
            Request::SnapshotSent if self.complete => Err(SessionError::SecondSnapshot),
            Request::SnapshotSent => {
                self.complete = true;
                Ok(Step::Retain(std::mem::take(&mut self.named)))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn add(uid: &str) -> Request {
        Request::Add { uid: uid.into(), name: "p".into(), namespace: "n".into(), service_account: "s".into() }
    }

    #[test]
    fn pods_that_the_snapshot_names_stay() {
        let mut session = Session::default();
        assert!(matches!(session.take(add("a")), Ok(Step::Add(_))));
        assert!(matches!(session.take(add("b")), Ok(Step::Add(_))));
        assert_eq!(session.take(Request::Keep("c".into())), Ok(Step::Keep));
        assert_eq!(session.take(Request::Del("b".into())), Ok(Step::Del("b".into())));
        let named = ["a".to_owned(), "c".to_owned()].into();
        assert_eq!(session.take(Request::SnapshotSent), Ok(Step::Retain(named)));
        assert!(matches!(session.take(add("d")), Ok(Step::Add(_))));
        assert_eq!(session.take(Request::Keep("a".into())), Err(SessionError::LateKeep("a".into())));
        assert_eq!(session.take(Request::SnapshotSent), Err(SessionError::SecondSnapshot));
        assert_eq!(session.take(Request::Del("unknown".into())), Ok(Step::Del("unknown".into())));
    }
}
