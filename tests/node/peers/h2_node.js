// An HBONE client and server made of Node's http2.
//
// usage: h2_node.js client HOST CA CHAIN KEY AUTHORITY STREAMS BYTES   sends BYTES on each of STREAMS to an application that
//            echoes them, and prints "same N" with the number of streams on which they came back
//        h2_node.js server HOST CA CHAIN KEY READY_FILE   echoes what comes on each CONNECT stream
const crypto = require("node:crypto");
const fs = require("node:fs");
const http2 = require("node:http2");

const [role, host, ca, cert, key, ...rest] = process.argv.slice(2);
const files = {
  ca: fs.readFileSync(ca), cert: fs.readFileSync(cert), key: fs.readFileSync(key), minVersion: "TLSv1.3",
  // Neither the windows nor the frames of the standard, and a small table.
  // In MB. What is written and not sent counts, and Node resets its own streams beyond that.
  maxSessionMemory: 1000,
  settings: { initialWindowSize: 100_000, maxFrameSize: 100_000, headerTableSize: 100 },
};

if (role === "client") {
  const [authority, streams, bytes] = rest;
  const content = crypto.randomBytes(Number(bytes));
  let [open, same] = [Number(streams), 0];
  const session = http2.connect(`https://${host}:15008`, { ...files, checkServerIdentity: () => undefined });
  session.on("error", (error) => { console.log(error); process.exit(1); });
  for (let number = open; number > 0; number--) {
    const stream = session.request({ ":method": "CONNECT", ":authority": authority });
    const pieces = [];
    stream.on("response", (headers) => {
      if (headers[":status"] === 200) stream.end(content);
    });
    stream.on("data", (piece) => pieces.push(piece));
    stream.on("error", (error) => console.log(error));
    stream.on("close", () => {
      same += Buffer.concat(pieces).equals(content) ? 1 : 0;
      if (--open === 0) {
        console.log("same", same);
        session.close();
      }
    });
  }
} else {
  const server = http2.createSecureServer({ ...files, requestCert: true, rejectUnauthorized: true });
  server.on("stream", (stream, headers) => {
    stream.on("error", () => {});
    if (headers[":method"] !== "CONNECT") return stream.respond({ ":status": 405 }, { endStream: true });
    stream.respond({ ":status": 200 });
    stream.pipe(stream);
  });
  server.listen(15008, host, () => fs.writeFileSync(rest[0], ""));
}
