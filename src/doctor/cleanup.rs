//! `culvert cleanup`: removes every trace of culvert from a node. Never while a daemon runs: that would write it all again.

use super::daemon::get;
use crate::config::Config;
use crate::node::cni::install;
use crate::node::kubernetes::annotate;
use crate::node::remains::{self, Outcome};
use crate::node::{Source, kubernetes, turn};
use crate::sys::seqpacket::Seqpacket;
use serde_json::Value;
use std::time::Duration;

/// How long the Kubernetes API may take to forget the pods' annotations.
const FORGET: Duration = Duration::from_secs(10);

/// What has become of a node that was to be cleaned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cleaned {
    /// Nothing of ours is left.
    Yes,
    /// Something could not be removed.
    NotAll,
    /// A daemon runs: nothing has been touched.
    InUse,
}

/// Cleans the node and hands a line for each thing to `say`. With `all` also rules that another node's daemon has written, or a version
/// that did not say for which node.
pub async fn run(config: &Config, all: bool, mut say: impl FnMut(&str)) -> Cleaned {
    if is_in_use(config) {
        say("FAIL  a daemon runs on this node, and would write everything again; end it first");
        return Cleaned::InUse;
    }
    if matches!(config.node.source, Source::Agent(_)) && !all {
        say("FAIL  whether a daemon that an agent gives pods to runs on this node cannot be seen from here;");
        say("      where none does, --all removes what such daemons have written");
        return Cleaned::InUse;
    }
    let mut fine = true;
    let mut done = |(what, result): Outcome| match result {
        Ok(true) => say(&format!("removed  {what}")),
        Ok(false) => {}
        Err(error) => {
            fine = false;
            say(&format!("FAIL  {what}: {error}"));
        }
    };
    let node = config.node.remains();
    node.remove_probes().await.into_iter().for_each(&mut done);
    let rules = node.remove_rules(all).await;
    rules.ours.into_iter().for_each(&mut done);
    let mut no_plugin = None;
    let mut annotations = Some("no settings of enrolment by Kubernetes are given".to_owned());
    if let Source::Kubernetes(kubernetes) = &config.node.source
        && let Some(cni) = &kubernetes.cni
    {
        match cni.remove() {
            Ok(files) if files.is_empty() => no_plugin = Some(cni.place()),
            Ok(files) => files.iter().for_each(|file| done((file.display().to_string(), Ok(true)))),
            Err(error) => done((install::PLUGIN.into(), Err(error.to_string()))),
        }
    }
    // Looked at again: what is removed from here on a daemon that has begun would miss.
    if is_in_use(config) {
        done((
            "state files, annotations, and what daemons meet at".into(),
            Err("a daemon has begun meanwhile; end it, and clean up again".into()),
        ));
    } else {
        if let Source::Kubernetes(kubernetes) = &config.node.source {
            kubernetes.remove_meeting_places(&node.whose).into_iter().for_each(&mut done);
            annotations = forget(kubernetes).await.err();
        }
        config.state_files().iter().map(|file| remains::remove_file(file)).for_each(&mut done);
    }
    if rules.others > 0 {
        say(&format!(
            "note  {} namespaces hold rules of another node, or of a version that did not say for which node; --all removes these too",
            rules.others
        ));
    }
    if rules.unreadable > 0 {
        say(&format!(
            "note  not removed: {} namespaces hold rules that are too many to be read, maybe of culvert; --all removes these too",
            rules.unreadable
        ));
    }
    let left = match rules.others + rules.unreadable {
        0 => "no trace is left on this node",
        _ => "nothing that is certainly this node's is left",
    };
    if let Some(place) = no_plugin {
        say(&format!(
            "note  no CNI plugin of culvert is in {place}; where the daemon had other folders, clean up with these"
        ));
    }
    match annotations {
        _ if !fine => {}
        None => say(&format!("ok    {left}; pods go on without the mesh")),
        Some(why) => {
            say(&format!("ok    {left}, but for the pods' annotation ambient.istio.io/redirection: {why};"));
            say("      it stays until they end or: kubectl annotate pod POD ambient.istio.io/redirection-");
        }
    }
    if fine { Cleaned::Yes } else { Cleaned::NotAll }
}

/// Removes the pods' annotations.
async fn forget(config: &kubernetes::Config) -> Result<(), String> {
    let forget = async {
        let client = kubernetes::client(config).await?;
        annotate::forget_all(client, &config.node_name).await
    };
    let late = || Err(format!("the Kubernetes API does not answer within {} s", FORGET.as_secs()));
    tokio::time::timeout(FORGET, forget).await.unwrap_or_else(|_| late())
}

/// Whether a daemon runs on this node: in our network namespace, as the one that the CNI plugin asks, or among those that take turns.
fn is_in_use(config: &Config) -> bool {
    let pods = get(config.admin.admin_port, "/pods");
    // Anybody may listen at that port of a node.
    if pods.is_ok_and(|(status, body)| status == 200 && serde_json::from_str::<Vec<Value>>(&body).is_ok()) {
        return true;
    }
    let Source::Kubernetes(kubernetes) = &config.node.source else { return false };
    Seqpacket::connect(&kubernetes.cni_socket).is_ok() || turn::is_lived_in(&kubernetes.turns(&config.node.whose()))
}
