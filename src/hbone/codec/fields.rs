//! The decoded fields of requests, responses and trailers: what a tunnel needs of them, and whether they are well
//! formed (RFC 9113 section 8). Pure.
//!
//! The fields are given one by one, as they are decoded. `check` tells whether all of them are well formed; a stream
//! with malformed fields has to be reset with PROTOCOL_ERROR (RFC 9113 section 8.1.1).

/// Longest header value that is accepted from a peer, in bytes.
const VALUE_MAX: usize = 4096;

/// How much of a method is kept, in bytes. CONNECT is the only one that matters.
const METHOD_MAX: usize = 32;

/// Longest authority that is kept, in bytes: a host name of 253 bytes with a port is shorter. Of a longer one the
/// beginning is kept, which is no valid authority either.
const AUTHORITY_MAX: usize = 300;

/// The name of the header that describes a workload (W3C Baggage).
pub const BAGGAGE: &str = "baggage";
/// The name of the header with the original client (RFC 7239).
pub const FORWARDED: &str = "forwarded";
/// The name of the header with the trace context (W3C Trace Context).
pub const TRACEPARENT: &str = "traceparent";
/// The name of the header with the network that a connection comes from (source: ztunnel's requests to other networks).
pub const NETWORK: &str = "x-forwarded-network";

/// Why fields are malformed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// A name has upper-case letters or other characters that names do not have (RFC 9113 section 8.2.1).
    #[error("a field with an invalid name")]
    Name,
    /// A value has characters that values do not have, or white space at an end (RFC 9113 section 8.2.1).
    #[error("a field with an invalid value")]
    Value,
    /// A field that describes an HTTP/1.1 connection (RFC 9113 section 8.2.2).
    #[error("a field that belongs to an HTTP/1.1 connection")]
    Connection,
    /// A pseudo header that does not exist here, is repeated, comes behind other fields, or has an impossible value
    /// (RFC 9113 section 8.3).
    #[error("a bad pseudo header")]
    BadPseudo,
    /// There is no `:method` or `:status`, or a request other than CONNECT lacks `:scheme` or `:path` (RFC 9113
    /// sections 8.3.1 and 8.3.2).
    #[error("a pseudo header is missing")]
    MissingPseudo,
}

/// A header that is only taken if it comes once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Once {
    #[default]
    Absent,
    /// It came, and is taken or not.
    Came(Option<String>),
    Repeated,
}

impl Once {
    fn came(&mut self, value: &[u8]) {
        *self = match self {
            Self::Absent => Self::Came(text(value)),
            Self::Came(_) | Self::Repeated => Self::Repeated,
        };
    }

    fn taken(self) -> Option<String> {
        match self {
            Self::Came(value) => value,
            Self::Absent | Self::Repeated => None,
        }
    }
}

/// What holds for all kinds of fields.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Order {
    /// A field came that is no pseudo header.
    regular: bool,
    /// The first rule that was broken.
    malformed: Option<Malformed>,
}

impl Order {
    fn set(&mut self, malformed: Malformed) {
        self.malformed.get_or_insert(malformed);
    }

    /// Checks a field. `pseudo` takes a pseudo header and tells whether it was expected. Returns whether this is a
    /// well-formed field that is no pseudo header.
    fn field(&mut self, name: &[u8], value: &[u8], pseudo: impl FnOnce(&[u8]) -> bool) -> bool {
        if !is_value(value) {
            self.set(Malformed::Value);
            return false;
        }
        if name.first() == Some(&b':') {
            if self.regular || !pseudo(name) {
                self.set(Malformed::BadPseudo);
            }
            return false;
        }
        self.regular = true;
        if !is_name(name) {
            self.set(Malformed::Name);
        } else if is_of_connection(name, value) {
            self.set(Malformed::Connection);
        }
        self.malformed.is_none()
    }

    fn check(&self) -> Result<(), Malformed> {
        self.malformed.map_or(Ok(()), Err)
    }
}

/// The fields of a request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RequestHead {
    order: Order,
    method: Option<String>,
    authority: Option<String>,
    scheme: bool,
    path: bool,
    protocol: bool,
    /// The value of `content-length`; impossible if it is no number, or came twice.
    content: Option<u64>,
    baggage: Once,
    forwarded: Once,
    traceparent: Once,
    network: Once,
}

