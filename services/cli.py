"""Owns the command line `duomo`: its commands and options, and how errors are said. Knows no service: imports them when one is needed.

Exit codes: 0 done, 1 the other side failed, 2 the operator can put it right (the message names the option), 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
import yaml

from duomo.errors import ConfigError, DuomoError

if TYPE_CHECKING:
    from duomo.config import DuomoConfig

app = typer.Typer(
    name="duomo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
EMBEDDED_MODEL = Path("models/tiny-moe")
DEFAULT_KEYS = Path("duomo-keys")
ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML configuration, such as deploy/local.yaml")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="any option of the configuration; repeatable")
]
Port = Annotated[int, typer.Option("--port", help="the port of the running system")]
RunDir = Annotated[Path | None, typer.Option("--run-dir", help="folder of this run's sockets and files")]
Device = Annotated[Literal["auto", "cpu", "cuda"] | None, typer.Option(help="auto: a GPU where the kernels run, else the CPU")]
Quantize = Annotated[Literal["fp8"] | None, typer.Option(help="make the weights fp8 as they are loaded (GPU)")]
RandomWeights = Annotated[bool, typer.Option("--random-weights", help="draw the weights: config.json suffices (GPU)")]
Deterministic = Annotated[bool, typer.Option("--deterministic", help="bytes do not depend on what else runs (a CPU's never do)")]
Layout = Annotated[Literal["auto", "split", "colocated"] | None, typer.Option(help="two pools, or one process; auto: by the device")]
MaxModelTokens = Annotated[int | None, typer.Option(help="context limit below the model's own")]
Url = Annotated[str, typer.Option("--url", help="base address of a running gateway")]
KeyFile = Annotated[Path, typer.Option("--file", help="the file of hashed keys (gateway.api_keys_file)")]
AdminUrl = Annotated[str, typer.Option("--url", help="base address of a running gateway's admin API (--admin-port)")]
AdminKey = Annotated[str, typer.Option("--api-key", envvar="DUOMO_ADMIN_KEY", help="a key of scope admin, where keys are asked for")]
ADMIN_URL = "http://127.0.0.1:8001"
admin = typer.Typer(no_args_is_help=True, help="List, drain, undrain and scale a running system, and flush its prefix caches.")
app.add_typer(admin, name="admin")
keys = typer.Typer(no_args_is_help=True, help="Make, list and remove API keys: a file of hashed keys, for `duomo serve --api-key-file`.")
app.add_typer(keys, name="keys")


def _show_version(is_asked: bool) -> None:
    if is_asked:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"duomo {version('duomo')}")
        except PackageNotFoundError:
            print("duomo from a checkout that is not installed")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print the version and end")] = False,
) -> None:
    """Serve Mixture-of-Experts models with prefill and decode as two pools."""


@app.command()
def serve(
    model_dir: Annotated[Path | None, typer.Argument(metavar="MODEL_DIR", help="a Hugging Face folder")] = None,
    config: ConfigFile = None,
    host: Annotated[str | None, typer.Option(help="where the gateway listens")] = None,
    port: Annotated[int | None, typer.Option(help="where the gateway listens")] = None,
    prefill_replicas: Annotated[int | None, typer.Option(help="replicas of the prefill pool")] = None,
    decode_replicas: Annotated[int | None, typer.Option(help="replicas of the decode pool")] = None,
    device: Device = None,
    quantize: Quantize = None,
    random_weights: RandomWeights = False,
    deterministic: Deterministic = False,
    layout: Layout = None,
    max_model_tokens: MaxModelTokens = None,
    trace_dir: Annotated[Path | None, typer.Option(help="write spans into this folder (see duomo trace)")] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="hashed API keys (see duomo keys); calls need one of them")] = None,
    ssl_certfile: Annotated[Path | None, typer.Option(help="PEM chain: speak TLS")] = None,
    ssl_keyfile: Annotated[Path | None, typer.Option(help="PEM key of --ssl-certfile")] = None,
    ssl_ca_certs: Annotated[Path | None, typer.Option(help="PEM: ask clients for certificates of these authorities")] = None,
    admin_host: Annotated[str | None, typer.Option(help="where the admin API listens")] = None,
    admin_port: Annotated[int | None, typer.Option(help="where the admin API listens; without it nowhere")] = None,
    run_dir: RunDir = None,
    settings: Settings = None,
) -> None:
    """Start router, prefill, decode and directory under Ray and serve MODEL_DIR until Ctrl-C."""
    named: dict[str, object] = {
        "model.path": None if model_dir is None else str(model_dir),
        "gateway.host": host,
        "gateway.port": port,
        "prefill.replicas": prefill_replicas,
        "decode.replicas": decode_replicas,
        "tracing.directory": None if trace_dir is None else str(trace_dir.absolute()),
        "gateway.api_keys_file": api_key_file,
        "gateway.ssl_certfile": ssl_certfile,
        "gateway.ssl_keyfile": ssl_keyfile,
        "gateway.ssl_ca_certs": ssl_ca_certs,
        "gateway.admin_host": admin_host,
        "gateway.admin_port": admin_port,
        "run_dir": None if run_dir is None else str(run_dir.absolute()),
    }
    named |= _engine_options(device, quantize, random_weights, deterministic, layout, max_model_tokens)
    loaded = _load(config, named, settings)
    from services.cli_serve import serve as serve_system

    raise typer.Exit(serve_system(loaded))


@app.command()
def replica(
    role: Annotated[Literal["prefill", "decode", "engine", "router"], typer.Argument(help="which process; engine: layout colocated")],
    config: ConfigFile = None,
    replica_id: Annotated[str, typer.Option("--id", help="this replica's name, unique in its system")] = "",
    settings: Settings = None,
) -> None:
    """Run one process of the system without Ray: what a container runs."""
    import socket

    loaded = _load(config, {}, settings)
    from services.cli_replica import run_one

    raise typer.Exit(run_one(loaded, role, replica_id or f"{role}-{socket.gethostname()}"))


@app.command()
def chat(
    message: Annotated[str | None, typer.Argument(help="one question; without it, a conversation")] = None,
    url: Url = "http://127.0.0.1:8000",
    model: Annotated[str, typer.Option(help="default: the first that the gateway offers")] = "",
    key: Annotated[str, typer.Option("--api-key", envvar="DUOMO_API_KEY", help="where the gateway asks for keys")] = "",
    max_tokens: Annotated[int, typer.Option()] = 256,
    temperature: Annotated[float, typer.Option()] = 0.7,
) -> None:
    """Talk to a running system; the answer streams."""
    from services.cli_chat import Gateway, converse

    raise typer.Exit(converse(Gateway(url, key), model, message, {"max_tokens": max_tokens, "temperature": temperature}))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="a script under bench/, such as serve/bench_rest, bench_rest or rest")] = None,
) -> None:
    """Run a benchmark from a checkout; what follows NAME goes to it."""
    root = _bench_root()
    scripts = {str(path.relative_to(root).with_suffix("")): path for path in sorted(root.rglob("bench_*.py"))}
    found = [path for key, path in scripts.items() if name in (key, path.stem, path.stem.removeprefix("bench_"))]
    if len(found) != 1:
        raise ConfigError(f"NAME must be one of: {', '.join(scripts) or '(no benchmark here)'}" + (f"; not {name!r}" if name else ""))
    roots = os.pathsep.join([str(root.parent), str(root.parent / "kernels")])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([roots, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, str(found[0]), *context.args], environment)


@app.command()
def trace(
    directory: Annotated[Path, typer.Argument(help="the folder given to `duomo serve --trace-dir`")],
    trace_id: Annotated[str | None, typer.Option("--id", help="a trace id; default: the last request")] = None,
) -> None:
    """Draw one request's waterfall across all processes, with its parts and what is unaccounted for."""
    if not directory.is_dir():
        raise ConfigError(f"DIRECTORY: {directory} is no folder; name the one given to `duomo serve --trace-dir`")
    from duomo.telemetry.waterfall import render_waterfall

    print(render_waterfall(directory, trace_id))


