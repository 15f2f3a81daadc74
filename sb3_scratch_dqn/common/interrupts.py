"""Ctrl-C between environment steps, never in the middle of writing one down.

A ``KeyboardInterrupt`` may come between any two instructions. If it came while a transition is written into replay,
half of the transition would stay there.
"""

import signal
import threading
from types import FrameType
from typing import Any


class Interrupts:
    """A context in which SIGINT is handled at once, except while ``held`` is true: then by :meth:`release`.

    ``waiting`` is not ``None`` if one came meanwhile. The context does nothing outside of the main thread, where Python
    handles no signals, and where SIGINT is not handled by a Python function. The handler of before is called, and put
    back in the end.
    """

    def __init__(self) -> None:
        self.held = False
        self.waiting: tuple[int, FrameType | None] | None = None
        self._handler: Any = None

    def __enter__(self) -> "Interrupts":
        """Take the place of the handler."""
        handler = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is threading.main_thread() and callable(handler):
            self._handler = handler
            signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        """Put the handler back, unless another one has taken the place of this one."""
        if self._handler is not None and signal.getsignal(signal.SIGINT) == self._handle:
            signal.signal(signal.SIGINT, self._handler)
        self.release()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.held:
            self.waiting = number, frame
        else:
            self._handler(number, frame)

    def release(self) -> None:
        """Handle from now on, first what came while it was held."""
        self.held = False
        if self.waiting is not None:
            waiting, self.waiting = self.waiting, None
            self._handler(*waiting)
