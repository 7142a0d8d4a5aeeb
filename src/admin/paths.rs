//! The list of the admin port's paths, for programs and for people without a browser.

use crate::ports;
use axum::response::Html;

/// `/` for those who do not ask for a page.
pub(super) fn paths() -> Html<String> {
    Html(format!(
        "<!doctype html><title>culvert</title><h1>culvert</h1><ul>\
         <li>/ in a browser: a live page about this node; its content is <a href=/snapshot>snapshot</a>, its changes are events\
         <li><a href=/status>status</a>: what is wrong on this node, in one answer\
         <li><a href=/pods>pods</a>: which pods are captured, which are not, and why\
         <li><a href=/connections>connections</a>: open connections, with both identities and the policy rule that permits each\
         <li><a href=/set_aside>set_aside</a>: endpoints that connections avoid for a while, why, and how long still\
         <li><a href=/history>history</a>?since=10m&amp;refused=true: connections that have ended or were refused, and what has changed\
         <li><a href=/plaintext>plaintext</a>: since when each pod has sent or received no plaintext\
         <li><a href=/config_dump>config_dump</a>: workloads, services, policies, certificates, settings\
         <li>explain?from=NAMESPACE/POD&amp;to=ADDRESS:PORT: what would happen to a connection now, step by step\
         <li>POST /explain/policies with `policies:` as in the mesh file: what these policies would change for connections\
         <li>POST /logging?level=debug or ?level=access=debug or ?reset: change the log filter\
         <li>POST /quitquitquit: end the daemon\
         <li><a href=/debug/pprof/profile>debug/pprof/profile</a>?seconds=10&frequency=100: a CPU profile, for pprof\
         </ul><p>Metrics: port {} /metrics. Readiness: port {} /healthz/ready.\n",
        ports::STATS,
        ports::READY
    ))
}
