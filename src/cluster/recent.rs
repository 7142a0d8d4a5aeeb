//! The list of daemons for those who ask again and again: nodes come and go, and daemons are replaced.

use super::question::Daemon;
use super::{ClusterError, Daemons};
use std::time::Duration;
use tokio::time::Instant;

/// How long a list of daemons is used. Nodes come and go slowly.
const FOUND_FOR: Duration = Duration::from_secs(20);

/// A list of daemons that is not too old.
#[derive(Clone, Debug, Default)]
pub struct Recent {
    /// The daemons, sorted by node.
    pub all: Vec<Daemon>,
    /// Why the list is older, if they could not be found again.
    pub error: Option<String>,
}

impl Daemons {
    /// The daemons by the last list, or by a new one if that is too old.
    pub async fn recent(&self, deadline: Duration) -> Recent {
        let known = self.found.lock().clone();
        match &known {
            Some((at, recent)) if at.elapsed() < FOUND_FOR => return recent.clone(),
            _ => {}
        }
        match self.find(deadline).await {
            Ok(all) => Recent { all, error: None },
            // Those that were known before are asked all the same.
            Err(error) => {
                let all = known.map(|(_, recent)| recent.all).unwrap_or_default();
                self.remember(Recent { all, error: Some(error.to_string()) })
            }
        }
    }

    /// Keeps a new list. Connections to daemons that are gone are closed.
    pub(super) fn keep(&self, found: Result<Vec<Daemon>, ClusterError>) -> Result<Vec<Daemon>, ClusterError> {
        let all = self.remember(Recent { all: found?, error: None }).all;
        self.lines.lock().retain(|daemon, _| all.contains(daemon));
        Ok(all)
    }

    fn remember(&self, recent: Recent) -> Recent {
        *self.found.lock() = Some((Instant::now(), recent.clone()));
        recent
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::tests::{daemon_pod, with_api};
    use parking_lot::Mutex;
    use std::sync::Arc;

    #[tokio::test(start_paused = true)]
    async fn after_a_rollout_the_new_daemons_are_found_and_old_ones_stay_while_the_api_is_away() {
        let listed = Arc::new(Mutex::new(Some("ztunnel-old")));
        let shown = listed.clone();
        let daemons = with_api(move |_| shown.lock().map(|name| vec![daemon_pod(name)]));
        let timeout = Duration::from_secs(5);
        let names = |recent: &Recent| recent.all.iter().map(|daemon| daemon.pod.clone()).collect::<Vec<_>>();
        assert_eq!(names(&daemons.recent(timeout).await), ["ztunnel-old"]);
        *listed.lock() = Some("ztunnel-new");
        assert_eq!(names(&daemons.recent(timeout).await), ["ztunnel-old"], "the list is young");
        tokio::time::advance(FOUND_FOR).await;
        assert_eq!(names(&daemons.recent(timeout).await), ["ztunnel-new"]);
        *listed.lock() = None;
        tokio::time::advance(FOUND_FOR).await;
        let away = daemons.recent(timeout).await;
        assert_eq!(names(&away), ["ztunnel-new"]);
        assert!(away.error.unwrap().contains("the Kubernetes API"));
    }
}
