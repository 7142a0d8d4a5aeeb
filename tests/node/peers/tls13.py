"""A client of TLS 1.3 that is neither OpenSSL nor BoringSSL nor rustls, and that breaks its rules one by one. Each case is a
connection of its own. Behind it the client asks for a PING of HTTP/2.

usage: tls13.py JSON    {"to": [host, port], "cert": file, "key": file}
prints {case: "answered", or "alert N", or "closed"}
"""
import json
import os
import socket
import sys

from tlslite.api import HandshakeSettings, TLSConnection, X509CertChain, parsePEMKey
from tlslite.constants import AlertDescription, AlertLevel, ContentType, HandshakeType
from tlslite.errors import TLSAbruptCloseError, TLSLocalAlert, TLSRemoteAlert
from tlslite.messages import Message

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
PING = bytes([0, 0, 8, 6, 0, 0, 0, 0, 0]) + b"tls 1.3!"
PONG = PING[:4] + b"\1" + PING[5:]
# Priority of a stream that does not exist: nobody answers it.
NOTHING = bytes([0, 0, 5, 2, 0, 0, 0, 0, 1, 0, 0, 0, 0, 15])

spec = json.loads(sys.argv[1])
chain, key = X509CertChain(), parsePEMKey(open(spec["key"]).read(), private=True)
chain.parsePemList(open(spec["cert"]).read())


class Client(TLSConnection):
    def __init__(self, **settings):
        raw = socket.create_connection(tuple(spec["to"]), timeout=10)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().__init__(raw)
        self.raw, self.settings, self.held = raw, HandshakeSettings(), None
        self.settings.minVersion = self.settings.maxVersion = (3, 4)
        # This library would compress its certificate although the server has not offered to take that.
        self.settings.certificate_compression_send = []
        for name, value in settings.items():
            setattr(self.settings, name, value)
        self.ignoreAbruptClose = False

    def shake(self):
        self.handshakeClientCert(chain, key, settings=self.settings, alpn=[bytearray(b"h2")])
        return self

    def record(self, kind, data):
        """One protected record."""
        for _ in self._recordLayer.sendRecord(Message(kind, bytearray(data))):
            pass

    def handshake(self, data):
        self.record(ContentType.handshake, data)

    def data(self, data):
        self.record(ContentType.application_data, data)

    def alert(self, *data):
        self.record(ContentType.alert, data)

    def next_key(self):
        session = self.session
        session.cl_app_secret, session.sr_app_secret = self._recordLayer.calcTLS1_3KeyUpdate_reciever(
            session.cipherSuite, session.cl_app_secret, session.sr_app_secret)

    def update(self, request=0):
        self.handshake([24, 0, 0, 1, request])
        self.next_key()

    def sealed(self, inner):
        """A record of these bytes, with their type and padding."""
        return bytes(self._recordLayer._encryptThenSeal(bytearray(inner), ContentType.application_data))

    def plain(self, kind, data):
        """A record as it is on the wire."""
        self.raw.sendall(bytes([kind, 3, 3]) + len(data).to_bytes(2) + bytes(data))


def outcome(client, ask=True):
    seen = b""
    try:
        if ask:
            client.data(PING)
        client.raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)
        while PONG not in seen:
            more = client.read(min=1, max=65536)
            if not more:
                return "closed in order"
            seen += bytes(more)
        return "answered"
    except TLSRemoteAlert as error:
        return f"alert {error.description}"
    except TLSLocalAlert as error:
        return f"error {error}"
    except (TLSAbruptCloseError, OSError):
        return "closed"


CASES = {}


def case(*variants, begin=True, ask=True, **settings):
    def add(function):
        for variant in variants or [()]:
            name = " ".join([function.__name__.replace("_", " "), *map(str, variant if isinstance(variant, tuple) else [variant])])
            CASES[name.strip()] = (function, variant if isinstance(variant, tuple) else (variant,), begin, ask, settings)
        return function
    return add


def run(name):
    function, variant, begin, ask, settings = CASES[name]
    client = Client(**settings)
    try:
        if begin:
            client.shake()
            client.data(PREFACE)
            # All of a case arrives at once. What arrived after the server's last word would reset the connection, and
            # with that the word might be lost.
            client.raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
        function(client, *variant)
    except TLSRemoteAlert as error:
        return f"alert {error.description}"
    except (TLSAbruptCloseError, OSError):
        # The rest of what it sends is not taken; what was said before may be there.
        ask = False
    return outcome(client, ask)


@case()
def nothing_special(c):
    pass


@case("aes128gcm", "aes256gcm", "chacha20-poly1305", begin=False)
def cipher(c, name):
    c.settings.cipherNames = [name]
    c.shake().data(PREFACE)


@case("x25519", "secp256r1", "secp384r1", begin=False)
def group(c, name):
    c.settings.eccCurves, c.settings.keyShares, c.settings.dhGroups = [name], [name], []
    c.shake().data(PREFACE)


@case(begin=False)
def another_group_asked_for(c):
    # No share that the server takes: it asks again (RFC 8446 section 4.1.4).
    c.settings.keyShares, c.settings.dhGroups = [], []
    c.settings.eccCurves = ["secp384r1"]
    c.shake().data(PREFACE)


@case(begin=False)
def tls_12(c):
    c.settings.minVersion = c.settings.maxVersion = (3, 3)
    c.shake()


@case(1, 2, 7, 64, begin=False)
def handshake_in_records_of(c, size):
    c.recordSize = size
    c.shake()
    c.recordSize = 16384
    c.data(PREFACE)


