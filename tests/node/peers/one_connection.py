"""Makes one connection, and holds it until it ends or for at most 2 seconds. Before that it puts the port of a URL into a file.

usage: one_connection.py PORT_FILE ADDRESS URL
"""
import socket
import sys

port_file, address, url = sys.argv[1:]
with open(port_file, "w") as file:
    file.write(url.rstrip("/").rpartition(":")[2])
connection = socket.create_connection((address, 80), timeout=2)
try:
    connection.sendall(b"hello\n")
    while connection.recv(65536):
        pass
except OSError:
    pass
