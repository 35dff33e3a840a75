"""SmallServer as a process: `python -m tests.bench.small_server PORT`."""

from __future__ import annotations

import sys

import uvicorn

from tests.bench.test_bench_serve import SmallServer

if __name__ == "__main__":
    uvicorn.run(SmallServer().app(), host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
