//! A connection to one admin port: HTTP/1.1 over a port-forward, or over TCP on this machine.

use super::question::{Answer, AskError, Question};
use crate::task::Group;
use crate::telemetry::log::with_causes;
use axum::body::Body;
use http::{Request, header};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use kube::api::Portforwarder;
use std::future::Future;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::watch;

/// How long the other end of a port-forward may take to say why a stream has ended.
const SAYS: Duration = Duration::from_millis(200);

/// How long a connection may take to end after a question has failed on it.
const ENDS: Duration = Duration::from_millis(400);

/// A connection to one admin port.
pub(super) struct Line {
    sender: SendRequest<Body>,
    /// Why it has ended, once it has; empty where only the question that was asked knows it.
    ended: watch::Receiver<Option<String>>,
    /// Keeps the port-forward open.
    _forwarder: Option<Forwarder>,
}

/// A port-forward, which ends when this is dropped.
struct Forwarder(Portforwarder);

impl Drop for Forwarder {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Line {
    /// Connects to an admin port of this machine.
    pub(super) async fn connect(address: SocketAddr, tasks: &Group) -> Result<Self, AskError> {
        let stream = TcpStream::connect(address).await;
        let stream = stream.map_err(|error| AskError::Unreachable(format!("{address}: {error}")))?;
        Self::over(stream, None::<std::future::Pending<_>>, None, tasks).await
    }

    /// Takes over a port-forward.
    pub(super) async fn of_forwarder(mut forwarder: Portforwarder, port: u16, tasks: &Group) -> Result<Self, AskError> {
        let (stream, error) = (forwarder.take_stream(port), forwarder.take_error(port));
        let (Some(stream), Some(error)) = (stream, error) else {
            return Err(AskError::Unreachable("port-forward: the port is not there".to_owned()));
        };
        Self::over(stream, Some(error), Some(Forwarder(forwarder)), tasks).await
    }

    /// Speaks HTTP over a stream. `error` of a port-forward completes with what its other end says about a
    /// failure.
    async fn over(
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
        error: Option<impl Future<Output = Option<String>> + Send + 'static>,
        forwarder: Option<Forwarder>,
        tasks: &Group,
    ) -> Result<Self, AskError> {
        let made = http1::handshake(TokioIo::new(stream)).await;
        let (sender, connection) = made.map_err(|error| AskError::Unreachable(with_causes(&error)))?;
        let (end, ended) = watch::channel(None);
        tasks.spawn(async move {
            let (mut error, mut connection) = (Box::pin(or_never(error)), Box::pin(connection));
            let (said, broken) = tokio::select! {
                // Without a text the port-forward is at its end too.
                text = &mut error => (text, None),
                result = &mut connection => {
                    // The reason may come after the end of the stream, or never, as the forward is still held.
                    drop(connection);
                    let said = tokio::time::timeout(SAYS, error).await.ok().flatten();
                    (said, result.err().map(|error| with_causes(&error)))
                }
            };
            let said = said.map(|text| format!("port-forward: {}", text.trim()));
            let why = said.or(broken).unwrap_or_default();
            // Nobody asks any more.
            let _ = end.send(Some(why));
        });
        Ok(Self { sender, ended, _forwarder: forwarder })
    }

    /// Whether a further question can be asked.
    pub(super) async fn is_open(&mut self) -> bool {
        self.ended.borrow().is_none() && self.sender.ready().await.is_ok()
    }

    /// Asks one question and reads the answer to its end.
    pub(super) async fn ask(&mut self, question: &Question) -> Result<Answer, AskError> {
        let request = Request::builder()
            .method(question.method.clone())
            .uri(&question.path)
            // The admin port answers only requests that name a loopback host.
            .header(header::HOST, "localhost")
            .body(Body::from(question.body.clone()))
            .map_err(|error| AskError::Unreachable(error.to_string()))?;
        let response = match self.sender.send_request(request).await {
            Ok(response) => response,
            Err(error) => return Err(AskError::Unreachable(self.why(with_causes(&error)).await)),
        };
        let status = response.status().as_u16();
        match axum::body::to_bytes(Body::new(response.into_body()), question.max).await {
            Ok(body) => Ok(Answer { status, body }),
            Err(error) => {
                let text = with_causes(&error);
                match text.contains("length limit") {
                    true => Err(AskError::TooLong(question.max)),
                    false => Err(AskError::Unreachable(self.why(text).await)),
                }
            }
        }
    }

    /// Why the connection has ended, as its other end says it, or `otherwise`.
    async fn why(&mut self, otherwise: String) -> String {
        match tokio::time::timeout(ENDS, self.ended.wait_for(Option::is_some)).await {
            Ok(Ok(why)) => why.clone().filter(|why| !why.is_empty()).unwrap_or(otherwise),
            _ => otherwise,
        }
    }
}

/// What a future says, or nothing ever where there is none.
async fn or_never<T>(future: Option<impl Future<Output = T>>) -> T {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    async fn asked(error: impl Future<Output = Option<String>> + Send + 'static) -> String {
        let tasks = Group::default();
        let (near, mut far) = tokio::io::duplex(1024);
        let mut line = Line::over(near, Some(error), None, &tasks).await.unwrap();
        let question = Question::get("/status", Duration::from_secs(5));
        let other_end = async {
            far.read_u8().await.unwrap();
            far.write_all(b"this is not it\r\n\r\n").await.unwrap();
        };
        let (asked, ()) = tokio::join!(tokio::time::timeout(question.deadline, line.ask(&question)), other_end);
        asked.expect("it is late").unwrap_err().to_string()
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_breaks_is_told_also_if_the_other_end_of_the_forward_says_nothing() {
        let broken = asked(std::future::pending()).await;
        assert!(broken.contains("HTTP"), "{broken}");
        let later = async {
            tokio::time::sleep(SAYS / 2).await;
            Some("container not running".to_owned())
        };
        assert_eq!(asked(later).await, "port-forward: container not running");
    }
}
