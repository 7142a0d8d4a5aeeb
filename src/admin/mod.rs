//! The three HTTP ports: admin (loopback only), metrics, and readiness.
//!
//! The pages are functions that the caller passes in; this module knows nothing of their content. Only POST changes
//! state. Admin requests must name a loopback host and may not come from the page of another site, so that no web page in
//! a browser can use the admin port.

mod control_plane;
pub mod dashboard;
pub mod page;
mod paths;
mod rendered;
mod turns;

pub use self::control_plane::{ControlPages, ControlPorts};
pub use self::rendered::Rendered;
use self::turns::Turns;
use crate::ports;
use crate::task::slots::Slots;
use crate::task::thread::run_blocking;
use crate::task::{Group, Ready};
use crate::telemetry::exposition::Format;
use axum::body::Body;
use axum::extract::{RawQuery, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Router};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::Value;
use std::fmt;
use std::future::Future;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tower_service::Service;

/// Settings of the HTTP ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Port of the admin pages.
    pub admin_port: u16,
    /// Port of the metrics.
    pub stats_port: u16,
    /// Whether to listen on IPv6 too.
    pub ipv6: bool,
}

/// Maximum number of open connections on one port, and from one source address. Further ones are closed at once.
const CONNECTIONS_MAX: usize = 128;
const CONNECTIONS_OF_ONE: usize = 16;
/// How long the headers of a request may take.
const HEAD_DEADLINE: Duration = Duration::from_secs(2);
/// Maximum size of the headers of a request.
const HEAD_BYTES_MAX: usize = 16 * 1024;
/// How long a connection to the admin port may last. Taking a profile takes a while.
const ADMIN_DEADLINE: Duration = Duration::from_secs(600);
/// How long a scrape may take, until its last byte is read.
const STATS_DEADLINE: Duration = Duration::from_secs(20);
/// How long a readiness request may take.
const READY_DEADLINE: Duration = Duration::from_secs(5);
/// Pause after a failed accept.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// A function that returns the content of a page.
pub type Page = Box<dyn Fn() -> Value + Send + Sync>;

/// The parameters of a query string, decoded, in their order.
pub type Query = Vec<(String, String)>;

/// Returns the content of a page that a query filters, or what is wrong with the query.
pub type Filtered = Box<dyn Fn(&Query) -> Result<Value, String> + Send + Sync>;

/// Changes the log filter as the query says. Returns the text of the response, or the error.
pub type Logging = Box<dyn Fn(&Query) -> Result<String, String> + Send + Sync>;

/// Takes a profile as the query says. Returns the profile, or the error.
pub type Profile = Box<dyn Fn(Query) -> Pin<Box<dyn Future<Output = Result<Vec<u8>, String>> + Send>> + Send + Sync>;

/// Answers a question as the query asks it. Returns the answer, or what is wrong with the question.
pub type Asked = Box<dyn Fn(Query) -> Pin<Box<dyn Future<Output = Result<Value, String>> + Send>> + Send + Sync>;

/// Answers a question about the text of a file. Returns the answer, or what is wrong with the text.
pub type AskedOfText = Box<dyn Fn(&str) -> Result<Value, String> + Send + Sync>;

/// The functions behind the paths.
pub struct Pages {
    /// `/` for browsers, and `/events`.
    pub site: page::Site,
    /// `/snapshot`: what the live page shows of this node.
    pub snapshot: Page,
    /// `/config_dump`.
    pub config_dump: Page,
    /// `/status`.
    pub status: Page,
    /// `/kernel`.
    pub kernel: Page,
    /// `/connections`.
    pub connections: Filtered,
    /// `/pods`.
    pub pods: Page,
    /// `/set_aside`.
    pub set_aside: Page,
    /// `/history`.
    pub history: Filtered,
    /// `/plaintext`.
    pub plaintext: Filtered,
    /// `/explain`.
    pub explain: Asked,
    /// `/explain/policies`: takes the text of a file.
    pub explain_policies: AskedOfText,
    /// `/logging`.
    pub logging: Logging,
    /// `/debug/pprof/profile`.
    pub cpu_profile: Profile,
    /// `/quitquitquit`.
    pub quit: Box<dyn Fn() + Send + Sync>,
    /// `/metrics`.
    pub metrics: Rendered,
    /// The client of a connection from one address to the other that came through the mesh, by which the daemon opened
    /// it.
    pub client: Box<dyn Fn(SocketAddr, SocketAddr) -> Option<IpAddr> + Send + Sync>,
    /// `/healthz/ready`.
    pub ready: Ready,
}

