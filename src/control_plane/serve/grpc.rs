//! gRPC over HTTP/2, as far as two calls need it: messages in the body of a request, and an answer that ends with a
//! status. Answers are shared bytes that are never copied.
//!
//! Large requests (a client lists everything that it holds) share one budget of memory, so that a thousand clients that
//! come back at once are read one after the other.

use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Response, header};
use hyper::body::{Body, Frame, Incoming};
use std::convert::Infallible;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::timeout;
use tonic::Status;

/// Largest request for facts. A client that holds 200,000 resources lists them in about 20 MiB.
pub const FACTS_BYTES_MAX: usize = 32 << 20;
/// Requests up to this size are read without asking for memory.
const SMALL: usize = 64 << 10;
/// The memory for larger ones, in units of [`SMALL`].
pub const BUDGET: usize = (128 << 20) / SMALL;
/// The memory that one caller may have: the largest request, or a few smaller ones, as a client makes one for each type.
pub const OF_ONE: usize = FACTS_BYTES_MAX / SMALL;
/// How long the rest of a message may be silent.
const SILENT: Duration = Duration::from_secs(10);
/// How long one message may take from its first byte to its last, with the wait for memory.
const MESSAGE_DEADLINE: Duration = Duration::from_secs(50);
/// Answers up to this size are sent in one piece.
const PIECE: usize = 16 << 10;

/// A message, and the memory that was set aside for it.
#[derive(Debug)]
pub struct Message {
    /// Its bytes.
    pub bytes: Bytes,
    /// The memory is free for others when this is dropped.
    pub memory: Option<Memory>,
}

/// Memory that is set aside for a large message: of all, and of its caller.
#[derive(Debug)]
pub struct Memory {
    _units: OwnedSemaphorePermit,
    _of_caller: Option<OwnedSemaphorePermit>,
}

/// The messages of a request.
#[derive(Debug)]
pub struct Messages {
    body: Incoming,
    buffer: BytesMut,
    max: usize,
    budget: Arc<Semaphore>,
    /// The memory of the caller for large messages.
    of_caller: Option<Arc<Semaphore>>,
}

impl Messages {
    /// The messages in this body, each of at most `max` bytes.
    pub fn new(body: Incoming, max: usize, budget: Arc<Semaphore>) -> Self {
        Self { body, buffer: BytesMut::new(), max, budget, of_caller: None }
    }

    /// The same, where large messages need memory of their caller too.
    pub fn of_caller(self, memory: Arc<Semaphore>) -> Self {
        Self { of_caller: Some(memory), ..self }
    }

    /// The next message; `None` at the end. It may not be dropped before it is done.
    pub async fn next(&mut self) -> Result<Option<Message>, Status> {
        if self.buffer.is_empty() && !self.read_more().await? {
            return Ok(None);
        }
        match timeout(MESSAGE_DEADLINE, self.message()).await {
            Ok(message) => message.map(Some),
            Err(_) => Err(Status::deadline_exceeded("a message took too long to arrive")),
        }
    }

    async fn message(&mut self) -> Result<Message, Status> {
        let (compressed, length) = loop {
            if let Some((&[compressed, a, b, c, d], _)) = self.buffer.split_first_chunk::<5>() {
                break (compressed, u32::from_be_bytes([a, b, c, d]));
            }
            self.need_more().await?;
        };
        if compressed != 0 {
            return Err(Status::unimplemented("compressed messages are not read here"));
        }
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        if length > self.max {
            // In the words by which a client knows that it should ask without the versions of what it holds.
            let text = format!("grpc: received message larger than max ({length} vs. {})", self.max);
            return Err(Status::resource_exhausted(text));
        }
        let memory = match u32::try_from(length.div_ceil(SMALL)) {
            Ok(units) if units > 1 => self.memory(units).await,
            _ => None,
        };
        while self.buffer.len() < 5 + length {
            self.need_more().await?;
        }
        let mut message = self.buffer.split_to(5 + length);
        let bytes = message.split_off(5).freeze();
        if self.buffer.is_empty() {
            self.buffer = BytesMut::new();
        }
        Ok(Message { bytes, memory })
    }

    /// Waits for memory, which is never refused.
    async fn memory(&self, units: u32) -> Option<Memory> {
        let of_caller = match &self.of_caller {
            Some(memory) => Some(memory.clone().acquire_many_owned(units).await.ok()?),
            None => None,
        };
        Some(Memory { _of_caller: of_caller, _units: self.budget.clone().acquire_many_owned(units).await.ok()? })
    }

    async fn need_more(&mut self) -> Result<(), Status> {
        // Whose connection is cut must not keep memory for long: it comes back and needs it.
        let silent = |_| Status::deadline_exceeded("a message stopped in its middle");
        match timeout(SILENT, self.read_more()).await.map_err(silent)?? {
            true => Ok(()),
            false => Err(Status::invalid_argument("the request ends within a message")),
        }
    }

