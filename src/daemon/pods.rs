//! Starting whatever says which pods this node has.

use crate::config::Config;
use crate::node::capture::Capturer;
use crate::node::kubernetes::leave::OwnSet;
use crate::node::probes::{HostProbes, Probed};
use crate::node::status::Board;
use crate::node::turn::Turn;
use crate::node::{self, Pods, Source, kubernetes, zds};
use crate::task::ready::Pending;
use crate::task::{Drain, Group, Ready};
use anyhow::{Context, anyhow};
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use std::sync::Arc;

/// Metrics of the sources, of which there is one.
pub(super) struct Metrics {
    agent: Arc<zds::Metrics>,
    kubernetes: Arc<kubernetes::watch::Metrics>,
    probes: HostProbes,
    plugin_in_place: Gauge,
}

impl Metrics {
    /// Registers those of the source that there is.
    pub(super) fn register(config: &Config, registry: &mut Registry) -> Self {
        let node::Config { host_netns, ipv6, .. } = &config.node;
        let probes = HostProbes {
            host: host_netns.clone(),
            ipv6: *ipv6,
            in_place: Default::default(),
            spoofed: Default::default(),
        };
        let metrics =
            Self { agent: Arc::default(), kubernetes: Arc::default(), probes, plugin_in_place: Gauge::default() };
        match &config.node.source {
            Source::Agent(_) => metrics.agent.register(registry),
            Source::Kubernetes(kubernetes) => {
                metrics.kubernetes.register(registry);
                if kubernetes.cni.is_some() {
                    let help = "1 while the CNI plugin is installed on the node, else 0";
                    registry.register("culvert_cni_plugin_in_place", help, metrics.plugin_in_place.clone());
                }
                metrics.probes.register(registry);
            }
            Source::File(_) => {}
        }
        metrics
    }
}

/// What is left to do when the process ends.
#[derive(Default)]
pub(super) struct Last {
    /// Tasks that take a moment then.
    pub(super) tasks: Group,
    /// Whether anything is to stay on the node.
    pub(super) own_set: Arc<OwnSet>,
}

/// Joins the daemons of this node, of which one writes. With an agent nothing is written but what each pod gets once; a pods file
/// is one daemon's.
pub(super) fn turn(config: &Config, drain: &Drain, background: &Group) -> Turn {
    let Source::Kubernetes(kubernetes) = &config.node.source else { return Turn::alone() };
    let (turn, member) = Turn::join(&kubernetes.turns(&config.node.whose()));
    background.spawn(member.keep(drain.signal()));
    turn
}

/// Follows the source until the process ends; gives what is left to do then.
pub(super) async fn follow(
    (config, capturer, board): (&Config, &Arc<Capturer>, &Arc<Board>),
    metrics: Metrics,
    pending: Pending,
    (ready, facts): (&Ready, &'static str),
    background: &Group,
) -> anyhow::Result<Last> {
    let last = Last::default();
    let pods = Pods::new(capturer.clone(), board.clone());
    let drain = capturer.drain.signal();
    match config.node.source.clone() {
        Source::File(path) => background.spawn(node::file::follow(pods, path, pending)),
        Source::Agent(path) => {
            let client = zds::Client { path, pods, metrics: metrics.agent, ready: Some(pending), said: None };
            background.spawn(client.run(ready.clone().until(facts), drain));
        }
        Source::Kubernetes(config) => {
            let client = kubernetes::client(&config).await.map_err(|error| anyhow!(error));
            let client = client.context("cannot reach the Kubernetes API")?;
            let probed = Probed::default();
            let plugin = match &config.cni {
                Some(cni) => {
                    let socket = config.cni_socket.display();
                    let asked = node::cni::listen(&config.cni_socket, &capturer.turn, background);
                    let asked = asked.with_context(|| format!("cannot listen for the CNI plugin at {socket}"))?;
                    let (in_place, turn) = (metrics.plugin_in_place.clone(), capturer.turn.clone());
                    background.spawn(cni.clone().keep(in_place, turn, drain.clone()));
                    Some(asked)
                }
                None => None,
            };
            background.spawn(metrics.probes.keep(probed.clone(), capturer.turn.clone(), drain.clone()));
            let source = kubernetes::Source {
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
