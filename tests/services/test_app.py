"""Owns the checks of the Serve application: what is bound, what a failed start says, and that an unplaceable replica is an error."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from duomo.config import DuomoConfig, load_config
from duomo.errors import ConfigError
from services.app import APP_NAME, RaySystem, _gpus, _import_roots, _kill_tree, _last_words, build_application
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "tiny-moe"

SERVE_SAYS = """The deployment failed to start 1 times in a row. See controller logs for details. Error:
\x1b[36mray::ServeReplica:duomo:prefill.initialize_and_get_metadata()\x1b[39m (pid=1, repr=<ray.serve.ServeReplica object at 0x7f>)
  File "replica.py", line 1928, in initialize
    raise RuntimeError(traceback.format_exc()) from None
RuntimeError: Traceback (most recent call last):
  File "services/prefill/service.py", line 5, in run_replica
    raise ModelError("tensor is missing")
duomo.errors.ModelError: bad_model (start): model.layers.3.mlp.gate.weight is missing
"""


def config(**overrides: object) -> DuomoConfig:
    return load_config(None, {"model.path": str(MODEL)} | overrides)


def test_four_deployments_are_bound_with_their_counts() -> None:
    application = build_application(config(**{"prefill.replicas": 2, "decode.replicas": 3}))
    router: Any = application._bound_deployment
    pools = [pool._bound_deployment for pool in router.init_args[1:]]
    bound: dict[str, Any] = {one.name: one for one in [router, *pools]}
    assert {name: one.num_replicas for name, one in bound.items()} == {"router": 1, "prefill": 2, "decode": 3, "directory": 1}
    for deployment in bound.values():
        assert deployment.ray_actor_options["num_cpus"] == 0.01, "Serve's default of one CPU never starts four on two cores"
        assert DuomoConfig.model_validate_json(deployment.init_args[0]).decode.replicas == 3
        assert deployment._deployment_config.graceful_shutdown_timeout_s > 300, "a draining replica finishes its streams"


def test_colocated_binds_one_engine_for_both_pools() -> None:
    application = build_application(config(layout="colocated"))
    router: Any = application._bound_deployment
    bound = {pool._bound_deployment.name: pool._bound_deployment.num_replicas for pool in router.init_args[1:]}
    assert bound == {"directory": 1, "engine": 1}


def test_an_engine_on_a_gpu_asks_for_the_card_that_ray_would_hide() -> None:
    def asked(one: DuomoConfig) -> dict[str, object]:
        router: Any = build_application(one)._bound_deployment
        every = [router, *(pool._bound_deployment for pool in router.init_args[1:])]
        return {deployment.name: deployment.ray_actor_options.get("num_gpus", 0) for deployment in every}

    assert asked(config(layout="colocated", **{"model.device": "cuda"})) == {"router": 0, "directory": 0, "engine": 1}
    assert asked(config(layout="colocated")) == {"router": 0, "directory": 0, "engine": 0}
    split = {"model.device": "cuda", "layout": "split"}
    alone = config(**split, **{"prefill.gpu_share": 1.0, "decode.gpu_share": 1.0, "decode.replicas": 2})
    assert asked(alone) == {"router": 0, "directory": 0, "prefill": 1, "decode": 1} and _gpus(alone) == 3
    shared = config(**split, **{"prefill.gpu_share": 0.4, "decode.gpu_share": 0.6})
    assert asked(shared) == {"router": 0, "directory": 0, "prefill": 0.5, "decode": 0.5} and _gpus(shared) == 1


def test_a_pool_is_not_scaled_beyond_the_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve would take the count and wait for ever for a card."""
    split = {"model.device": "cuda", "layout": "split", "prefill.gpu_share": 1.0, "decode.gpu_share": 1.0}
    system = RaySystem(config(**split), tmp_path, print)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 1.0, "GPU": 2.0})
    with pytest.raises(ConfigError, match="1 of prefill and 2 of decode replicas need a card each, 3 in all; the Ray cluster has 2"):
        system.scale("decode", 2)


def test_pools_are_pinned_by_resource_only_when_asked() -> None:
    def resources(one: DuomoConfig) -> dict[str, object]:
        actor: dict[str, Any] = build_application(one)._bound_deployment.ray_actor_options or {}
        return dict(actor.get("resources") or {})

    assert resources(config()) == {}
    assert set(resources(config(**{"ray.pin_by_resource": True}))) == {"duomo_router"}


def test_a_failed_start_is_told_by_the_replicas_own_exception() -> None:
    assert _last_words(SERVE_SAYS) == "ModelError: bad_model (start): model.layers.3.mlp.gate.weight is missing"
    waiting = "Deployment 'prefill' has 1 replicas\nthat have taken more than 8s to be scheduled."
    assert _last_words(waiting) == "Deployment 'prefill' has 1 replicas that have taken more than 8s to be scheduled."


def test_workers_find_the_three_import_roots() -> None:
    roots = _import_roots()
    assert roots[:2] == [str(ROOT), str(ROOT / "kernels")]
    assert len(roots) == len(set(roots))


def test_a_tree_that_still_grows_is_killed_whole() -> None:
    """A raylet that is interrupted half started goes on starting its agents."""
    not_ours = set(psutil.Process().children(recursive=True))
    grow = "import subprocess, time\nwhile True: subprocess.Popen(['sleep', '60'], start_new_session=True); time.sleep(0.002)"
    root = subprocess.Popen([sys.executable, "-c", grow], start_new_session=True)
    while len(psutil.Process(root.pid).children()) < 5:
        time.sleep(0.01)
    seen = psutil.Process(root.pid).children()
    _kill_tree(not_ours)
    root.wait(60)
    assert not [one for one in seen if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    assert not set(psutil.Process().children(recursive=True)) - not_ours


def test_binding_the_application_needs_no_torch() -> None:
    code = f"""
import sys
from services.app import build_application
from duomo.config import load_config
build_application(load_config(None, {{"model.path": {str(MODEL)!r}}}))
print([name for name in ("torch", "nixl", "tokenizers", "transformers") if name in sys.modules])
"""
    environment = os.environ
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100)
    assert done.stdout.strip().splitlines()[-1] == "[]", done.stdout + done.stderr


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (("ray.pin_by_resource=true",), "duomo_directory"),
        (("ray.start_timeout_s=1",), "ray.start_timeout_s"),
    ],
)
def test_an_unplaceable_or_late_replica_is_a_clear_error(settings: tuple[str, ...], named: str) -> None:
    port = free_port()
    folder = Path(tempfile.mkdtemp(prefix="duomo-t-"))
    command = [sys.executable, "-m", "services.cli", "serve", str(MODEL), "--device", "cpu", "--port", str(port), "--run-dir", str(folder)]
    for setting in settings:
        command += ["--set", setting]
    environment = os.environ
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 2 and named in done.stderr.splitlines()[-1], done.stderr
    assert not list(folder.iterdir())
    folder.rmdir()


def test_the_application_has_one_name() -> None:
    assert APP_NAME == "duomo"
