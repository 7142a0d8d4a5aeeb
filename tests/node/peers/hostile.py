"""A peer with a valid certificate that speaks HTTP/2 by hand, to misuse it. Says what it does in lines, and ends when its work is
done or by a signal.

usage: hostile.py JSON
  {"to": [host, port], "ca": file, "cert": file, "key": file, "do": KIND, ...}

KIND, and what it takes:
  flood {"frame": NAME, "seconds": n}: the same control frame without end; prints "cut" or "not cut" with how many were sent
  unread {"authority", "tunnels", "streams"}: asks on each stream for much, opens all windows and never reads; prints "asked"
  upload {"authority", "tunnels", "streams", "bytes"}: sends so much on each stream, as far as windows go; prints "sent"
  small {"authority", "other", "frames", "bytes"}: so many frames to an application that does not read; then asks `other`
        on the same tunnel; prints "answered" or how the tunnel ended
  idle {"tunnels"}: prints "open N" of those that still are when all have been opened
  break {"how": NAME}: breaks a rule of HTTP/2; prints "goaway CODE" or "closed"
  wait: prints how its tunnel ends: "goaway CODE" or "closed"
"""
import json
import select
import signal
import socket
import ssl
import struct
import sys
import time

import hpack

DATA, HEADERS, PRIORITY, RST, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 2, 3, 4, 6, 7, 8
MAX_WINDOW = 2**31 - 1


def frame(kind, flags=0, stream=0, payload=b""):
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


FLOODS = {
    "ping": frame(PING, 0, 0, b"01234567"),
    "ping-ack": frame(PING, 1, 0, b"01234567"),
    "settings": frame(SETTINGS),
    "priority": frame(PRIORITY, 0, 1, b"\0\0\0\0\x10"),
    "window-update": frame(WINDOW_UPDATE, 0, 0, b"\0\0\0\1"),
    "unknown": frame(0xBE, 0, 0, b"x" * 16),
}


class Tunnel:
    def __init__(self, spec, grant=MAX_WINDOW - 65535):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.load_verify_locations(spec["ca"])
        context.load_cert_chain(spec["cert"], spec["key"])
        context.set_alpn_protocols(["h2"])
        raw = socket.create_connection(tuple(spec["to"]), timeout=20)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.tls = context.wrap_socket(raw)
        settings = struct.pack(">HI", 4, MAX_WINDOW)
        grant = frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", grant))
        self.tls.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0, settings) + grant)
        self.encoder, self.decoder, self.buffer = hpack.Encoder(), hpack.Decoder(), b""
        self.window, self.streams, self.initial, self.frame_max, self.next = 65535, {}, 65535, 16384, 1

    def connect(self, authority, end=False):
        stream, self.next = self.next, self.next + 2
        block = self.encoder.encode([(":method", "CONNECT"), (":authority", authority)])
        self.tls.sendall(frame(HEADERS, 4 | (1 if end else 0), stream, block))
        self.streams[stream] = self.initial
        return stream

    def read(self, timeout=20):
        """The next frame; what it says of windows is taken."""
        self.tls.settimeout(timeout)
        while len(self.buffer) < 9 or len(self.buffer) < 9 + int.from_bytes(self.buffer[:3]):
            data = self.tls.recv(65536)
            if not data:
                raise EOFError("closed")
            self.buffer += data
        length, kind, flags = int.from_bytes(self.buffer[:3]), self.buffer[3], self.buffer[4]
        stream, payload = int.from_bytes(self.buffer[5:9]), self.buffer[9:9 + length]
        self.buffer = self.buffer[9 + length:]
        if kind == WINDOW_UPDATE:
            if stream:
                self.streams[stream] = self.streams.get(stream, 0) + int.from_bytes(payload)
            else:
                self.window += int.from_bytes(payload)
        elif kind == SETTINGS and not flags & 1:
            for at in range(0, len(payload), 6):
                name, value = struct.unpack(">HI", payload[at:at + 6])
                if name == 1:
                    self.encoder.header_table_size = value
                elif name == 4:
                    for known in self.streams:
                        self.streams[known] += value - self.initial
                    self.initial = value
                elif name == 5:
                    self.frame_max = value
            self.tls.sendall(frame(SETTINGS, 1))
        elif kind == PING and not flags & 1:
            self.tls.sendall(frame(PING, 1, 0, payload))
        return kind, flags, stream, payload

    def status(self, wanted):
        """Reads until a stream is answered."""
        while True:
            kind, _, stream, payload = self.read()
            if kind == HEADERS:
                headers = dict(self.decoder.decode(payload))
                if stream == wanted:
                    return int(headers[":status"])
            elif kind == RST and stream == wanted:
                return f"reset {int.from_bytes(payload)}"
            elif kind == GOAWAY:
                return f"goaway {int.from_bytes(payload[4:8])}"

    def send(self, stream, payload):
        """Sends as much as the windows take; gives how much that was."""
        size = min(len(payload), self.window, self.streams[stream])
        out = b"".join(frame(DATA, 0, stream, payload[at:min(at + 16384, size)]) for at in range(0, size, 16384))
        self.tls.settimeout(20)
        self.tls.sendall(out)
        self.window -= size
        self.streams[stream] -= size
        return size

    def drain(self):
        """Reads frames that are there."""
        while self.tls.pending() or self.buffer or select.select([self.tls], [], [], 0.05)[0]:
            try:
                self.read(0.05)
            except TimeoutError:
                return


