//! The three HTTP ports: admin (loopback only), metrics, readiness. It is handed functions and knows nothing of what
//! they show. State changes by POST only; admin requests must name a loopback host, so that no web page can reach it.

use crate::task::thread::beside;
use crate::task::{Group, Ready};
use axum::Router;
use axum::body::Body;
use axum::extract::{RawQuery, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::{get, post};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use prometheus_client::registry::Registry;
use serde_json::Value;
use std::fmt;
use std::future::Future;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

/// Port of the admin pages, on loopback.
pub const ADMIN_PORT: u16 = 15000;
/// Port of the metrics, on all addresses.
pub const STATS_PORT: u16 = 15020;
/// Port of readiness, on all addresses.
pub const READY_PORT: u16 = 15021;

/// Settings of the ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Port of the admin pages.
    pub admin_port: u16,
    /// Port of the metrics.
    pub stats_port: u16,
    /// Whether IPv6 is used.
    pub ipv6: bool,
}

/// Connections open at once on one port; further ones wait in its queue.
const CONNECTIONS_MAX: usize = 256;
/// How long a request's head may take.
const HEAD_DEADLINE: Duration = Duration::from_secs(2);
/// How large a request's head may be.
const HEAD_BYTES_MAX: usize = 16 * 1024;
/// How long a connection may live, however busy.
const CONNECTION_DEADLINE: Duration = Duration::from_secs(600);
/// Pause after an accept failed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// A function that gives a page.
pub type Page = Box<dyn Fn() -> Value + Send + Sync>;

/// Changes the log filter, given the query string; the answer, or why not.
pub type Logging = Box<dyn Fn(Option<&str>) -> Result<String, String> + Send + Sync>;

/// Takes a profile, given the query string; the profile, or why not.
pub type Profile =
    Box<dyn Fn(Option<String>) -> Pin<Box<dyn Future<Output = Result<Vec<u8>, String>> + Send>> + Send + Sync>;

/// What the ports show.
pub struct Pages {
    /// `/config_dump`.
    pub config_dump: Page,
    /// `/connections`.
    pub connections: Page,
    /// `/pods`.
    pub pods: Page,
    /// `/logging`.
    pub logging: Logging,
    /// `/debug/pprof/profile`.
    pub cpu_profile: Profile,
    /// `/quitquitquit`.
    pub quit: Box<dyn Fn() + Send + Sync>,
    /// `/metrics`.
    pub registry: Mutex<Registry>,
    /// `/healthz/ready`.
    pub ready: Ready,
}

impl fmt::Debug for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pages")
    }
}

/// A port that cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address}: {source}; is another daemon running here?")]
pub struct BindError {
    address: SocketAddr,
    source: std::io::Error,
}

/// Serves the ports in the namespace of the process until dropped.
#[derive(Debug)]
pub struct Ports {
    listeners: Vec<(TcpListener, Router)>,
}

impl Ports {
    /// Opens the ports.
    pub async fn bind(pages: Pages, config: Config) -> Result<Self, BindError> {
        let pages = Arc::new(pages);
        let admin = Router::new()
            .route("/", get(index))
            .route("/config_dump", get(config_dump))
            .route("/connections", get(connections))
            .route("/pods", get(pods))
            .route("/logging", post(logging))
            .route("/quitquitquit", post(quit))
            .route("/debug/pprof/profile", get(cpu_profile))
            .route("/debug/pprof/heap", get(heap_profile))
            .route("/debug/pprof/heap/profiling", get(heap_profile))
            .layer(middleware::from_fn(loopback_host_only))
            .with_state(pages.clone());
        let stats = Router::new()
            .route("/metrics", get(metrics))
            .route("/stats/prometheus", get(metrics))
            .with_state(pages.clone());
        let ready = Router::new().route("/healthz/ready", get(readiness)).with_state(pages);

        let (any, localhost) = if config.ipv6 {
            (IpAddr::V6(Ipv6Addr::UNSPECIFIED), vec![IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)])
        } else {
            (IpAddr::V4(Ipv4Addr::UNSPECIFIED), vec![IpAddr::V4(Ipv4Addr::LOCALHOST)])
        };
        let mut listeners = Vec::new();
        for ip in localhost {
            listeners.push((listen(SocketAddr::new(ip, config.admin_port)).await?, admin.clone()));
        }
        listeners.push((listen(SocketAddr::new(any, config.stats_port)).await?, stats));
        listeners.push((listen(SocketAddr::new(any, READY_PORT)).await?, ready));
        Ok(Self { listeners })
    }

    /// One future per port, each of which serves until dropped.
    pub fn serve(self) -> Vec<impl Future<Output = ()> + Send> {
        self.listeners.into_iter().map(|(listener, router)| serve(listener, router)).collect()
    }
}

/// Serves one port: a bounded number of connections at once, each request's head within a deadline. Whoever parks
/// connections here must not use up the descriptors of the node.
async fn serve(listener: TcpListener, router: Router) {
    let (places, connections) = (Arc::new(Semaphore::new(CONNECTIONS_MAX)), Group::default());
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!(%error, "an admin port cannot accept; trying again");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let service = TowerToHyperService::new(router.clone());
        connections.spawn(async move {
            let mut http = hyper::server::conn::http1::Builder::new();
            http.timer(TokioTimer::new()).header_read_timeout(HEAD_DEADLINE).max_buf_size(HEAD_BYTES_MAX);
            let serving = http.half_close(true).keep_alive(true).serve_connection(TokioIo::new(stream), service);
            // A client that breaks off, or is too slow, is its own loss.
            let _ = tokio::time::timeout(CONNECTION_DEADLINE, serving).await;
            drop(place);
        });
    }
}