@app.command()
def scale(
    prefill: Annotated[int | None, typer.Option(help="replicas of the prefill pool")] = None,
    decode: Annotated[int | None, typer.Option(help="replicas of the decode pool")] = None,
    port: Port = 8000,
    run_dir: RunDir = None,
    wait_s: Annotated[
        float, typer.Option(help="wait this long for the pools to have their size (draining takes as long as its streams)")
    ] = 330.0,
) -> None:
    """Change how many replicas a running system has; replicas that go finish their streams first. Without options: show them."""
    from services.cli_scale import scale_pools

    raise typer.Exit(scale_pools({"prefill": prefill, "decode": decode}, port, run_dir, wait_s))


@admin.command("list")
def list_replicas(url: AdminUrl = ADMIN_URL, key: AdminKey = "") -> None:
    """The replicas that a gateway is connected to."""
    from services.cli_admin import list_replicas as show

    raise typer.Exit(show(url, key))


@admin.command()
def drain(replica: Annotated[str, typer.Argument(metavar="REPLICA")], url: AdminUrl = ADMIN_URL, key: AdminKey = "") -> None:
    """Let a replica take no new request and finish its live ones; it stays, for `duomo admin undrain`."""
    from services.cli_admin import ask_of_replica

    raise typer.Exit(ask_of_replica(url, key, replica, "drain"))


