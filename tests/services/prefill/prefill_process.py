"""One prefill replica as a process of its own, the other end of test_nixl_handoff.py: serves until SIGTERM. Argument: its configuration."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys

from duomo.config import DuomoConfig
from services.prefill.service import run_replica


async def main() -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await run_replica(DuomoConfig.model_validate_json(sys.argv[1]), "prefill-0", stop)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    asyncio.run(main())