    /// Reads what comes next. Returns false at the end.
    async fn read_more(&mut self) -> Result<bool, Status> {
        loop {
            let Some(frame) = poll_fn(|cx| Pin::new(&mut self.body).poll_frame(cx)).await else { return Ok(false) };
            let frame = frame.map_err(|error| Status::cancelled(error.to_string()))?;
            if let Ok(data) = frame.into_data()
                && !data.is_empty()
            {
                self.buffer.extend_from_slice(&data);
                return Ok(true);
            }
        }
    }
}

/// What follows next in the body of an answer.
#[derive(Debug)]
enum Next {
    Data(Bytes),
    End(HeaderMap),
}

/// The body of an answer.
#[derive(Debug)]
pub struct Answer(Source);

#[derive(Debug)]
enum Source {
    Stream(mpsc::Receiver<Next>),
    Whole(std::vec::IntoIter<Next>),
}

/// Sends the messages of an answer. Dropped without [`Sender::end`], it breaks the call.
#[derive(Debug)]
pub struct Sender(mpsc::Sender<Next>);

/// The client is gone.
#[derive(Debug)]
pub struct Gone;

impl Answer {
    /// An answer of many messages, of which `pieces` may wait to be read.
    pub fn stream(pieces: usize) -> (Sender, Response<Self>) {
        let (send, receive) = mpsc::channel(pieces);
        (Sender(send), respond(Self(Source::Stream(receive))))
    }

    /// An answer of one message.
    pub fn message(message: &impl prost::Message) -> Response<Self> {
        let pieces = framed(vec![message.encode_to_vec().into()]).into_iter().map(Next::Data);
        let all: Vec<Next> = pieces.chain([Next::End(trailers(&Status::ok("")))]).collect();
        respond(Self(Source::Whole(all.into_iter())))
    }

    /// An answer that is only a status.
    pub fn status(status: &Status) -> Response<Self> {
        let mut response = respond(Self(Source::Whole(Vec::new().into_iter())));
        response.headers_mut().extend(trailers(status));
        response
    }

    /// An answer that is only an HTTP status, for what is not gRPC.
    pub fn http(status: http::StatusCode) -> Response<Self> {
        let mut response = Response::new(Self(Source::Whole(Vec::new().into_iter())));
        *response.status_mut() = status;
        response
    }
}

impl Sender {
    /// Sends a message that comes in pieces. Waits while the client does not read.
    pub async fn send(&self, message: Vec<Bytes>) -> Result<(), Gone> {
        for piece in framed(message) {
            self.0.send(Next::Data(piece)).await.map_err(|_| Gone)?;
        }
        Ok(())
    }

    /// Ends the answer with a status, if the client reads.
    pub fn end(self, status: &Status) {
        // Where there is no room the client has not read for long, and the call is broken instead.
        let _ = self.0.try_send(Next::End(trailers(status)));
    }

    /// Completes when the client is gone.
    pub async fn gone(&self) {
        self.0.closed().await;
    }
}

fn respond(body: Answer) -> Response<Answer> {
    let mut response = Response::new(body);
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    response
}

fn trailers(status: &Status) -> HeaderMap {
    let mut map = HeaderMap::new();
    // It fails only for texts that cannot be headers, and tonic escapes them.
    if status.add_header(&mut map).is_err() {
        map.insert("grpc-status", HeaderValue::from(status.code() as i32));
    }
    map
}

/// Puts the length before a message. A short message becomes one piece.
fn framed(message: Vec<Bytes>) -> Vec<Bytes> {
    let length: usize = message.iter().map(Bytes::len).sum();
    let mut start = BytesMut::with_capacity(5 + if length <= PIECE { length } else { 0 });
    start.put_u8(0);
    start.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    if length <= PIECE {
        message.iter().for_each(|piece| start.put_slice(piece));
        return vec![start.freeze()];
    }
    let pieces = message.into_iter().filter(|piece| !piece.is_empty());
    std::iter::once(start.freeze()).chain(pieces).collect()
}

/// The driver of an answer has given it up.
#[derive(Debug, thiserror::Error)]
#[error("the answer was given up")]
pub struct GivenUp;

impl Body for Answer {
    type Data = Bytes;
    type Error = GivenUp;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, GivenUp>>> {
        let next = match &mut self.0 {
            Source::Whole(pieces) => pieces.next(),
            Source::Stream(receive) => match receive.poll_recv(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(None) => return Poll::Ready(Some(Err(GivenUp))),
                Poll::Ready(next) => next,
            },
        };
        Poll::Ready(match next {
            Some(Next::Data(bytes)) => Some(Ok(Frame::data(bytes))),
            Some(Next::End(trailers)) => {
                self.0 = Source::Whole(Vec::new().into_iter());
                Some(Ok(Frame::trailers(trailers)))
            }
            None => None,
        })
    }

    fn is_end_stream(&self) -> bool {
        matches!(&self.0, Source::Whole(pieces) if pieces.as_slice().is_empty())
    }
}

/// Never fails.
pub type Answered = Result<Response<Answer>, Infallible>;
