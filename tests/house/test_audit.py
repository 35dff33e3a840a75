"""The audit of what is installed, `.ci/audit`, beside scripted answers of pip and pip-audit: what makes it red, and what it says else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from source_tree import ROOT

KNOWN = {"name": "leftpad", "version": "1.0", "vulns": [{"id": "CVE-1", "fix_versions": ["1.1"]}]}
CLEAN = {"name": "leftpad", "version": "1.1", "vulns": []}
UNKNOWN = {"name": "ours", "skip_reason": "not found there"}
ANSWER = """
import json, sys
service = sys.argv[sys.argv.index("-s") + 1]
answer = json.loads({answers!r})[service]
if answer is None:
    sys.exit("ConnectionError: no such host")
print(json.dumps({{"dependencies": answer}}))
"""


def audited(folder: Path, pypi: list[object] | None, osv: list[object] | None, *options: str, fits: bool = True) -> tuple[int, str]:
    (folder / "pip.py").write_text(f"import sys\nsys.exit({0 if fits else 1})\n")
    (folder / "pip_audit.py").write_text(ANSWER.format(answers=json.dumps({"pypi": pypi, "osv": osv})))
    command = [sys.executable, str(ROOT / ".ci" / "audit"), *options]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout


@pytest.mark.parametrize("answers", [([CLEAN, UNKNOWN], None), (None, [CLEAN, UNKNOWN]), ([UNKNOWN], [CLEAN])])
def test_green_where_a_service_knows_us_and_nothing_against_us(
    tmp_path: Path, answers: tuple[list[object] | None, list[object] | None]
) -> None:
    code, said = audited(tmp_path, *answers)
    assert code == 0 and "was asked of 1 packages" in said and "NOT AUDITED" not in said


@pytest.mark.parametrize("answers", [([KNOWN, UNKNOWN], None), (None, [KNOWN]), ([UNKNOWN], [CLEAN, KNOWN])])
def test_red_where_a_vulnerability_is_known(tmp_path: Path, answers: tuple[list[object] | None, list[object] | None]) -> None:
    code, said = audited(tmp_path, *answers)
    assert code == 1 and "leftpad 1.0: CVE-1, mended in 1.1" in said


@pytest.mark.parametrize("answers", [(None, None), ([UNKNOWN], None), ([], [])])
def test_no_service_is_said_aloud_and_red_only_where_that_is_asked_for(
    tmp_path: Path, answers: tuple[list[object] | None, list[object] | None]
) -> None:
    code, said = audited(tmp_path, *answers)
    assert code == 0 and "NOT AUDITED" in said
    assert audited(tmp_path, *answers, "--strict")[0] == 3


def test_red_where_packages_do_not_fit_together(tmp_path: Path) -> None:
    assert audited(tmp_path, [CLEAN], None, fits=False)[0] == 1