impl fmt::Debug for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pages")
    }
}

/// A port cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address}: {source}; is another daemon running here?")]
pub struct BindError {
    address: SocketAddr,
    source: std::io::Error,
}

/// The open ports, in the network namespace of the process.
#[derive(Debug)]
pub struct Ports {
    listeners: Vec<(TcpListener, Router, PortLimits)>,
    pages: Arc<Pages>,
    live: Arc<page::Live>,
}

/// The limits for clients of a port.
#[derive(Clone, Debug)]
struct PortLimits {
    slots: Arc<Slots>,
    deadline: Duration,
    /// Whether a connection may send several requests.
    keep_alive: bool,
}

impl PortLimits {
    /// For the admin port, whose clients are on this machine.
    fn local() -> Self {
        Self { slots: Slots::new(CONNECTIONS_MAX, CONNECTIONS_MAX), deadline: ADMIN_DEADLINE, keep_alive: true }
    }

    /// For a port that is reachable from everywhere.
    fn open(deadline: Duration) -> Self {
        Self { slots: Slots::new(CONNECTIONS_MAX, CONNECTIONS_OF_ONE), deadline, keep_alive: false }
    }
}

impl Ports {
    /// Opens the ports.
    pub async fn bind(pages: Pages, config: Config) -> Result<Self, BindError> {
        let site = pages.site.clone();
        let pages = Arc::new(pages);
        let live = site.live.clone();
        let admin = Router::new()
            .route("/", get(index))
            .route("/events", get(page::events).with_state(site))
            .route("/snapshot", get(snapshot))
            .route("/config_dump", get(config_dump))
            .route("/status", get(status))
            .route("/kernel", get(kernel))
            .route("/metrics", get(metrics))
            .route("/connections", get(connections))
            .route("/pods", get(pods))
            .route("/set_aside", get(set_aside))
            .route("/history", get(history))
            .route("/plaintext", get(plaintext))
            .route("/explain", get(explain))
            .route("/explain/policies", post(explain_policies))
            .route("/logging", post(logging))
            .route("/quitquitquit", post(quit))
            .route("/debug/pprof/profile", get(cpu_profile))
            .route("/debug/pprof/heap", get(heap_profile))
            .route("/debug/pprof/heap/profiling", get(heap_profile))
            .layer(middleware::from_fn(local_only))
            .with_state(pages.clone());
        let stats = Router::new()
            .route("/metrics", get(metrics))
            .route("/stats/prometheus", get(metrics))
            .layer(middleware::from_fn_with_state(Arc::<Turns>::default(), in_turn))
            .with_state(pages.clone());
        let ready = Router::new().route("/healthz/ready", get(readiness)).with_state(pages.clone());

        let (any, localhost) = if config.ipv6 {
            (IpAddr::V6(Ipv6Addr::UNSPECIFIED), vec![IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)])
        } else {
            (IpAddr::V4(Ipv4Addr::UNSPECIFIED), vec![IpAddr::V4(Ipv4Addr::LOCALHOST)])
        };
        let mut listeners = Vec::new();
        for ip in localhost {
            let listener = listen(SocketAddr::new(ip, config.admin_port)).await?;
            listeners.push((listener, admin.clone(), PortLimits::local()));
        }
        let stats_listener = listen(SocketAddr::new(any, config.stats_port)).await?;
        listeners.push((stats_listener, stats, PortLimits::open(STATS_DEADLINE)));
        let ready_listener = listen(SocketAddr::new(any, ports::READY)).await?;
        listeners.push((ready_listener, ready, PortLimits::open(READY_DEADLINE)));
        Ok(Self { listeners, pages, live })
    }

    /// Serves all ports until dropped.
    pub async fn serve(self) {
        let serving = Group::default();
        for (listener, router, limits) in self.listeners {
            let pages = self.pages.clone();
            serving.spawn(serve(listener, router, limits, move |peer, own| (pages.client)(peer, own)));
        }
        serving.spawn(async move { self.live.run().await });
        serving.finished().await;
    }
}

