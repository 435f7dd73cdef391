"""A request as the endpoints see it, and what they answer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from email.message import Message
from functools import cached_property
from io import BufferedIOBase
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from loopback_hub.repositories import PIECE, Blob


class HubError(Exception):
    """An answer that says no, in the headers that the client reads."""

    def __init__(self, status: int, code: str | None, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}


class Moved(Exception):
    """The repository has another name now; the answer is a redirect to the same request under that name."""

    def __init__(self, old: str, new: str) -> None:
        super().__init__(new)
        self.old, self.new = old, new


@dataclass(frozen=True)
class User:
    """Who sends a request. An administrator may read and write everything."""

    name: str
    organizations: tuple[str, ...] = ()
    administrator: bool = False

    def owns(self, namespace: str) -> bool:
        """Whether the user may write there."""
        return self.administrator or namespace in (self.name, *self.organizations)


@dataclass
class Request:
    """One line of the log."""

    method: str
    target: str
    """Path and query as they came."""
    range: str | None = None
    authorized: bool = False
    status: int = 0
    sent: int = 0
    """Bytes of the body that were sent."""

    @property
    def path(self) -> str:
        """The target without its query."""
        return self.target.partition("?")[0]


@dataclass
class Response:
    """An answer: bytes, or a part of a blob."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    blob: Blob | None = None
    start: int = 0
    stop: int = 0

    @property
    def length(self) -> int:
        """Bytes of the body."""
        return len(self.body) if self.blob is None else self.stop - self.start

    def pieces(self) -> Iterator[bytes]:
        """The body."""
        if self.blob is not None:
            yield from self.blob.pieces(self.start, self.stop)
        else:
            for position in range(0, len(self.body), PIECE):
                yield self.body[position : position + PIECE]


def answer(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON answer."""
    return Response(status, {"Content-Type": "application/json", **(headers or {})}, json.dumps(value).encode())


class Body:
    """What a request carries; what an endpoint leaves unread is read before the answer goes out."""

    def __init__(self, stream: BufferedIOBase, headers: Message) -> None:
        self._stream = stream
        self._chunked = headers.get("Transfer-Encoding", "").lower() == "chunked"
        self._left = int(headers.get("Content-Length") or 0)

    def pieces(self) -> Iterator[bytes]:
        """The body, once."""
        while self._chunked:
            size = int(self._stream.readline().partition(b";")[0], 16)
            piece = self._stream.read(size)
            self._stream.readline()
            if size == 0:
                self._chunked = False
            else:
                yield piece
        while self._left > 0:
            piece = self._stream.read(min(PIECE, self._left))
            if not piece:
                raise ConnectionResetError("the client went away")
            self._left -= len(piece)
            yield piece

    def read(self) -> bytes:
        """All of it."""
        return b"".join(self.pieces())


@dataclass
class Call:
    """A request on its way through an endpoint."""

    method: str
    target: str
    headers: Message
    body: Body
    user: User | None
    endpoint: str

    def signed_in(self) -> User:
        """The user, where the anonymous may not go."""
        if self.user is None:
            raise HubError(401, None, "Invalid username or password.")
        return self.user

    @property
    def path(self) -> str:
        """The path, still quoted."""
        return urlsplit(self.target).path

    @cached_property
    def query(self) -> dict[str, list[str]]:
        """Parameters; ``expand[]`` is ``expand``."""
        parsed = parse_qs(urlsplit(self.target).query, keep_blank_values=True)
        return {key.removesuffix("[]"): values for key, values in parsed.items()}

    def one(self, name: str) -> str | None:
        """A parameter that comes once."""
        values = self.query.get(name)
        return values[-1] if values else None

    def asks(self, name: str) -> bool:
        """Whether a parameter is set to true."""
        return (self.one(name) or "").lower() in ("1", "true")

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body.read() or b"{}")

    def page(self, rows: list[Any], size: int) -> tuple[list[Any], dict[str, str]]:
        """The page of ``rows`` that the request wants, and the header that links to the next one."""
        start = int(self.one("cursor") or 0)
        if start + size >= len(rows):
            return rows[start : start + size], {}
        following = urlencode({**self.query, "cursor": start + size}, doseq=True)
        return rows[start : start + size], {"Link": f'<{self.endpoint}{self.path}?{following}>; rel="next"'}
