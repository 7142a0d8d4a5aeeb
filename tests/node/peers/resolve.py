"""Resolves each name given by Python's standard library and prints its addresses in order on one line."""

import socket
import sys

for name in sys.argv[1:]:
    try:
        found = sorted({info[4][0] for info in socket.getaddrinfo(name, 80, type=socket.SOCK_STREAM)})
    except socket.gaierror:
        found = ["none"]
    print(name, *found)
