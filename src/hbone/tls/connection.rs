//! A TLS 1.3 connection after its handshake. It does no I/O: the owner of the socket passes in what it read, and sends
//! what is sealed here.

use super::error::TlsError;
use super::messages::Messages;
use super::record::{ContentType, HEAD, Opener, Sealer, Secrets, whole_length};
use rustls::client::ClientConnectionData;
use rustls::kernel::KernelConnection;
use rustls::server::ServerConnectionData;
use rustls::{AlertDescription, ExtractedSecrets};
use std::fmt;
use std::ops::Range;

/// Records without data that a peer may send in a row: key updates, parts of tickets, empty records. Each costs us more
/// work than it costs the peer.
const CREDIT: u32 = 32;

/// After that many records of data, the peer may send one more record without data.
const RECORDS_PER_CREDIT: u32 = 4;

const WARNING: u8 = 1;
const FATAL: u8 = 2;

/// What [`Tls::next`] found at the beginning of the bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// There is no whole record yet.
    Incomplete {
        /// Bytes that are missing: of the record if its header is there, otherwise of the header.
        missing: usize,
    },
    /// Application data, which is never empty.
    Data {
        /// Bytes of the record.
        used: usize,
        /// Where in the bytes the decrypted data is.
        plain: Range<usize>,
    },
    /// A record without data, which was dealt with. [`Tls::pending`] may have changed.
    Control {
        /// Bytes of the record.
        used: usize,
    },
    /// The peer sends nothing more (close_notify, RFC 8446 section 6.1). It may still receive.
    Closed {
        /// Bytes of the record. When more follows it, that is used up, too, by the next call.
        used: usize,
    },
}

/// Derives the keys that follow a KeyUpdate.
enum Keys {
    Client(KernelConnection<ClientConnectionData>),
    Server(KernelConnection<ServerConnectionData>),
}

impl Keys {
    fn next_to_send(&mut self) -> Result<Secrets, TlsError> {
        let next = match self {
            Self::Client(kernel) => kernel.update_tx_secret(),
            Self::Server(kernel) => kernel.update_tx_secret(),
        };
        Ok(next.map_err(|_| TlsError::Keys)?.try_into()?)
    }

    fn next_to_receive(&mut self) -> Result<Secrets, TlsError> {
        let next = match self {
            Self::Client(kernel) => kernel.update_rx_secret(),
            Self::Server(kernel) => kernel.update_rx_secret(),
        };
        Ok(next.map_err(|_| TlsError::Keys)?.try_into()?)
    }
}

/// A TLS 1.3 connection after its handshake.
pub struct Tls {
    sealer: Sealer,
    opener: Opener,
    /// `None` only in tests.
    keys: Option<Keys>,
    messages: Messages,
    /// The peer waits for a KeyUpdate from us. However often it asks before we send one, one is enough (RFC 8446
    /// section 4.6.3).
    answer: bool,
    /// We have sent close_notify or a fatal alert.
    sent_last: bool,
    /// The peer has sent close_notify.
    received_last: bool,
    /// Why nothing more can be received.
    failed: Option<TlsError>,
    /// Records without data that the peer may send now.
    credit: u32,
    /// Records of data since the credit last grew.
    data_records: u32,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tls({:?} {:?})", self.sealer, self.opener)
    }
}

impl Tls {
    /// Continues a client's connection after rustls has done the handshake.
    pub(super) fn client(
        secrets: ExtractedSecrets,
        kernel: KernelConnection<ClientConnectionData>,
    ) -> Result<Self, TlsError> {
        Self::new(secrets.tx.try_into()?, secrets.rx.try_into()?, Some(Keys::Client(kernel)), true)
    }

    /// Continues a server's connection after rustls has done the handshake.
    pub(super) fn server(
        secrets: ExtractedSecrets,
        kernel: KernelConnection<ServerConnectionData>,
    ) -> Result<Self, TlsError> {
        Self::new(secrets.tx.try_into()?, secrets.rx.try_into()?, Some(Keys::Server(kernel)), false)
    }

