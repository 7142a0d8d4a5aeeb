//! Frames that carry no bytes of a stream: settings, windows, resets and GOAWAY.

use super::receive::SessionError;
use super::{Event, Role, Session, WINDOW_MAX};
use crate::hbone::codec::frame::{self, ErrorCode};

impl<A> Session<A> {
    pub(super) fn settings(&mut self, settings: &[(u16, u32)], events: &mut Vec<Event>) -> Result<(), SessionError> {
        let mut window = None;
        for (name, value) in settings {
            match *name {
                // Only the last one counts: nothing is sent between them.
                frame::INITIAL_WINDOW_SIZE => window = Some(*value),
                frame::MAX_FRAME_SIZE => self.peer_frame = *value as usize,
                frame::MAX_CONCURRENT_STREAMS => self.peer_streams = *value,
                _ => {}
            }
        }
        if let Some(window) = window {
            let change = i64::from(window) - i64::from(self.peer_window);
            self.peer_window = window;
            for (_, stream) in &mut self.streams {
                stream.send_window += change;
                if stream.send_window > WINDOW_MAX {
                    let what = "SETTINGS that make a stream's window too large";
                    return Err(SessionError::rule(ErrorCode::FLOW_CONTROL_ERROR, what));
                }
            }
            if change > 0 {
                events.push(Event::RoomForAll);
            }
        }
        if !self.settings_received {
            self.settings_received = true;
            events.push(Event::Settled);
            if self.role == Role::Client && !settings.iter().any(|(name, _)| *name == frame::MAX_CONCURRENT_STREAMS) {
                self.peer_streams = u32::MAX;
            }
        }
        frame::settings_ack(&mut self.control);
        Ok(())
    }

    pub(super) fn window_update(
        &mut self,
        id: u32,
        increment: u32,
        events: &mut Vec<Event>,
    ) -> Result<(), SessionError> {
        if id == 0 {
            let had_none = self.send_window <= 0;
            self.send_window += i64::from(increment);
            if self.send_window > WINDOW_MAX {
                let what = "WINDOW_UPDATE that makes the connection's window too large";
                return Err(SessionError::rule(ErrorCode::FLOW_CONTROL_ERROR, what));
            }
            if had_none && self.send_window > 0 {
                events.push(Event::RoomForAll);
            }
            return Ok(());
        }
        let Some(key) = self.by_id.get(&id).copied() else {
            if self.is_idle(id) {
                let what = "WINDOW_UPDATE on a stream that was never opened";
                return Err(SessionError::rule(ErrorCode::PROTOCOL_ERROR, what));
            }
            return Ok(());
        };
        let Some(stream) = self.streams.get_mut(key) else { return Ok(()) };
        let had_none = stream.send_window <= 0;
        stream.send_window += i64::from(increment);
        if stream.send_window > WINDOW_MAX {
            return self.stream_error(id, ErrorCode::FLOW_CONTROL_ERROR, events);
        }
        if had_none && stream.send_window > 0 {
            events.push(Event::Room { key });
        }
        Ok(())
    }

    pub(super) fn peer_reset(&mut self, id: u32, code: ErrorCode, events: &mut Vec<Event>) -> Result<(), SessionError> {
        // What follows the peer's own reset was not on its way when we reset the stream (RFC 9113 section 5.1).
        self.remembered.retain(|remembered| *remembered != id);
        let Some(key) = self.by_id.get(&id).copied() else {
            if self.is_idle(id) {
                let what = "RST_STREAM on a stream that was never opened";
                return Err(SessionError::rule(ErrorCode::PROTOCOL_ERROR, what));
            }
            return Ok(());
        };
        let Some(stream) = self.streams.get_mut(key) else { return Ok(()) };
        let (answered, over) = (stream.answered, stream.is_over());
        (stream.local_ended, stream.remote_ended) = (true, true);
        if self.role == Role::Server && !answered {
            self.count_reset()?;
        }
        if !over {
            self.tell_reset(key, code, events);
        }
        Ok(())
    }

    pub(super) fn peer_goes_away(&mut self, last: u32, events: &mut Vec<Event>) {
        if self.role == Role::Client {
            let last = self.peer_last.map_or(last, |before| before.min(last));
            self.peer_last = Some(last);
            for (key, stream) in &mut self.streams {
                if stream.id > last && !stream.is_over() {
                    (stream.local_ended, stream.remote_ended) = (true, true);
                    // A stream that was answered may have carried something, so it must not be tried again.
                    let reset = Event::Reset { key, code: ErrorCode::REFUSED_STREAM };
                    events.push(if stream.answered { reset } else { Event::Unprocessed { key } });
                }
            }
        }
        events.push(Event::GoAway);
    }
}
