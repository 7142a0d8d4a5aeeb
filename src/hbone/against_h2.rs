//! This codec against the h2 crate: each reads what the other one writes.

use super::codec::fields::{RequestHead, ResponseHead};
use super::codec::frame::{self, ErrorCode, PREFACE, Part};
use super::codec::hpack::Decoder;
use super::codec::reader::Reader;
use super::request::{Authority, ConnectRequest, encode_response};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response};
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

type Field = (Vec<u8>, Vec<u8>);

/// The other side of an h2 connection.
struct Wire {
    io: DuplexStream,
    reader: Reader,
    input: Vec<u8>,
    at: usize,
}

impl Wire {
    async fn new(mut io: DuplexStream, server: bool) -> Self {
        let mut out = if server { Vec::new() } else { PREFACE.to_vec() };
        frame::settings(&[(frame::MAX_HEADER_LIST_SIZE, 1 << 16)], &mut out);
        io.write_all(&out).await.unwrap();
        Self { io, reader: Reader::new(server, 1 << 14, 1 << 17), input: Vec::new(), at: 0 }
    }

    /// The next part, and the bytes that it refers to. Acknowledges settings.
    async fn next(&mut self) -> (Part, Vec<u8>) {
        loop {
            let rest = &self.input[self.at..];
            let (used, part) = self.reader.next(rest).unwrap();
            let bytes = rest[..used].to_vec();
            self.at += used;
            match part {
                Some(Part::Settings(_)) => {
                    let mut out = Vec::new();
                    frame::settings_ack(&mut out);
                    self.io.write_all(&out).await.unwrap();
                }
                Some(Part::SettingsAck | Part::WindowUpdate { .. }) => {}
                Some(part) => return (part, bytes),
                None => {
                    self.input.clear();
                    self.at = 0;
                    assert!(self.io.read_buf(&mut self.input).await.unwrap() > 0, "the connection ended");
                }
            }
        }
    }

    async fn headers(&mut self) -> (u32, Vec<u8>) {
        match self.next().await {
            (Part::Headers { stream, block, .. }, _) => (stream, block),
            other => panic!("{other:?}"),
        }
    }
}

fn run<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
}

fn map(fields: &[Field]) -> HeaderMap {
    let mut map = HeaderMap::new();
    for (name, value) in fields {
        map.append(HeaderName::from_bytes(name).unwrap(), HeaderValue::from_bytes(value).unwrap());
    }
    map
}

fn request(headers: HeaderMap) -> Request<()> {
    let mut request = Request::builder().method(Method::CONNECT).uri("10.0.0.1:80").body(()).unwrap();
    *request.headers_mut() = headers;
    request
}

/// Opens a stream for each of these requests with h2, and decodes what it writes.
async fn sent_by_h2(requests: Vec<HeaderMap>, decoder: &mut Decoder) -> Vec<Vec<Field>> {
    let (ours, theirs) = duplex(1 << 20);
    let (client, mut wire) = tokio::join!(
        h2::client::Builder::new().max_send_buffer_size(1 << 20).handshake::<_, Bytes>(theirs),
        Wire::new(ours, true)
    );
    let (mut client, connection) = client.unwrap();
    let work = async {
        let (mut all, mut streams) = (Vec::new(), Vec::new());
        for headers in requests {
            client = client.ready().await.unwrap();
            streams.push(client.send_request(request(headers), false).unwrap());
            let (_, block) = wire.headers().await;
            let mut fields = Vec::new();
            let whole =
                decoder.decode(&block, 1 << 20, &mut |name, value| fields.push((name.to_vec(), value.to_vec())));
            assert_eq!(whole, Ok(true));
            all.push(fields);
        }
        all
    };
    tokio::select! {
        all = work => all,
        ended = connection => panic!("{ended:?}"),
    }
}