    fn new(send: Secrets, receive: Secrets, keys: Option<Keys>, is_client: bool) -> Result<Self, TlsError> {
        Ok(Self {
            sealer: Sealer::new(send)?,
            opener: Opener::new(receive)?,
            keys,
            messages: Messages::new(is_client),
            answer: false,
            sent_last: false,
            received_last: false,
            failed: None,
            credit: CREDIT,
            data_records: 0,
        })
    }

    /// Opens the first record in `wire`, in place. After an error every call returns the same error; the peer should
    /// get the alert of [`TlsError::alert`], and the connection must be closed.
    pub fn next(&mut self, wire: &mut [u8]) -> Result<Next, TlsError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        if self.received_last {
            // RFC 8446 section 6.1: data behind close_notify is ignored.
            return Ok(Next::Closed { used: wire.len() });
        }
        self.read_record(wire).inspect_err(|error| self.failed = Some(*error))
    }

    fn read_record(&mut self, wire: &mut [u8]) -> Result<Next, TlsError> {
        let Some(head) = wire.first_chunk::<HEAD>() else { return Ok(Next::Incomplete { missing: HEAD - wire.len() }) };
        // A record that is too long is refused before anyone waits for it.
        let used = whole_length(*head)?;
        let available = wire.len();
        let Some(record) = wire.get_mut(..used) else { return Ok(Next::Incomplete { missing: used - available }) };
        let (content, plain) = self.opener.open(record)?;
        let bytes = record.get(plain.clone()).unwrap_or_default();
        match content {
            ContentType::Alert => return self.read_alert(bytes, used),
            ContentType::Handshake => self.read_messages(bytes)?,
            // RFC 8446 section 5.1: nothing may come between the records of one message.
            ContentType::ApplicationData if self.messages.is_inside() => {
                return Err(TlsError::Unexpected("data inside of a handshake message"));
            }
            ContentType::ApplicationData if bytes.is_empty() => self.spend()?,
            ContentType::ApplicationData => {
                self.earn();
                return Ok(Next::Data { used, plain });
            }
        }
        Ok(Next::Control { used })
    }

    fn read_messages(&mut self, bytes: &[u8]) -> Result<(), TlsError> {
        self.spend()?;
        if let Some(update) = self.messages.read(bytes)? {
            self.opener = Opener::new(self.keys()?.next_to_receive()?)?;
            self.answer |= update.answer;
        }
        Ok(())
    }

    fn keys(&mut self) -> Result<&mut Keys, TlsError> {
        self.keys.as_mut().ok_or(TlsError::Keys)
    }

    /// RFC 8446 section 6: the level means nothing, every alert is fatal but these two. An alert may also interrupt a
    /// handshake message: it says why the rest does not come.
    fn read_alert(&mut self, bytes: &[u8], used: usize) -> Result<Next, TlsError> {
        let &[_level, description] = bytes else { return Err(TlsError::Malformed("length of an alert")) };
        match AlertDescription::from(description) {
            AlertDescription::CloseNotify => {
                self.received_last = true;
                Ok(Next::Closed { used })
            }
            AlertDescription::UserCanceled => {
                self.spend()?;
                Ok(Next::Control { used })
            }
            alert => Err(TlsError::Alert(alert)),
        }
    }

    /// Counts a record without data.
    fn spend(&mut self) -> Result<(), TlsError> {
        self.credit = self.credit.checked_sub(1).ok_or(TlsError::Flood)?;
        Ok(())
    }

    /// Counts a record of data.
    fn earn(&mut self) {
        self.data_records += 1;
        if self.data_records == RECORDS_PER_CREDIT {
            self.data_records = 0;
            self.credit = CREDIT.min(self.credit + 1);
        }
    }

    /// Whether [`Tls::write_control`] must be called, and its record sent, before more data is sealed.
    pub fn pending(&self) -> bool {
        // RFC 8446 section 6.1: nothing follows our close_notify.
        !self.sent_last && (self.answer || self.sealer.needs_key_update())
    }

    /// Writes the record that must be sent before more data, if there is one, and returns its length. This is a
    /// KeyUpdate (RFC 8446 section 4.6.3): the peer asked for it, or the sending key is used up. All that is sealed
    /// later has a new key, so the order of records must not change.
    pub fn write_control(&mut self, out: &mut [u8]) -> Result<usize, TlsError> {
        if !self.pending() {
            return Ok(0);
        }
        // The last byte: we do not request one in return.
        let used = self.seal_control(ContentType::Handshake, &[24, 0, 0, 1, 0], out)?;
        self.sealer = Sealer::new(self.keys()?.next_to_send()?)?;
        self.answer = false;
        Ok(used)
    }

    /// Makes a record of application data in place, see [`Sealer::seal`].
    pub fn seal(&mut self, record: &mut [u8], plain: usize) -> Result<usize, TlsError> {
        if self.sent_last {
            return Err(TlsError::Closed);
        }
        Ok(self.sealer.seal(record, plain)?)
    }

    /// Writes the alert that says that we send nothing more, and returns its length. Nothing can be sealed after it.
    /// Writes nothing the second time.
    pub fn close_notify(&mut self, out: &mut [u8]) -> Result<usize, TlsError> {
        self.write_last(WARNING, AlertDescription::CloseNotify.into(), out)
    }

    /// Writes a fatal alert, and returns its length. Like [`Tls::close_notify`], it is the last record.
    pub fn alert(&mut self, description: u8, out: &mut [u8]) -> Result<usize, TlsError> {
        self.write_last(FATAL, description, out)
    }

    fn write_last(&mut self, level: u8, description: u8, out: &mut [u8]) -> Result<usize, TlsError> {
        if self.sent_last {
            return Ok(0);
        }
        let used = self.seal_control(ContentType::Alert, &[level, description], out)?;
        self.sent_last = true;
        Ok(used)
    }

    fn seal_control(&mut self, content: ContentType, bytes: &[u8], out: &mut [u8]) -> Result<usize, TlsError> {
        if let Some(place) = out.get_mut(HEAD..HEAD + bytes.len()) {
            place.copy_from_slice(bytes);
        }
        // Fails if that was too short.
        Ok(self.sealer.seal_as(content, out, bytes.len())?)
    }
}

