//! One pipe per thread, through which the bytes of large transfers go from one TCP socket to another without being
//! copied (splice(2)). It is empty between two passes: what the receiver does not take at once is read out of it. So no
//! connection holds the pipe, however long its receiver does not read, and one is enough.

use super::scratch::{PassError, SCRATCH_BYTES};
use bytes::Bytes;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::unistd::pipe2;
use std::cell::RefCell;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use tokio::io::Interest;
use tokio::net::TcpStream;

/// Size of a pipe. It has a slot for each 4 KiB, and each piece of a received packet takes a slot, however small it is:
/// 128 of them hold a pass also if each is a packet of a network without large packets.
const PIPE_BYTES: i32 = 512 * 1024;

/// How many passes are made without a pipe before another one is asked for, after there was none to be had.
const ASK_EVERY: u32 = 1024;

thread_local! {
    static PIPE: RefCell<Place> = const { RefCell::new(Place::Empty { ask_in: 0 }) };
}

/// Where a thread keeps its pipe.
#[derive(Debug)]
enum Place {
    /// The pipe, which is empty.
    Pipe(Pipe),
    /// None has been made, or none could be: too few file descriptors, or too much memory in pipes of this user.
    Empty { ask_in: u32 },
    /// The kernel does not splice, or does not let us.
    Unsupported,
}

#[derive(Debug)]
struct Pipe {
    reader: File,
    writer: OwnedFd,
}

/// Passes on bytes that wait, through the thread's pipe, as [`super::scratch::pass_now`] does and as many. `None`: there
/// is no pipe, or it has nothing to say. Only a read tells what that means, because splice(2) also stops before urgent
/// data, and says then what it says if nothing is there.
pub fn pass_through_pipe(from: &TcpStream, to: &TcpStream) -> Result<Option<(usize, Bytes)>, PassError> {
    PIPE.with_borrow_mut(|place| {
        let Some(pipe) = place.take() else { return Ok(None) };
        let length = match pipe.fill(from) {
            Ok(length) => length,
            // No error of a socket is one of these.
            Err(Errno::EINVAL | Errno::ENOSYS) => {
                *place = Place::Unsupported;
                return Ok(None);
            }
            Err(error) => {
                *place = Place::Pipe(pipe);
                return Err(PassError::From(error.into()));
            }
        };
        // After an error, the pipe is closed with what is left in it.
        let rest = pipe.empty(length, to).map_err(PassError::To)?;
        *place = Place::Pipe(pipe);
        Ok((length > 0).then_some((length, rest)))
    })
}

impl Place {
    /// Takes the pipe out, or makes one.
    fn take(&mut self) -> Option<Pipe> {
        match std::mem::replace(self, Self::Empty { ask_in: 0 }) {
            Self::Pipe(pipe) => Some(pipe),
            Self::Empty { ask_in: 0 } => {
                let pipe = Pipe::of_size(PIPE_BYTES).ok();
                if pipe.is_none() {
                    *self = Self::Empty { ask_in: ASK_EVERY };
                }
                pipe
            }
            Self::Empty { ask_in } => {
                *self = Self::Empty { ask_in: ask_in - 1 };
                None
            }
            Self::Unsupported => {
                *self = Self::Unsupported;
                None
            }
        }
    }
}

impl Pipe {
    /// A pipe of this size in bytes. Beyond what one user may have in pipes, the kernel makes only tiny ones, and refuses
    /// to enlarge them.
    fn of_size(bytes: i32) -> io::Result<Self> {
        let (reader, writer) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC)?;
        fcntl(&writer, FcntlArg::F_SETPIPE_SZ(bytes))?;
        // A call that moves nothing fails where splicing is not permitted, before it may take an error from a socket.
        splice(&reader, None, &writer, None, 0, SpliceFFlags::empty())?;
        Ok(Self { reader: reader.into(), writer })
    }

    /// Moves bytes that wait in a socket into the pipe. The runtime is not told if there are none: it would wait for
    /// more, and urgent data may be there.
    fn fill(&self, from: &TcpStream) -> nix::Result<usize> {
        match splice(from, None, &self.writer, None, SCRATCH_BYTES, SpliceFFlags::SPLICE_F_NONBLOCK) {
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(0),
            other => other,
        }
    }

    /// Moves the pipe's `left` bytes to a socket. Returns those for which it has no room.
    fn empty(&self, mut left: usize, to: &TcpStream) -> io::Result<Bytes> {
        while left > 0 {
            // The number of bytes is exact: if more were asked for, kernels could wait for more before they send.
            let flags = SpliceFFlags::SPLICE_F_NONBLOCK;
            match to.try_io(Interest::WRITABLE, || Ok(splice(&self.reader, None, to, None, left, flags)?)) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(moved) => left = left.saturating_sub(moved),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        let mut rest = vec![0; left];
        (&self.reader).read_exact(&mut rest)?;
        Ok(rest.into())
    }
}

