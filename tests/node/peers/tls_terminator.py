"""Carries TLS connections with HTTP/2 to a plain TCP server on the loopback address, for h2specd, which asks for no
certificate. The server's port is in a file, which may change.

usage: tls_terminator.py ADDRESS PORT CA CHAIN KEY PORT_FILE READY_FILE
"""
import asyncio
import ssl
import sys

address, port, ca, chain, key, port_file, ready = sys.argv[1:]
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_verify_locations(ca)
context.load_cert_chain(chain, key)
context.verify_mode = ssl.CERT_REQUIRED
context.set_alpn_protocols(["h2"])


async def pump(reader, writer, begun):
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
        begun.set()


async def pump_frames(reader, writer, back, begun):
    """Answers PING, which h2specd does not do: it takes every frame for the answer to what it sent."""
    try:
        writer.write(await reader.readexactly(24))
        while True:
            head = await reader.readexactly(9)
            payload = await reader.readexactly(int.from_bytes(head[:3]))
            if head[3] == 6 and not head[4] & 1:
                # One comes at the beginning. Behind the server's SETTINGS, which has to be its first frame, h2specd is not
                # in the middle of another one.
                await begun.wait()
                back.write(head[:4] + bytes([1]) + head[5:] + payload)
            else:
                writer.write(head + payload)
                await writer.drain()
    except asyncio.IncompleteReadError:
        pass


async def serve(reader, writer):
    writers = [writer]
    try:
        with open(port_file) as file:
            plain_reader, plain_writer = await asyncio.open_connection("127.0.0.1", int(file.read()))
        writers.append(plain_writer)
        begun = asyncio.Event()
        there = asyncio.ensure_future(pump_frames(reader, plain_writer, writer, begun))
        pumps = [there, asyncio.ensure_future(pump(plain_reader, writer, begun))]
        # The end of one direction is the end of both.
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        # Bytes that nobody read would turn the end into a reset, and what the client said last would be lost.
        plain_writer.write_eof()
        async with asyncio.timeout(3):
            while await plain_reader.read(65536):
                pass
    except (OSError, TimeoutError):
        # What the server sees is that its connection is closed.
        pass
    for each in writers:
        each.close()


async def main():
    server = await asyncio.start_server(serve, address, int(port), ssl=context)
    open(ready, "w").close()
    await server.serve_forever()


asyncio.run(main())
