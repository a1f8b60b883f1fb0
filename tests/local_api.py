"""What the stand-ins for an HTTP API have in common: they answer in JSON, and keep quiet."""

import json
from http.server import BaseHTTPRequestHandler


class JsonHandler(BaseHTTPRequestHandler):
    def reply(self, body: bytes) -> dict:
        """What to answer to this body. For the subclass."""
        raise NotImplementedError

    def do_POST(self) -> None:
        content = json.dumps(self.reply(self.rfile.read(int(self.headers["Content-Length"])))).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *given) -> None:
        pass
