"""Counts frames on an interface that hold a text in clear, until SIGTERM; then prints the count as JSON.

usage: sniff.py INTERFACE TEXT READY_FILE
"""
import json
import signal
import socket
import struct
import sys
import time

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


def ends(frame):
    """From whom to whom a frame of TCP goes."""
    at = 14
    if frame[12:14] == b"\x08\x00":
        family, source, length = socket.AF_INET, frame[at + 12 : at + 16], (frame[at] & 15) * 4
        target = frame[at + 16 : at + 20]
    else:
        family, source, target, length = socket.AF_INET6, frame[at + 8 : at + 24], frame[at + 24 : at + 40], 40
    ports = struct.unpack("!HH", frame[at + length : at + length + 4])
    source, target = socket.inet_ntop(family, source), socket.inet_ntop(family, target)
    return f"{time.strftime('%H:%M:%S')} {source} {ports[0]} to {target} {ports[1]}"


frames = found = 0
examples = []
while True:
    try:
        frame = sniffer.recv(1 << 18)
    except TimeoutError:
        # Stopped, and nothing under way any more.
        if stopped:
            break
        continue
    frames += 1
    if text in frame:
        found += 1
        if len(examples) < 8:
            examples.append(ends(frame))
# PACKET_STATISTICS (packet(7)): what was received, and what was lost because nobody took it in time.
_, dropped = struct.unpack("II", sniffer.getsockopt(263, 6, 8))
print(json.dumps({"frames": frames, "found": found, "dropped": dropped, "examples": examples}), flush=True)
