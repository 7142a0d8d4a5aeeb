//! Starts the source of this node's pods: the Kubernetes API, the agent, the pods file, or the daemon's own workload.

use super::metrics::Metrics;
use crate::config::Config;
use crate::node::active_daemon::ActiveRole;
use crate::node::capture::Capturer;
use crate::node::kubelet_probes::ProbedPods;
use crate::node::kubernetes::daemonset::OwnDaemonSet;
use crate::node::status::Board;
use crate::node::{self, PodSource, Pods, kubernetes, zds};
use crate::task::ready::Pending;
use crate::task::{Drain, Group, Ready};
use anyhow::{Context, anyhow};
use std::sync::Arc;

/// Work that remains when the process ends.
#[derive(Default)]
pub(super) struct Last {
    /// Tasks that need a moment then.
    pub(super) tasks: Group,
    /// What is known of the daemon's own DaemonSet, which decides whether anything stays on the node.
    pub(super) own_set: Arc<OwnDaemonSet>,
}

/// Joins the daemons of this node, one of which is active. Under an agent there is nothing to agree on, because each
/// daemon writes only what every pod gets once; a pods file belongs to one daemon.
pub(super) fn active_role(config: &Config, drain: &Drain, background: &Group) -> ActiveRole {
    let PodSource::Kubernetes(kubernetes) = &config.node.source else { return ActiveRole::sole() };
    let (role, membership) = ActiveRole::join(&kubernetes.daemons_folder(&config.node.node_tag()));
    background.spawn(membership.keep(drain.signal()));
    role
}

/// What a source of pods needs.
pub(super) struct Enrolment<'a> {
    pub(super) config: &'a Config,
    pub(super) capturer: &'a Arc<Capturer>,
    pub(super) board: &'a Arc<Board>,
    pub(super) ready: &'a Ready,
    /// The condition of readiness that mesh facts are.
    pub(super) facts: &'static str,
    pub(super) background: &'a Group,
}

impl Enrolment<'_> {
    /// Follows the source until the process ends. Returns the work that remains then.
    pub(super) async fn follow(self, metrics: Metrics, pending: Pending) -> anyhow::Result<Last> {
        let Self { config, capturer, board, ready, facts, background } = self;
        let last = Last::default();
        let pods = Pods::new(capturer.clone(), board.clone());
        let drain = capturer.drain.signal();
        match config.node.source.clone() {
            PodSource::File(path) => background.spawn(node::pods_file::follow(pods, path, pending)),
            PodSource::Own(own) => {
                let (capturer, board, ready) = (capturer.clone(), board.clone(), ready.clone());
                background.spawn(node::own_workload::serve(own, pods, capturer, board, ready, pending));
            }
            PodSource::Agent(path) => {
                let client = zds::Client { path, pods, metrics: metrics.agent, ready: Some(pending), said: None };
                background.spawn(client.run(ready.clone().until(facts), drain));
            }
            PodSource::Kubernetes(config) => {
                let client = kubernetes::client(&config).await.map_err(|error| anyhow!(error));
                let client = client.context("cannot reach the Kubernetes API")?;
                let probed = ProbedPods::default();
                let plugin = match &config.cni {
                    Some(cni) => {
                        let socket = config.cni_socket.display();
                        let asked = node::cni::listen(&config.cni_socket, &capturer.role, background);
                        let asked = asked.with_context(|| format!("cannot listen for the CNI plugin at {socket}"))?;
                        let (in_place, role) = (metrics.plugin_in_place.clone(), capturer.role.clone());
                        background.spawn(cni.clone().keep(in_place, role, drain.clone()));
                        Some(asked)
                    }
                    None => None,
                };
                background.spawn(metrics.probes.keep(probed.clone(), capturer.role.clone(), drain.clone()));
                let source = kubernetes::Enrolment {
                    config: *config,
                    client,
                    pods,
                    board: board.clone(),
                    capturer: capturer.clone(),
                    probed,
                    metrics: metrics.kubernetes,
                    plugin,
                    own_set: last.own_set.clone(),
                    ready: Some(pending),
                };
                last.tasks.spawn(source.run(drain));
            }
        }
        Ok(last)
    }
}