#[cfg(any(test, fuzzing))]
impl Tls {
    /// A client's connection without a handshake, from secrets for sending and receiving. It has no further keys.
    pub(crate) fn without_handshake(send: Secrets, receive: Secrets) -> Result<Self, TlsError> {
        Self::new(send, receive, None, true)
    }
}

/// Room that is enough for everything that [`Tls::write_control`], [`Tls::close_notify`] and [`Tls::alert`] write.
#[cfg(test)]
pub const CONTROL_MAX: usize = 64;

#[cfg(test)]
impl Tls {
    /// The same, for keys that are right.
    pub(crate) fn for_tests(send: Secrets, receive: Secrets) -> Self {
        Self::without_handshake(send, receive).unwrap()
    }

    /// Continues sending with another record number.
    pub(super) fn skip_sending_to(&mut self, sequence: u64) {
        self.sealer.skip_to(sequence);
    }

    /// Continues receiving with another record number.
    pub(super) fn skip_receiving_to(&mut self, sequence: u64) {
        self.opener.skip_to(sequence);
    }
}

#[cfg(test)]
mod tests {
    use super::super::record::{PLAIN_MAX, RecordError, Suite, TAIL};
    use super::*;
    use proptest::prelude::*;

    fn secrets(key: u8) -> Secrets {
        Secrets::new(Suite::Aes128Gcm, &[key; 16], &[key; 12], 0).unwrap()
    }

