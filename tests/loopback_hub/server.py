"""The Hub over HTTP/1.1: one thread a connection, a log of requests, and faults where tests ordered them."""

from __future__ import annotations

import json
import re
import socket
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import sleep  # tests that replace time.sleep do not mean this one
from typing import Any

from loopback_hub import catalogue, contents, pulls  # noqa: F401 - they register their endpoints
from loopback_hub.faults import Fault, Faults
from loopback_hub.messages import Body, Call, HubError, Request, Response, User, answer
from loopback_hub.routing import dispatch
from loopback_hub.state import HubState


class LoopbackHub(HubState):
    """A Hub on 127.0.0.1: `start` it, fill it with `create`, let clients talk to `url`, look at `requests`."""

    def __init__(self, port: int = 0) -> None:
        self.requests: list[Request] = []
        """All requests since `clear`, in the order in which they came."""
        self.errors: list[str] = []
        """Tracebacks of the server's own bugs, which it answers with 501, a status that no client retries."""
        self.faults = Faults()
        self._port = port
        self._server: _Server | None = None
        super().__init__()

    @property
    def url(self) -> str:
        """The endpoint, for ``HF_ENDPOINT``."""
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> LoopbackHub:
        """Listens, after `stop` again on the same port."""
        if self._server is not None:
            return self
        self._server = _Server(("127.0.0.1", self._port), self)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True, name="loopback-hub").start()
        return self

    def stop(self) -> None:
        """Goes away: closes the port and every connection, also in the middle of an answer."""
        if self._server is not None:
            server, self._server = self._server, None
            server.shutdown()
            server.server_close()
            server.hang_up()

    def clear(self) -> None:
        """Back to an empty Hub without log, faults and users."""
        super().clear()
        self.faults.clear()
        self.requests.clear()
        self.errors.clear()

    def seen(self, pattern: str = "", method: str | None = None) -> list[Request]:
        """Logged requests whose target (path and query) has ``pattern`` in it."""
        return [r for r in self.requests if method in (None, r.method) and re.search(pattern, r.target)]

    def bytes_served(self, pattern: str = "") -> int:
        """Bytes of bodies that were sent for requests whose target has ``pattern`` in it."""
        return sum(request.sent for request in self.seen(pattern))

    def fail(
        self, pattern: str, status: int, *, headers: Mapping[str, str] | None = None, body: bytes = b"", **order: Any
    ) -> Fault:
        """Answers the next matching request with an error; ``times``, ``skip``, ``method`` as in `Fault`."""
        return self.faults.order(Fault(pattern, status=status, headers=headers or {}, body=body, **order))

    def delay(self, pattern: str, seconds: float, **order: Any) -> Fault:
        """Waits before every matching answer."""
        return self.faults.order(Fault(pattern, delay=seconds, **{"times": None, **order}))

    def truncate(self, pattern: str, keep: int, **order: Any) -> Fault:
        """Closes the connection after ``keep`` bytes of a body that promised more."""
        return self.faults.order(Fault(pattern, keep=keep, **{"method": "GET", **order}))

    def drop(self, pattern: str, **order: Any) -> Fault:
        """Closes the connection without an answer."""
        return self.faults.order(Fault(pattern, drop=True, **order))

    def wrong_etag(self, pattern: str, etag: str = "0" * 40, **order: Any) -> Fault:
        """Answers with another ETag than the content has."""
        return self.faults.order(Fault(pattern, etag=etag, **order))

    def corrupt(self, pattern: str, **order: Any) -> Fault:
        """Answers with the right length and other bytes."""
        return self.faults.order(Fault(pattern, corrupt=True, **{"method": "GET", **order}))

    def call(self, pattern: str, action: Callable[[], object], **order: Any) -> Fault:
        """Runs ``action`` when a matching request comes, before it is answered; `stop` for example."""
        return self.faults.order(Fault(pattern, action=action, **order))


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], hub: LoopbackHub) -> None:
        self.hub = hub
        self._connections: set[socket.socket] = set()
        super().__init__(address, _Handler)

    @contextmanager
    def connected(self, connection: socket.socket) -> Iterator[None]:
        self._connections.add(connection)
        try:
            yield
        finally:
            self._connections.discard(connection)

    def hang_up(self) -> None:
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def handle(self) -> None:
        with self.server.connected(self.connection), suppress(OSError):
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:
        """The log is `LoopbackHub.requests`."""

    def _serve(self) -> None:
        hub = self.server.hub
        sender = self.headers.get("Authorization")
        request = Request(self.command, self.path, self.headers.get("Range"), authorized=sender is not None)
        hub.requests.append(request)
        wait, fault = hub.faults.strike(self.command, self.path)
        sleep(wait)
        if fault and fault.action:
            fault.action()
        if fault and fault.drop:
            self.close_connection = True
            return
        body = Body(self.rfile, self.headers)
        if fault and fault.status:
            response = Response(fault.status, dict(fault.headers), fault.body)
        else:
            response = self._answer(hub, body, sender)
        for _ in body.pieces():
            pass
        self._send(request, response, fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _answer(self, hub: LoopbackHub, body: Body, sender: str | None) -> Response:
        try:
            user = self._user(hub, sender)
            return dispatch(hub, Call(self.command, self.path, self.headers, body, user, hub.url))
        except HubError as error:
            return answer({"error": error.message}, error.status, error.headers)
        except OSError:
            raise
        except Exception:
            hub.errors.append(f"{self.command} {self.path}\n{traceback.format_exc()}")
            return answer({"error": traceback.format_exc()}, 501)

    def _user(self, hub: LoopbackHub, sender: str | None) -> User | None:
        if sender is None or self.path.startswith(("/cdn/", "/lfs/")):
            return None
        token = sender.removeprefix("Bearer ")
        if token not in hub.users:
            raise HubError(401, None, "Invalid credentials in Authorization header")
        return hub.users[token]

    def _send(self, request: Request, response: Response, fault: Fault | None) -> None:
        headers = {**response.headers, "Content-Length": str(response.length)}
        if fault and fault.etag:
            headers.update({name: f'"{fault.etag}"' for name in ("ETag", "X-Linked-Etag") if name in headers})
        request.status = response.status
        self.send_response(response.status, HTTPStatus(response.status).phrase)
        for name, value in headers.items():
            # A file's name stands in some of them, and may hold anything.
            self.send_header(name, json.dumps(value)[1:-1].replace('\\"', '"'))
        self.end_headers()
        if self.command == "HEAD":
            return
        left = response.length if fault is None or fault.keep is None else min(fault.keep, response.length)
        for piece in response.pieces():
            piece = piece[:left]
            left -= len(piece)
            # Counted before it is sent: a test that has read the last byte finds it in the log.
            request.sent += len(piece)
            self.wfile.write(bytes(255 - byte for byte in piece) if fault and fault.corrupt else piece)
            if left == 0:
                break
        if fault and fault.keep is not None:
            self.wfile.flush()
            self.close_connection = True