@case(begin=False)
def padded_handshake(c):
    c._recordLayer.padding_cb = lambda length, kind, most: min(most, 300)
    c.shake().data(PREFACE)


def tamper(c, which, change):
    """Changes a message of our side of the handshake before it is sent."""
    real = c._sendMsg

    def send(message, *arguments, **named):
        if getattr(message, "handshakeType", None) == which:
            change(message)
        return real(message, *arguments, **named)
    c._sendMsg = send
    queue = c._queue_message

    def queued(message):
        if getattr(message, "handshakeType", None) == which:
            change(message)
        return queue(message)
    c._queue_message = queued


@case(0, 31, begin=False)
def finished_with_a_wrong_byte(c, place):
    def change(message):
        message.verify_data = bytearray(message.verify_data)
        message.verify_data[place] ^= 1
    tamper(c, HandshakeType.finished, change)
    c.shake()


@case(begin=False)
def finished_too_short(c):
    tamper(c, HandshakeType.finished, lambda message: setattr(message, "verify_data", message.verify_data[:-1]))
    c.shake()


@case(begin=False)
def certificate_verify_with_a_wrong_byte(c):
    def change(message):
        message.signature = bytearray(message.signature)
        message.signature[-1] ^= 1
    tamper(c, HandshakeType.certificate_verify, change)
    c.shake()


@case(begin=False)
def no_certificate(c):
    c.handshakeClientCert(settings=c.settings, alpn=[bytearray(b"h2")])


@case((0, 1), (1, 1), (0, 20), (1, 20), (0, 40), (1, 40))
def key_updates(c, request, count):
    for _ in range(count):
        c.update(request)


@case()
def a_key_update_for_every_four_records(c):
    for _ in range(200):
        c.update(1)
        for _ in range(4):
            c.data(NOTHING)


@case()
def key_update_in_five_records(c):
    for byte in [24, 0, 0, 1, 1]:
        c.handshake([byte])
    c.next_key()


@case()
def data_inside_of_a_key_update(c):
    c.handshake([24, 0])
    c.data(NOTHING)


@case(2, 255)
def key_update_with_value(c, value):
    c.handshake([24, 0, 0, 1, value])


@case(0, 2, 1000)
def key_update_with_length(c, length):
    c.handshake([24, *length.to_bytes(3), *bytes(length)])


@case()
def two_key_updates_in_a_record(c):
    c.handshake([24, 0, 0, 1, 0] * 2)


@case()
def the_old_key_behind_a_key_update(c):
    c.handshake([24, 0, 0, 1, 0])


@case(20, 100)
def empty_records_of_data(c, count):
    for _ in range(count):
        c.data(b"")


@case()
def an_empty_record_of_a_handshake(c):
    c.handshake(b"")


@case(1, 255, 16384)
def padding_of(c, size):
    c._recordLayer.padding_cb = lambda length, kind, most: min(size, 16385 - length)


@case(1, 2, 13)
def messages_in_records_of(c, size):
    for at in range(0, len(NOTHING * 20), size):
        c.data((NOTHING * 20)[at:at + size])


@case(1, 16385)
def nothing_but_padding_of(c, size):
    c.plain(23, c.sealed(bytes(size)))


@case()
def content_of_16384_bytes(c):
    # An unknown frame, which is ignored.
    c.data(((16384 - 9).to_bytes(3) + bytes([0xbe, 0, 0, 0, 0, 0]) + bytes(16384 - 9)))


@case((16385, 0), (16384, 1), (16000, 640))
def content_and_padding_of(c, content, padding):
    c.plain(23, c.sealed(bytes(content) + bytes([23]) + bytes(padding)))


@case(16641, 20000, 65535)
def a_record_of_the_length(c, length):
    c.raw.sendall(bytes([23, 3, 3]) + length.to_bytes(2))


@case(0, 1, 16)
def a_record_that_is_too_short(c, length):
    c.plain(23, bytes(length))


@case(0, 5, 14, -1)
def a_record_with_a_wrong_byte(c, place):
    record = bytearray(c.sealed(NOTHING + bytes([23])))
    record[place] ^= 0x80
    c.plain(23, record)


@case()
def a_record_again(c):
    record = c.sealed(NOTHING + bytes([23]))
    c.plain(23, record)
    c.plain(23, record)


@case()
def change_cipher_spec_behind_the_handshake(c):
    c.plain(20, [1])


@case(21, 22, 24, 255)
def an_unprotected_record_of_type(c, kind):
    c.plain(kind, [2, 40, 0, 0])


@case(0, 20, 24, 25, 255)
def a_protected_record_of_type(c, kind):
    c.plain(23, c.sealed(b"\1" + bytes([kind])))


@case(0, 1, 2, 4, 5, 8, 11, 13, 15, 20, 254)
def a_message_of_type(c, kind):
    c.handshake([kind, 0, 0, 32, *bytes(32)])


@case(ask=False)
def close_notify(c):
    c.alert(1, 0)


@case()
def close_notify_and_more(c):
    c.alert(1, 0)
    c.data(NOTHING)


@case((1, 90), (2, 90), (1, 100), (2, 40), (1, 80), (3, 200))
def alert(c, level, description):
    c.alert(level, description)


@case((), (1,), (1, 0, 0), (1, 90, 1, 90))
def an_alert_of_the_bytes(c, *data):
    c.alert(*data)


print(json.dumps({name: run(name) for name in CASES}))