    /// A client, and the server's two directions.
    fn client() -> (Tls, Sealer, Opener) {
        (Tls::for_tests(secrets(1), secrets(2)), Sealer::new(secrets(2)).unwrap(), Opener::new(secrets(1)).unwrap())
    }

    fn record(sealer: &mut Sealer, content: ContentType, plain: &[u8]) -> Vec<u8> {
        let mut record = [&[0; HEAD][..], plain, &[0; TAIL]].concat();
        sealer.seal_as(content, &mut record, plain.len()).unwrap();
        record
    }

    use ContentType::{Alert, ApplicationData, Handshake};

    /// Parts of a ticket of 20 bytes.
    const TICKET: ([u8; 4], [u8; 20]) = ([4, 0, 0, 20], [0; 20]);

    #[test]
    fn data_is_found_in_place() {
        let (mut tls, mut server, _) = client();
        let mut wire = record(&mut server, ApplicationData, b"one");
        wire.extend(record(&mut server, ApplicationData, b"more"));
        let Ok(Next::Data { used, plain }) = tls.next(&mut wire) else { panic!("no data") };
        assert_eq!((used, &wire[plain]), (HEAD + 3 + TAIL, &b"one"[..]));
        let Ok(Next::Data { used, plain }) = tls.next(&mut wire[used..]) else { panic!("no data") };
        assert_eq!((used, plain), (HEAD + 4 + TAIL, HEAD..HEAD + 4));
        assert_eq!(tls.next(&mut []), Ok(Next::Incomplete { missing: HEAD }));
    }

    #[test]
    fn an_incomplete_record_says_how_much_is_missing_and_is_not_touched() {
        let (mut tls, mut server, _) = client();
        let whole = record(&mut server, ApplicationData, b"some bytes");
        for length in 0..whole.len() {
            let missing = if length < HEAD { HEAD - length } else { whole.len() - length };
            let mut part = whole[..length].to_vec();
            assert_eq!(tls.next(&mut part), Ok(Next::Incomplete { missing }), "{length} bytes");
            assert_eq!(part, whole[..length]);
        }
        assert!(matches!(tls.next(&mut whole.clone()), Ok(Next::Data { .. })));
    }

    #[test]
    fn a_bad_header_is_refused_without_the_rest() {
        let fresh = || client().0;
        assert_eq!(fresh().next(&mut [23, 3, 3, 0x41, 1]), Err(TlsError::Record(RecordError::Overflow)));
        let change_cipher_spec = fresh().next(&mut [20, 3, 3, 0, 1, 1]);
        assert_eq!(change_cipher_spec, Err(TlsError::Record(RecordError::Unexpected)));
        let plain_alert = fresh().next(&mut [21, 3, 3, 0, 2, 2, 40]);
        assert_eq!(plain_alert, Err(TlsError::Record(RecordError::Unexpected)));
    }

    #[test]
    fn an_error_stays() {
        let (mut tls, mut server, _) = client();
        let good = record(&mut server, ApplicationData, b"good");
        let mut bad = good.clone();
        bad[HEAD] ^= 1;
        for mut bytes in [bad, good, Vec::new()] {
            assert_eq!(tls.next(&mut bytes), Err(TlsError::Record(RecordError::BadMac)));
        }
    }

    #[test]
    fn close_notify_ends_one_direction_only() {
        let (mut tls, mut server, mut opener) = client();
        let mut wire = record(&mut server, Alert, &[2, 0]);
        wire.extend(b"ignored");
        assert_eq!(tls.next(&mut wire), Ok(Next::Closed { used: HEAD + 2 + TAIL }));
        assert_eq!(tls.next(&mut wire[HEAD + 2 + TAIL..]), Ok(Next::Closed { used: 7 }));

        let mut out = [&[0; HEAD][..], b"still open", &[0; TAIL]].concat();
        assert_eq!(tls.seal(&mut out, 10), Ok(out.len()));
        assert_eq!(opener.open(&mut out), Ok((ApplicationData, HEAD..HEAD + 10)));
        let mut out = [0; CONTROL_MAX];
        let used = tls.close_notify(&mut out).unwrap();
        assert_eq!(opener.open(&mut out[..used]), Ok((Alert, HEAD..HEAD + 2)));
        assert_eq!(out[HEAD..HEAD + 2], [WARNING, 0]);
        assert_eq!(tls.seal(&mut out, 0), Err(TlsError::Closed));
        assert_eq!((tls.close_notify(&mut out), tls.alert(10, &mut out)), (Ok(0), Ok(0)));
    }

