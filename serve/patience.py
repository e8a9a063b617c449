"""How long the ONNX server waits for a request to arrive: uvicorn itself waits for headers for ever."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

ARRIVAL_S: Final = 60  # for the headers of a request, and for what is left of the body of an answered one


class Patient(H11Protocol):
    """A connection that is closed where no whole request has come for so long, by a 408 where one had begun."""

    arrival_s: float = ARRIVAL_S
    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A new connection, whose first request is waited for."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """More of a request; one that is whole as far as it must be to be answered has nothing more to wait for."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
        elif self._waiting is None:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """The end."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._waiting = self.loop.call_later(self.arrival_s, self._give_up)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _give_up(self) -> None:
        if self.transport.is_closing():
            return
        if self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
            status, close = HTTPStatus.REQUEST_TIMEOUT, [(b"connection", b"close"), (b"content-length", b"0")]
            answer = h11.Response(status_code=status.value, headers=close, reason=status.phrase.encode())
            self.transport.write(self.conn.send(answer) or b"")
        self.transport.close()