impl RequestHead {
    /// Takes the next field.
    pub fn field(&mut self, name: &[u8], value: &[u8]) {
        let pseudo = |name: &[u8]| match name {
            b":method" => is_name_in_any_case(value) && self.method.replace(prefix(value, METHOD_MAX)).is_none(),
            b":authority" => self.authority.replace(prefix(value, AUTHORITY_MAX)).is_none(),
            b":scheme" => !std::mem::replace(&mut self.scheme, true),
            b":path" => !value.is_empty() && !std::mem::replace(&mut self.path, true),
            // Extended CONNECT (RFC 8441 section 4).
            b":protocol" => !std::mem::replace(&mut self.protocol, true),
            _ => false,
        };
        if !self.order.field(name, value, pseudo) {
            return;
        }
        match name {
            b"baggage" => self.baggage.came(value),
            b"forwarded" => self.forwarded.came(value),
            b"traceparent" => self.traceparent.came(value),
            b"x-forwarded-network" => self.network.came(value),
            b"content-length" => {
                let length = std::str::from_utf8(value).ok().and_then(|text| text.parse().ok());
                self.content = Some(length.filter(|_| self.content.is_none()).unwrap_or(u64::MAX));
            }
            _ => {}
        }
    }

    /// How many bytes of content the request has according to its fields.
    pub fn content(&self) -> Option<u64> {
        self.content
    }

    /// Whether the request is well formed. A CONNECT request with too many pseudo headers, or without an authority, is
    /// found when it is made into a `ConnectRequest`: the peer is told with a status.
    pub fn check(&self) -> Result<(), Malformed> {
        self.order.check()?;
        let complete = match self.method.as_deref() {
            Some("CONNECT") => true,
            Some(_) => self.scheme && self.path,
            None => false,
        };
        if complete { Ok(()) } else { Err(Malformed::MissingPseudo) }
    }

    /// What a tunnel needs to know.
    pub fn into_parts(self) -> RequestParts {
        RequestParts {
            method: self.method.unwrap_or_default(),
            authority: self.authority,
            extended: self.scheme || self.path || self.protocol,
            baggage: self.baggage.taken(),
            forwarded: self.forwarded.taken(),
            traceparent: self.traceparent.taken(),
            network: self.network.taken(),
        }
    }
}

/// What a tunnel needs to know of a request.
#[derive(Debug)]
pub struct RequestParts {
    /// The beginning of the method.
    pub method: String,
    /// The beginning of `:authority`.
    pub authority: Option<String>,
    /// Whether there is a pseudo header that a plain CONNECT request does not have.
    pub extended: bool,
    /// The header, if it is taken.
    pub baggage: Option<String>,
    /// The header, if it is taken.
    pub forwarded: Option<String>,
    /// The header, if it is taken.
    pub traceparent: Option<String>,
    /// The header, if it is taken.
    pub network: Option<String>,
}

/// The fields of a response.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ResponseHead {
    order: Order,
    status: Option<u16>,
}

impl ResponseHead {
    /// Takes the next field.
    pub fn field(&mut self, name: &[u8], value: &[u8]) {
        let status = &mut self.status;
        let pseudo = |name: &[u8]| match status_code(value) {
            Some(code) if name == b":status" => status.replace(code).is_none(),
            _ => false,
        };
        // The other fields of an answer are not used.
        self.order.field(name, value, pseudo);
    }

    /// The status, if the response is well formed.
    pub fn check(&self) -> Result<u16, Malformed> {
        self.order.check()?;
        self.status.ok_or(Malformed::MissingPseudo)
    }
}

/// The fields of trailers, which have no pseudo headers (RFC 9113 section 8.1). A tunnel has no use for them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trailers {
    order: Order,
}

impl Trailers {
    /// Takes the next field.
    pub fn field(&mut self, name: &[u8], value: &[u8]) {
        self.order.field(name, value, |_| false);
    }

    /// Whether the trailers are well formed.
    pub fn check(&self) -> Result<(), Malformed> {
        self.order.check()
    }
}

/// A value as it can be written: without white space at its ends. `None` if it cannot.
pub fn writable(value: &str) -> Option<&str> {
    let value = value.trim_matches([' ', '\t']);
    value.bytes().all(is_visible).then_some(value)
}

fn is_visible(byte: u8) -> bool {
    matches!(byte, b' '..=b'~' | b'\t')
}

/// A value that is short and visible.
fn text(value: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(value).ok()?;
    (value.len() <= VALUE_MAX && value.iter().all(|byte| is_visible(*byte))).then(|| text.to_owned())
}

fn prefix(value: &[u8], max: usize) -> String {
    String::from_utf8_lossy(value.get(..max).unwrap_or(value)).into_owned()
}

/// Three digits (RFC 9110 section 15).
fn status_code(value: &[u8]) -> Option<u16> {
    let [b'1'..=b'9', b'0'..=b'9', b'0'..=b'9'] = value else { return None };
    Some(value.iter().fold(0, |sum, digit| sum * 10 + u16::from(digit - b'0')))
}