def say(*words):
    print(*words, flush=True)


def until_told():
    signal.pause()


def flood(spec):
    tunnel = Tunnel(spec, 1)
    tunnel.drain()
    chunk, sent, end = FLOODS[spec["frame"]] * 1000, 0, time.monotonic() + spec["seconds"]
    tunnel.tls.setblocking(False)
    say("begins")
    try:
        while time.monotonic() < end:
            ready = select.select([tunnel.tls], [tunnel.tls], [], 0.1)
            if ready[0]:
                try:
                    if not tunnel.tls.recv(65536):
                        raise EOFError
                except ssl.SSLWantReadError:
                    pass
            if ready[1]:
                try:
                    sent += tunnel.tls.send(chunk)
                except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
                    pass
        say("not cut", sent)
    except (OSError, EOFError):
        say("cut", sent)


def unread(spec):
    tunnels = []
    for _ in range(spec["tunnels"]):
        try:
            tunnel = Tunnel(spec)
            tunnel.drain()
            for _ in range(spec["streams"]):
                # Not waiting for the answer: it would have to be read.
                tunnel.send(tunnel.connect(spec["authority"]), b"go\n")
            tunnels.append(tunnel)
        except (OSError, EOFError) as error:
            say("lost", repr(error))
    say("asked", len(tunnels))
    until_told()


def upload(spec):
    tunnels, total, lost = [], 0, 0
    chunk = b"x" * (1 << 20)
    for _ in range(spec["tunnels"]):
        try:
            tunnel = Tunnel(spec)
            tunnels.append(tunnel)
            tunnel.drain()
            for _ in range(spec["streams"]):
                stream, left = tunnel.connect(spec["authority"]), spec["bytes"]
                if tunnel.status(stream) != 200:
                    continue
                while left > 0:
                    sent = tunnel.send(stream, chunk[:left])
                    left -= sent
                    total += sent
                    tunnel.drain()
                    if sent == 0:
                        break
        except (OSError, EOFError):
            lost += 1
    say("sent", total, "lost", lost)
    until_told()


def small(spec):
    tunnel = Tunnel(spec)
    tunnel.drain()
    stream = tunnel.connect(spec["authority"])
    assert tunnel.status(stream) == 200
    piece = frame(DATA, 0, stream, b"m" * spec["bytes"]) * 100
    try:
        for _ in range(spec["frames"] // 100):
            tunnel.tls.sendall(piece)
            while tunnel.tls.pending() or select.select([tunnel.tls], [], [], 0)[0]:
                tunnel.read()
        other = tunnel.connect(spec["other"])
        status = tunnel.status(other)
        if status != 200:
            return say(status)
        tunnel.tls.sendall(frame(DATA, 1, other, b"hello\n"))
        while True:
            kind, _, stream, payload = tunnel.read()
            if kind == DATA and stream == other and payload:
                say("answered")
                return until_told()
            if kind == GOAWAY:
                return say("goaway", int.from_bytes(payload[4:8]))
    except (OSError, EOFError) as error:
        say("lost", repr(error))


def idle(spec):
    tunnels = []
    for _ in range(spec["tunnels"]):
        try:
            tunnels.append(Tunnel(spec))
        except (OSError, EOFError):
            pass
    still = 0
    for tunnel in tunnels:
        try:
            tunnel.drain()
            still += 1
        except (OSError, EOFError):
            pass
    say("open", still)
    until_told()


def heads(tunnel, count, end):
    """HEADERS of so many streams, each followed by what `end` gives for it."""
    for _ in range(count):
        stream, tunnel.next = tunnel.next, tunnel.next + 2
        block = tunnel.encoder.encode([(":method", "CONNECT"), (":authority", "10.0.0.1:80")])
        yield frame(HEADERS, 4, stream, block) + end(stream)


BREAKS = {
    "hpack": lambda t: frame(HEADERS, 4, 1, b"\xfe"),
    "window_overflow": lambda t: frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", MAX_WINDOW)),
    "bad_frame": lambda t: frame(DATA, 0, 0, b"x"),
    "continuation_flood": lambda t: frame(HEADERS, 0, 1, b"\x82") + frame(9, 0, 1, b"") * 1000,
    "rapid_reset": lambda t: b"".join(heads(t, 2000, lambda stream: frame(RST, 0, stream, struct.pack(">I", 8)))),
}


def break_(spec):
    tunnel = Tunnel(spec)
    tunnel.drain()
    try:
        tunnel.tls.settimeout(20)
        tunnel.tls.sendall(BREAKS[spec["how"]](tunnel))
        while True:
            kind, _, _, payload = tunnel.read()
            if kind == GOAWAY:
                return say("goaway", int.from_bytes(payload[4:8]))
    except (OSError, EOFError):
        say("closed")


def wait(spec):
    tunnel = Tunnel(spec)
    if spec.get("authority"):
        stream = tunnel.connect(spec["authority"])
        say("status", tunnel.status(stream))
    try:
        while True:
            kind, _, _, payload = tunnel.read(60)
            if kind == GOAWAY:
                say("goaway", int.from_bytes(payload[4:8]))
            elif kind == RST:
                say("reset", int.from_bytes(payload))
    except (OSError, EOFError):
        say("closed")


spec = json.loads(sys.argv[1])
{"flood": flood, "unread": unread, "upload": upload, "small": small, "idle": idle, "break": break_, "wait": wait}[spec["do"]](spec)
