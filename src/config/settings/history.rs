//! Settings of what the node remembers for the admin port.

use crate::config::kind::Number;
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
}