/// Serves one port with a limited number of connections, of which no source may take all, and with deadlines. A client
/// that leaves connections open must not use up the daemon's file descriptors or keep others from being served.
/// `through_mesh` gives the client of a connection from one address to the other that came through the mesh.
async fn serve<F>(listener: TcpListener, router: Router, limits: PortLimits, through_mesh: F)
where
    F: Fn(SocketAddr, SocketAddr) -> Option<IpAddr>,
{
    let connections = Group::default();
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::debug!(%error, "cannot accept a connection on an HTTP port; trying again");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let behind = stream.local_addr().ok().and_then(|own| through_mesh(peer, own));
        let client = behind.unwrap_or(peer.ip());
        let Ok(slot) = limits.slots.take(client) else { continue };
        let (router, own) = (router.clone().layer(Extension(Client(client))), page::Connection::default());
        let cut = own.0.clone();
        let service = service_fn(move |mut request: hyper::Request<hyper::body::Incoming>| {
            request.extensions_mut().insert(own.clone());
            router.clone().call(request)
        });
        let PortLimits { deadline, keep_alive, .. } = limits;
        connections.spawn(async move {
            let mut http = hyper::server::conn::http1::Builder::new();
            http.timer(TokioTimer::new()).header_read_timeout(HEAD_DEADLINE).max_buf_size(HEAD_BYTES_MAX);
            let serving = http.half_close(true).keep_alive(keep_alive).serve_connection(TokioIo::new(stream), service);
            // Errors and timeouts are the client's, and need no report.
            tokio::select! {
                _ = tokio::time::timeout(deadline, serving) => {}
                () = cut.cancelled() => {}
            }
            drop(slot);
        });
    }
}

/// The address of a request's client.
#[derive(Clone, Copy, Debug)]
struct Client(IpAddr);

/// Refuses a request of a client that has used up its turns.
async fn in_turn(
    State(turns): State<Arc<Turns>>,
    Extension(Client(client)): Extension<Client>,
    request: Request,
    next: Next,
) -> Response {
    let Err(wait) = turns.take(client) else { return next.run(request).await };
    let seconds = HeaderValue::from(wait.as_secs().max(1));
    let text = "too many scrapes from this address; see Retry-After\n";
    (StatusCode::TOO_MANY_REQUESTS, [(header::RETRY_AFTER, seconds)], text).into_response()
}

async fn listen(address: SocketAddr) -> Result<TcpListener, BindError> {
    TcpListener::bind(address).await.map_err(|source| BindError { address, source })
}

/// Refuses what a web page of somebody else can make a browser send. It cannot read the answers, but its requests would
/// have effects: pictures are made, and the API server is asked with the operator's credentials.
async fn local_only(request: Request, next: Next) -> Response {
    match refusal(request.headers()) {
        None => next.run(request).await,
        Some(why) => (StatusCode::FORBIDDEN, why).into_response(),
    }
}

/// Why a request is refused. An attacker's web page can reach 127.0.0.1 under a name of its own (DNS rebinding), but
/// then the Host is that name. Under the right name its requests have an Origin, or, as for an image, a link or a frame,
/// none; but browsers say in Sec-Fetch-Site where each comes from: from this port's page, from the user, or from
/// elsewhere, where other ports of this machine are elsewhere too. Other programs do not send it.
fn refusal(headers: &HeaderMap) -> Option<&'static str> {
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    if !is_loopback(host) || headers.contains_key(header::ORIGIN) {
        return Some("the admin port answers only requests to localhost, 127.0.0.1 or [::1]\n");
    }
    let is_own = |from: &HeaderValue| from == "same-origin" || from == "none";
    let foreign = !headers.get_all("sec-fetch-site").iter().all(is_own);
    foreign.then_some("links of other pages do not lead here; type the address into a new tab\n")
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