/// What tests of other modules ask for.
#[cfg(test)]
pub mod testing {
    use super::*;

    /// Whether this thread has used a pipe.
    pub fn has_pipe() -> bool {
        PIPE.with_borrow(|place| matches!(place, Place::Pipe(_)))
    }

    /// Makes this thread have no pipe, as if the kernel did not splice.
    pub fn forbid() {
        PIPE.set(Place::Unsupported);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::leg::Leg;
    use crate::sys::socket::reset_on_close;
    use socket2::SockRef;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let far = listener.accept().await.unwrap().0;
        for socket in [&near, &far] {
            socket.writable().await.unwrap();
        }
        (near, far)
    }

    /// Bytes that show where they belong.
    fn pattern(length: usize, first: usize) -> Vec<u8> {
        (first..first + length).map(|n| u8::try_from(n % 251).unwrap()).collect()
    }

    /// A socket at which these bytes wait, and the one that has sent them.
    async fn with_waiting(bytes: &[u8]) -> (TcpStream, TcpStream) {
        let (mut client, from) = pair().await;
        SockRef::from(&from).set_recv_buffer_size(1 << 20).unwrap();
        client.write_all(bytes).await.unwrap();
        Leg::new(&client).drained().await;
        (client, from)
    }

    /// Passes bytes on as they are, and leaves none behind.
    async fn passes_exactly(bytes: &[u8]) {
        let ((_client, from), (to, mut server)) = (with_waiting(bytes).await, pair().await);
        let (length, rest) = pass_through_pipe(&from, &to).unwrap().unwrap();
        assert_eq!((length, rest.len()), (bytes.len(), 0));
        let mut received = vec![0; length];
        server.read_exact(&mut received).await.unwrap();
        assert_eq!(received, bytes);
    }

    #[tokio::test]
    async fn what_the_receiver_does_not_take_does_not_stay_in_the_pipe() {
        let bytes = pattern(SCRATCH_BYTES, 0);
        let ((_client, from), (to, mut server)) = (with_waiting(&bytes).await, pair().await);
        SockRef::from(&server).set_recv_buffer_size(4096).unwrap();
        SockRef::from(&to).set_send_buffer_size(4096).unwrap();
        let (length, rest) = pass_through_pipe(&from, &to).unwrap().unwrap();
        assert_eq!(length, bytes.len());
        assert!(!rest.is_empty() && rest.len() < length, "{} bytes", rest.len());
        passes_exactly(&pattern(1000, 7)).await;
        let mut taken = vec![0; length - rest.len()];
        server.read_exact(&mut taken).await.unwrap();
        assert_eq!([&taken[..], &rest].concat(), bytes);
    }

    #[tokio::test]
    async fn what_a_broken_receiver_was_to_get_is_gotten_by_nobody() {
        let ((_client, from), (to, server)) = (with_waiting(&pattern(1000, 0)).await, pair().await);
        reset_on_close(&server);
        drop(server);
        let passed = pass_through_pipe(&from, &to);
        assert!(matches!(passed, Err(PassError::To(_))), "{passed:?}");
        passes_exactly(&pattern(1000, 7)).await;
    }

    #[tokio::test]
    async fn a_reset_sender_is_an_error_and_all_else_is_for_a_read_to_tell() {
        let ((client, from), (to, _server)) = (pair().await, pair().await);
        assert!(pass_through_pipe(&from, &to).unwrap().is_none(), "nothing is there");
        SockRef::from(&client).shutdown(std::net::Shutdown::Write).unwrap();
        from.readable().await.unwrap();
        assert!(pass_through_pipe(&from, &to).unwrap().is_none(), "the end");
        let (client, from) = pair().await;
        reset_on_close(&client);
        drop(client);
        from.readable().await.unwrap();
        let passed = pass_through_pipe(&from, &to);
        assert!(matches!(passed, Err(PassError::From(_))), "{passed:?}");
        assert!(testing::has_pipe());
    }

    #[test]
    fn a_pipe_that_was_not_to_be_had_is_asked_for_again() {
        assert!(Pipe::of_size(i32::MAX).is_err(), "beyond what anyone may have");
        let mut place = Place::Empty { ask_in: 2 };
        assert_eq!([place.take().is_some(), place.take().is_some(), place.take().is_some()], [false, false, true]);
        place = Place::Unsupported;
        assert!(place.take().is_none() && place.take().is_none());
    }
}