/// A token (RFC 9110 section 5.6.2).
fn is_name_in_any_case(name: &[u8]) -> bool {
    !name.is_empty() && name.iter().all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte))
}

/// A token in lower case (RFC 9113 section 8.2.1).
fn is_name(name: &[u8]) -> bool {
    is_name_in_any_case(name) && !name.iter().any(u8::is_ascii_uppercase)
}

/// Whether a value may be sent at all (RFC 9113 section 8.2.1).
fn is_value(value: &[u8]) -> bool {
    let is_space = |byte: Option<&u8>| matches!(byte, Some(b' ' | b'\t'));
    !value.iter().any(|byte| matches!(byte, b'\0' | b'\r' | b'\n'))
        && !is_space(value.first())
        && !is_space(value.last())
}

/// Whether a field belongs to an HTTP/1.1 connection (RFC 9113 section 8.2.2).
fn is_of_connection(name: &[u8], value: &[u8]) -> bool {
    match name {
        b"connection" | b"proxy-connection" | b"keep-alive" | b"transfer-encoding" | b"upgrade" => true,
        b"te" => !value.eq_ignore_ascii_case(b"trailers"),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const CONNECT: [(&str, &str); 2] = [(":method", "CONNECT"), (":authority", "a:80")];

    fn request(fields: &[(&str, &str)]) -> RequestHead {
        let mut head = RequestHead::default();
        fields.iter().for_each(|(name, value)| head.field(name.as_bytes(), value.as_bytes()));
        head
    }

    fn response(fields: &[(&str, &str)]) -> ResponseHead {
        let mut head = ResponseHead::default();
        fields.iter().for_each(|(name, value)| head.field(name.as_bytes(), value.as_bytes()));
        head
    }

    fn trailers(fields: &[(&str, &str)]) -> Trailers {
        let mut head = Trailers::default();
        fields.iter().for_each(|(name, value)| head.field(name.as_bytes(), value.as_bytes()));
        head
    }

    #[test]
    fn well_formed_requests() {
        let get = [(":method", "GET"), (":scheme", "https"), (":path", "/")];
        for more in [&[][..], &[("te", "trailers")], &[("x-a", ""), ("x-a", "b")], &[("baggage", "a b\tc")]] {
            assert_eq!(request(&[&CONNECT[..], more].concat()).check(), Ok(()), "{more:?}");
            assert_eq!(request(&[&get[..], more].concat()).check(), Ok(()), "{more:?}");
        }
    }

    #[test]
    fn malformed_requests() {
        for (fields, error) in [
            (&[][..], Malformed::MissingPseudo),
            (&[(":authority", "a:80")], Malformed::MissingPseudo),
            (&[(":method", "GET"), (":path", "/")], Malformed::MissingPseudo),
            (&[(":method", "GET"), (":scheme", "https")], Malformed::MissingPseudo),
            (&[(":method", "GET"), (":scheme", "https"), (":path", "")], Malformed::BadPseudo),
            (&[(":method", "")], Malformed::BadPseudo),
            (&[(":method", "CON NECT")], Malformed::BadPseudo),
            (&[(":method", "CONNECT"), (":status", "200")], Malformed::BadPseudo),
            (&[(":method", "CONNECT"), (":other", "")], Malformed::BadPseudo),
            (&[(":method", "CONNECT"), (":", "")], Malformed::BadPseudo),
            (&[(":method", "CONNECT"), (":Authority", "a:80")], Malformed::BadPseudo),
            (&[("x", "y"), (":method", "CONNECT")], Malformed::BadPseudo),
        ] {
            assert_eq!(request(fields).check(), Err(error), "{fields:?}");
        }
        for name in [":method", ":authority", ":scheme", ":path", ":protocol"] {
            let twice = request(&[(name, "CONNECT"), (name, "CONNECT")]);
            assert_eq!(twice.check(), Err(Malformed::BadPseudo), "{name}");
        }
    }

    #[test]
    fn fields_that_are_malformed_everywhere() {
        for (name, value, error) in [
            ("", "", Malformed::Name),
            ("Baggage", "a", Malformed::Name),
            ("a b", "", Malformed::Name),
            ("a:b", "", Malformed::Name),
            ("a\u{7f}", "", Malformed::Name),
            ("\u{e9}", "", Malformed::Name),
            ("a\n", "", Malformed::Name),
            ("a", "b\0c", Malformed::Value),
            ("a", "b\rc", Malformed::Value),
            ("a", "b\nc", Malformed::Value),
            ("a", " b", Malformed::Value),
            ("a", "b\t", Malformed::Value),
            ("a", " ", Malformed::Value),
            ("connection", "close", Malformed::Connection),
            ("proxy-connection", "close", Malformed::Connection),
            ("keep-alive", "1", Malformed::Connection),
            ("transfer-encoding", "chunked", Malformed::Connection),
            ("upgrade", "h2c", Malformed::Connection),
            ("te", "gzip", Malformed::Connection),
            ("te", "", Malformed::Connection),
        ] {
            let field = (name, value);
            assert_eq!(request(&[CONNECT[0], CONNECT[1], field, ("b", "")]).check(), Err(error), "{field:?}");
            assert_eq!(response(&[(":status", "200"), field, ("b", "")]).check(), Err(error), "{field:?}");
            assert_eq!(trailers(&[field, ("b", "")]).check(), Err(error), "{field:?}");
        }
    }

    #[test]
    fn responses() {
        assert_eq!(response(&[(":status", "200"), ("a", "b")]).check(), Ok(200));
        assert_eq!(response(&[]).check(), Err(Malformed::MissingPseudo));
        for status in ["", "20", "2000", "+20", "099", "2 0", "2OO"] {
            assert_eq!(response(&[(":status", status)]).check(), Err(Malformed::BadPseudo), "{status:?}");
        }
        for fields in [
            [(":status", "200"), (":status", "200")],
            [(":status", "200"), (":method", "CONNECT")],
            [("a", "b"), (":status", "200")],
        ] {
            assert_eq!(response(&fields).check(), Err(Malformed::BadPseudo), "{fields:?}");
        }
        assert_eq!(response(&[(":status", "200"), ("baggage", "a=b")]).check(), Ok(200));
    }

    #[test]
    fn trailers_have_no_pseudo_headers() {
        assert_eq!(trailers(&[]).check(), Ok(()));
        assert_eq!(trailers(&[("grpc-status", "0")]).check(), Ok(()));
        assert_eq!(trailers(&[(":status", "200")]).check(), Err(Malformed::BadPseudo));
        assert_eq!(trailers(&[(":method", "CONNECT")]).check(), Err(Malformed::BadPseudo));
    }

    #[test]
    fn headers_that_are_repeated_or_too_long_or_not_visible_are_ignored() {
        let (fits, long) = ("x".repeat(VALUE_MAX), "x".repeat(VALUE_MAX + 1));
        for (values, expected) in [
            (&[][..], None),
            (&["a"], Some("a")),
            (&[""], Some("")),
            (&["a", "a"], None),
            (&["a", "b", "c"], None),
            (&[&long, "a"], None),
            (&[&long], None),
            (&[&fits], Some(&fits[..])),
            (&["\u{e9}"], None),
            (&["a\u{1}b"], None),
        ] {
            for name in [BAGGAGE, FORWARDED, TRACEPARENT] {
                let fields: Vec<_> = CONNECT.into_iter().chain(values.iter().map(|value| (name, *value))).collect();
                let head = request(&fields);
                assert_eq!(head.check(), Ok(()));
                let parts = head.into_parts();
                let taken = [(BAGGAGE, parts.baggage), (FORWARDED, parts.forwarded), (TRACEPARENT, parts.traceparent)];
                for (other, value) in taken {
                    assert_eq!(value.as_deref(), expected.filter(|_| other == name), "{name} {other} {values:?}");
                }
            }
        }
    }

    #[test]
    fn long_pseudo_headers_are_cut_to_a_bounded_length() {
        let long = "a".repeat(100_000);
        let parts = request(&[(":method", &long), (":authority", &long)]).into_parts();
        assert_eq!((parts.method.len(), parts.authority.unwrap().len()), (METHOD_MAX, AUTHORITY_MAX));
    }

    proptest! {
        #[test]
        fn any_fields_are_taken_without_a_panic_and_what_is_taken_can_be_written(
            fields in prop::collection::vec(
                (prop_oneof!["(:method|:authority|:path|baggage|forwarded|te)", ".{0,8}"], prop::collection::vec(any::<u8>(), 0..12)),
                0..8,
            ),
        ) {
            let mut head = RequestHead::default();
            fields.iter().for_each(|(name, value)| head.field(name.as_bytes(), value));
            let well_formed = head.check().is_ok();
            let parts = head.into_parts();
            for value in [parts.baggage, parts.forwarded].into_iter().flatten() {
                prop_assert_eq!(writable(&value), Some(&value[..]));
            }
            prop_assert!(!well_formed || fields.iter().any(|(name, _)| name == ":method"));
        }
    }
}
