"""An HBONE server that refuses every stream with REFUSED_STREAM, and counts tunnels and streams: prints "tunnels N streams M"
at each change.

usage: refusing.py ADDRESS PORT CHAIN KEY READY_FILE
"""
import socket
import ssl
import struct
import sys
import threading

address, port, chain, key, ready = sys.argv[1:]
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(chain, key)
context.set_alpn_protocols(["h2"])
count, lock = {"tunnels": 0, "streams": 0, "closed": 0}, threading.Lock()


def add(what):
    with lock:
        count[what] += 1
        print(*(f"{name} {n}" for name, n in count.items()), flush=True)


def serve(connection):
    try:
        with context.wrap_socket(connection, server_side=True) as tls:
            tls.sendall(bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
            data, skipped = b"", False
            while True:
                new = tls.recv(65536)
                if not new:
                    break
                data += new
                if not skipped:
                    if len(data) < 24:
                        continue
                    data, skipped = data[24:], True
                while len(data) >= 9 and len(data) >= 9 + int.from_bytes(data[:3]):
                    length, kind, flags, stream = int.from_bytes(data[:3]), data[3], data[4], data[5:9]
                    payload, data = data[9:9 + length], data[9 + length:]
                    if kind == 1:
                        add("streams")
                        tls.sendall(b"\0\0\4\3\0" + stream + struct.pack(">I", 7))
                    elif kind == 4 and not flags & 1:
                        tls.sendall(bytes([0, 0, 0, 4, 1, 0, 0, 0, 0]))
                    elif kind == 6 and not flags & 1:
                        tls.sendall(b"\0\0\x08\6\1\0\0\0\0" + payload)
    except OSError:
        pass
    add("closed")


listener = socket.create_server((address, int(port)))
open(ready, "w").close()
while True:
    accepted, _ = listener.accept()
    add("tunnels")
    threading.Thread(target=serve, args=(accepted,), daemon=True).start()
