"""Carries plain TCP connections to a TLS server, for programs that have no client certificate.

usage: tls_adaptor.py LISTEN_PORT TO_ADDRESS TO_PORT CA CHAIN KEY READY_FILE
"""
import asyncio
import ssl
import sys

port, host, to, ca, chain, key, ready = sys.argv[1:]
context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
context.check_hostname = False
context.load_verify_locations(ca)
context.load_cert_chain(chain, key)
context.set_alpn_protocols(["h2"])


async def pump(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()


async def serve(reader, writer):
    writers = [writer]
    try:
        tls_reader, tls_writer = await asyncio.open_connection(host, int(to), ssl=context)
        writers.append(tls_writer)
        pumps = [asyncio.ensure_future(pump(reader, tls_writer)), asyncio.ensure_future(pump(tls_reader, writer))]
        # TLS has no half-closed connections here: the end of one direction is the end of both.
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        # Bytes that nobody read would turn the end into a reset, and what the server said last would be lost.
        writer.write_eof()
        async with asyncio.timeout(3):
            while await reader.read(65536):
                pass
    except (OSError, TimeoutError):
        # What the program sees is that its connection is closed.
        pass
    for each in writers:
        each.close()


async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", int(port))
    open(ready, "w").close()
    await server.serve_forever()


asyncio.run(main())
