//! Metrics as text.

use crate::task::thread::run_blocking;
use crate::telemetry::exposition::Format;
use axum::body::Bytes;
use parking_lot::Mutex;
use prometheus_client::registry::Registry;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Rendering metrics takes at most one part in this many of the time, however many scrapers there are.
const RENDER_SHARE: u32 = 8;
/// The longest that a scraper waits because of that. Scrapers give up after 10 s by default.
const RENDER_PAUSE_MAX: Duration = Duration::from_secs(2);

/// Metrics as text, rendered once for all requests that arrive at the same time.
pub struct Rendered {
    registry: Arc<Mutex<Registry>>,
    open_metrics: tokio::sync::Mutex<Option<Rendering>>,
    text: tokio::sync::Mutex<Option<Rendering>>,
}

/// One rendered text. All requests share it, so slow readers cost no further memory.
struct Rendering {
    /// When rendering began. The text includes everything that was counted before.
    begun: Instant,
    took: Duration,
    text: Result<Bytes, String>,
}

impl Rendered {
    /// Renders the metrics of a registry.
    pub fn new(registry: Registry) -> Self {
        let registry = Arc::new(Mutex::new(registry));
        Self { registry, open_metrics: tokio::sync::Mutex::default(), text: tokio::sync::Mutex::default() }
    }

    /// A text whose rendering began after this call.
    pub(super) async fn text(&self, format: Format) -> Result<Bytes, String> {
        let asked = Instant::now();
        let last = match format {
            Format::OpenMetrics => &self.open_metrics,
            Format::Text => &self.text,
        };
        let mut last = last.lock().await;
        if let Some(rendering) = last.as_ref().filter(|rendering| rendering.begun >= asked) {
            return rendering.text.clone();
        }
        if let Some(Rendering { begun, took, .. }) = last.as_ref() {
            tokio::time::sleep_until(*begun + (*took * RENDER_SHARE).min(RENDER_PAUSE_MAX)).await;
        }
        let (begun, registry) = (Instant::now(), self.registry.clone());
        let render = move || {
            let registry = registry.lock();
            format.render(&registry).map(Bytes::from).map_err(|error| error.to_string())
        };
        let text = run_blocking(render).await.unwrap_or_else(|| Err("the metrics could not be rendered".into()));
        *last = Some(Rendering { begun, took: begun.elapsed(), text: text.clone() });
        text
    }
}
