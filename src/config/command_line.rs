//! The command line: which commands there are, and their options.

use super::args::{CleanupArgs, ControlArgs, DemoArgs, NodeArgs};
use super::ask::{
    ConnectionsArgs, DashboardArgs, DoctorArgs, ExplainArgs, LogsArgs, PodsArgs, ReportArgs, StatusArgs, TopArgs,
};
use clap::{Parser, Subcommand};
use std::path::PathBuf;

/// A tunnel daemon for Kubernetes nodes: it captures pods' TCP and carries it as HBONE, authenticated by workload
/// identity.
#[derive(Debug, Parser)]
#[command(name = "culvert", disable_help_subcommand = true)]
pub struct Cli {
    /// The command.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands of culvert.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the daemon of this node.
    Node(Box<NodeArgs>),
    /// The same as `node`, by the name that Istio's ztunnel chart uses: `proxy ztunnel`.
    Proxy {
        /// `ztunnel`, or nothing.
        #[arg(value_parser = ["ztunnel"])]
        role: Option<String>,
        /// Settings.
        #[command(flatten)]
        node: Box<NodeArgs>,
    },
    /// Check the settings, the mesh file, the pods file and the built-in CA, and start nothing.
    Check(Box<NodeArgs>),
    /// Run the control plane of a mesh without Istio: it serves mesh facts and certificates to the daemons of a cluster,
    /// from what the Kubernetes API says.
    Control {
        /// What to do instead of running.
        #[command(subcommand)]
        command: Option<ControlCommand>,
        /// Settings.
        #[command(flatten)]
        settings: Box<ControlArgs>,
    },
    /// Manage the built-in certificate authority.
    Ca {
        /// The command.
        #[command(subcommand)]
        command: CaCommand,
    },
    /// Run a demonstration: two nodes and five pods on this machine, real traffic, and a report of it.
    Demo(DemoArgs),
    /// Check this node and its daemon. Prints one line for each check, with what to do where something is wrong. With
    /// --cluster or --node: what the daemons of a cluster say about themselves.
    Doctor(Box<DoctorArgs>),
    /// Say what is wrong, on all nodes in one screen: capture, readiness, facts, certificates, failures. Exits with 0 if
    /// everything is green, 1 if something is red or a node does not answer, 3 if no daemon could be asked.
    Status(StatusArgs),
    /// List the enrolled pods as their daemons know them: state, since when, and notes.
    Pods(PodsArgs),
    /// List the open connections, or those that have ended or were refused, with both ends, protection and rule.
    Connections(ConnectionsArgs),
    /// Show live flows: who talks to whom, how fast, how protected, and how long it takes until a connection is open. On
    /// a terminal it is refreshed, otherwise printed once.
    Top(TopArgs),
    /// Serve the live page about all nodes on this machine, until Ctrl-C: pods, flows, connections, refusals, certificates.
    Dashboard(DashboardArgs),
    /// Print the lines of the log that are about a pod, from the daemon of its node.
    Logs(LogsArgs),
    /// Say what would happen to a connection now, step by step: what the address is, which endpoints could be chosen and
    /// why others not, the route, the identities that are expected, and the policies that decide. Or, with --policy, what
    /// policies would change.
    Explain(ExplainArgs),
    /// Collect what a bug report needs into one archive: versions, settings without secrets, states, connections, recent
    /// history, metrics, and facts about the kernel.
    Report(ReportArgs),
    /// Print the completions of a shell, to be sourced or installed.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Print the manual page of culvert, or of one of its commands, for man(1).
    Man {
        /// The command. Default: the page about culvert.
        command: Option<String>,
    },
    /// Redirect the traffic of this network namespace to a daemon in dedicated mode, and end. An init container or a
    /// systemd unit does this before it starts the daemon; it needs CAP_NET_ADMIN.
    Redirect {
        /// Remove the redirection instead.
        #[arg(long)]
        remove: bool,
        /// Settings.
        #[command(flatten)]
        node: Box<NodeArgs>,
    },
    /// Remove every trace of culvert from this node, once no daemon runs on it.
    Cleanup(CleanupArgs),
    /// Run as the CNI plugin. The container runtime does this (CNI_COMMAND, CNI_NETNS, CNI_ARGS, and a configuration on
    /// standard input).
    Cni,
    /// Print the version.
    Version,
}

/// Commands for the control plane.
#[derive(Clone, Copy, Debug, Subcommand)]
pub enum ControlCommand {
    /// Replace the root of the mesh, in steps during which both the old and the new one are trusted. Run it again until it
    /// says that it is done.
    RotateRoot {
        /// Begin another replacement although there has been one.
        #[arg(long)]
        again: bool,
    },
}

/// Commands for the built-in certificate authority.
#[derive(Debug, Subcommand)]
pub enum CaCommand {
    /// Make a new authority (P-256) in a directory. An existing one is never overwritten.
    Init {
        /// The directory.
        dir: PathBuf,
    },
}
