//! Requests that are not CONNECT. They are refused, but only when they are complete: then their content can be compared
//! with what they announce (RFC 9113 section 8.1.1).

use super::{Event, Session, SessionError};
use crate::hbone::codec::frame::ErrorCode;

impl<A> Session<A> {
    /// The peer has sent everything on a stream.
    pub(super) fn ends(&mut self, key: usize, events: &mut Vec<Event>) -> Result<(), SessionError> {
        let Some(stream) = self.streams.get_mut(key) else { return Ok(()) };
        let id = stream.id;
        if let Some(foreign) = &stream.foreign
            && foreign.announced.is_some_and(|announced| announced != foreign.received)
        {
            return self.stream_error(id, ErrorCode::PROTOCOL_ERROR, events);
        }
        stream.remote_ended = true;
        if let Some(foreign) = stream.foreign.take() {
            events.push(Event::Request { key, request: Err(foreign.error) });
        }
        events.push(Event::End { key });
        Ok(())
    }

    /// Reports that a stream was reset, if the owner knows it.
    pub(super) fn tell_reset(&mut self, key: usize, code: ErrorCode, events: &mut Vec<Event>) {
        if self.streams.get(key).is_some_and(|stream| stream.foreign.is_some()) {
            self.remove(key);
        } else {
            events.push(Event::Reset { key, code });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hbone::codec::frame;
    use crate::hbone::request::RequestError;
    use crate::hbone::session::Role;
    use crate::hbone::testing::CONFIG;

    /// A server, after the peer's SETTINGS.
    fn server() -> Session<()> {
        let mut session = Session::new(Role::Server, &CONFIG);
        let mut wire = frame::PREFACE.to_vec();
        frame::settings(&[], &mut wire);
        receive(&mut session, &wire);
        session.control().clear();
        session
    }

    fn receive(session: &mut Session<()>, wire: &[u8]) -> Vec<Event> {
        let mut events = Vec::new();
        session.receive(wire, 0, &mut events, || ()).unwrap();
        events
    }

    /// GET over https for `/`, with this much announced content.
    fn get(stream: u32, announced: Option<&str>, end: bool) -> Vec<u8> {
        let mut block = vec![0x82, 0x87, 0x84];
        if let Some(text) = announced {
            // `content-length` is entry 28 of the static table.
            block.extend([0x0f, 13, u8::try_from(text.len()).unwrap()]);
            block.extend(text.as_bytes());
        }
        let mut wire = Vec::new();
        frame::headers(stream, &block, end, 16_384, &mut wire);
        wire
    }

    fn connect(stream: u32) -> Vec<u8> {
        let mut wire = Vec::new();
        let block = [&[0x02, 7][..], b"CONNECT", &[0x01, 11], b"10.0.0.1:80"].concat();
        frame::headers(stream, &block, false, 16_384, &mut wire);
        wire
    }

    fn data(stream: u32, bytes: &[u8], end: bool) -> Vec<u8> {
        let flags = if end { frame::END_STREAM } else { 0 };
        [&frame::head(bytes.len(), frame::DATA, flags, stream)[..], bytes].concat()
    }

    fn reset(stream: u32, code: ErrorCode) -> Vec<u8> {
        let mut wire = Vec::new();
        frame::rst_stream(stream, code, &mut wire);
        wire
    }

    #[test]
    fn a_request_for_something_else_is_reported_when_it_is_complete() {
        let mut session = server();
        assert!(receive(&mut session, &[get(1, Some("8"), false), data(1, b"four", false)].concat()).is_empty());
        let events = receive(&mut session, &data(1, b"more", true));
        assert!(
            matches!(&events[..], [Event::Request { request: Err(RequestError::Method(_)), .. }, Event::End { .. }]),
            "{events:?}"
        );
        let events = receive(&mut session, &get(3, None, true));
        assert!(matches!(&events[..], [Event::Request { .. }, Event::End { .. }]), "{events:?}");
    }

    #[test]
    fn content_of_another_length_than_announced_resets_the_stream_and_leaves_nothing() {
        for (announced, content) in [("5", "four"), ("3", "four"), ("four", "four"), ("0", "four"), ("1", "")] {
            let mut session = server();
            let wire = [get(1, Some(announced), false), data(1, content.as_bytes(), true)].concat();
            assert!(receive(&mut session, &wire).is_empty(), "{announced}");
            assert_eq!(*session.control(), reset(1, ErrorCode::PROTOCOL_ERROR), "{announced}");
            assert_eq!(session.len(), 0);
        }
    }

    #[test]
    fn an_incomplete_request_that_the_peer_resets_leaves_nothing() {
        let mut session = server();
        assert!(receive(&mut session, &[get(1, None, false), reset(1, ErrorCode::CANCEL)].concat()).is_empty());
        assert_eq!((session.len(), session.control().len()), (0, 0));
    }

    #[test]
    fn fields_that_are_too_large_are_answered_and_leave_nothing() {
        let mut session = server();
        let mut block = vec![0x82, 0x87, 0x84];
        // A value of 4000 bytes goes into the dynamic table, and comes again and again.
        block.extend([&[0x40, 1, b'n', 0x7f, 0xa1, 0x1e][..], &[b'v'; 4000], &[0xbe; 17]].concat());
        let mut wire = Vec::new();
        frame::headers(1, &block, false, 16_384, &mut wire);
        assert!(receive(&mut session, &wire).is_empty());
        assert_eq!(session.len(), 0);
        assert!(session.control().ends_with(&reset(1, ErrorCode::NO_ERROR)), "{:?}", session.control());
    }

    #[test]
    fn what_was_on_its_way_when_we_reset_a_stream_is_ignored_but_not_what_follows_the_peers_reset() {
        let mut session = server();
        let events = receive(&mut session, &connect(1));
        let [Event::Request { key, .. }] = events[..] else { panic!("{events:?}") };
        session.reset(key, ErrorCode::CANCEL);
        session.control().clear();
        receive(&mut session, &data(1, b"late", false));
        assert!(session.control().is_empty());
        receive(&mut session, &[reset(1, ErrorCode::CANCEL), data(1, b"wrong", false)].concat());
        assert_eq!(*session.control(), reset(1, ErrorCode::STREAM_CLOSED));

        session.control().clear();
        receive(&mut session, &[connect(3), reset(3, ErrorCode::CANCEL), data(3, b"wrong", false)].concat());
        assert_eq!(*session.control(), reset(3, ErrorCode::STREAM_CLOSED));
    }
}
