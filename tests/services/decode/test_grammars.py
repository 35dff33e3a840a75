"""What a decode replica needs to begin: the grammar library only once a request asks for structure."""

from __future__ import annotations

import subprocess
import sys


def test_an_engine_is_imported_without_the_grammar_library() -> None:
    """As where kernels are measured, with torch and Triton alone."""
    code = "import sys; sys.modules['llguidance'] = None; import duomo.engine.monolith, duomo.engine.sampler, services.decode.batch"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
