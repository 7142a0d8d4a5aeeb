"""An HBONE server on a TLS 1.3 library that is neither OpenSSL nor BoringSSL nor rustls. It echoes what comes on each stream.

usage: tls13_server.py ADDRESS CHAIN KEY READY_FILE HOW
HOW:
  tickets: sends many tickets, in between too      updates: updates its key often and asks for the client's next one
  padding: pads every record                       tiny: sends its handshake and its data in records of a few bytes
  hello, request, finished, certificate: sends such a message behind the handshake
  flood: updates its key without end               split: leaves a key update unfinished and sends data
  mac: changes a byte of a record                  large: sends too much in a record
  alert: a fatal alert                             plain: a record without protection
Prints the alert with which the client ends the connection: "alert N", "closed in order" or "closed".
"""
import socket
import sys
import threading

import h2.config
import h2.connection
import h2.events
from tlslite.api import HandshakeSettings, TLSConnection, X509CertChain, parsePEMKey
from tlslite.constants import ContentType
from tlslite.errors import TLSAbruptCloseError, TLSLocalAlert, TLSRemoteAlert
from tlslite.messages import Message

address, chain_file, key_file, ready, how = sys.argv[1:]
chain, key = X509CertChain(), parsePEMKey(open(key_file).read(), private=True)
chain.parsePemList(open(chain_file).read())
TICKET = bytes([4, 0, 0, 30]) + bytes([0, 0, 1, 0, 1, 2, 3, 4, 1, 9, 0, 15]) + bytes(15) + bytes([0, 0]) + b"\0"
MESSAGES = {"hello": 0, "request": 13, "finished": 20, "certificate": 11}


class Server(TLSConnection):
    def record(self, kind, data):
        for _ in self._recordLayer.sendRecord(Message(kind, bytearray(data))):
            pass

    def update(self, request):
        self.record(ContentType.handshake, [24, 0, 0, 1, request])
        session = self.session
        session.cl_app_secret, session.sr_app_secret = self._recordLayer.calcTLS1_3KeyUpdate_reciever(
            session.cipherSuite, session.cl_app_secret, session.sr_app_secret)

    def odd(self):
        """What is wrong or unusual, before each answer."""
        layer = self._recordLayer
        if how == "tickets":
            self.record(ContentType.handshake, TICKET * 3)
            self.record(ContentType.handshake, TICKET[:7])
            self.record(ContentType.handshake, TICKET[7:])
        elif how == "updates":
            self.update(1)
        elif how in MESSAGES:
            self.record(ContentType.handshake, [MESSAGES[how], 0, 0, 32, *bytes(32)])
        elif how == "flood":
            # In one piece: what arrived behind the alert would be answered with a reset.
            self.raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
            for _ in range(40):
                self.update(0)
            self.raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)
        elif how == "split":
            self.record(ContentType.handshake, [24, 0])
        elif how == "alert":
            self.record(ContentType.alert, [2, 80])
        elif how == "plain":
            self.raw.sendall(bytes([22, 3, 3, 0, 4, 0, 0, 0, 0]))
        elif how in ("mac", "large"):
            inner = bytearray([0] * (20_000 if how == "large" else 20) + [23])
            sealed = bytearray(layer._encryptThenSeal(inner, ContentType.application_data))
            sealed[0] ^= how == "mac"
            self.raw.sendall(bytes([23, 3, 3]) + len(sealed).to_bytes(2) + sealed)


def echo(tls):
    connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="utf-8"))
    connection.initiate_connection()
    waits, ended, answers = {}, set(), 0
    while True:
        # Not an empty record: behind what is wrong it would be answered with a reset, and the alert might be lost.
        if out := connection.data_to_send():
            tls.write(out)
        data = tls.read(min=1, max=65536)
        if not data:
            return print("closed in order", flush=True)
        for event in connection.receive_data(bytes(data)):
            if isinstance(event, h2.events.RequestReceived):
                connection.send_headers(event.stream_id, [(":status", "200")])
                waits[event.stream_id] = b""
            elif isinstance(event, h2.events.DataReceived):
                waits[event.stream_id] += event.data
                connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, h2.events.StreamEnded):
                ended.add(event.stream_id)
        for stream in list(waits):
            while size := min(connection.local_flow_control_window(stream), len(waits[stream]), 16384):
                connection.send_data(stream, waits[stream][:size])
                waits[stream] = waits[stream][size:]
                answers += 1
                if how not in ("tickets", "updates") or answers % 40 == 1:
                    tls.write(connection.data_to_send())
                    tls.odd()
            if stream in ended and not waits[stream]:
                connection.end_stream(stream)
                del waits[stream]


def serve(raw):
    tls = Server(raw)
    tls.raw, settings = raw, HandshakeSettings()
    settings.minVersion = settings.maxVersion = (3, 4)
    settings.certificate_compression_send = []
    if how == "tickets":
        settings.ticketKeys, settings.ticket_count = [bytearray(32)], 5
    if how == "padding":
        tls._recordLayer.padding_cb = lambda length, kind, most: min(max(most, 0), 1000)
    if how == "tiny":
        tls.recordSize = 9
    tls.ignoreAbruptClose = False
    try:
        tls.handshakeServer(certChain=chain, privateKey=key, reqCert=True, settings=settings, alpn=[bytearray(b"h2")])
        echo(tls)
    except TLSRemoteAlert as error:
        print("alert", error.description, flush=True)
    except TLSLocalAlert as error:
        print("error", error, flush=True)
    except (TLSAbruptCloseError, OSError):
        print("closed", flush=True)


listener = socket.create_server((address, 15008))
open(ready, "w").close()
while True:
    accepted, _ = listener.accept()
    accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    threading.Thread(target=serve, args=(accepted,), daemon=True).start()