/// The live page for browsers, and a list of the paths for others.
async fn index(State(pages): State<Arc<Pages>>, headers: HeaderMap, RawQuery(query): RawQuery) -> Response {
    match page::is_browser(&headers) {
        true => page::page(&pages.site, &parameters(query.as_deref())).await,
        false => paths::paths().into_response(),
    }
}

/// Makes a page off the runtime, because a page of a large mesh takes a while and nothing else should wait for it.
async fn pretty(pages: Arc<Pages>, pick: fn(&Pages) -> &Page) -> Response {
    let work = move || text_of(&pick(&pages)());
    match run_blocking(work).await {
        Some(text) => json(text),
        None => (StatusCode::INTERNAL_SERVER_ERROR, "the page could not be made; see standard error\n").into_response(),
    }
}

async fn config_dump(State(pages): State<Arc<Pages>>) -> Response {
    pretty(pages, |pages| &pages.config_dump).await
}

async fn status(State(pages): State<Arc<Pages>>) -> Response {
    pretty(pages, |pages| &pages.status).await
}

async fn kernel(State(pages): State<Arc<Pages>>) -> Response {
    pretty(pages, |pages| &pages.kernel).await
}

async fn connections(State(pages): State<Arc<Pages>>, RawQuery(query): RawQuery) -> Response {
    filtered(pages, query, |pages| &pages.connections).await
}

async fn pods(State(pages): State<Arc<Pages>>) -> Response {
    pretty(pages, |pages| &pages.pods).await
}

/// Without spaces, because `culvert dashboard` fetches it again and again.
async fn snapshot(State(pages): State<Arc<Pages>>) -> Response {
    match run_blocking(move || (pages.snapshot)().to_string()).await {
        Some(text) => json(text),
        None => (StatusCode::INTERNAL_SERVER_ERROR, "the page could not be made; see standard error\n").into_response(),
    }
}

async fn set_aside(State(pages): State<Arc<Pages>>) -> Response {
    pretty(pages, |pages| &pages.set_aside).await
}

/// Off the runtime, as other pages are.
async fn history(State(pages): State<Arc<Pages>>, RawQuery(query): RawQuery) -> Response {
    filtered(pages, query, |pages| &pages.history).await
}

async fn plaintext(State(pages): State<Arc<Pages>>, RawQuery(query): RawQuery) -> Response {
    filtered(pages, query, |pages| &pages.plaintext).await
}

/// Makes a page that a query filters, off the runtime.
async fn filtered(pages: Arc<Pages>, query: Option<String>, pick: fn(&Pages) -> &Filtered) -> Response {
    let work = move || pick(&pages)(&parameters(query.as_deref())).map(|page| text_of(&page));
    match run_blocking(work).await {
        Some(Ok(text)) => json(text),
        Some(Err(text)) => (StatusCode::BAD_REQUEST, text + "\n").into_response(),
        None => (StatusCode::INTERNAL_SERVER_ERROR, "the page could not be made; see standard error\n").into_response(),
    }
}

async fn explain(State(pages): State<Arc<Pages>>, RawQuery(query): RawQuery) -> Response {
    pretty_text((pages.explain)(parameters(query.as_deref())).await)
}

/// An answer, or what is wrong with the question.
fn pretty_text(answer: Result<Value, String>) -> Response {
    match answer {
        Ok(answer) => json(text_of(&answer)),
        Err(text) => (StatusCode::BAD_REQUEST, text + "\n").into_response(),
    }
}

/// Off the runtime, because many connections take a while.
async fn explain_policies(State(pages): State<Arc<Pages>>, text: String) -> Response {
    match run_blocking(move || (pages.explain_policies)(&text).map(|answer| text_of(&answer))).await {
        Some(Ok(text)) => json(text),
        Some(Err(text)) => (StatusCode::BAD_REQUEST, text + "\n").into_response(),
        None => (StatusCode::INTERNAL_SERVER_ERROR, "no answer could be made; see standard error\n").into_response(),
    }
}