    #[test]
    fn a_fatal_alert_has_the_words_and_the_error_of_rustls() {
        for (level, description, name) in
            [(2, 42, "BadCertificate"), (1, 48, "UnknownCA"), (2, 45, "CertificateExpired")]
        {
            let (mut tls, mut server, _) = client();
            let error = tls.next(&mut record(&mut server, Alert, &[level, description])).unwrap_err();
            assert_eq!((error.to_string(), error.alert()), (format!("received fatal alert: {name}"), None));
            let error = std::io::Error::from(error);
            let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
            assert_eq!(inner, Some(&rustls::Error::AlertReceived(description.into())));
        }
    }

    #[test]
    fn an_alert_has_two_bytes() {
        for bytes in [&[1][..], &[1, 0, 0], &[1, 0, 1, 0]] {
            let (mut tls, mut server, _) = client();
            let found = tls.next(&mut record(&mut server, Alert, bytes));
            assert!(matches!(found, Err(TlsError::Malformed(_))), "{bytes:?}");
        }
    }

    #[test]
    fn data_must_not_interrupt_a_ticket_but_an_alert_may() {
        let start = [&TICKET.0[..], &TICKET.1[..9]].concat();
        for (content, bytes, expected) in [
            (Handshake, &TICKET.1[9..], Ok(Next::Control { used: HEAD + 11 + TAIL })),
            (ApplicationData, b"data", Err(TlsError::Unexpected("data inside of a handshake message"))),
            (ApplicationData, b"", Err(TlsError::Unexpected("data inside of a handshake message"))),
            (Alert, &[2, 80], Err(TlsError::Alert(AlertDescription::InternalError))),
        ] {
            let (mut tls, mut server, _) = client();
            assert!(matches!(tls.next(&mut record(&mut server, Handshake, &start)), Ok(Next::Control { .. })));
            assert_eq!(tls.next(&mut record(&mut server, content, bytes)), expected);
        }
    }

    #[test]
    fn records_without_data_are_limited_and_data_allows_more() {
        let ticket = [&TICKET.0[..], &TICKET.1].concat();
        let kinds = [(ApplicationData, &b""[..]), (Handshake, &ticket), (Alert, &[1, 90])];
        for (content, bytes) in kinds {
            let (mut tls, mut server, _) = client();
            let mut next = |content, bytes| tls.next(&mut record(&mut server, content, bytes));
            for _ in 0..CREDIT {
                assert!(matches!(next(content, bytes), Ok(Next::Control { .. })));
            }
            for _ in 0..RECORDS_PER_CREDIT {
                assert!(matches!(next(ApplicationData, b"x"), Ok(Next::Data { .. })));
            }
            assert!(matches!(next(content, bytes), Ok(Next::Control { .. })));
            let error = next(content, bytes).unwrap_err();
            assert_eq!((error, error.alert()), (TlsError::Flood, Some(10)));
            assert!(error.to_string().contains("key_update_flood"));
        }
    }

    #[test]
    fn a_peer_cannot_save_up_credit() {
        let (mut tls, mut server, _) = client();
        for _ in 0..RECORDS_PER_CREDIT * CREDIT * 2 {
            assert!(tls.next(&mut record(&mut server, ApplicationData, b"x")).is_ok());
        }
        let mut next = || tls.next(&mut record(&mut server, ApplicationData, b""));
        assert!((0..CREDIT).all(|_| next().is_ok()));
        assert_eq!(next(), Err(TlsError::Flood));
    }

