"""Owns what every test's process and its children are told before torch is loaded. Knows no test."""

import contextlib
import os
import platform
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Triton's interpreter multiplies tiles by numpy's BLAS. Some processors' routines give a row other bits by its place in a tile, and so do
# threads that share one; those of Nehalem, which every later x86-64 has, do not. Read when numpy is loaded.
os.environ["OPENBLAS_NUM_THREADS"] = "1"
if platform.machine() in ("x86_64", "AMD64"):
    os.environ["OPENBLAS_CORETYPE"] = "Nehalem"

# An example is no timed test, nor is making one: on a machine with other work any of them may take long. Each run tries the same examples,
# so that no change is refused for what another one brought; `make test-slow` draws new ones (--hypothesis-profile=drawn). Kernels are
# also tested where there is no hypothesis.
with contextlib.suppress(ImportError):
    from hypothesis import HealthCheck, settings

    settings.register_profile("drawn", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.register_profile("duomo", settings.get_profile("drawn"), derandomize=True, database=None)
    settings.load_profile("duomo")

# Spinning OpenMP threads on shared cores make a step thirty times slower (services/app.py).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Processes that tests start find the three roots as the tests themselves do (pyproject.toml, pythonpath).
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", ""))))

# Triton's kernels run in its interpreter where there is no GPU; read when a kernel is decorated, so before duomo_kernels is imported.
if not Path("/dev/nvidia0").exists():
    os.environ["TRITON_INTERPRET"] = "1"