fn text_of(value: &Value) -> String {
    serde_json::to_string_pretty(value).unwrap_or_else(|error| format!("{{\"error\":\"{error}\"}}"))
}

fn json(text: String) -> Response {
    ([(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))], text + "\n").into_response()
}

/// The decoded parameters of a query string.
pub(crate) fn parameters(query: Option<&str>) -> Query {
    form_urlencoded::parse(query.unwrap_or_default().as_bytes()).into_owned().collect()
}

async fn logging(State(pages): State<Arc<Pages>>, RawQuery(query): RawQuery) -> Response {
    match (pages.logging)(&parameters(query.as_deref())) {
        Ok(text) => (StatusCode::OK, text).into_response(),
        Err(text) => (StatusCode::BAD_REQUEST, text).into_response(),
    }
}

async fn cpu_profile(State(pages): State<Arc<Pages>>, RawQuery(query): RawQuery) -> Response {
    match (pages.cpu_profile)(parameters(query.as_deref())).await {
        Ok(profile) => {
            ([(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"))], profile).into_response()
        }
        Err(text) => (StatusCode::BAD_REQUEST, text).into_response(),
    }
}

async fn heap_profile() -> Response {
    let text = "heap profiles are not supported; see /metrics for memory, and /debug/pprof/profile for CPU profiles\n";
    (StatusCode::INTERNAL_SERVER_ERROR, text).into_response()
}

async fn quit(State(pages): State<Arc<Pages>>) -> &'static str {
    (pages.quit)();
    "shutdown now\n"
}

async fn metrics(State(pages): State<Arc<Pages>>, headers: HeaderMap) -> Response {
    exposed(&pages.metrics, &headers).await
}

/// Metrics in the format that a scraper accepts.
async fn exposed(metrics: &Rendered, headers: &HeaderMap) -> Response {
    let accept = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    let format = Format::accepted(accept);
    match metrics.text(format).await {
        Ok(text) => ([(header::CONTENT_TYPE, format.content_type())], Body::from(text)).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error).into_response(),
    }
}

async fn readiness(State(pages): State<Arc<Pages>>) -> Response {
    ready_or_not(&pages.ready)
}

fn ready_or_not(ready: &Ready) -> Response {
    let pending = ready.pending();
    if pending.is_empty() {
        return (StatusCode::OK, "ready\n").into_response();
    }
    (StatusCode::INTERNAL_SERVER_ERROR, format!("not ready, pending: {}\n", pending.join(", "))).into_response()
}

#[cfg(test)]
mod tests {
    use super::{is_loopback, refusal};
    use axum::http::{HeaderMap, HeaderName};

    #[test]
    fn what_a_page_of_another_site_sends_is_refused() {
        let refused = |headers: &[(&'static str, &'static str)]| {
            let named =
                |(name, value): &(&'static str, &'static str)| (HeaderName::from_static(name), value.parse().unwrap());
            let host = [("host", "127.0.0.1:15000")];
            refusal(&host.iter().chain(headers).map(named).collect::<HeaderMap>()).is_some()
        };
        assert!(!refused(&[]), "curl, istioctl and daemons that are asked by `culvert dashboard`");
        assert!(!refused(&[("sec-fetch-site", "none"), ("sec-fetch-mode", "navigate")]), "the user");
        assert!(!refused(&[("sec-fetch-site", "same-origin")]), "the page of this port");
        for from in ["cross-site", "same-site", "", "None", "of the future"] {
            assert!(refused(&[("sec-fetch-site", from)]), "{from}");
            assert!(refused(&[("sec-fetch-site", from), ("sec-fetch-mode", "navigate")]), "{from}");
        }
        assert!(refused(&[("origin", "http://attacker.example")]));
        assert!(refused(&[("origin", "http://attacker.example"), ("sec-fetch-site", "none")]));
    }

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
