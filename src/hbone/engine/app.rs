//! The application's side of a stream: its socket, and what waits for it.

use super::backlog::Backlog;
use super::ended::{CarryError, Ended};
use crate::hbone::carry::Meter;
use crate::hbone::codec::frame::ErrorCode;
use crate::hbone::error::StreamFailure;
use crate::sys::poller::Readiness;
use std::fmt;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::task::Waker;
use std::time::Duration;
use tokio::time::Instant;

/// What belongs to a carried connection and ends with it. It counts the bytes while the connection lasts.
pub trait Owner: Meter + Send {
    /// The connection has ended.
    fn ended(self: Box<Self>, ended: Ended);
}

/// What an engine keeps for a stream.
#[derive(Debug, Default)]
pub struct App {
    /// How far the stream is.
    pub state: State,
    /// The task that waits for the state to change.
    pub waker: Option<Waker>,
    /// Bytes that the application has not taken yet.
    pub backlog: Backlog,
    /// It is in the list of requests, and nobody has taken it yet.
    pub waits: bool,
    /// The peer has sent everything.
    pub peer_ended: bool,
    /// The peer has reset the stream before it was carried.
    pub reset: Option<ErrorCode>,
    /// The application's socket, once there is one.
    pub carried: Option<Box<Carried>>,
}

/// How far a stream is.
#[derive(Debug, Default)]
pub enum State {
    /// It is not answered.
    #[default]
    Asked,
    /// The peer has answered with this status.
    Answered(u16),
    /// It has ended before it was carried.
    Failed(StreamFailure),
}

/// An application's connection that is carried over a stream.
pub struct Carried {
    /// The socket.
    pub socket: TcpStream,
    /// What ends with it.
    pub owner: Box<dyn Owner>,
    /// Bytes may wait to be read.
    pub readable: bool,
    /// There may be room to write.
    pub writable: bool,
    /// The application has ended: reads go on until they return 0 or an error.
    pub hung_up: bool,
    /// The stream waits for its turn to send.
    pub queued: bool,
    /// END_STREAM has been sent, or the peer takes no more.
    pub app_ended: bool,
    /// FIN has been sent to the application, behind all that the peer sent.
    pub shut: bool,
    /// The error with which the application's connection broke.
    pub broken: Option<io::Error>,
    /// It is broken, and its last bytes have a deadline.
    pub giving_up: bool,
    /// How much the tunnel has to send until END_STREAM is out.
    pub end_at: u64,
    /// When the half-closed or broken connection is given up, if nothing happens.
    pub deadline: Option<Instant>,
    /// Bytes that were carried when the deadline was set.
    pub carried_then: u64,
    /// How long a half-closed connection may be silent.
    pub silence: Duration,
}

impl fmt::Debug for Carried {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Carried({:?})", self.socket)
    }
}

/// The result of a read.
#[derive(Debug)]
pub enum Got {
    /// This many bytes.
    Bytes(usize),
    /// Nothing waits.
    Nothing,
    /// The application has ended in order.
    End,
    /// The application's connection has broken, and everything that it had sent has been read.
    Broken,
}

impl Carried {
    /// A connection that is carried from now on.
    pub fn new(socket: TcpStream, owner: Box<dyn Owner>, silence: Duration) -> Self {
        Self {
            socket,
            owner,
            readable: true,
            writable: true,
            hung_up: false,
            queued: false,
            app_ended: false,
            shut: false,
            broken: None,
            giving_up: false,
            end_at: 0,
            deadline: None,
            carried_then: 0,
            silence,
        }
    }

    /// Takes note of what the poller reports.
    pub fn note(&mut self, ready: Readiness) {
        self.readable |= ready.readable;
        self.writable |= ready.writable;
        self.hung_up |= ready.hung_up;
        if ready.broken
            && let Ok(Some(error)) | Err(error) = self.socket.take_error()
        {
            self.break_with(error);
        }
    }

    /// Records an error. Only the first one counts. What the application had sent before can still be read.
    pub fn break_with(&mut self, error: io::Error) {
        self.broken.get_or_insert(error);
        (self.readable, self.hung_up) = (true, true);
    }

    /// Reads into `slices`, which have room for `room` bytes.
    pub fn read(&mut self, slices: &mut [IoSliceMut<'_>], room: usize) -> Got {
        loop {
            let read = if let [one] = slices { (&self.socket).read(one) } else { (&self.socket).read_vectored(slices) };
            return match read {
                Ok(0) if self.broken.is_some() => Got::Broken,
                Ok(0) => {
                    self.readable = false;
                    Got::End
                }
                Ok(length) => {
                    // A short read means that nothing is left, unless the end is all that is left.
                    self.readable = length >= room || self.hung_up;
                    Got::Bytes(length)
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.readable = false;
                    Got::Nothing
                }
                Err(error) => {
                    self.break_with(error);
                    Got::Broken
                }
            };
        }
    }

    /// Writes as much as fits; returns how much that was.
    pub fn write(&mut self, slices: &[IoSlice<'_>]) -> usize {
        let all: usize = slices.iter().map(|slice| slice.len()).sum();
        if !self.writable || self.broken.is_some() || all == 0 {
            return 0;
        }
        loop {
            let written = match slices {
                [one] => (&self.socket).write(one),
                [one, rest @ ..] if rest.iter().all(|slice| slice.is_empty()) => (&self.socket).write(one),
                many => (&self.socket).write_vectored(many),
            };
            return match written {
                Ok(length) => {
                    self.writable = length == all;
                    length
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.writable = false;
                    0
                }
                Err(error) => {
                    self.break_with(error);
                    0
                }
            };
        }
    }

    /// Sends FIN to the application. A socket whose other side is gone cannot be shut down and does not need to be.
    pub fn shut(&mut self) {
        self.shut = true;
        match self.socket.shutdown(Shutdown::Write) {
            Err(error) if error.kind() != io::ErrorKind::NotConnected => self.break_with(error),
            _ => {}
        }
    }

    /// The error with which it broke.
    pub fn error(&mut self) -> CarryError {
        CarryError::App(self.broken.take().unwrap_or_else(|| io::ErrorKind::ConnectionReset.into()))
    }
}
