"""Receives the results of tasks by webhook and believes only what codeq has signed.

    python webhook_receiver.py SECRET [PORT]

SECRET is the server's ``webhookHmacSecret``. A task created with
``"webhook": "http://HOST:PORT/done"`` has its result sent here when it ends. To try it on one
machine start the server with ``WEBHOOKS_ALLOW_PRIVATE_NETWORKS=true WEBHOOK_HMAC_SECRET=SECRET``.
"""

import hashlib
import hmac
import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

AGE_MAX_SECONDS = 300  # an old request that somebody has recorded is worth nothing
BODY_BYTES_MAX = 8 << 20

secret = sys.argv[1].encode()
seen: set[str] = set()  # results come at least once; a real receiver keeps this in its database


def is_from_codeq(timestamp: str, signature: str, body: bytes) -> bool:
    if not timestamp.isdecimal() or abs(time.time() - int(timestamp)) > AGE_MAX_SECONDS:
        return False
    expected = hmac.new(secret, timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()
    return hmac.compare_digest(expected.encode(), signature.encode())  # in constant time


class Receiver(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        length = int(self.headers.get("content-length", "0"))
        if length > BODY_BYTES_MAX:
            self.answer(413)
            return
        body = self.rfile.read(length)
        timestamp = self.headers.get("X-CodeQ-Timestamp", "")
        if not is_from_codeq(timestamp, self.headers.get("X-CodeQ-Signature", ""), body):
            self.answer(401)
            return
        result = json.loads(body)
        if result["taskId"] not in seen:
            seen.add(result["taskId"])
            print(result["eventType"], result["status"], result["result"], flush=True)
        self.answer(204)  # any 2xx; without it codeq tries again

    def answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Silent: what counts is printed above."""


server = ThreadingHTTPServer(
    ("127.0.0.1", int(sys.argv[2]) if len(sys.argv) > 2 else 8001), Receiver
)
print("listening on port", server.server_port, flush=True)
server.serve_forever()
