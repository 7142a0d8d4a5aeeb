//! Starting whatever says which pods this node has.

use crate::config::Config;
use crate::node::capture::Capturer;
use crate::node::probes::{HostProbes, Probed};
use crate::node::status::Board;
use crate::node::{self, Pods, Source, kubernetes, zds};
use crate::task::ready::Pending;
use crate::task::{Group, Ready};
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

/// Follows the source until the process ends; gives those tasks that have something to do then, which takes a moment.
pub(super) async fn follow(
    (config, capturer, board): (&Config, &Arc<Capturer>, &Arc<Board>),
    metrics: Metrics,
    pending: Pending,
    (ready, facts): (&Ready, &'static str),
    background: &Group,
) -> anyhow::Result<Group> {
    let last = Group::default();
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
                    let asked = node::cni::listen(&config.cni_socket, background);
                    let asked = asked.with_context(|| format!("cannot listen for the CNI plugin at {socket}"))?;
                    background.spawn(cni.clone().keep(metrics.plugin_in_place.clone(), drain.clone()));
                    Some(asked)
                }
                None => None,
            };
            background.spawn(metrics.probes.keep(probed.clone(), drain.clone()));
            let source = kubernetes::Source {
                config: *config,
                client,
                pods,
                board: board.clone(),
                capturer: capturer.clone(),
                probed,
                metrics: metrics.kubernetes,
                plugin,
                could_ask: Default::default(),
                ready: Some(pending),
            };
            last.spawn(source.run(drain));
        }
    }
    Ok(last)
}