/// Fields as a client might send them: names of the static table, names that come again, and names that are new.
fn fields() -> impl Strategy<Value = Vec<Field>> {
    let name = prop_oneof!["accept|cookie|user-agent|via|authorization", "x-[a-c]{1}", "[a-z][a-z0-9-]{0,30}"];
    let name = name.prop_filter("h2 treats it on its own", |name| {
        !["connection", "keep-alive", "upgrade", "te", "content-length"].contains(&&name[..])
    });
    let value = prop_oneof![
        "[a-c]{0,3}".prop_map(String::into_bytes),
        "[ -~]{0,60}".prop_map(|text| text.trim().as_bytes().to_vec()),
        prop::collection::vec(0x80..=0xff_u8, 0..40),
        Just(vec![b'v'; 900]),
    ];
    prop::collection::vec((name.prop_map(String::into_bytes), value), 0..30)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn header_blocks_of_h2_are_decoded(requests in prop::collection::vec(fields(), 1..8)) {
        let maps: Vec<HeaderMap> = requests.iter().map(|fields| map(fields)).collect();
        let mut decoder = Decoder::new();
        let decoded = run(sent_by_h2(maps.clone(), &mut decoder));
        for (fields, map) in decoded.into_iter().zip(maps) {
            let pseudo = [(&b":method"[..], &b"CONNECT"[..]), (b":authority", b"10.0.0.1:80")];
            let expected = pseudo.into_iter().chain(map.iter().map(|(name, value)| (name.as_str().as_bytes(), value.as_bytes())));
            prop_assert!(fields.iter().map(|(name, value)| (&name[..], &value[..])).eq(expected), "{:?}", fields);
        }
    }
}

#[test]
fn h2_uses_the_dynamic_table_and_huffman_code() {
    let headers = map(&[(b"x-long-name".to_vec(), b"some value".to_vec())]);
    let mut decoder = Decoder::new();
    run(sent_by_h2(vec![headers.clone(), headers], &mut decoder));
    assert!(decoder.size() > 0, "or the tests above show little");
}

#[test]
fn an_h2_server_takes_our_request_and_we_take_its_answer() {
    run(async {
        let (ours, theirs) = duplex(1 << 20);
        let sent = ConnectRequest {
            authority: Authority::Host("web.a.svc".into(), 80),
            baggage: Some("k8s.namespace.name=a".into()),
            forwarded: Some(format!("for=\"10.0.0.2:1234\";host={}", "h".repeat(3000))),
            traceparent: Some("00-1-2-03".into()),
            network: Some("net-1".into()),
        };
        let mut got = None;
        let server = async {
            let mut connection = h2::server::handshake(theirs).await.unwrap();
            let (request, mut respond) = connection.accept().await.unwrap().unwrap();
            let response = Response::builder().header("baggage", "k8s.pod.name=b").body(()).unwrap();
            let mut stream = respond.send_response(response, false).unwrap();
            stream.send_data(Bytes::from_static(b"hello"), false).unwrap();
            let mut trailers = HeaderMap::new();
            trailers.insert("x-a", HeaderValue::from_static("b"));
            stream.send_trailers(trailers).unwrap();
            got = Some(request);
            // Goes on until the client is done.
            assert!(connection.accept().await.is_none_or(|end| end.is_err()));
            std::future::pending::<()>().await;
        };
        let client = async {
            let mut wire = Wire::new(ours, false).await;
            let (mut block, mut out) = (Vec::new(), Vec::new());
            sent.encode(&mut block);
            // In many pieces, so that h2 also reads our CONTINUATION frames.
            frame::headers(1, &block, true, 800, &mut out);
            wire.io.write_all(&out).await.unwrap();
            let (mut decoder, mut seen, mut data) = (Decoder::new(), Vec::new(), Vec::new());
            loop {
                match wire.next().await {
                    (Part::Headers { stream: 1, block, end_stream, .. }, _) => {
                        let mut head = ResponseHead::default();
                        let mut baggage = None;
                        let mut take = |name: &[u8], value: &[u8]| {
                            head.field(name, value);
                            if name == b"baggage" {
                                baggage = Some(String::from_utf8(value.to_vec()).unwrap());
                            }
                        };
                        decoder.decode(&block, 4096, &mut take).unwrap();
                        let status = head.check().ok();
                        seen.push((status, baggage, end_stream));
                        if end_stream {
                            return (seen, data);
                        }
                    }
                    (Part::Data { range, .. }, bytes) => data.extend_from_slice(&bytes[range]),
                    (Part::DataHead { .. }, _) => {}
                    other => panic!("{other:?}"),
                }
            }
        };
        let (seen, data) = tokio::select! {
            seen = client => seen,
            () = server => panic!("never ends"),
        };
        let request = got.unwrap();
        assert_eq!(request.method(), Method::CONNECT);
        assert_eq!(request.uri().authority().unwrap().as_str(), "web.a.svc:80");
        let value = |name: &str| request.headers().get(name).map(|value| value.to_str().unwrap().to_owned());
        assert_eq!(request.headers().len(), 4);
        assert_eq!(value("baggage"), sent.baggage);
        assert_eq!(value("forwarded"), sent.forwarded);
        assert_eq!(value("traceparent"), sent.traceparent);
        assert_eq!(value("x-forwarded-network"), sent.network);
        // The trailers have no status.
        assert_eq!(seen, [(Some(200), Some("k8s.pod.name=b".into()), false), (None, None, true)]);
        assert_eq!(data, b"hello");
    });
}

