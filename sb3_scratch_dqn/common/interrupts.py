"""Delay SIGINT (Ctrl-C) while a transition is written to the replay buffer.

A ``KeyboardInterrupt`` can be raised between any two instructions. While a transition is being written, it would leave
half of it in the buffer.
"""

import signal
import threading
from types import FrameType
from typing import Any


class Interrupts:
    """A context in which SIGINT is handled at once, except while ``blocked`` is true: then :meth:`unblock` handles it.

    ``pending`` is not ``None`` if SIGINT arrived while it was blocked. The context does nothing outside of the main
    thread, where Python handles no signals, and where the handler of SIGINT is not a Python function. It calls the
    handler that was installed when the context was entered, and restores it on exit.
    """

    def __init__(self) -> None:
        self.blocked = False
        self.pending: tuple[int, FrameType | None] | None = None
        self._handler: Any = None

    def __enter__(self) -> "Interrupts":
        """Install the handler."""
        handler = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is threading.main_thread() and callable(handler):
            self._handler = handler
            signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the original handler, unless another one was installed since."""
        if self._handler is not None and signal.getsignal(signal.SIGINT) == self._handle:
            signal.signal(signal.SIGINT, self._handler)
        self.unblock()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.blocked:
            self.pending = number, frame
        else:
            self._handler(number, frame)

    def unblock(self) -> None:
        """Stop blocking, and handle a pending SIGINT."""
        self.blocked = False
        if self.pending is not None:
            pending, self.pending = self.pending, None
            self._handler(*pending)
