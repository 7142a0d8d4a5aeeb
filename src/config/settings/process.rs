//! Settings of how the daemon ends, of its log, and of its metrics.

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
    METRIC_SERIES_MAX: Number<usize> = Setting::new("metric-series-max", "CULVERT_METRIC_SERIES_MAX", Number(1, 1_000_000))
        .or("5000")
        .help(
            "Most label sets with names from the mesh in one group of metrics. What comes beyond is counted with `overflow` in place \
             of the names, and in `culvert_metric_overflows_total`.",
        )
        .shown("metricSeriesMax", |c| json!(c.series.max));
    METRIC_SERIES_IDLE: Time = Setting::new("metric-series-idle", "CULVERT_METRIC_SERIES_IDLE", Time::ANY)
        .or("10m")
        .help(
            "How long a label set that nothing uses is kept once one of its workloads is gone. Longer than scrapers look back, so \
             that they see it end.",
        )
        .shown("metricSeriesIdle", |c| parse::shown_duration(c.series.idle));
}
