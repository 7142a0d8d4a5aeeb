//! Where the namespaces of the pods are, and for how long that is so.

use super::Running;
use crate::mesh::Text;
use crate::sys::netns::{Netns, NetnsError};
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;
use tokio::time::Instant;

/// How long a namespace that has no process may be without the pod's address before it is given up.
const ADDRESS_GONE: Duration = Duration::from_secs(3);

/// A pod's namespace, and where it was found.
pub(super) struct Place {
    pub(super) netns: Netns,
    /// Not known: the CNI plugin has handed it over, or the process that led there has ended. It is sought again; until
    /// another one is found the pod stays captured where it is.
    pub(super) path: Option<PathBuf>,
    /// Whether the CNI plugin has handed it over: no scan knows better as long as it holds the pod's address.
    pub(super) handed_over: bool,
    /// Addresses that the CNI plugin has told of; the API does so later, and of an earlier sandbox's until then.
    pub(super) ips: Vec<IpAddr>,
    /// Since when it holds none of the pod's addresses.
    pub(super) bare_since: Option<Instant>,
    /// Whether another namespace of the pod's processes has been named that holds its address as well.
    pub(super) contested: bool,
    /// When it became known. A scan that began before that knows nothing of it.
    pub(super) since: Instant,
}

impl Place {
    /// One that has just become known.
    pub(super) fn new(netns: Netns) -> Self {
        let (path, handed_over, ips) = (None, false, Vec::new());
        Self { netns, path, handed_over, ips, bare_since: None, contested: false, since: Instant::now() }
    }
}

impl Running {
    /// Takes a namespace that a scan has found, which `began` before.
    pub(super) fn place(&mut self, uid: Text, netns: Netns, path: PathBuf, began: Option<Instant>) {
        let is_own = self.is_its_own(&uid);
        match self.places.get_mut(&uid) {
            Some(place) if place.netns == netns => {
                (place.path, place.bare_since) = (Some(path), None);
                place.ips.clear();
            }
            // A later one than the scan knows of.
            Some(place) if began.is_none_or(|began| place.since > began) => {}
            // What led to it has been told by the runtime; what leads elsewhere, the pod may have made itself.
            Some(place) if place.handed_over && is_own != Some(false) => {
                if !std::mem::replace(&mut place.contested, true) {
                    tracing::warn!(
                        uid = &*uid, captured = %place.netns.path().display(), other = %path.display(),
                        "a process of the pod is in another namespace that holds its address as well; the one that the CNI \
                         plugin handed over stays captured"
                    );
                }
            }
            _ => {
                self.places.insert(uid, Place { path: Some(path), ..Place::new(netns) });
            }
        }
    }

    /// Gives up the place of a pod whose address it does not hold any more: the sandbox has ended.
    pub(super) fn keep_if_its_own(&mut self, uid: &Text) {
        if self.is_its_own(uid) == Some(false) {
            self.places.remove(uid);
        }
    }

    /// Whether the place of a pod holds an address of the pod; `None` where that cannot be said now.
    fn is_its_own(&self, uid: &Text) -> Option<bool> {
        let told = self.pods.as_ref().and_then(|pods| pods.get(uid));
        let (place, pod) = (self.places.get(uid)?, told.or_else(|| self.memory.get(uid))?);
        let mut known = pod.ips.iter().chain(&place.ips).peekable();
        known.peek()?;
        // What cannot be looked at now is no sign of an end.
        let held = place.netns.addresses().ok()?;
        Some(known.any(|ip| held.iter().any(|(held, _)| held == ip)))
    }

    /// Looks at whether what led to the namespaces still does.
    pub(super) fn look(&mut self) {
        for place in self.places.values_mut() {
            // That it cannot be looked at now (no descriptors left, say) is no sign of an end.
            let lost = place.path.as_ref().is_some_and(|path| match Netns::open(path) {
                Ok(now) => now != place.netns,
                Err(NetnsError::Open { source, .. }) => source.kind() == std::io::ErrorKind::NotFound,
                Err(_) => false,
            });
            if lost {
                // Its oldest process has ended: another one may still be there, or a new sandbox comes.
                place.path = None;
                self.scan.next = Instant::now();
            }
        }
        // No process leads there: when the pod's address goes, so has the sandbox.
        let unled = self.places.iter().filter(|(_, place)| place.path.is_none()).map(|(uid, _)| uid.clone());
        for uid in unled.collect::<Vec<_>>() {
            let bare = self.is_its_own(&uid) == Some(false);
            let Some(place) = self.places.get_mut(&uid) else { continue };
            let since = bare.then(|| place.bare_since.unwrap_or_else(Instant::now));
            place.bare_since = since;
            if since.is_some_and(|since| since.elapsed() >= ADDRESS_GONE) {
                let netns = place.netns.path().display().to_string();
                tracing::info!(uid = &*uid, netns, "the pod's address has gone from its namespace; it is let go");
                self.places.remove(&uid);
            }
        }
    }
}
