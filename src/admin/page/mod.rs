//! The live page: one self-contained HTML page about the nodes, and its changes as server-sent events. It needs nothing
//! from outside, keeps nothing, and changes nothing.

mod html;
mod live;
pub mod notes;
mod parts;
mod picture;

#[cfg(test)]
mod tests;

pub use live::{Feed, Live, Told};

use super::{Query, parameters};
use aws_lc_rs::digest::{SHA256, digest};
use axum::body::{Body, Bytes};
use axum::extract::{Extension, RawQuery, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use std::convert::Infallible;
use std::sync::{Arc, LazyLock};
use tokio_util::sync::CancellationToken;

const STYLE: &str = include_str!("page.css");
const SCRIPTS: [&str; 3] = [include_str!("feed.js"), include_str!("tables.js"), include_str!("graph.js")];

/// The script of the page.
static SCRIPT: LazyLock<String> = LazyLock::new(|| SCRIPTS.concat());

/// Nothing may be loaded or run but what is in the page, by its hash, and only this port may be asked.
static POLICY: LazyLock<HeaderValue> = LazyLock::new(|| {
    let hash = |text: &str| format!("'sha256-{}'", BASE64.encode(digest(&SHA256, text.as_bytes())));
    let policy = format!(
        "default-src 'none'; style-src {}; script-src {}; connect-src 'self'; img-src data:; form-action 'self'; \
         base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'",
        hash(STYLE),
        hash(&SCRIPT)
    );
    HeaderValue::try_from(policy).unwrap_or_else(|_| HeaderValue::from_static("default-src 'none'"))
});

/// Cancelled when the connection of a request has to end.
#[derive(Clone, Debug, Default)]
pub struct Connection(pub CancellationToken);

/// The live page of one port.
#[derive(Clone, Debug)]
pub struct Site {
    /// What it shows.
    pub live: Arc<Live>,
    /// The text in the window's title.
    pub title: Arc<str>,
    /// Paths of the other pages of the port.
    pub links: &'static [&'static str],
}

/// Whether a client can show HTML. Programs that fetch the list of pages say `*/*`.
pub fn is_browser(headers: &HeaderMap) -> bool {
    let accept = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    accept.flat_map(|value| value.split(',')).any(|kind| kind.trim().starts_with("text/html"))
}

/// `/` for browsers.
pub async fn page(site: &Site, query: &Query) -> Response {
    let (picture, asked, site) = (site.live.picture().await, html::Asked::of(query), site.clone());
    let work = move || html::page(&picture, &asked, (&site.title, site.links), (STYLE, &SCRIPT));
    match super::run_blocking(work).await {
        Some(text) => sealed((HeaderValue::from_static("text/html; charset=utf-8"), Body::from(text))),
        None => (StatusCode::INTERNAL_SERVER_ERROR, "the page could not be made; see standard error\n").into_response(),
    }
}

/// The same for a port that has only this page.
pub async fn page_alone(State(site): State<Site>, RawQuery(query): RawQuery) -> Response {
    page(&site, &parameters(query.as_deref())).await
}

/// `/events`: the whole picture, then its changes.
pub async fn events(State(site): State<Site>, connection: Option<Extension<Connection>>) -> Response {
    let cut = connection.map(|Extension(Connection(cut))| cut).unwrap_or_default();
    match site.live.listen(cut).await {
        Ok(events) => {
            let stream = futures_util::stream::unfold(events, |mut events| async move {
                let event = events.recv().await?;
                Some((Ok::<Bytes, Infallible>(event), events))
            });
            sealed((HeaderValue::from_static("text/event-stream"), Body::from_stream(stream)))
        }
        Err(full) => (StatusCode::SERVICE_UNAVAILABLE, format!("{full}\n")).into_response(),
    }
}

/// An answer that browsers must neither interpret otherwise, nor frame, nor keep, nor give to other sites.
fn sealed((kind, body): (HeaderValue, Body)) -> Response {
    let fixed = |name: &'static str, value| (HeaderName::from_static(name), HeaderValue::from_static(value));
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, kind);
    headers.insert(header::CONTENT_SECURITY_POLICY, POLICY.clone());
    headers.extend([
        fixed("x-content-type-options", "nosniff"),
        fixed("x-frame-options", "DENY"),
        fixed("cache-control", "no-store"),
        fixed("referrer-policy", "no-referrer"),
        fixed("cross-origin-resource-policy", "same-origin"),
        fixed("cross-origin-opener-policy", "same-origin"),
    ]);
    response
}
