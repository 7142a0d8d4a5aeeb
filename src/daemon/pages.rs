//! What the admin and metrics ports serve.

use super::parts::Parts;
use super::{dump, explain, history, kernel, plaintext, profile, snapshot, status};
use crate::admin::page::{Live, Site, Told};
use crate::admin::{Pages, Query, Rendered};
use crate::connection::Shared;
use crate::connection::dial::direct::OpenLegs;
use crate::dns::Dns;
use crate::task::Ready;
use crate::task::thread::run_blocking;
use crate::telemetry::log::LogControl;
use prometheus_client::registry::Registry;
use serde_json::json;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// The pages. `quit` is notified when somebody asks the daemon to end.
pub(super) fn pages(
    parts: &Arc<Parts>,
    (shared, own_legs): (&Arc<Shared>, &OpenLegs),
    log: LogControl,
    (quit, ready): (&Arc<Notify>, Ready),
    registry: Registry,
) -> Pages {
    let (for_dump, for_connections, for_pods, for_set_aside) =
        (parts.clone(), parts.clone(), parts.clone(), parts.clone());
    let (for_history, for_plaintext) = (parts.clone(), parts.clone());
    let (dns, quit) = (parts.dns.clone(), quit.clone());
    Pages {
        site: site(parts, &ready),
        snapshot: {
            let (parts, ready) = (parts.clone(), ready.clone());
            Box::new(move || snapshot::snapshot(&parts, &ready))
        },
        config_dump: Box::new(move || dump::config_dump(&for_dump)),
        status: {
            let (parts, ready) = (parts.clone(), ready.clone());
            Box::new(move || status::status(&parts, &ready))
        },
        kernel: Box::new(kernel::kernel),
        connections: {
            let shared = shared.clone();
            Box::new(move |query| dump::connections(&for_connections, &shared, query))
        },
        pods: Box::new(move || dump::pods(&for_pods)),
        set_aside: Box::new(move || dump::set_aside(&for_set_aside)),
        history: Box::new(move |query| history::history(&for_history, query)),
        plaintext: Box::new(move |query| plaintext::plaintext(&for_plaintext, query)),
        explain: {
            let shared = shared.clone();
            Box::new(move |query| {
                let shared = shared.clone();
                Box::pin(async move { explain::answer(&shared, &query).await })
            })
        },
        explain_policies: {
            let shared = shared.clone();
            Box::new(move |text| explain::policies(&shared, text))
        },
        logging: Box::new(move |query| logging(&log, &dns, query)),
        cpu_profile: Box::new(|query| Box::pin(profile::cpu(query))),
        quit: Box::new(move || quit.notify_one()),
        metrics: Rendered::new(registry),
        client: {
            let own_legs = own_legs.clone();
            Box::new(move |from, to| own_legs.client(from, to))
        },
        ready,
    }
}

/// The other pages, which the live page leads to.
const LINKS: [&str; 7] = ["/status", "/pods", "/connections", "/history", "/set_aside", "/config_dump", "/snapshot"];

/// The live page, about this node alone.
fn site(parts: &Arc<Parts>, ready: &Ready) -> Site {
    let title = format!("node {}", parts.config.node_name).trim_end().to_owned();
    let (parts, ready) = (parts.clone(), ready.clone());
    let feed = move || -> std::pin::Pin<Box<dyn Future<Output = _> + Send>> {
        let (parts, ready) = (parts.clone(), ready.clone());
        Box::pin(async move {
            let name = snapshot::node_name(&parts).to_owned();
            let work = move || {
                let begun = Instant::now();
                (snapshot::snapshot(&parts, &ready), begun.elapsed())
            };
            let (own, work) = run_blocking(work).await.unwrap_or_else(|| {
                let error = "its page could not be made; see standard error of the daemon";
                (json!({"node": name, "reachable": false, "error": error}), Duration::ZERO)
            });
            Told { said: json!({"nodes": [own]}), work }
        })
    };
    Site { live: Live::new(Box::new(feed)), title: title.into(), links: &LINKS }
}

/// `/logging`, as ztunnel has it: `level=<directives>` adds directives, `reset` first restores the filter of the start,
/// and no query shows the filter. `dns=<namespace>/<pod>`, which may be repeated, logs the DNS requests of that pod
/// until a reset.
fn logging(log: &LogControl, dns: &Dns, query: &Query) -> Result<String, String> {
    let is_reset = |name: &str| name == "reset";
    if query.iter().any(|(name, _)| is_reset(name)) {
        log.reset().map_err(|error| format!("{error}\n"))?;
        dns.log_only(Vec::new());
    }
    for (name, value) in query.iter().filter(|(name, _)| !is_reset(name)) {
        match (name.as_str(), value.as_str()) {
            // istioctl asks for the current level in this way.
            ("level", "") => Ok(()),
            ("level", directives) => log.add(directives),
            ("dns", pod) if pod.split('/').count() == 2 => {
                let mut pods = dns.logged();
                pods.push(pod.to_owned());
                dns.log_only(pods);
                Ok(())
            }
            _ => {
                let instead = "use level=debug, level=access=debug, dns=NAMESPACE/POD, or reset";
                return Err(format!("{name:?} with the value {value:?} is not understood: {instead}\n"));
            }
        }
        .map_err(|error| format!("{error}\n"))?;
    }
    let of_dns = match dns.logged() {
        pods if pods.is_empty() => String::new(),
        pods => format!("DNS requests are logged of {}\n", pods.join(", ")),
    };
    Ok(format!("current log level is {}\n{of_dns}", log.current()))
}
