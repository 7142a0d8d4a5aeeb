//! Reads settings one by one and collects every fault, each with the names of the setting, the value and what is
//! expected.

use super::args::{SettingArgs, Settings};
use super::kind::Kind;
use super::setting::{About, Setting};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Settings as they were given, and the faults found in them so far.
pub(super) struct Checker<'a> {
    texts: &'a BTreeMap<&'static str, String>,
    /// Faults so far.
    pub(super) faults: Vec<String>,
}

impl<'a> Checker<'a> {
    /// Starts with no faults.
    pub(super) fn new<S: Settings>(args: &'a SettingArgs<S>) -> Self {
        Self { texts: args.texts(), faults: Vec::new() }
    }

    /// The text of a setting as it was given, which may be empty.
    pub(super) fn given<K>(&self, setting: &Setting<K>) -> Option<&'a str> {
        self.texts.get(setting.about.variable).map(String::as_str)
    }

    /// The text of a setting, unless that is empty; else its default.
    pub(super) fn text<K>(&self, setting: &Setting<K>) -> Option<&'a str> {
        self.given(setting).filter(|text| !text.is_empty()).or(setting.about.default_value())
    }

    /// The same, as a path.
    pub(super) fn path<K>(&self, setting: &Setting<K>) -> Option<PathBuf> {
        self.text(setting).map(PathBuf::from)
    }

    /// The value of a setting, or its default.
    pub(super) fn read<K: Kind<Value: Default>>(&mut self, setting: &Setting<K>) -> K::Value {
        self.optional(setting).unwrap_or_default()
    }

    /// The value of a setting, or `default` where it is not set or not valid.
    pub(super) fn read_or<K: Kind>(&mut self, setting: &Setting<K>, default: K::Value) -> K::Value {
        self.optional(setting).unwrap_or(default)
    }

    /// The value of a setting, or its default if it has one.
    pub(super) fn optional<K: Kind>(&mut self, setting: &Setting<K>) -> Option<K::Value> {
        let given = self.given(setting);
        self.parse(setting, given)
    }

    /// The value that a text has for a setting; its default where the text says nothing.
    pub(super) fn parse<K: Kind>(&mut self, setting: &Setting<K>, given: Option<&str>) -> Option<K::Value> {
        let default = setting.about.default_value();
        let text = given.map(str::trim).filter(|text| !text.is_empty()).or(default)?;
        match setting.kind.read(text) {
            Ok(value) => Some(value),
            Err(expected) => {
                self.fault(&setting.about, &format!("{text:?} is not valid: expected {expected}"));
                default.and_then(|text| setting.kind.read(text).ok())
            }
        }
    }

    /// Adds a fault of a setting. One that is read for several purposes has each of its faults once.
    pub(super) fn fault(&mut self, about: &About, what: &str) {
        let fault = format!("{}: {what}", about.names());
        if !self.faults.contains(&fault) {
            self.faults.push(fault);
        }
    }
}
