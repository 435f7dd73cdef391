"""What goes wrong on purpose: answers that tests order for requests that match."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass
class Fault:
    """One order. It strikes ``times`` matching requests (None: all), after letting ``skip`` pass."""

    pattern: str
    method: str | None = None
    times: int | None = 1
    skip: int = 0
    delay: float = 0.0
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    drop: bool = False
    keep: int | None = None
    """Bytes of the body after which the connection is closed; ``Content-Length`` still promises all."""
    etag: str | None = None
    corrupt: bool = False
    action: Callable[[], object] | None = None

    def matches(self, method: str, target: str) -> bool:
        """Whether the order is for a request of ``target``, its path with the query."""
        return self.times != 0 and self.method in (None, method) and re.search(self.pattern, target) is not None


class Faults:
    """All orders; the first that is due strikes a request, and delays come on top."""

    def __init__(self) -> None:
        self._orders: list[Fault] = []
        self._lock = threading.Lock()

    def order(self, fault: Fault) -> Fault:
        """Adds an order, and gives it back so that its ``times`` can be set to 0 again."""
        with self._lock:
            self._orders.append(fault)
        return fault

    def clear(self) -> None:
        """Forgets all orders."""
        with self._lock:
            self._orders.clear()

    def strike(self, method: str, target: str) -> tuple[float, Fault | None]:
        """Seconds to wait, and what else befalls the request."""
        wait, struck = 0.0, None
        with self._lock:
            for order in self._orders:
                if not order.matches(method, target):
                    continue
                if order.skip:
                    order.skip -= 1
                    continue
                if order.delay == 0.0 and struck:
                    continue
                if order.times is not None:
                    order.times -= 1
                wait += order.delay
                struck = struck or (order if order.delay == 0.0 else None)
        return wait, struck
