//! One read buffer per thread, borrowed for a single read, so that an idle connection holds no buffer.

use bytes::Bytes;
use std::cell::RefCell;
use std::io;
use tokio::net::TcpStream;

/// Size of the buffer, and so of the largest single read. With the 9-byte header of an HTTP/2 frame it fills exactly
/// eight TLS records.
pub const SCRATCH_BYTES: usize = 128 * 1024 - 9;

thread_local! {
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; SCRATCH_BYTES].into_boxed_slice());
}

/// Which socket failed while bytes were copied from one to the other.
#[derive(Debug)]
pub enum PassError {
    /// The socket that is read.
    From(io::Error),
    /// The socket that is written.
    To(io::Error),
}

/// Reads the waiting bytes and writes as many of them as fit, without waiting. Returns the number of bytes read, and
/// those of them that could not be written yet.
pub fn pass_now(from: &TcpStream, to: &TcpStream) -> Result<(usize, Bytes), PassError> {
    SCRATCH.with_borrow_mut(|scratch| {
        let length = from.try_read(scratch).map_err(PassError::From)?;
        let mut rest = scratch.get(..length).unwrap_or_default();
        while !rest.is_empty() {
            match to.try_write(rest) {
                Ok(written) => rest = rest.get(written..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(PassError::To(error)),
            }
        }
        Ok((length, Bytes::copy_from_slice(rest)))
    })
}

/// Writes all bytes, waiting for room as needed.
pub async fn write_all(to: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match to.try_write(bytes) {
            Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => to.writable().await?,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
