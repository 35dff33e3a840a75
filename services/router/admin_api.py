"""The admin API on its own port: lists, drains and undrains replicas, flushes their caches, scales pools. Knows no client's request.

Every call that would change something is audited, the refused ones too. Scaling goes to whoever started the replicas: `duomo serve`, by the
socket in its run's folder (services/admin.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from duomo.api_keys import Scope as KeyScope
from duomo.config import DuomoConfig
from duomo.errors import ConfigError, DuomoError, RequestError
from services.admin import SOCKET_NAME, AdminCommand, Replicas, ask
from services.router.app import expert_report, pool_report
from services.router.audit import Audit, Deed
from services.router.auth import Guard, holder_of
from services.router.body import read_body
from services.router.common_fields import json_object
from services.router.fields import Fields
from services.router.gateway import Gateway
from services.router.keys import Keys
from services.router.operator import Operator
from services.router.refusals import answer_refusals

_MAX_BODY_BYTES: Final = 4096
_JSON: Final = "application/json"


def build_admin_app(gateway: Gateway, keys: Keys, audit: Audit) -> FastAPI:
    """The application of gateway.admin_port. `audit` is the caller's to close."""
    app = FastAPI(title="Duomo admin", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    api = AdminApi(gateway, audit)
    app.add_route("/admin/pools", api.pools, methods=["GET"])
    app.add_route("/admin/experts", api.experts, methods=["GET"])
    app.add_route("/admin/replicas/{replica}/drain", api.drain, methods=["POST"])
    app.add_route("/admin/replicas/{replica}/undrain", api.undrain, methods=["POST"])
    app.add_route("/admin/replicas/{replica}/flush", api.flush_replica, methods=["POST"])
    app.add_route("/admin/pools/{pool}/flush", api.flush_pool, methods=["POST"])
    app.add_route("/admin/pools/{pool}/scale", api.scale, methods=["POST"])
    app.add_route("/health/live", api.live, methods=["GET"])
    answer_refusals(app)
    app.add_middleware(Guard, keys=keys, needed=_needed, refused=api.refused, host=gateway.config.gateway.admin_host)
    return app


def _needed(path: str) -> tuple[KeyScope, ...]:
    return () if path == "/health/live" else ("admin",)


class AdminApi:
    """The endpoints of one gateway."""

    def __init__(self, gateway: Gateway, audit: Audit) -> None:
        self._gateway = gateway
        self._audit = audit
        self._operator = Operator(gateway.pools)

    async def pools(self, request: Request) -> Response:
        return _answer(pool_report(self._gateway))

    async def experts(self, request: Request) -> Response:
        return _answer(expert_report(self._gateway))

    async def live(self, request: Request) -> Response:
        return _answer({"status": "live"})

    async def drain(self, request: Request) -> Response:
        return await self._audited(request, "drain", lambda: self._set_draining(request, True))

    async def undrain(self, request: Request) -> Response:
        return await self._audited(request, "undrain", lambda: self._set_draining(request, False))

    async def flush_replica(self, request: Request) -> Response:
        return await self._audited(request, "flush", lambda: self._flush(request))

    async def flush_pool(self, request: Request) -> Response:
        return await self._audited(request, "flush", lambda: self._flush_pool(request))

    async def scale(self, request: Request) -> Response:
        return await self._audited(request, "scale", lambda: self._scale(request))

    def refused(self, code: str, scope: Scope) -> None:
        """Of the guard: a call that no endpoint hears of."""
        if scope["method"] != "GET":
            action = scope["path"].rsplit("/", 1)[-1]
            known = action if action in ("drain", "undrain", "flush", "scale") else "other"
            holder = holder_of(scope)
            address = scope["client"][0] if scope.get("client") else "-"
            who = holder.name if holder is not None else "-"
            self._audit.record(Deed(who=who, address=address, action=known, target=scope["path"][:200], result=code))

    async def _audited(self, request: Request, action: str, work: Callable[[], Awaitable[object]]) -> Response:
        result, detail = "internal", ""
        try:
            if "origin" in request.headers:  # a page of any site, in the browser of somebody on this machine, may send a POST
                raise RequestError("The admin API takes no calls from browsers (Origin).", param="origin", status=403, code="from_browser")
            done = await work()
            is_whole = not (isinstance(done, dict) and done.get("not_flushed"))
            result, detail = "ok" if is_whole else "partly_done", msgspec.json.encode(done).decode()
            return _answer(done, 200 if is_whole else 207)
        except DuomoError as error:
            is_quote = isinstance(error, RequestError) and error.status == 400  # of the body, which may hold anything
            result, detail = error.code, "" if is_quote else error.detail
            raise
        finally:
            holder = holder_of(request.scope)
            self._audit.record(
                Deed(
                    who=holder.name if holder is not None else "-",
                    address=request.client.host if request.client is not None else "-",
                    action=action,
                    target=" ".join(str(value)[:200] for value in request.path_params.values()),
                    result=result,
                    detail=detail,
                )
            )

    async def _set_draining(self, request: Request, is_draining: bool) -> object:
        link = self._operator.replica(request.path_params["replica"])
        await self._operator.set_draining(link, is_draining)
        return {"replica": link.member.replica_id, "is_draining": is_draining, "gateway_legs": len(link.legs)}

    async def _flush(self, request: Request) -> object:
        link = self._operator.replica(request.path_params["replica"])
        return {"flushed_blocks": {link.member.replica_id: await self._operator.flush(link)}}

    async def _flush_pool(self, request: Request) -> object:
        told = await self._operator.flush_all(self._operator.pool(request.path_params["pool"]))
        counts = {name: said for name, said in told.items() if isinstance(said, int)}
        errors = {name: said for name, said in told.items() if isinstance(said, RequestError)}
        if errors and not counts:
            raise next(iter(errors.values()))
        return {"flushed_blocks": counts, "not_flushed": {name: error.detail for name, error in errors.items()}}

    async def _scale(self, request: Request) -> object:
        fields = Fields(json_object(await read_body(request, _MAX_BODY_BYTES)))
        replicas = fields.integer("replicas", low=1, high=256)
        fields.finish()
        if replicas is None:
            raise RequestError("'replicas' is missing: a whole number from 1 to 256.", param="replicas", code="missing_required_parameter")
        return {"replicas": await asyncio.to_thread(scale, self._gateway.config, request.path_params["pool"], replicas)}


def scale(config: DuomoConfig, pool: str, replicas: int) -> Replicas:
    """Ask whoever started the replicas for so many; how many there are in which state now. Raises RequestError. Blocks: for a thread."""
    if pool not in ("prefill", "decode"):
        raise RequestError(f"There is no pool '{pool}' to scale: prefill or decode.", param="pool", status=404, code="pool_not_found")
    path = None if config.run_dir is None else config.run_dir / SOCKET_NAME
    if path is None or not path.exists():
        detail = "This gateway does not run under `duomo serve`: scale by what started its replicas (docker-compose, Kubernetes)."
        raise RequestError(detail, param="replicas", status=501, code="not_scalable")
    try:
        return ask(path, AdminCommand(command="scale", pool="prefill" if pool == "prefill" else "decode", replicas=replicas))
    except ConfigError as error:
        raise RequestError(f"Not scaled: {error.detail}.", param="replicas", status=409, code="scale_refused") from error


def _answer(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type=_JSON)
