"""A server that answers as vLLM's OpenAI server does, of a model that is in the same process."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Stub(BaseHTTPRequestHandler):
    """A test's own subclass answers completions; `spoil` may change what it says."""

    names = ("it",)
    spoil = staticmethod(lambda found: found)

    def complete(self, asked):
        raise NotImplementedError

    def log_message(self, *_):
        pass

    def reply(self, answer, status=200):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def do_GET(self):
        self.reply({"data": [{"id": name} for name in self.names]})

    def do_POST(self):
        self.complete(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))


@contextmanager
def answering(handler):
    """The address under which it does."""
    running = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()
