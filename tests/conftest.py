"""Owns what every test's process and its children are told before torch is loaded. Knows no test."""

import contextlib
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# An example is no timed test: on a machine with other work any of them may take long. Kernels are also tested where there is no
# hypothesis.
with contextlib.suppress(ImportError):
    from hypothesis import settings

    settings.register_profile("duomo", deadline=None)
    settings.load_profile("duomo")

# Spinning OpenMP threads on shared cores make a step thirty times slower (services/app.py).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Processes that tests start find the three roots as the tests themselves do (pyproject.toml, pythonpath).
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", ""))))

# Triton's kernels run in its interpreter where there is no GPU; read when a kernel is decorated, so before duomo_kernels is imported.
if not Path("/dev/nvidia0").exists():
    os.environ["TRITON_INTERPRET"] = "1"
