//! Kinds of values: what each accepts, in words and in code. Pure.

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// What a setting accepts, and what it means.
pub trait Kind: Copy + Sync {
    /// What it is read as.
    type Value;

    /// Reads a text without space around it. The error says what is expected.
    fn read(&self, text: &str) -> Result<Self::Value, String>;

    /// What is accepted, in words; `None` for any text.
    fn accepts(&self) -> Option<String>;
}

/// Any text.
#[derive(Clone, Copy, Debug)]
pub struct Text;

impl Kind for Text {
    type Value = String;

    fn read(&self, text: &str) -> Result<String, String> {
        Ok(text.to_owned())
    }

    fn accepts(&self) -> Option<String> {
        None
    }
}

/// A path.
#[derive(Clone, Copy, Debug)]
pub struct File;

impl Kind for File {
    type Value = PathBuf;

    fn read(&self, text: &str) -> Result<PathBuf, String> {
        Ok(text.into())
    }

    fn accepts(&self) -> Option<String> {
        None
    }
}

/// `true` or `false`.
#[derive(Clone, Copy, Debug)]
pub struct Switch;

impl Kind for Switch {
    type Value = bool;

    fn read(&self, text: &str) -> Result<bool, String> {
        text.parse().map_err(|_| "true or false".into())
    }

    fn accepts(&self) -> Option<String> {
        Some("true or false".into())
    }
}

/// A whole number from the first to the second, both included.
#[derive(Clone, Copy, Debug)]
pub struct Number<T>(pub T, pub T);

impl<T: Copy + Sync + FromStr + PartialOrd + Display> Kind for Number<T> {
    type Value = T;

    fn read(&self, text: &str) -> Result<T, String> {
        number(text, self.0..=self.1)
    }

    fn accepts(&self) -> Option<String> {
        Some(range(&(self.0..=self.1)))
    }
}

/// Reads a whole number of a range.
pub fn number<T: FromStr + PartialOrd + Display>(text: &str, accepted: RangeInclusive<T>) -> Result<T, String> {
    let number = text.parse().ok().filter(|number| accepted.contains(number));
    number.ok_or_else(|| range(&accepted))
}

fn range<T: Display>(accepted: &RangeInclusive<T>) -> String {
    format!("a number from {} to {}", accepted.start(), accepted.end())
}

/// One of a few words, and what each stands for.
#[derive(Clone, Copy, Debug)]
pub struct Words<T: 'static>(pub &'static [(&'static str, T)]);

impl<T: Copy + Sync> Kind for Words<T> {
    type Value = T;

    fn read(&self, text: &str) -> Result<T, String> {
        let found = self.0.iter().find(|(word, _)| *word == text);
        found.map(|(_, meaning)| *meaning).ok_or_else(|| self.accepts().unwrap_or_default())
    }

    fn accepts(&self) -> Option<String> {
        let words: Vec<&str> = self.0.iter().map(|(word, _)| *word).collect();
        Some(match words.split_last() {
            Some((last, [])) => (*last).to_owned(),
            Some((last, others)) => format!("{} or {last}", others.join(", ")),
            None => String::new(),
        })
    }
}

/// A text that a function reads.
#[derive(Debug)]
pub struct Custom<T: 'static> {
    /// What is accepted, in words.
    pub expected: &'static str,
    /// Reads it. The error says what is expected.
    pub read: fn(&str) -> Result<T, String>,
}

impl<T> Clone for Custom<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Custom<T> {}

impl<T> Kind for Custom<T> {
    type Value = T;

    fn read(&self, text: &str) -> Result<T, String> {
        (self.read)(text)
    }

    fn accepts(&self) -> Option<String> {
        Some(self.expected.into())
    }
}

/// A duration between two bounds.
#[derive(Clone, Copy, Debug)]
pub struct Time {
    /// What is accepted, in words.
    expected: &'static str,
    min: Duration,
    max: Duration,
    /// Whether it must be whole seconds.
    whole: bool,
}

/// Longest duration that makes sense anywhere; beyond it arithmetic with dates could overflow.
const LONGEST: Duration = Duration::from_secs(10 * 31_557_600);

impl Time {
    /// Any duration but zero.
    pub const ANY: Self = Self {
        expected: "a duration above zero and up to 10 years, such as 10s, 5m, 1h30m or 25 (seconds)",
        min: Duration::from_nanos(1),
        max: LONGEST,
        whole: false,
    };

    /// The life of a certificate.
    pub const CERTIFICATE: Self =
        Self { expected: "a duration from 10s to 10 years", min: Duration::from_secs(10), max: LONGEST, whole: false };

    /// The time to live of a DNS answer. Resolvers keep no answer for more than a day.
    pub const DNS: Self = Self {
        expected: "whole seconds from 1s to 1 day",
        min: Duration::from_secs(1),
        max: Duration::from_secs(86_400),
        whole: true,
    };

    /// What the kernel accepts for `TCP_KEEPIDLE` and `TCP_KEEPINTVL` (tcp(7)).
    pub const KEEPALIVE: Self = Self {
        expected: "whole seconds from 1s to 32767s",
        min: Duration::from_secs(1),
        max: Duration::from_secs(32_767),
        whole: true,
    };
}

impl Kind for Time {
    type Value = Duration;

    fn read(&self, text: &str) -> Result<Duration, String> {
        let fits = |time: &Duration| (self.min..=self.max).contains(time) && !(self.whole && time.subsec_nanos() != 0);
        super::duration::parse(text).filter(fits).ok_or_else(|| self.expected.into())
    }

    fn accepts(&self) -> Option<String> {
        Some(self.expected.into())
    }
}
