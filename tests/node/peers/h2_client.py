"""A client made of the library h2: sends bytes on several streams at once to an application that echoes them.

usage: h2_client.py JSON
  {"to": [host, port], "ca": file, "cert": file, "key": file, "authority": text,
   "streams": n, "bytes": of each stream, "chunk": largest DATA frame,
   "settings": {number: value}, "changes": [{number: value}...] one after the other, while bytes flow,
   "goaway": whether it goes away in the middle, "hold": streams that are opened besides and left open}
prints {"answers": [status or "reset CODE" of each stream], "same": whether all came back, "held": [the same of those]}
"""
import json
import random
import socket
import ssl
import sys

import h2.config
import h2.connection
import h2.events
import h2.settings
from h2_loop import Loop, frame

GOAWAY = 7


def connect(spec):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(spec["ca"])
    context.load_cert_chain(spec["cert"], spec["key"])
    context.set_alpn_protocols(["h2"])
    raw = socket.create_connection(tuple(spec["to"]), timeout=20)
    tls = context.wrap_socket(raw)
    connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
    values = {int(name): value for name, value in spec.get("settings", {}).items()}
    connection.local_settings = h2.settings.Settings(client=True, initial_values=values)
    connection.initiate_connection()
    return Loop(tls, connection)


class Client:
    def __init__(self, spec):
        self.spec, self.loop = spec, connect(spec)
        self.connection, self.random = self.loop.connection, random.Random(7)
        self.answers, self.received, self.sent, self.ended = {}, {}, {}, set()
        self.changes, self.settled, self.gone = list(spec.get("changes", [])), True, False
        self.content = self.random.randbytes(spec["bytes"])

    def open(self):
        stream = self.connection.get_next_available_stream_id()
        # New names and values for each stream, so that the dynamic table fills and entries are evicted.
        more = [(f"x-{stream % 7}", f"{self.random.getrandbits(400):x}") for _ in range(3)]
        self.connection.send_headers(stream, [(":method", "CONNECT"), (":authority", self.spec["authority"])] + more)
        return stream

    def take(self, event):
        stream = getattr(event, "stream_id", None)
        if isinstance(event, h2.events.ResponseReceived):
            self.answers[stream] = int(dict(event.headers)[":status"])
        elif isinstance(event, h2.events.DataReceived):
            self.received.setdefault(stream, bytearray()).extend(event.data)
            if stream not in self.ended:
                self.connection.acknowledge_received_data(event.flow_controlled_length, stream)
        elif isinstance(event, h2.events.StreamReset):
            self.answers.setdefault(stream, f"reset {int(event.error_code)}")
            self.ended.add(stream)
        elif isinstance(event, h2.events.StreamEnded):
            self.ended.add(stream)
        elif isinstance(event, h2.events.SettingsAcknowledged):
            self.settled = True
        elif isinstance(event, h2.events.ConnectionTerminated):
            raise EOFError(f"goaway {event.error_code}")

    def send(self, stream):
        """Sends one frame, if the windows take it."""
        at = self.sent[stream]
        pad = self.random.choice([None, None, 0, self.random.randrange(256)])
        room = self.connection.local_flow_control_window(stream) - (0 if pad is None else pad + 1)
        size = min(self.random.randrange(1, self.spec["chunk"] + 1), len(self.content) - at, room)
        size = min(size, self.connection.max_outbound_frame_size - 256)
        if size <= 0:
            return
        self.sent[stream] = at + size
        end = self.sent[stream] == len(self.content)
        self.connection.send_data(stream, self.content[at:at + size], end_stream=end, pad_length=pad)

    def change(self):
        total = sum(len(data) for data in self.received.values())
        half = total * 2 > self.spec["bytes"] * self.spec["streams"]
        if self.changes and self.settled and total:
            self.settled = False
            self.connection.update_settings({int(name): value for name, value in self.changes.pop(0).items()})
        if self.spec.get("goaway") and half and not self.gone:
            self.gone = True
            self.loop.raw(frame(GOAWAY, 0, 0, bytes(8)))

    def run(self):
        while not self.settled or not self.connection.remote_settings.max_concurrent_streams < 2**31:
            for event in self.loop.step():
                self.take(event)
        # h2 would not open a stream beyond the limit.
        self.connection.remote_settings[3] = 2**31 - 1
        self.connection.remote_settings.acknowledge()
        held = [self.open() for _ in range(self.spec.get("hold", 0))]
        own = [self.open() for _ in range(self.spec["streams"])]
        # That of the streams that are held, too.
        answered = set(held + own)
        self.sent = dict.fromkeys(own, 0)
        while not (all(stream in self.ended for stream in own) and answered <= self.answers.keys()):
            for stream in own:
                if self.answers.get(stream) == 200 and self.sent[stream] < len(self.content):
                    if stream not in self.ended and len(self.loop.out) < 1 << 20:
                        self.send(stream)
            self.loop.take()
            for event in self.loop.step():
                self.take(event)
            self.change()
        same = all(self.received.get(stream) == self.content for stream in own if self.answers[stream] == 200)
        return {
            "answers": [self.answers[stream] for stream in own], "same": same,
            "held": [self.answers.get(stream) for stream in held],
        }


print(json.dumps(Client(json.loads(sys.argv[1])).run()))
