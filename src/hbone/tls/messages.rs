//! The handshake messages that a peer may send after the handshake (RFC 8446 section 4.6): session tickets, which are
//! skipped without being stored, and KeyUpdate.
//!
//! A message may be split over records, and several tickets may share a record (section 5.1). At most the first 5 bytes
//! of a message are kept.

use super::error::TlsError;

const NEW_SESSION_TICKET: u8 = 4;
const KEY_UPDATE: u8 = 24;

/// Bytes before the body of a message: its type and length.
const MESSAGE_HEAD: usize = 4;

/// A ticket with an empty nonce, one byte of ticket and no extensions.
const TICKET_MIN: usize = 14;

/// Largest ticket. Servers that put the client's certificates into it stay far below.
const TICKET_MAX: usize = 64 * 1024;

/// Reads messages from the content of records.
#[derive(Debug)]
pub(super) struct Messages {
    /// Only clients may get tickets.
    tickets: bool,
    /// The beginning of a message: its head, and for a KeyUpdate its body.
    start: [u8; MESSAGE_HEAD + 1],
    filled: usize,
    /// Bytes of a ticket that are still to come.
    skip: usize,
}

/// A complete KeyUpdate, the last message of its record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct KeyUpdate {
    /// The peer wants us to update our key, too.
    pub(super) answer: bool,
}

impl Messages {
    /// `tickets`: the peer is a server, so it may send tickets.
    pub(super) fn new(tickets: bool) -> Self {
        Self { tickets, start: [0; MESSAGE_HEAD + 1], filled: 0, skip: 0 }
    }

    /// Whether the last record ended inside of a message. Then, the next one must continue it.
    pub(super) fn is_inside(&self) -> bool {
        self.filled > 0 || self.skip > 0
    }

    /// Reads the content of one record.
    pub(super) fn read(&mut self, mut content: &[u8]) -> Result<Option<KeyUpdate>, TlsError> {
        loop {
            let skipped = self.skip.min(content.len());
            self.skip -= skipped;
            let Some((byte, rest)) = content.get(skipped..).and_then(<[u8]>::split_first) else { return Ok(None) };
            content = rest;
            if let Some(place) = self.start.get_mut(self.filled) {
                *place = *byte;
            }
            self.filled += 1;
            if let Some(update) = self.check()? {
                // RFC 8446 section 5.1: messages must not span key changes.
                return if content.is_empty() {
                    Ok(Some(update))
                } else {
                    Err(TlsError::Unexpected("behind KeyUpdate"))
                };
            }
        }
    }

    /// Checks the part of a message that is known so far.
    fn check(&mut self) -> Result<Option<KeyUpdate>, TlsError> {
        let [kind, high, middle, low, body] = self.start;
        let is_ticket = kind == NEW_SESSION_TICKET && self.tickets;
        if !is_ticket && kind != KEY_UPDATE {
            return Err(TlsError::Unexpected("neither ticket nor KeyUpdate"));
        }
        if self.filled < MESSAGE_HEAD {
            return Ok(None);
        }
        let length = usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low);
        if is_ticket {
            if !(TICKET_MIN..=TICKET_MAX).contains(&length) {
                return Err(TlsError::Malformed("length of a ticket"));
            }
            (self.filled, self.skip) = (0, length);
            return Ok(None);
        }
        if length != 1 {
            return Err(TlsError::Malformed("length of a KeyUpdate"));
        }
        if self.filled == MESSAGE_HEAD {
            return Ok(None);
        }
        self.filled = 0;
        match body {
            0 => Ok(Some(KeyUpdate { answer: false })),
            1 => Ok(Some(KeyUpdate { answer: true })),
            _ => Err(TlsError::Illegal("KeyUpdate request")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ticket(length: usize) -> Vec<u8> {
        [&[NEW_SESSION_TICKET][..], &u32::try_from(length).unwrap().to_be_bytes()[1..], &vec![24; length]].concat()
    }

    const PLEASE_UPDATE: [u8; 5] = [KEY_UPDATE, 0, 0, 1, 1];
    const UPDATED: [u8; 5] = [KEY_UPDATE, 0, 0, 1, 0];

    #[test]
    fn tickets_may_share_a_record_with_each_other_and_with_a_key_update_behind_them() {
        let mut messages = Messages::new(true);
        let record = [&ticket(TICKET_MIN)[..], &ticket(300), &UPDATED].concat();
        assert_eq!(messages.read(&record), Ok(Some(KeyUpdate { answer: false })));
        assert_eq!(messages.read(&PLEASE_UPDATE), Ok(Some(KeyUpdate { answer: true })));
        assert_eq!(messages.read(&ticket(TICKET_MAX)), Ok(None));
        assert!(!messages.is_inside());
    }

    #[test]
    fn nothing_may_follow_a_key_update_in_its_record() {
        let record = [&UPDATED[..], &ticket(20)].concat();
        assert!(matches!(Messages::new(true).read(&record), Err(TlsError::Unexpected(_))));
        assert!(matches!(Messages::new(true).read(&[UPDATED, UPDATED].concat()), Err(TlsError::Unexpected(_))));
        assert!(matches!(Messages::new(true).read(&[&UPDATED[..], &[4]].concat()), Err(TlsError::Unexpected(_))));
    }

    #[test]
    fn other_messages_are_refused_by_their_first_byte() {
        // ClientHello, ServerHello, CertificateRequest, Certificate, Finished.
        for kind in [0, 1, 2, 13, 11, 20, 255] {
            assert!(matches!(Messages::new(true).read(&[kind]), Err(TlsError::Unexpected(_))), "type {kind}");
        }
        assert!(matches!(Messages::new(false).read(&[NEW_SESSION_TICKET]), Err(TlsError::Unexpected(_))));
    }

    #[test]
    fn wrong_lengths_and_values_are_refused() {
        for length in [[0, 0, 0], [0, 0, 2], [1, 0, 1]] {
            let message = [&[KEY_UPDATE][..], &length].concat();
            assert!(matches!(Messages::new(true).read(&message), Err(TlsError::Malformed(_))), "{length:?}");
        }
        assert!(matches!(Messages::new(true).read(&[KEY_UPDATE, 0, 0, 1, 2]), Err(TlsError::Illegal(_))));
        for length in [0, TICKET_MIN - 1, TICKET_MAX + 1] {
            assert!(matches!(Messages::new(true).read(&ticket(length)), Err(TlsError::Malformed(_))), "{length}");
        }
    }

    proptest! {
        #[test]
        fn messages_may_be_split_anywhere(lengths in prop::collection::vec(TICKET_MIN..100, 0..4), cuts: [u16; 6]) {
            let mut all: Vec<u8> = lengths.into_iter().flat_map(ticket).collect();
            all.extend(PLEASE_UPDATE);
            let mut cuts: Vec<_> = cuts.into_iter().map(|cut| usize::from(cut) % all.len()).collect();
            cuts.extend([0, all.len()]);
            cuts.sort_unstable();
            let mut messages = Messages::new(true);
            for (index, cut) in cuts.windows(2).enumerate() {
                let found = messages.read(&all[cut[0]..cut[1]]).unwrap();
                let is_last = index + 2 == cuts.len();
                prop_assert_eq!(found, is_last.then_some(KeyUpdate { answer: true }));
            }
            prop_assert!(!messages.is_inside());
        }

        #[test]
        fn any_bytes_are_read_without_a_panic(records: Vec<Vec<u8>>) {
            let mut messages = Messages::new(true);
            let _ = records.iter().try_for_each(|record| messages.read(record).map(drop));
        }
    }
}
