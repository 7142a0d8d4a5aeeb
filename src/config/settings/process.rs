//! Settings of how the daemon ends, and of its log.

use crate::config::kind::{Number, Text, Time, Words};
use crate::config::parse;
use crate::config::setting::{Described, Setting};
use serde_json::json;

/// Formats of the log, by whether it is JSON. ztunnel calls its text `plain`.
const FORMATS: Words<bool> = Words(&[("text", false), ("plain", false), ("json", true)]);

settings! {
    DRAIN_DEADLINE: Time = Setting::new("drain-deadline", "CONNECTION_TERMINATION_DEADLINE", Time::ANY)
        .or("5s")
        .help("How long open connections may take to end when the daemon ends, or when a pod is released. Where it is not set, `TERMINATION_GRACE_PERIOD_SECONDS` gives it.")
        .shown("selfTerminationDeadline", |c| parse::shown_duration(c.drain_deadline));
    GRACE_PERIOD: Number<u64> = Setting::new("grace-period", "TERMINATION_GRACE_PERIOD_SECONDS", Number(0, 86_400))
        .help(
            "Grace period of the daemon's pod, in seconds. It gives `CONNECTION_TERMINATION_DEADLINE` where that is not set: 5 s less than \
             the grace period, or if that is 10 s or shorter, 1 s less, and at least 1 s.",
        );
    LOG: Text = Setting::new("log", "RUST_LOG", Text)
        .or("info")
        .help("Log filter: levels and `target=level`, separated by commas, such as `warn,access=info`.")
        .shown("logFilter", |c| json!(c.log.filter));
    LOG_FORMAT: Words<bool> = Setting::new("log-format", "LOG_FORMAT", FORMATS)
        .or("text")
        .help("Format of the log. `plain` is ztunnel's word for `text`.")
        .shown("logFormat", |c| json!(if c.log.json { "json" } else { "text" }));
}
