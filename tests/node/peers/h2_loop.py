"""What peers made of the library h2 have in common: a TLS socket that is read and written without waiting for either, and
header blocks that are cut into many frames.
"""
import select
import ssl

HEADERS, CONTINUATION = 1, 9
END_HEADERS, PADDED, PRIORITY = 4, 8, 0x20
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def frame(kind, flags, stream, payload=b""):
    return len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload


def cut_headers(data, size=20):
    """Frames with each block of headers in frames of `size` bytes, the first of them with padding and a priority."""
    out = b""
    if data.startswith(PREFACE):
        out, data = PREFACE, data[len(PREFACE):]
    while data:
        end = 9 + int.from_bytes(data[:3])
        head, payload, kind, flags, stream = data[:9], data[9:end], data[3], data[4], int.from_bytes(data[5:9])
        data = data[end:]
        if kind != HEADERS or not flags & END_HEADERS or flags & (PADDED | PRIORITY):
            out += head + payload
            continue
        pieces = [payload[at:at + size] for at in range(0, len(payload), size)]
        first = bytes([7]) + bytes(4) + bytes([15]) + pieces[0] + bytes(7)
        last = len(pieces) == 1
        out += frame(HEADERS, flags & ~END_HEADERS | PADDED | PRIORITY | (END_HEADERS if last else 0), stream, first)
        for number, piece in enumerate(pieces[1:], 2):
            out += frame(CONTINUATION, END_HEADERS if number == len(pieces) else 0, stream, piece)
    return out


class Loop:
    """One connection. `step` does I/O and returns events."""

    def __init__(self, tls, connection):
        self.tls, self.connection, self.out = tls, connection, b""
        tls.setblocking(False)

    def raw(self, data):
        """Sends a frame of which h2 does not know."""
        self.take()
        self.out += data

    def take(self):
        self.out += cut_headers(self.connection.data_to_send())

    def step(self, timeout=20):
        self.take()
        wanted = [self.tls] if self.out else []
        if not self.tls.pending():
            ready = select.select([self.tls], wanted, [], timeout)
            if not (ready[0] or ready[1]):
                raise TimeoutError(f"nothing for {timeout} seconds")
        try:
            while self.out:
                self.out = self.out[self.tls.send(self.out[:1 << 18]):]
        except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
            pass
        try:
            data = self.tls.recv(1 << 18)
        except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
            return []
        if not data:
            raise EOFError("closed")
        events = self.connection.receive_data(data)
        self.take()
        return events
