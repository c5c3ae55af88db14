"""Loading ahead of use: results in order, background threads, a bound on the bytes that wait, and an honest clock of the waiting.

An item's failure is raised where that item would have come, and the next call goes on behind it. Closing the iterator, or losing it,
stops the threads. Pillow and torch release Python's global lock while they decode and resize, so threads suffice.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar, cast

S = TypeVar("S")
T = TypeVar("T")


class Ahead(Generic[S, T], Iterator[T]):
    """The results of `load` over `items`, in order. At least one item is under way, whatever the bound on bytes.

    `cost` is the bytes that a finished result holds; `reserve` is what an unfinished one is taken to need.
    """

    def __init__(
        self, load: Callable[[S], T], items: Iterable[S], *, workers: int, most_bytes: int, reserve: int, cost: Callable[[T], int]
    ) -> None:
        self.waited_s = 0.0
        self.loaded = 0
        self._feed = _Feed(load, iter(items), workers, most_bytes, reserve, cost)
        # The threads hold the feed and not this object, so that losing this object ends them.
        self._finalizer = weakref.finalize(self, self._feed.abandon)
        self._feed.top_up()

    def __next__(self) -> T:
        """The next result, waiting for it if need be; raises what loading it raised."""
        future = self._feed.take()
        if future is None:
            self.close()
            raise StopIteration
        if not future.done():
            start = time.perf_counter()
            future.exception()
            self.waited_s += time.perf_counter() - start
        self._feed.release(future)
        result = future.result()
        self.loaded += 1
        return result

    def close(self) -> None:
        """Stop loading and wait for the threads to end; what was loaded ahead is dropped."""
        self._finalizer.detach()
        self._feed.stop()

    def __enter__(self) -> Ahead[S, T]:
        """For use in a `with` statement."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close."""
        self.close()


class _Feed(Generic[S, T]):
    """What the iterator and its threads share. `held` bytes are those of finished results plus the reserves of unfinished ones."""

    def __init__(
        self, load: Callable[[S], T], items: Iterator[S], workers: int, most_bytes: int, reserve: int, cost: Callable[[T], int]
    ) -> None:
        self._load, self._items, self._most_bytes, self._reserve, self._cost = load, items, most_bytes, reserve, cost
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="tiles-ahead")
        self._lock = threading.RLock()
        self._line: deque[Future[T]] = deque()
        self._held = 0
        self._ended = self._abandoned = False

    def top_up(self) -> None:
        """Send items to the threads for as long as the bound allows; an error of the items themselves takes its place in the line."""
        with self._lock:
            while not self._ended and (not self._line or self._held + self._reserve <= self._most_bytes):
                try:
                    item = next(self._items)
                except StopIteration:
                    self._ended = True
                except Exception as error:  # noqa: BLE001 - not handled but delivered, at its place in the line
                    self._ended = True
                    self._line.append(_failed(error))
                else:
                    self._held += self._reserve
                    self._line.append(self._pool.submit(self._work, item))

    def _work(self, item: S) -> T:
        held = 0
        try:
            if self._abandoned:
                # Nobody is left to see it; and an error's traceback would hold the pool.
                return cast(T, None)
            result = self._load(item)
            held = self._cost(result)
            return result
        finally:
            with self._lock:
                self._held += held - self._reserve
            self.top_up()

    def take(self) -> Future[T] | None:
        """The first of the line, or None at the end."""
        with self._lock:
            self.top_up()
            return self._line.popleft() if self._line else None

    def release(self, future: Future[T]) -> None:
        """Take a finished result's bytes off the account and use the room."""
        if future.exception() is None:
            with self._lock:
                self._held -= self._cost(future.result())
        self.top_up()

    def stop(self) -> None:
        """Load nothing further and wait for the threads to end."""
        with self._lock:
            self._ended = True
            self._line.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def abandon(self) -> None:
        """Load nothing further. Takes no lock, because the garbage collector may call it from within anything.

        What is queued then ends at once, which leaves nobody who holds the pool, and a pool that nobody holds ends its threads.
        """
        self._ended = self._abandoned = True
        self._line.clear()


def _failed(error: BaseException) -> Future[T]:
    future: Future[T] = Future()
    future.set_exception(error)
    return future