@admin.command()
def undrain(replica: Annotated[str, typer.Argument(metavar="REPLICA")], url: AdminUrl = ADMIN_URL, key: AdminKey = "") -> None:
    """Let a drained replica take requests again."""
    from services.cli_admin import ask_of_replica

    raise typer.Exit(ask_of_replica(url, key, replica, "undrain"))


@admin.command()
def flush(
    name: Annotated[str, typer.Argument(metavar="NAME", help="a replica, or a pool: prefill, decode or all")],
    url: AdminUrl = ADMIN_URL,
    key: AdminKey = "",
) -> None:
    """Forget every prefix computed so far; what is in use stays in use."""
    from services.cli_admin import ask_of_pool, ask_of_replica

    ask = ask_of_pool if name in ("prefill", "decode", "all") else ask_of_replica
    raise typer.Exit(ask(url, key, name, "flush"))


@admin.command("scale")
def scale_pool(
    pool: Annotated[Literal["prefill", "decode"], typer.Argument()],
    replicas: Annotated[int, typer.Argument(min=1, max=256)],
    url: AdminUrl = ADMIN_URL,
    key: AdminKey = "",
) -> None:
    """As `duomo scale`, by way of the gateway; does not wait."""
    from services.cli_admin import ask_of_pool

    raise typer.Exit(ask_of_pool(url, key, pool, "scale", {"replicas": replicas}))


@keys.command("add")
def add_key(
    name: Annotated[str, typer.Argument(metavar="NAME", help="whose key it is: what the audit log names")],
    scope: Annotated[list[str] | None, typer.Option(help="inference (unnamed), metrics or admin; repeatable")] = None,
    file: KeyFile = DEFAULT_KEYS,
) -> None:
    """Print a new key, once, and add its hash to the file."""
    from services.cli_keys import add_key as add

    raise typer.Exit(add(file, name, scope or ["inference"]))


@keys.command("list")
def list_keys(file: KeyFile = DEFAULT_KEYS) -> None:
    """Names and scopes of the file's keys."""
    from services.cli_keys import list_keys as show

    raise typer.Exit(show(file))