    #[test]
    fn control_records_need_room_and_lose_nothing_without_it() {
        let (mut tls, _, mut opener) = client();
        for room in 0..HEAD + 2 + TAIL {
            assert_eq!(tls.alert(80, &mut vec![0; room]), Err(TlsError::Record(RecordError::Buffer)), "{room} bytes");
        }
        let mut out = [0; CONTROL_MAX];
        let used = tls.alert(80, &mut out).unwrap();
        assert_eq!(opener.open(&mut out[..used]), Ok((Alert, HEAD..HEAD + 2)));
        assert_eq!(out[HEAD..HEAD + 2], [FATAL, 80]);
        assert_eq!((tls.pending(), tls.write_control(&mut out)), (false, Ok(0)));
    }

    #[test]
    fn errors_map_to_the_alerts_of_rfc_8446() {
        for (error, alert) in [
            (TlsError::Record(RecordError::BadMac), Some(20)),
            (TlsError::Record(RecordError::Overflow), Some(22)),
            (TlsError::Record(RecordError::Unexpected), Some(10)),
            (TlsError::Unexpected(""), Some(10)),
            (TlsError::Malformed(""), Some(50)),
            (TlsError::Illegal(""), Some(47)),
            (TlsError::Keys, Some(80)),
            (TlsError::Truncated, None),
        ] {
            assert_eq!(error.alert(), alert, "{error:?}");
        }
    }

    proptest! {
        #[test]
        fn records_may_arrive_in_any_pieces(
            parts in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..300), 1..6),
            pieces in prop::collection::vec(1..200usize, 1..30),
        ) {
            let (mut tls, mut server, _) = client();
            let all: Vec<u8> = parts.iter().flat_map(|part| record(&mut server, ApplicationData, part)).collect();
            let (mut buffer, mut rest, mut found) = (Vec::new(), &all[..], Vec::new());
            for piece in pieces.into_iter().chain([all.len()]) {
                let (now, later) = rest.split_at(piece.min(rest.len()));
                buffer.extend(now);
                rest = later;
                while let Next::Data { used, plain } = tls.next(&mut buffer).unwrap() {
                    found.push(buffer[plain].to_vec());
                    buffer.drain(..used);
                }
            }
            prop_assert_eq!(found, parts);
        }

        #[test]
        fn any_content_from_the_peer_is_handled(
            records in prop::collection::vec(
                (
                    prop::sample::select(&[Alert, Handshake, ApplicationData][..]),
                    prop_oneof![
                        prop::collection::vec(any::<u8>(), 0..40),
                        Just(vec![4, 0, 0, 20]), Just(vec![0; 20]), Just(vec![24, 0, 0]), Just(vec![1, 0]),
                    ],
                ),
                0..20,
            ),
        ) {
            let (mut tls, mut server, _) = client();
            for (content, bytes) in records {
                let mut wire = record(&mut server, content, &bytes);
                let length = wire.len();
                match tls.next(&mut wire) {
                    Ok(Next::Data { used, plain }) => prop_assert_eq!((used, &wire[plain]), (length, &bytes[..])),
                    Ok(Next::Control { used } | Next::Closed { used }) => prop_assert_eq!(used, length),
                    Ok(Next::Incomplete { .. }) => prop_assert!(false, "a whole record is not incomplete"),
                    Err(_) => break,
                }
            }
        }
    }

    #[test]
    fn the_largest_record_is_sealed() {
        let (mut tls, _, mut opener) = client();
        let mut out = vec![5; HEAD + PLAIN_MAX + TAIL];
        assert_eq!(tls.seal(&mut out, PLAIN_MAX), Ok(out.len()));
        assert_eq!(opener.open(&mut out), Ok((ApplicationData, HEAD..HEAD + PLAIN_MAX)));
    }
}
