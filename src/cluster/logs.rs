//! The log of a daemon's pod, line by line, through the Kubernetes API.

use super::{AskError, ClusterError, Daemon, Daemons};
use crate::telemetry::log::with_causes;
use futures_util::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, LogParams};
use std::time::Duration;

/// The longest line that is read. The rest of a longer one is left out.
const LINE_MAX: u64 = 1 << 20;

/// Which lines of a log are read.
#[derive(Clone, Debug, Default)]
pub struct LogLines {
    /// Whether to wait for further lines.
    pub follow: bool,
    /// How far back; `None`: from the beginning.
    pub since: Option<Duration>,
    /// The last ones only; `None`: all.
    pub tail: Option<u32>,
}

impl Daemons {
    /// Reads the log of a daemon. `take` gets each line, without its end, and says whether to go on. The API has
    /// `deadline` to answer, and for each line if further ones are not waited for.
    pub async fn log(
        &self,
        daemon: &Daemon,
        lines: &LogLines,
        deadline: Duration,
        mut take: impl FnMut(&str) -> bool,
    ) -> Result<(), ClusterError> {
        let Some(client) = &self.client else {
            let text =
                "the log is in the Kubernetes API; on the node itself read it with the container runtime or journalctl";
            return Err(ClusterError::NotFound(text.to_owned()));
        };
        if daemon.pod.is_empty() {
            return Err(ClusterError::NotFound(daemon.down.clone().unwrap_or_default()));
        }
        let pods: Api<Pod> = Api::namespaced(client.clone(), &daemon.namespace);
        let parameters = LogParams {
            follow: lines.follow,
            since_seconds: lines.since.map(|since| i64::try_from(since.as_secs()).unwrap_or(i64::MAX).max(1)),
            tail_lines: lines.tail.map(i64::from),
            // Injected sidecars and init containers do not matter: the daemon is the only container of its pod.
            ..LogParams::default()
        };
        let api = |text: String| ClusterError::Api(format!("the log of {}/{}: {text}", daemon.namespace, daemon.pod));
        let late = || api(AskError::Late(deadline).to_string());
        let stream = tokio::time::timeout(deadline, pods.log_stream(&daemon.pod, &parameters)).await;
        let stream = stream.map_err(|_| late())?.map_err(|error| api(with_causes(&error)))?;
        let mut stream = std::pin::pin!(stream);
        let mut line = Vec::new();
        loop {
            let read = read_line(&mut stream, &mut line);
            let read = match lines.follow {
                true => read.await,
                false => tokio::time::timeout(deadline, read).await.map_err(|_| late())?,
            };
            if !read.map_err(|error| api(error.to_string()))? {
                break;
            }
            if !take(String::from_utf8_lossy(&line).trim_end_matches(['\n', '\r'])) {
                break;
            }
        }
        Ok(())
    }
}

/// Reads one line into `line`, up to its longest length. Returns whether there was one.
async fn read_line(stream: &mut (impl AsyncBufRead + Unpin), line: &mut Vec<u8>) -> std::io::Result<bool> {
    line.clear();
    (&mut *stream).take(LINE_MAX).read_until(b'\n', line).await?;
    if line.is_empty() {
        return Ok(false);
    }
    let mut rest = Vec::new();
    while !line.ends_with(b"\n") && !rest.ends_with(b"\n") {
        rest.clear();
        (&mut *stream).take(LINE_MAX).read_until(b'\n', &mut rest).await?;
        if rest.is_empty() {
            break;
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::tests::with_api;

    #[tokio::test]
    async fn lines_are_read_to_the_last_one_and_long_ones_are_cut() {
        let long = "x".repeat(3 << 20);
        let text = format!("one\n{long}\nthree");
        let mut stream = futures_util::io::Cursor::new(text.into_bytes());
        let (mut line, mut lengths) = (Vec::new(), Vec::new());
        while read_line(&mut stream, &mut line).await.unwrap() {
            lengths.push(line.len());
        }
        assert_eq!(lengths, [4, 1 << 20, 5]);
    }

    #[tokio::test(start_paused = true)]
    async fn an_api_that_says_nothing_is_late() {
        let no_answer = axum::Router::new().fallback(std::future::pending::<()>);
        let no_line = axum::Router::new().fallback(|| async {
            axum::body::Body::from_stream(futures_util::stream::pending::<Result<bytes::Bytes, std::io::Error>>())
        });
        let daemon = Daemon { namespace: "a".into(), pod: "b".into(), ..Daemon::default() };
        for api in [no_answer, no_line] {
            let mut daemons = with_api(|_| None);
            daemons.client = Some(kube::Client::new(api, "default"));
            let deadline = Duration::from_secs(5);
            let lines = LogLines::default();
            let read = tokio::time::timeout(2 * deadline, daemons.log(&daemon, &lines, deadline, |_| true)).await;
            let error = read.expect("it ends").unwrap_err().to_string();
            assert_eq!(error, "the Kubernetes API: the log of a/b: no answer within 5s");
        }
    }
}
