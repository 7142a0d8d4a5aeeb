//! Settings of what the node remembers for the admin port.

use crate::config::kind::{Number, Switch};
use crate::config::setting::{Described, Setting};
use serde_json::json;

settings! {
    HISTORY: Number<usize> = Setting::new("history", "CULVERT_HISTORY", Number(0, 1_000_000))
        .or("10000")
        .help(
            "Ended and refused connections, and changes, that `/history` remembers, with about 0.8 KiB for each: half of them \
             connections that ended well, three eighths connections that failed or were refused, and an eighth changes. 0 \
             remembers nothing.",
        )
        .shown("historyEntries", |c| json!(c.history));
    ACCESS_LOG_STAGES: Switch = Setting::new("access-log-stages", "CULVERT_ACCESS_LOG_STAGES", Switch)
        .or("false")
        .help("Show in the access log how long each stage of a connection took.")
        .shown("accessLogStages", |c| json!(c.access_log_stages));
}
