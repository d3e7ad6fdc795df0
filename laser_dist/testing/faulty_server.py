"""An HTTP server that fails in the ways servers fail."""

import socket
import struct
import threading
from collections import Counter, defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class FaultyServer:
    """Serves a folder over HTTP; `faults[name]` are what the next requests for a file meet, one after the other."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.requests: Counter = Counter()
        self.released = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        name = request.path.rsplit("/", 1)[1]
        self.requests[name] += 1
        fault = self.faults[name].pop(0) if self.faults[name] else ""
        path = self.folder / name
        if fault.isdigit() or not path.is_file():
            return request.send_error(int(fault or 404))
        content = path.read_bytes()
        if fault == "stall":  # an answer that never comes
            self.released.wait(20)
            return None
        if fault == "altered":
            content = content[:600] + bytes([content[600] ^ 1]) + content[601:]
        request.send_response(200)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if fault == "truncated":
            content = content[: len(content) // 2]
        elif fault == "reset":
            request.wfile.write(content[: len(content) // 2])
            request.wfile.flush()
            # Linger 0: the connection ends with a reset instead of an orderly close.
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return request.connection.close()
        elif fault == "stall within":
            request.wfile.write(content[: len(content) // 2])
            request.wfile.flush()
            self.released.wait(20)
            return None
        elif fault == "trickle":
            for byte in content:
                if self.released.wait(0.05):
                    return None
                request.wfile.write(bytes([byte]))
                request.wfile.flush()
        request.wfile.write(content)
        return None

    def close(self) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()
