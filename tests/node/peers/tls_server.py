"""A TLS server on a port that shakes hands with whoever comes and says nothing afterwards.

usage: tls_server.py ADDRESS PORT CHAIN KEY READY_FILE
"""
import socket
import ssl
import sys

address, port, chain, key, ready = sys.argv[1:]
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(chain, key)
context.set_alpn_protocols(["h2"])
listener = socket.create_server((address, int(port)))
open(ready, "w").close()
while True:
    connection, _ = listener.accept()
    connection.settimeout(20)
    try:
        with context.wrap_socket(connection, server_side=True) as tls:
            tls.recv(65536)
            tls.recv(65536)
    except OSError:
        # The client found the certificate wanting, as it should.
        pass
