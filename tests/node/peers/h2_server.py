"""An HBONE server made of the library h2. What it does with a stream depends on the port that is asked for:

  9000: echoes
  9001: the same, and GOAWAY behind the first bytes; the stream goes on
  9002: refuses the first stream on each tunnel with GOAWAY, as one that it will never act on
  9003: echoes, and changes its settings all the time
  9100 + CODE: echoes 4 bytes and resets with CODE

usage: h2_server.py JSON    {"address", "ca", "cert", "key", "ready": file to make, "settings": {number: value}}
"""
import json
import random
import socket
import ssl
import sys
import threading

import h2.config
import h2.connection
import h2.events
import h2.settings
from h2_loop import Loop, frame

RST, GOAWAY = 3, 7
LAST = (2**31 - 1).to_bytes(4)
CHANGES = [{4: 0}, {4: 70_000}, {5: 1_000_000}, {4: 7}, {4: 65_535, 5: 16_384}, {1: 0}, {1: 65_536}]

spec = json.loads(sys.argv[1])
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(spec["cert"], spec["key"])
context.load_verify_locations(spec["ca"])
context.verify_mode = ssl.CERT_REQUIRED
context.set_alpn_protocols(["h2"])
# Tunnels on which port 9002 was refused.
refused = 0


class Server:
    def __init__(self, tls):
        self.connection = h2.connection.H2Connection(
            h2.config.H2Configuration(client_side=False, header_encoding="utf-8"))
        values = {int(name): value for name, value in spec["settings"].items()}
        self.connection.local_settings = h2.settings.Settings(client=False, initial_values=values)
        self.connection.initiate_connection()
        self.loop, self.random = Loop(tls, self.connection), random.Random(7)
        self.ports, self.waits, self.ended, self.going = {}, {}, set(), False
        self.settled, self.changes = False, 0

    def take(self, event):
        stream = getattr(event, "stream_id", None)
        if isinstance(event, h2.events.RequestReceived):
            self.request(stream, int(dict(event.headers)[":authority"].rpartition(":")[2]))
        elif isinstance(event, h2.events.DataReceived):
            if stream in self.ports:
                self.waits[stream] += event.data
                self.connection.acknowledge_received_data(event.flow_controlled_length, stream)
        elif isinstance(event, h2.events.StreamEnded):
            self.ended.add(stream)
        elif isinstance(event, h2.events.StreamReset):
            self.ports.pop(stream, None)
        elif isinstance(event, h2.events.SettingsAcknowledged):
            self.settled = True
            if self.connection.local_settings.initial_window_size < 100:
                # Without a window nothing arrives that would lead to the next change.
                self.change()

    def request(self, stream, port):
        global refused
        if port == 9002 and refused < 3:
            refused += 1
            self.loop.raw(frame(GOAWAY, 0, 0, (stream - 2 if stream > 1 else 0).to_bytes(4) + bytes(4)))
            raise EOFError
        more = [(f"x-{n}", f"{self.random.getrandbits(400):x}") for n in range(3)]
        self.connection.send_headers(stream, [(":status", "103"), ("link", "nothing")])
        self.connection.send_headers(stream, [(":status", "200")] + more)
        self.ports[stream], self.waits[stream] = port, b""

    def send(self, stream):
        port, waits = self.ports[stream], self.waits[stream]
        if port >= 9100 and waits:
            self.connection.send_data(stream, waits[:4])
            self.loop.raw(frame(RST, 0, stream, (port - 9100).to_bytes(4)))
            self.connection.reset_stream(stream)
            # That one was for h2's own books.
            self.connection.clear_outbound_data_buffer()
            self.ports.pop(stream)
            return
        pad = self.random.choice([None, None, 0, self.random.randrange(256)])
        room = self.connection.local_flow_control_window(stream) - (0 if pad is None else pad + 1)
        size = min(room, len(waits), self.random.randrange(1, 60_000), self.connection.max_outbound_frame_size - 256)
        if size > 0:
            self.connection.send_data(stream, waits[:size], pad_length=pad)
            self.waits[stream] = waits[size:]
            if port == 9001 and not self.going:
                self.going = True
                self.loop.raw(frame(GOAWAY, 0, 0, LAST + bytes(4)))
            if port == 9003 and self.settled:
                self.change()
        elif not waits and stream in self.ended:
            self.connection.end_stream(stream)
            self.ports.pop(stream)

    def change(self):
        self.connection.update_settings(CHANGES[self.changes % len(CHANGES)])
        self.settled, self.changes = False, self.changes + 1

    def run(self):
        try:
            while True:
                # As long as something can be sent, nothing is waited for.
                for event in self.loop.step(60):
                    self.take(event)
                before = None
                while before != self.waits and len(self.loop.out) < 1 << 20:
                    before = dict(self.waits)
                    for stream in list(self.ports):
                        self.send(stream)
                    self.loop.take()
        except EOFError:
            while self.loop.out:
                self.loop.out = self.loop.out[self.loop.tls.send(self.loop.out):]
            self.loop.tls.close()


def serve(raw):
    try:
        Server(context.wrap_socket(raw, server_side=True)).run()
    except OSError as error:
        print(repr(error), flush=True)


listener = socket.create_server((spec["address"], 15008))
open(spec["ready"], "w").close()
while True:
    accepted, _ = listener.accept()
    threading.Thread(target=serve, args=(accepted,), daemon=True).start()
