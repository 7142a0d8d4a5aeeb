"""A raw HTTP/2 client over mutual TLS that is not culvert's own stack: sends what it is told, says what came back.

With "until_goaway": FILE it makes that file when the requests are done and waits for GOAWAY.

usage: h2_connect.py JSON
  {"to": [host, port], "ca": file, "cert": file|null, "key": file|null, "requests": [{"headers": [[name, value]...], "send": text, "early": text sent before the answer}]}
  A request without "send" ends with its headers.
prints {"tls": "ok", "results": [{"status": n|null, "body": text, "reset": code|null}]} or {"tls": error}
"""
import json
import socket
import ssl
import sys

import h2.config
import h2.connection
import h2.events


def main(spec):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(spec["ca"])
    context.set_alpn_protocols(["h2"])
    if spec["cert"]:
        context.load_cert_chain(spec["cert"], spec["key"])
    try:
        raw = socket.create_connection(tuple(spec["to"]), timeout=20)
        tls = context.wrap_socket(raw)
        config = h2.config.H2Configuration(
            client_side=True, header_encoding="utf-8", validate_outbound_headers=False, normalize_outbound_headers=False)
        connection = h2.connection.H2Connection(config)
        connection.initiate_connection()
        tls.sendall(connection.data_to_send())
        # With TLS 1.3 the server's refusal of a certificate arrives with the first read.
        pump(tls, connection)
    except (OSError, EOFError) as error:
        return {"tls": repr(error)}
    results = [request(tls, connection, r) for r in spec["requests"]]
    if spec.get("until_goaway"):
        open(spec["until_goaway"], "w").close()
        return {"tls": "ok", "results": results, "goaway": goaway(tls)}
    return {"tls": "ok", "results": results}


def goaway(tls):
    """Waits for GOAWAY (RFC 9113 6.8) and gives its code; read off the frames, as h2 takes none after it."""
    data = b""
    while True:
        data += tls.recv(65536)
        while len(data) >= 9 and len(data) >= 9 + int.from_bytes(data[:3]):
            length, kind = int.from_bytes(data[:3]), data[3]
            if kind == 7:
                return int.from_bytes(data[13:17])
            data = data[9 + length:]


def pump(tls, connection):
    data = tls.recv(65536)
    if not data:
        raise EOFError("closed")
    events = connection.receive_data(data)
    tls.sendall(connection.data_to_send())
    return events


def request(tls, connection, spec):
    stream = connection.get_next_available_stream_id()
    result = {"status": None, "body": "", "reset": None}
    try:
        connection.send_headers(stream, [tuple(h) for h in spec["headers"]], end_stream="send" not in spec)
        if spec.get("early"):
            connection.send_data(stream, spec["early"].encode())
        tls.sendall(connection.data_to_send())
        while True:
            for event in pump(tls, connection):
                if getattr(event, "stream_id", stream) != stream:
                    continue
                if isinstance(event, h2.events.ResponseReceived):
                    result["status"] = int(dict(event.headers)[":status"])
                    if result["status"] == 200:
                        connection.send_data(stream, spec["send"].encode(), end_stream=True)
                        tls.sendall(connection.data_to_send())
                elif isinstance(event, h2.events.DataReceived):
                    result["body"] += event.data.decode()
                    connection.acknowledge_received_data(event.flow_controlled_length, stream)
                elif isinstance(event, h2.events.StreamReset):
                    result["reset"] = int(event.error_code)
                    return result
                elif isinstance(event, h2.events.StreamEnded):
                    return result
                elif isinstance(event, h2.events.ConnectionTerminated):
                    result["reset"] = int(event.error_code)
                    return result
    except (OSError, EOFError) as error:
        result["error"] = repr(error)
        return result


print(json.dumps(main(json.loads(sys.argv[1]))))
