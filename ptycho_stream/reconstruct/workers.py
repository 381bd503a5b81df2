"""Threads that compute side by side, each with torch on one core.

Torch's own threads split every operation and wait for each other hundreds of times a batch; whole
parts of a batch, one a thread, meet once. Used by the predictor on a CPU.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Barrier
from typing import ParamSpec, Self, TypeVar

import torch

_P = ParamSpec("_P")
_T = TypeVar("_T")

_START_S = 60.0


class Workers:
    """``count`` threads; with one, the calling thread does the work itself, as torch is set.

    The threads end with :meth:`close`, or when nothing refers to this object any more.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = _single_threaded_pool(count) if count > 1 else None

    def submit(self, task: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """Have ``task`` done; what it raises comes out of the future's ``result()``."""
        if self._pool is not None:
            return self._pool.submit(task, *args, **kwargs)
        done: Future[_T] = Future()
        try:
            done.set_result(task(*args, **kwargs))
        except Exception as error:  # told by result(), as a pool does
            done.set_exception(error)
        return done

    def close(self) -> None:
        """End the threads, when what they were given is done; nothing can be submitted then."""
        if self._pool is not None:
            self._pool.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _single_threaded_pool(count: int) -> ThreadPoolExecutor:
    """A pool, all of its threads started and told to leave torch's own threads alone."""
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, "predict", _use_one_core)
    # The setting is each thread's own, but threads take the one that was made last when they first
    # use it: so all workers start now, and then the setting is made again as it was.
    barrier = Barrier(count + 1, timeout=_START_S)
    for _ in range(count):
        pool.submit(barrier.wait)
    barrier.wait()
    torch.set_num_threads(before)
    return pool


def _use_one_core() -> None:
    torch.set_num_threads(1)
    torch.get_num_threads()  # the first use in this thread: takes the 1, and keeps it
