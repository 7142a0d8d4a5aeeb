//! The command line and the environment, as text. Every setting is an argument and an environment variable; the argument takes precedence.

use super::setting::About;
use super::settings;
use clap::{Arg, ArgMatches, Args, FromArgMatches, Parser, Subcommand};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// A per-node L4 tunnel for Kubernetes: captures pods' TCP and carries it as HBONE under workload identity.
#[derive(Debug, Parser)]
#[command(name = "culvert", disable_help_subcommand = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What culvert can do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run as this node's daemon.
    Node(Box<NodeArgs>),
    /// The same as `node`, under the words of Istio's ztunnel chart: `proxy ztunnel`.
    Proxy {
        /// `ztunnel`, or nothing.
        #[arg(value_parser = ["ztunnel"])]
        role: Option<String>,
        /// Settings.
        #[command(flatten)]
        node: Box<NodeArgs>,
    },
    /// Check a configuration, the mesh file and the pods file; start nothing.
    Check(Box<NodeArgs>),
    /// The built-in certificate authority.
    Ca {
        /// What to do with it.
        #[command(subcommand)]
        command: CaCommand,
    },
    /// See it work: two nodes and five pods on this machine, real traffic, and an account of it.
    Demo(DemoArgs),
    /// Look at this node, where the daemon runs: one line for each thing, and what to do where it is not well.
    Doctor(Box<NodeArgs>),
    /// The pods of this node as its daemon knows them: state, since when, and what should be known of each.
    Pods {
        /// What the admin port says of them, as it is.
        #[arg(long)]
        json: bool,
        /// Settings.
        #[command(flatten)]
        node: Box<NodeArgs>,
    },
    /// Remove every trace of culvert from this node, where no daemon runs any more.
    Cleanup(CleanupArgs),
    /// The CNI plugin, run by the container runtime (CNI_COMMAND, CNI_NETNS, CNI_ARGS, a configuration on standard input).
    Cni,
    /// Print the version.
    Version,
}

/// What can be done with the built-in certificate authority.
#[derive(Debug, Subcommand)]
pub enum CaCommand {
    /// Make a new authority (P-256) in a directory; an existing one is never overwritten.
    Init {
        /// The directory.
        dir: PathBuf,
    },
}

/// Settings of cleaning up.
#[derive(Clone, Debug, Args)]
pub struct CleanupArgs {
    /// Remove also the rules that another node's daemon has written in namespaces of this machine, or a version that did not
    /// say for which node.
    #[arg(long)]
    pub all: bool,
    /// Where a daemon runs, say so and wait for a signal: whoever starts this again must not find the node while that daemon is being
    /// restarted.
    #[arg(long)]
    pub once: bool,
    /// Remove nothing, and wait for a signal: a pod of a DaemonSet that has cleaned its node has to stay.
    #[arg(long)]
    pub stay: bool,
    /// Settings of the daemon that was here.
    #[command(flatten)]
    pub node: Box<NodeArgs>,
}

/// Settings of the demonstration.
#[derive(Clone, Debug, Args)]
pub struct DemoArgs {
    /// Leave everything running until Ctrl-C.
    #[arg(long)]
    pub keep: bool,
    /// Print one JSON object instead of the account.
    #[arg(long)]
    pub json: bool,
    /// Seconds for each of the measurements.
    #[arg(long, default_value_t = 2)]
    pub seconds: u64,
}

/// Settings of the daemon as they were given, unchecked.
#[derive(Clone, Debug, Default)]
pub struct NodeArgs(BTreeMap<&'static str, String>);

impl NodeArgs {
    /// The text of a setting, where it was given.
    pub(crate) fn get(&self, setting: &About) -> Option<&str> {
        self.0.get(setting.variable).map(String::as_str)
    }

    /// Every setting that was given, with its text.
    pub(crate) fn given(&self) -> impl Iterator<Item = (&'static About, &str)> {
        settings::all().filter_map(|setting| Some((setting, self.get(setting)?)))
    }

    /// Settings by variable; those with unknown names are left out.
    pub fn of(values: &BTreeMap<String, String>) -> Self {
        let value = |setting: &About| Some((setting.variable, values.get(setting.variable)?.clone()));
        Self(settings::all().filter_map(value).collect())
    }
}

impl Args for NodeArgs {
    fn augment_args(command: clap::Command) -> clap::Command {
        let mut command = command;
        for group in &settings::GROUPS {
            for setting in group.settings {
                let about = setting.about();
                let accepts = setting.accepts().map(|accepts| format!(" [accepts: {accepts}]")).unwrap_or_default();
                let default = about.default_text().map(|text| format!(" [default: {text}]")).unwrap_or_default();
                let arg = Arg::new(about.flag).long(about.flag).env(about.variable).value_name("VALUE");
                let arg = arg.hide_env_values(about.is_secret).help_heading(group.title);
                command = command.arg(arg.help(format!("{}{accepts}{default}", about.help)));
            }
        }
        command
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for NodeArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut args = Self::default();
        args.update_from_arg_matches(matches)?;
        Ok(args)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        for setting in settings::all() {
            // Every setting is an argument of the command, so that the lookup does not fail.
            if let Ok(Some(text)) = matches.try_get_one::<String>(setting.flag) {
                self.0.insert(setting.variable, text.clone());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
impl From<&[(&str, &str)]> for NodeArgs {
    fn from(given: &[(&str, &str)]) -> Self {
        let args = Self::of(&given.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect());
        assert_eq!(args.0.len(), given.len(), "each is a setting, named once: {given:?}");
        args
    }
}
