"""Signals and a limit of time: training ends after the step in hand with a checkpoint, and the same command goes on.

Between two steps ``Watch.asked`` says why to stop, the same in every process. Before the first step and after the
last one nothing is worth waiting for, and a signal ends the training where it is, by an exception, so that nothing is
left half-written; every other command too. A second one leaves at once, always.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

CODE = 75
"""Exit code of a training that was asked to stop and can go on: EX_TEMPFAIL of sysexits.h, try again later."""
AGAIN = 1.0
"""Seconds after the first signal in which another is the same request: Ctrl-C reaches a process and its launcher, and
the launcher hands it on."""
NEWEST = "the same command goes on from the newest checkpoint"
SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""What asks a training to stop."""


class Interrupted(BaseException):
    """A command was asked to stop, and a training can go on.

    No Exception, which libraries would take for a failure of theirs.
    """


class ProcessGone(RuntimeError):
    """Another process of this training has ended, so that this one cannot go on."""


class Watch:
    """Knows whether this command was asked to stop."""

    def __init__(self, hours: float, kept: str = NEWEST) -> None:
        """hours: from now on, after which to stop; 0: never. kept: what is said where a second signal leaves."""
        self.hours, self.kept = hours, kept
        self.limit = time.monotonic() + (3600 * hours or math.inf)  # whatever becomes of the wall clock
        self.number = 0
        self._stepping, self._lap, self._longest = False, 0.0, 0.0
        self._group: Any = None

    @property
    def reason(self) -> str:
        """By what the training ends."""
        return signal.Signals(self.number).name if self.number else f"run.max_hours {self.hours:g}"

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        """Within it signals wait for ``asked``."""
        self._stepping, self._lap = True, time.monotonic()
        try:
            yield
        finally:
            self._stepping = False
        if self.number:
            raise Interrupted(self.reason)

    def asked(self) -> bool:
        """Whether to stop now; to be called after each step, in all processes, which all get the same answer.

        The time is over where a step as long as the longest so far, with all that the caller did around it, would end
        too late. Processes agree by two numbers over TCP between their hosts, whatever device trains: that waits for
        no device, and a process that has died is found out.
        """
        now = time.monotonic()
        self._longest, self._lap = max(self._longest, now - self._lap), now
        import torch
        import torch.distributed as dist

        from . import parallel

        mine = torch.tensor([self.number, now + self._longest > self.limit], dtype=torch.int64)
        if parallel.size() > 1:
            self._group = self._group or dist.new_group(backend="gloo")
            dist.all_reduce(mine, dist.ReduceOp.MAX, self._group)
        self.number = self.number or int(mine[0])  # one may have come meanwhile
        return bool(mine.any())

    def note(self, number: int, frame: FrameType | None) -> None:
        """Take a signal: what Python calls between two of its instructions."""
        if self.number:
            return
        self.number = number
        if not self._stepping:
            raise Interrupted(self.reason)

    def listen(self, receiver: socket.socket) -> None:
        """Read the numbers of signals as they come, also while the main thread is in one long call; a second one ends.

        receiver: the other end of what Python writes them to; closed: return.
        """
        first = None
        while number := receiver.recv(1):
            if number[0] not in SIGNALS:
                continue
            name = signal.Signals(number[0]).name
            if first is None:
                first = time.monotonic()
                if self._stepping and _is_main():
                    _say(f"{name}: this step is finished and a checkpoint saved; a second one leaves at once")
            elif time.monotonic() - first > AGAIN:
                if sys.stderr.isatty():
                    os.write(2, b"\x1b[?25h")  # the cursor, which a progress bar hides
                _say(f"fastgen: {name} again, left at once; {self.kept}")
                os._exit(128 + number[0])


def _is_main() -> bool:
    from . import parallel

    return parallel.rank() == 0


def _say(text: str) -> None:
    """A line on stderr at once, past buffers that another thread may hold."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())


@contextlib.contextmanager
def watched(hours: float = 0.0, kept: str = NEWEST) -> Iterator[Watch]:
    """A watch over this training or another command; its handlers of signals are gone after it.

    Other threads than the main one get none. kept: what is said of what is left where a second signal leaves at once.
    A signal that is ignored, as SIGINT in the background of a shell, stays so.
    """
    watch = Watch(hours, kept)
    if threading.current_thread() is not threading.main_thread():
        yield watch
        return
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    taken = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, watch.note) for number in taken}
    wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    listener = threading.Thread(target=watch.listen, args=(ours,), name="fastgen-signals", daemon=True)
    listener.start()
    try:
        yield watch
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        theirs.close()
        listener.join()
        ours.close()


def over(code: int) -> None:
    """What the process was for is done: a signal ends it at once, with this exit code and not as if it had failed.

    Python takes a while to clear up, and libraries may, such as trackers that upload. Only the main thread can say so.
    """
    if threading.current_thread() is not threading.main_thread():
        return

    def leave(number: int, frame: FrameType | None) -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)

    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, leave)


def of_another(error: BaseException) -> bool:
    """Whether an error says that another process could not be reached."""
    import torch.distributed as dist

    from . import parallel

    named = any(word in str(error) for word in ("gloo", "NCCL", "onnection closed by peer", "onnection reset by peer"))
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and parallel.size() > 1 and named)
