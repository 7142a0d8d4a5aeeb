//! `culvert cleanup`: removes every trace of culvert from a node. Never while a daemon runs: that would write it all again.

use super::get;
use crate::config::Config;
use crate::node::cni::install;
use crate::node::kubernetes::annotate;
use crate::node::remains::{self, Outcome};
use crate::node::{Source, kubernetes};
use crate::sys::seqpacket::Seqpacket;
use std::path::Path;
use std::time::Duration;

/// How long the Kubernetes API may take to forget the pods' annotations.
const FORGET: Duration = Duration::from_secs(10);

/// Cleans the node and hands a line for each thing to `say`; whether all could be removed. With `all` also rules that another
/// node's daemon has written, or a version that did not say for which node.
pub async fn run(config: &Config, all: bool, mut say: impl FnMut(&str)) -> bool {
    if get(config.admin.admin_port, "/pods").is_ok() || answers(config) {
        say("FAIL  a daemon runs on this node, and would write everything again; end it first");
        return false;
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
    let mut annotations = Some("no settings of enrolment by Kubernetes are given".to_owned());
    if let Source::Kubernetes(kubernetes) = &config.node.source {
        if let Some(cni) = &kubernetes.cni {
            match cni.remove() {
                Ok(files) => files.iter().for_each(|file| done((file.display().to_string(), Ok(true)))),
                Err(error) => done((install::PLUGIN.into(), Err(error.to_string()))),
            }
        }
        kubernetes.remove_meeting_places(&node.whose).into_iter().for_each(&mut done);
        annotations = forget(kubernetes).await.err();
    }
    config.state_files().iter().map(|file| remains::remove_file(file)).for_each(&mut done);
    if rules.others > 0 {
        say(&format!(
            "note  {} namespaces hold rules of another node, or of a version that did not say for which node; --all removes these too",
            rules.others
        ));
    }
    match annotations {
        _ if !fine => {}
        None => say("ok    no trace is left on this node; pods go on without the mesh"),
        Some(why) => {
            say(&format!(
                "ok    no trace is left on this node, but for the pods' annotation ambient.istio.io/redirection: {why};"
            ));
            say("      it stays until they end or: kubectl annotate pod POD ambient.istio.io/redirection-");
        }
    }
    fine
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

/// Whether a daemon in another pod takes the CNI plugin's questions.
fn answers(config: &Config) -> bool {
    let is_taken = |socket: &Path| Seqpacket::connect(socket).is_ok();
    matches!(&config.node.source, Source::Kubernetes(kubernetes) if is_taken(&kubernetes.cni_socket))
}