async fn listen(address: SocketAddr) -> Result<TcpListener, BindError> {
    TcpListener::bind(address).await.map_err(|source| BindError { address, source })
}

/// Refuses requests whose Host is not loopback: a name that an attacker points at 127.0.0.1 is not (DNS rebinding).
async fn loopback_host_only(request: Request, next: Next) -> Response {
    let host = request.headers().get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    let cross_site = request.headers().contains_key(header::ORIGIN);
    if is_loopback(host) && !cross_site {
        return next.run(request).await;
    }
    (StatusCode::FORBIDDEN, "the admin port answers only requests to localhost, 127.0.0.1 or [::1]\n").into_response()
}

fn is_loopback(host: &str) -> bool {
    if let Ok(address) = host.parse::<SocketAddr>() {
        return address.ip().is_loopback();
    }
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    let literal = name.trim_start_matches('[').trim_end_matches(']');
    name.eq_ignore_ascii_case("localhost") || literal.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

async fn index() -> Html<&'static str> {
    Html(
        "<!doctype html><title>culvert</title><h1>culvert</h1><ul>\
         <li><a href=/pods>pods</a>: which pods are captured, which are not, and why\
         <li><a href=/connections>connections</a>: who talks to whom now, under which identities and rule\
         <li><a href=/config_dump>config_dump</a>: workloads, services, policies, certificates, settings\
         <li>POST /logging?level=debug or ?level=access=debug, ?reset: the log filter\
         <li>POST /quitquitquit: end the daemon\
         <li><a href=/debug/pprof/profile>debug/pprof/profile</a>?seconds=10&frequency=100: where CPU time goes, for pprof\
         </ul><p>Metrics: port 15020 /metrics. Readiness: port 15021 /healthz/ready.\n",
    )
}

/// Makes a page beside the runtime: that of a large mesh takes a while, and nothing else should wait for it.
async fn pretty(pages: Arc<Pages>, pick: fn(&Pages) -> &Page) -> Response {
    let work = move || {
        let value = pick(&pages)();
        serde_json::to_string_pretty(&value).unwrap_or_else(|error| format!("{{\"error\":\"{error}\"}}"))
    };
    match beside(work).await {
        Some(text) => {
            ([(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))], text + "\n").into_response()
        }
        None => (StatusCode::INTERNAL_SERVER_ERROR, "the page could not be made\n").into_response(),
    }
}

async fn config_dump(State(pages): State<Arc<Pages>>) -> Response {
    pretty(pages, |pages| &pages.config_dump).await
}

async fn connections(State(pages): State<Arc<Pages>>) -> Response {
    pretty(pages, |pages| &pages.connections).await
}

async fn pods(State(pages): State<Arc<Pages>>) -> Response {
    pretty(pages, |pages| &pages.pods).await
}

async fn logging(State(pages): State<Arc<Pages>>, RawQuery(query): RawQuery) -> Response {
    match (pages.logging)(query.as_deref()) {
        Ok(text) => (StatusCode::OK, text).into_response(),
        Err(text) => (StatusCode::BAD_REQUEST, text).into_response(),
    }
}

async fn cpu_profile(State(pages): State<Arc<Pages>>, RawQuery(query): RawQuery) -> Response {
    match (pages.cpu_profile)(query).await {
        Ok(profile) => {
            ([(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"))], profile).into_response()
        }
        Err(text) => (StatusCode::BAD_REQUEST, text).into_response(),
    }
}

async fn heap_profile() -> Response {
    let text = "heap profiles are not built in; /metrics and /debug/pprof/profile are\n";
    (StatusCode::INTERNAL_SERVER_ERROR, text).into_response()
}

async fn quit(State(pages): State<Arc<Pages>>) -> &'static str {
    (pages.quit)();
    "shutdown now\n"
}

async fn metrics(State(pages): State<Arc<Pages>>, request: Request) -> Response {
    let accepts = |kind: &str| {
        let accept = request.headers().get_all(header::ACCEPT);
        accept.iter().any(|value| value.to_str().is_ok_and(|text| text.contains(kind)))
    };
    let kind = if accepts("application/openmetrics-text") {
        "application/openmetrics-text;charset=utf-8;version=1.0.0"
    } else {
        "text/plain; charset=utf-8"
    };
    let mut text = String::new();
    let registry = pages.registry.lock().unwrap_or_else(PoisonError::into_inner);
    match prometheus_client::encoding::text::encode(&mut text, &registry) {
        Ok(()) => ([(header::CONTENT_TYPE, kind)], Body::from(text)).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

async fn readiness(State(pages): State<Arc<Pages>>) -> Response {
    let pending = pages.ready.pending();
    if pending.is_empty() {
        return (StatusCode::OK, "ready\n").into_response();
    }
    (StatusCode::INTERNAL_SERVER_ERROR, format!("not ready, pending: {}\n", pending.join(", "))).into_response()
}

#[cfg(test)]
mod tests {
    use super::is_loopback;

    #[test]
    fn only_loopback_hosts_are_answered() {
        for good in
            ["localhost", "localhost:15000", "LOCALHOST:1", "127.0.0.1", "127.0.0.1:15000", "[::1]:15000", "[::1]"]
        {
            assert!(is_loopback(good), "{good}");
        }
        for bad in
            ["", "evil.example", "evil.example:15000", "10.0.0.1:15000", "localhost.evil.example", "127.0.0.1.evil"]
        {
            assert!(!is_loopback(bad), "{bad}");
        }
    }
}
