//! The settings on the command line and in the environment, as text. Every setting is an argument and an environment
//! variable; the argument takes precedence.

use super::setting::About;
use super::settings::{self, Group};
use clap::{Arg, ArgMatches, Args, FromArgMatches};
use std::collections::BTreeMap;
use std::marker::PhantomData;

/// Options of `culvert cleanup`.
#[derive(Clone, Debug, Args)]
pub struct CleanupArgs {
    /// Also remove rules that another node's daemon wrote in network namespaces of this machine, and rules that do not
    /// say which node they belong to.
    #[arg(long)]
    pub all: bool,
    /// If a daemon runs, say so and wait for a signal instead of ending. Otherwise a container would be started again
    /// and could clean the node just while that daemon restarts.
    #[arg(long)]
    pub once: bool,
    /// Remove nothing and wait for a signal. A pod of a DaemonSet that has cleaned its node has to keep running.
    #[arg(long)]
    pub stay: bool,
    /// Settings of the daemon that ran here.
    #[command(flatten)]
    pub node: Box<NodeArgs>,
}

/// Options of `culvert demo`.
#[derive(Clone, Debug, Args)]
pub struct DemoArgs {
    /// Leave everything running until Ctrl-C.
    #[arg(long)]
    pub keep: bool,
    /// Print one JSON object instead of the report.
    #[arg(long)]
    pub json: bool,
    /// Seconds that each measurement takes.
    #[arg(long, default_value_t = 2)]
    pub seconds: u64,
}

/// Columns of a line of help.
const HELP_COLUMNS: usize = 100;

/// Which settings a command has.
pub trait Settings: Clone + std::fmt::Debug + Default + Send + Sync + 'static {
    /// Them, in groups.
    fn groups() -> &'static [Group];
}

/// `culvert node`.
#[derive(Clone, Debug, Default)]
pub struct OfNode;

impl Settings for OfNode {
    fn groups() -> &'static [Group] {
        &settings::GROUPS
    }
}

/// `culvert control`.
#[derive(Clone, Debug, Default)]
pub struct OfControl;

impl Settings for OfControl {
    fn groups() -> &'static [Group] {
        &settings::CONTROL_GROUPS
    }
}

/// Settings of the daemon as they were given, unchecked.
pub type NodeArgs = SettingArgs<OfNode>;

/// Settings of the control plane as they were given, unchecked.
pub type ControlArgs = SettingArgs<OfControl>;

/// Settings of a command as they were given, unchecked.
#[derive(Clone, Debug, Default)]
pub struct SettingArgs<S>(BTreeMap<&'static str, String>, PhantomData<S>);

impl<S: Settings> SettingArgs<S> {
    /// The text of a setting, where it was given.
    pub(crate) fn get(&self, setting: &About) -> Option<&str> {
        self.0.get(setting.variable).map(String::as_str)
    }

    /// The texts by variable.
    pub(super) fn texts(&self) -> &BTreeMap<&'static str, String> {
        &self.0
    }

    /// Every setting that was given, with its text.
    pub(crate) fn given(&self) -> impl Iterator<Item = (&'static About, &str)> {
        settings::each(S::groups()).filter_map(|setting| Some((setting, self.get(setting)?)))
    }

    /// Settings by variable; those with unknown names are left out.
    pub fn of(values: &BTreeMap<String, String>) -> Self {
        let value = |setting: &About| Some((setting.variable, values.get(setting.variable)?.clone()));
        Self(settings::each(S::groups()).filter_map(value).collect(), PhantomData)
    }
}

impl<S: Settings> Args for SettingArgs<S> {
    fn augment_args(command: clap::Command) -> clap::Command {
        let mut command = command.next_line_help(true);
        for group in S::groups() {
            for setting in group.settings {
                let about = setting.about();
                let accepts = setting.accepts().map(|accepts| format!(" [accepts: {accepts}]")).unwrap_or_default();
                let default = about.default_text().map(|text| format!(" [default: {text}]")).unwrap_or_default();
                let help = wrapped(&format!("{}{accepts}{default}", about.help));
                let arg = Arg::new(about.flag).long(about.flag).env(about.variable).value_name("VALUE");
                let arg = arg.hide_env_values(about.is_secret).help_heading(group.title);
                command = command.arg(arg.help(help));
            }
        }
        command
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

/// Breaks a text into lines between words.
fn wrapped(text: &str) -> String {
    let (mut lines, mut column) = (String::new(), 0);
    for word in text.split(' ') {
        let width = word.chars().count();
        if column > 0 && column + 1 + width > HELP_COLUMNS {
            lines.push('\n');
            column = 0;
        } else if column > 0 {
            lines.push(' ');
            column += 1;
        }
        lines.push_str(word);
        column += width;
    }
    lines
}

impl<S: Settings> FromArgMatches for SettingArgs<S> {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut args = Self::default();
        args.update_from_arg_matches(matches)?;
        Ok(args)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        for setting in settings::each(S::groups()) {
            // Every setting is an argument of the command, so that the lookup does not fail.
            if let Ok(Some(text)) = matches.try_get_one::<String>(setting.flag) {
                self.0.insert(setting.variable, text.clone());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
impl<S: Settings> From<&[(&str, &str)]> for SettingArgs<S> {
    fn from(given: &[(&str, &str)]) -> Self {
        let args = Self::of(&given.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect());
        assert_eq!(args.0.len(), given.len(), "each is a setting, named once: {given:?}");
        args
    }
}