@keys.command("remove")
def remove_key(name: Annotated[str, typer.Argument(metavar="NAME")], file: KeyFile = DEFAULT_KEYS) -> None:
    """Take a key out of the file; a running gateway refuses it a second later."""
    from services.cli_keys import remove_key as remove

    raise typer.Exit(remove(file, name))


@app.command()
def doctor(
    model_dir: Annotated[Path | None, typer.Argument(metavar="MODEL_DIR", help="whose kernels and memory are looked at")] = None,
    config: ConfigFile = None,
    port: Annotated[int | None, typer.Option(help="the port to be looked at")] = None,
    device: Device = None,
    quantize: Quantize = None,
    random_weights: RandomWeights = False,
    deterministic: Deterministic = False,
    layout: Layout = None,
    max_model_tokens: MaxModelTokens = None,
    settings: Settings = None,
) -> None:
    """Show what this machine offers: devices, layout, kernels, memory plan, torch, NIXL and its transport, Redis, ports."""
    if model_dir is None and config is None:
        model_dir = EMBEDDED_MODEL
    named: dict[str, object] = {"model.path": None if model_dir is None else str(model_dir), "gateway.port": port}
    named |= _engine_options(device, quantize, random_weights, deterministic, layout, max_model_tokens)
    from services.cli_doctor import examine

    raise typer.Exit(examine(_read(config, named, settings)))


def main() -> None:
    """The console script. A DuomoError is one line on stderr; anything else is a bug and keeps its traceback."""
    try:
        app()
    except DuomoError as error:
        print(f"duomo: error: {error.detail}", file=sys.stderr)
        sys.exit(2 if error.phase == "start" else 1)


def _engine_options(
    device: str | None, quantize: str | None, random_weights: bool, deterministic: bool, layout: str | None, max_model_tokens: int | None
) -> dict[str, object]:
    """What serve and doctor are told alike; None: not named."""
    return {
        "model.device": device,
        "model.quantize": quantize,
        "model.random_weights": random_weights or None,
        "model.max_model_tokens": max_model_tokens,
        "deterministic": deterministic or None,
        "layout": layout,
    }


def _load(file: Path | None, named: dict[str, object], settings: list[str] | None) -> DuomoConfig:
    """What _read reads; then MODEL_DIR is looked at."""
    config = _read(file, named, settings)
    path = config.model.path
    if not (path / "config.json").is_file():
        what = "holds no config.json" if path.is_dir() else "is no folder"
        raise ConfigError(f"MODEL_DIR (model.path): {path} {what}; name a Hugging Face folder, such as models/tiny-moe")
    absolute: dict[str, object] = {"model": config.model.model_copy(update={"path": path.resolve(), "name": config.model.served_name})}
    files = {name: value.resolve() for name, value in config.gateway if isinstance(value, Path)}  # of another process, in another folder
    absolute["gateway"] = config.gateway.model_copy(update=files)
    return config.model_copy(update=absolute)


def _read(file: Path | None, named: dict[str, object], settings: list[str] | None) -> DuomoConfig:
    """File, then --set, then the named options."""
    from duomo.config import load_config

    overrides: dict[str, object] = {}
    for setting in settings or []:
        key, separator, value = setting.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set {setting!r}: write SECTION.KEY=VALUE, such as decode.num_blocks=512")
        try:
            overrides[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {setting!r}: {value!r} is no YAML value ({str(error).splitlines()[0]})") from error
    overrides |= {key: value for key, value in named.items() if value is not None}
    if file is None and "model.path" not in overrides:
        raise ConfigError("MODEL_DIR is missing: name a Hugging Face folder, such as models/tiny-moe, or a --config with model.path")
    return load_config(file, overrides)


def _bench_root() -> Path:
    for root in (Path.cwd(), Path(__file__).resolve().parents[1]):
        if (root / "bench").is_dir():
            return root / "bench"
    raise ConfigError("no folder bench/ here: benchmarks run from a checkout of Duomo")


if __name__ == "__main__":
    main()
