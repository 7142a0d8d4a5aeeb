"""Counts frames on an interface that hold a text in clear, until SIGTERM; then prints the count as JSON.

usage: sniff.py INTERFACE TEXT READY_FILE
"""
import json
import signal
import socket
import struct
import sys

interface, text, ready = sys.argv[1], sys.argv[2].encode(), sys.argv[3]
sniffer = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
sniffer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 26)
sniffer.bind((interface, 0))
sniffer.settimeout(0.1)
stopped = False


def stop(*_):
    global stopped
    stopped = True


signal.signal(signal.SIGTERM, stop)
open(ready, "w").close()
frames = found = 0
while True:
    try:
        frame = sniffer.recv(1 << 18)
    except TimeoutError:
        # Stopped, and nothing under way any more.
        if stopped:
            break
        continue
    frames += 1
    found += text in frame
# PACKET_STATISTICS (packet(7)): what was received, and what was lost because nobody took it in time.
_, dropped = struct.unpack("II", sniffer.getsockopt(263, 6, 8))
print(json.dumps({"frames": frames, "found": found, "dropped": dropped}), flush=True)
