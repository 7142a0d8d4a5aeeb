//! `culvert cleanup`: removes every trace of culvert from a node.
//!
//! It refuses to run while a daemon runs, because the daemon would write everything again. Without `--all` it does not
//! touch rules of other nodes' daemons.

use super::daemon::get;
use crate::config::Config;
use crate::node::cleanup::{self, CleanupOutcome, Removed};
use crate::node::cni::install;
use crate::node::kubernetes::annotate;
use crate::node::{PodSource, active_daemon, kubernetes};
use crate::sys::seqpacket::Seqpacket;
use serde_json::Value;
use std::time::Duration;

/// How long removing the pods' annotations through the Kubernetes API may take.
const ANNOTATIONS_DEADLINE: Duration = Duration::from_secs(10);

/// The result of a cleanup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cleaned {
    /// Nothing of culvert is left.
    Yes,
    /// Something could not be removed.
    NotAll,
    /// A daemon runs, or may run. Nothing has been removed.
    InUse,
}

/// Says which namespaces keep rules, and why.
fn say_what_stays(rules: &Removed, say: &mut impl FnMut(&str)) {
    if rules.others > 0 {
        say(&format!(
            "note  {} namespaces hold rules of another node, or of an old version that does not name its node; --all removes them too",
            rules.others
        ));
    }
    if rules.unreadable > 0 {
        say(&format!(
            "note  {} namespaces hold too many rules to read, perhaps culvert's too; --all removes culvert's rules there as well",
            rules.unreadable
        ));
    }
    if rules.workloads > 0 {
        say(&format!(
            "note  {} namespaces belong to workloads that carry their own traffic (culvert redirect): their rules stay, because \
             without them their traffic would pass in plaintext; culvert redirect --remove, run inside, removes them",
            rules.workloads
        ));
    }
}

/// Cleans the node and passes a line for each removed thing to `say`. With `all` it also removes rules of another
/// node's daemon, and rules of old versions that do not name their node.
pub async fn run(config: &Config, all: bool, mut say: impl FnMut(&str)) -> Cleaned {
    if is_in_use(config) {
        say("FAIL  a daemon is running on this node and would write everything again; stop it first");
        return Cleaned::InUse;
    }
    if matches!(config.node.source, PodSource::Agent(_)) && !all {
        say("FAIL  with an agent as the source of pods, it is unknown whether a daemon is running on this node;");
        say("      if none is, use --all to remove the rules of such daemons");
        return Cleaned::InUse;
    }
    let mut fine = true;
    let mut done = |(what, result): CleanupOutcome| match result {
        Ok(true) => say(&format!("removed  {what}")),
        Ok(false) => {}
        Err(error) => {
            fine = false;
            say(&format!("FAIL  {what}: {error}"));
        }
    };
    let node = config.node.cleanup();
    node.remove_probe_rules().await.into_iter().for_each(&mut done);
    let mut rules = node.remove_rules(all).await;
    std::mem::take(&mut rules.ours).into_iter().for_each(&mut done);
    let mut no_plugin = None;
    let mut annotations = Some("there are no settings for the Kubernetes API".to_owned());
    if let PodSource::Kubernetes(kubernetes) = &config.node.source
        && let Some(cni) = &kubernetes.cni
    {
        match cni.remove() {
            Ok(files) if files.is_empty() => no_plugin = Some(cni.place()),
            Ok(files) => files.iter().for_each(|file| done((file.display().to_string(), Ok(true)))),
            Err(error) => done((install::PLUGIN.into(), Err(error.to_string()))),
        }
    }
    // Checked again, because a daemon that has started in the meantime needs what is removed from here on.
    if is_in_use(config) {
        done((
            "state files, annotations, and the locks and socket of daemons".into(),
            Err("a daemon has started in the meantime; stop it, and run the cleanup again".into()),
        ));
    } else {
        if let PodSource::Kubernetes(kubernetes) = &config.node.source {
            kubernetes.remove_shared_files(&node.tag).into_iter().for_each(&mut done);
            annotations = remove_annotations(kubernetes).await.err();
        }
        config.state_files.iter().map(|file| cleanup::remove_file(file)).for_each(&mut done);
    }
    say_what_stays(&rules, &mut say);
    let left = match rules.others + rules.unreadable {
        0 => "no trace of culvert is left on this node",
        _ => "nothing that certainly belongs to this node is left",
    };
    if let Some(place) = no_plugin {
        say(&format!(
            "note  there is no CNI plugin of culvert in {place}; if the daemon used other folders, run the cleanup with those settings"
        ));
    }
    match annotations {
        _ if !fine => {}
        None => say(&format!("ok    {left}; pods continue without the mesh")),
        Some(why) => {
            say(&format!("ok    {left}, except for the pods' annotation ambient.istio.io/redirection: {why};"));
            say(
                "      it stays until the pods end, or remove it with: kubectl annotate pod POD ambient.istio.io/redirection-",
            );
        }
    }
    if fine { Cleaned::Yes } else { Cleaned::NotAll }
}

/// Removes the annotations of this node's pods.
async fn remove_annotations(config: &kubernetes::Config) -> Result<(), String> {
    let removing = async {
        let client = kubernetes::client(config).await?;
        annotate::remove_all(client, &config.node_name).await
    };
    let late = || Err(format!("the Kubernetes API has not answered within {} s", ANNOTATIONS_DEADLINE.as_secs()));
    tokio::time::timeout(ANNOTATIONS_DEADLINE, removing).await.unwrap_or_else(|_| late())
}

/// Whether a daemon runs on this node: one that answers on the admin port of this network namespace, or listens on the
/// CNI socket, or holds a lock in the folder of this node's daemons.
fn is_in_use(config: &Config) -> bool {
    let pods = get(config.admin.admin_port, "/pods");
    // Another program may listen on this port of the node.
    if pods.is_ok_and(|(status, body)| status == 200 && serde_json::from_str::<Vec<Value>>(&body).is_ok()) {
        return true;
    }
    let PodSource::Kubernetes(kubernetes) = &config.node.source else { return false };
    Seqpacket::connect(&kubernetes.cni_socket).is_ok()
        || active_daemon::has_daemon(&kubernetes.daemons_folder(&config.node.node_tag()))
}
