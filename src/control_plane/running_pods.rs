//! The pods that run now, as far as certificates depend on them: which service accounts each node may have certificates
//! for.

use crate::mesh::Text;
use parking_lot::RwLock;
use std::collections::HashMap;

/// A pod that runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunningPod {
    /// Namespace.
    pub namespace: Text,
    /// Name.
    pub name: Text,
    /// Uid of the object.
    pub uid: Text,
    /// Service account.
    pub service_account: Text,
    /// The node on which it runs.
    pub node: Text,
}

/// Node, namespace and service account.
type Account = (Text, Text, Text);

/// All pods that run now. The watch writes it, the CA asks it.
#[derive(Debug, Default)]
pub struct RunningPods(RwLock<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// By namespace and name.
    pods: HashMap<(Text, Text), RunningPod>,
    /// How many pods of each account a node runs.
    accounts: HashMap<Account, usize>,
    /// Whether all pods have been listed once.
    complete: bool,
}

impl Inner {
    fn remove(&mut self, key: &(Text, Text)) {
        let Some(old) = self.pods.remove(key) else { return };
        let account = (old.node, old.namespace, old.service_account);
        if let Some(count) = self.accounts.get_mut(&account) {
            *count -= 1;
            if *count == 0 {
                self.accounts.remove(&account);
            }
        }
    }
}

impl RunningPods {
    /// Adds a pod, or replaces what was known about it. A pod that no longer runs, or has no node yet, is to be removed.
    pub fn set(&self, pod: RunningPod) {
        let key = (pod.namespace.clone(), pod.name.clone());
        let mut inner = self.0.write();
        inner.remove(&key);
        let account = (pod.node.clone(), pod.namespace.clone(), pod.service_account.clone());
        *inner.accounts.entry(account).or_default() += 1;
        inner.pods.insert(key, pod);
    }

    /// Removes a pod.
    pub fn remove(&self, namespace: &str, name: &str) {
        self.0.write().remove(&(namespace.into(), name.into()));
    }

    /// Says that all pods have been listed.
    pub fn set_complete(&self) {
        self.0.write().complete = true;
    }

    /// Whether all pods have been listed once. Before that, nobody may be refused for a pod that is not known.
    pub fn is_complete(&self) -> bool {
        self.0.read().complete
    }

    /// A pod by namespace and name.
    pub fn get(&self, namespace: &str, name: &str) -> Option<RunningPod> {
        self.0.read().pods.get(&(namespace.into(), name.into())).cloned()
    }

    /// Whether `node` runs a pod of this account.
    pub fn runs(&self, node: &str, namespace: &str, service_account: &str) -> bool {
        let account = (node.into(), namespace.into(), service_account.into());
        self.0.read().accounts.contains_key(&account)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(name: &str, uid: &str, account: &str, node: &str) -> RunningPod {
        let namespace = "shop".into();
        RunningPod { namespace, name: name.into(), uid: uid.into(), service_account: account.into(), node: node.into() }
    }

    #[test]
    fn a_node_has_the_accounts_of_its_own_pods_as_long_as_one_runs() {
        let pods = RunningPods::default();
        pods.set(pod("a", "1", "web", "n1"));
        pods.set(pod("b", "2", "web", "n1"));
        pods.set(pod("c", "3", "db", "n2"));
        assert!(pods.runs("n1", "shop", "web") && !pods.runs("n2", "shop", "web") && !pods.runs("n1", "bank", "web"));
        pods.remove("shop", "a");
        assert!(pods.runs("n1", "shop", "web"));
        pods.remove("shop", "a");
        assert!(pods.runs("n1", "shop", "web"), "a pod that is gone twice counts once");
        // A pod of the same name elsewhere takes the place of the old one.
        pods.set(pod("b", "4", "web", "n2"));
        assert!(!pods.runs("n1", "shop", "web") && pods.runs("n2", "shop", "web"));
        assert_eq!(pods.get("shop", "b").unwrap().uid, "4".into());
    }
}