#[test]
fn an_h2_client_takes_our_answer_and_we_take_its_request() {
    run(async {
        let (ours, theirs) = duplex(1 << 20);
        let (client, mut wire) = tokio::join!(h2::client::handshake(theirs), Wire::new(ours, true));
        let (mut client, connection) = client.unwrap();
        let headers = map(&[(b"baggage".to_vec(), b"a=b".to_vec()), (b"x-other".to_vec(), b"c".to_vec())]);
        let ask = async {
            let (accepted, mut stream) = client.send_request(request(headers.clone()), false).unwrap();
            stream.send_data(Bytes::from_static(b"hello"), true).unwrap();
            let accepted = accepted.await.unwrap();
            assert_eq!((accepted.status().as_u16(), accepted.headers()["baggage"].as_bytes()), (200, &b"c=d"[..]));
            let (refused, _) = client.send_request(request(headers), true).unwrap();
            let refused = refused.await.unwrap();
            assert_eq!((refused.status().as_u16(), refused.headers().len()), (503, 0));
            let (reset, _) = client.send_request(request(HeaderMap::new()), true).unwrap();
            assert_eq!(reset.await.unwrap_err().reason(), Some(h2::Reason::REFUSED_STREAM));
        };
        let answer = async {
            let (mut decoder, mut requests, mut data) = (Decoder::new(), Vec::new(), Vec::new());
            loop {
                let mut out = Vec::new();
                match wire.next().await {
                    (Part::Headers { stream, block, .. }, _) => {
                        let mut head = RequestHead::default();
                        decoder.decode(&block, 4096, &mut |name, value| head.field(name, value)).unwrap();
                        assert_eq!(head.check(), Ok(()));
                        requests.push(ConnectRequest::from_head(head).unwrap());
                        let mut block = Vec::new();
                        match stream {
                            1 => encode_response(200, Some("c=d"), &mut block),
                            3 => encode_response(503, None, &mut block),
                            _ => frame::rst_stream(stream, ErrorCode::REFUSED_STREAM, &mut out),
                        }
                        if !block.is_empty() {
                            frame::headers(stream, &block, stream == 3, 1 << 14, &mut out);
                        }
                        wire.io.write_all(&out).await.unwrap();
                        if stream == 5 {
                            return (requests, data);
                        }
                    }
                    (Part::Data { stream: 1, range, .. }, bytes) => data.extend_from_slice(&bytes[range]),
                    (Part::DataHead { stream: 1, length: 5, end_stream: true }, _) => {}
                    other => panic!("{other:?}"),
                }
            }
        };
        let both = async { tokio::join!(ask, answer).1 };
        let (requests, data) = tokio::select! {
            done = both => done,
            ended = connection => panic!("{ended:?}"),
        };
        let authority = Authority::Address("10.0.0.1:80".parse().unwrap());
        let bare = ConnectRequest { authority, baggage: None, forwarded: None, traceparent: None, network: None };
        let with = ConnectRequest { baggage: Some("a=b".into()), ..bare.clone() };
        assert_eq!(requests, [with.clone(), with, bare]);
        assert_eq!(data, b"hello");
    });
}
