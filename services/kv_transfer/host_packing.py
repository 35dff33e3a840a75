"""Owns the thread that packs and seals messages in the host's memory while the writer thread writes others. Knows no slot, no transport.

Over CMA a write is the processor's own copy, made in the call that posts it: without a second thread packing and hashing would wait for it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from services.kv_transfer.push_job import GivenUpError, PushJob
from services.kv_transfer.sealing import seal


class HostPacker:
    """One thread, started by the first message. From any thread; the creator calls close()."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kv-packer")

    def begin(self, job: PushJob, message: Any, is_dropped: Callable[[], bool]) -> HostFilling:
        """The job's payload, padding and trailer into `message`, by and by; in the order of the calls.

        is_dropped: asked in the thread when the job's turn has come. Then nothing is packed, wait() raises GivenUpError, and the blocks are
        free as soon as the message before it is packed, not after a queue of others.
        """
        assert isinstance(message, memoryview), "whoever fills a device's memory seals it too"
        return HostFilling(self._thread.submit(_pack, job, message, is_dropped))

    def close(self) -> None:
        """What was begun goes on; what waits is not begun."""
        self._thread.shutdown(wait=False, cancel_futures=True)


class HostFilling:
    """A Filling; raises in wait() what the job's fill raised."""

    def __init__(self, packed: Future[None]) -> None:
        self._packed = packed

    def is_over(self) -> bool:
        return self._packed.done()

    def wait(self) -> None:
        self._packed.result()


def _pack(job: PushJob, message: memoryview, is_dropped: Callable[[], bool]) -> None:
    if is_dropped():
        raise GivenUpError
    filling = job.fill(message[: job.span.num_bytes])
    assert filling is None, "whoever fills by and by seals too"
    seal(message, job.handle.handle_id, job.span)
