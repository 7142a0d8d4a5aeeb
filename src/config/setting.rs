//! What a setting is: its argument, variable, default, accepted values, help text and key in `/config_dump`, in one
//! place.
//!
//! The settings themselves are in `settings/`. The command line, the checker, `docs/settings.md` and `/config_dump` all
//! read them from there.

use super::Config;
use super::kind::Kind;
use serde_json::Value;

/// One setting. `K` knows which values it accepts and what they mean.
#[derive(Debug)]
pub struct Setting<K> {
    /// How it is called and described.
    pub about: About,
    /// What it accepts.
    pub kind: K,
}

/// Names, default and description of a setting.
#[derive(Clone, Copy, Debug)]
pub struct About {
    /// The argument, without `--`.
    pub flag: &'static str,
    /// The environment variable.
    pub variable: &'static str,
    /// What applies where it is not set.
    pub default: Default,
    /// What it means, in full sentences.
    pub help: &'static str,
    /// Its key in `/config_dump`, and the value there. Not every setting has one.
    pub shown: Option<Shown>,
    /// Its text may contain a secret and is shown nowhere.
    pub is_secret: bool,
}

/// What applies where a setting is not set.
#[derive(Clone, Copy, Debug)]
pub enum Default {
    /// Nothing.
    None,
    /// This text, read as if it had been set.
    Text(&'static str),
    /// Something that depends on the machine or on other settings, in words.
    Depends(&'static str),
}

/// A key of `/config_dump`, with a dot before the key of an inner object, and where its value comes from.
pub type Shown = (&'static str, fn(&Config) -> Value);

impl<K: Copy> Setting<K> {
    /// A setting with no default.
    pub const fn new(flag: &'static str, variable: &'static str, kind: K) -> Self {
        let about = About { flag, variable, default: Default::None, help: "", shown: None, is_secret: false };
        Self { about, kind }
    }

    /// Gives it a default, in the form in which it would be set.
    pub const fn or(mut self, text: &'static str) -> Self {
        self.about.default = Default::Text(text);
        self
    }

    /// Says where its default comes from.
    pub const fn or_else(mut self, words: &'static str) -> Self {
        self.about.default = Default::Depends(words);
        self
    }

    /// Says what it means.
    pub const fn help(mut self, help: &'static str) -> Self {
        self.about.help = help;
        self
    }

    /// Gives it a key in `/config_dump`.
    pub const fn shown(mut self, key: &'static str, value: fn(&Config) -> Value) -> Self {
        self.about.shown = Some((key, value));
        self
    }

    /// Its text may contain a secret.
    pub const fn secret(mut self) -> Self {
        self.about.is_secret = true;
        self
    }
}

impl About {
    /// Both names, for messages.
    pub fn names(&self) -> String {
        format!("{} (--{})", self.variable, self.flag)
    }

    /// The default, if it is a text that could be set.
    pub fn default_value(&self) -> Option<&'static str> {
        match self.default {
            Default::Text(text) => Some(text),
            Default::None | Default::Depends(_) => None,
        }
    }

    /// The default, in words.
    pub fn default_text(&self) -> Option<&'static str> {
        match self.default {
            Default::None => None,
            Default::Text(text) | Default::Depends(text) => Some(text),
        }
    }
}

/// A setting of any kind.
pub trait Described: Sync {
    /// Its names, default and description.
    fn about(&self) -> &About;
    /// What it accepts, in words; `None` for any text.
    fn accepts(&self) -> Option<String>;
}

impl<K: Kind> Described for Setting<K> {
    fn about(&self) -> &About {
        &self.about
    }

    fn accepts(&self) -> Option<String> {
        self.kind.accepts()
    }
}
