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
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::watch;

/// A connection to one admin port.
pub(super) struct Line {
    sender: SendRequest<Body>,
    /// Why it has ended, once it has.
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
        Self::over(stream, std::future::pending(), None, tasks).await
    }

    /// Takes over a port-forward.
    pub(super) async fn of_forwarder(mut forwarder: Portforwarder, port: u16, tasks: &Group) -> Result<Self, AskError> {
        let (stream, error) = (forwarder.take_stream(port), forwarder.take_error(port));
        let (Some(stream), Some(error)) = (stream, error) else {
            return Err(AskError::Unreachable("port-forward: the port is not there".to_owned()));
        };
        Self::over(stream, error, Some(Forwarder(forwarder)), tasks).await
    }

    /// Speaks HTTP over a stream. `error` completes with what the other end of a port-forward says about its failure.
    async fn over(
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
        error: impl Future<Output = Option<String>> + Send + 'static,
        forwarder: Option<Forwarder>,
        tasks: &Group,
    ) -> Result<Self, AskError> {
        let made = http1::handshake(TokioIo::new(stream)).await;
        let (sender, connection) = made.map_err(|error| AskError::Unreachable(with_causes(&error)))?;
        let (end, ended) = watch::channel(None);
        let is_forward = forwarder.is_some();
        tasks.spawn(async move {
            let mut error = std::pin::pin!(error);
            let mut connection = std::pin::pin!(connection);
            let mut said = None;
            let broken = tokio::select! {
                result = &mut connection => result.err().map(|error| with_causes(&error)),
                text = &mut error => {
                    said = text;
                    // Without a text the port-forward is at its end too.
                    None
                }
            };
            if said.is_none() && is_forward && broken.is_some() {
                said = error.await;
            }
            let said = said.map(|text| format!("port-forward: {}", text.trim()));
            let why = said.or(broken).unwrap_or_else(|| "the connection was closed".to_owned());
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
        match self.ended.wait_for(Option::is_some).await {
            Ok(why) => why.clone().unwrap_or(otherwise),
            Err(_) => otherwise,
        }
    }
}
