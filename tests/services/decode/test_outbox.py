"""A gateway's sockets at a decode replica: one is in use, and what was asked for by another is nobody's any more."""

from __future__ import annotations

import asyncio
from pathlib import Path

from duomo.wire.messages import Cancel
from tests.services.decode.rig import configuration, running, serve
from tests.services.decode.scripted_gateway import ScriptedGateway
from tests.services.decode.scripted_peers import GREEDY, Prompt, expected, ids, until, with_max


def test_a_gateway_that_comes_back_by_another_socket_has_given_up_what_it_asked_for_by_the_first(tmp_path: Path) -> None:
    """As after a cut network: the gateway sees silence and dials again, and the end of its first socket is never seen here."""

    async def go() -> None:
        async with running(configuration(tmp_path)) as rig:
            first = rig.gateway
            decoding, waiting = Prompt("decoding", 0, ids(20), with_max(GREEDY, 2000)), Prompt("waiting", 0, ids(20, 1), GREEDY)
            first.start(decoding, rig.prefill)
            await rig.prefill.prefill(decoding)
            first.start(waiting, rig.prefill)
            rig.prefill.announce(waiting)
            await rig.prefill.granted(waiting)
            second = ScriptedGateway(rig.config)
            second.identity = first.identity
            await second.connect(rig.service.membership.identity.address)
            await until(lambda: rig.service.num_live_requests() == 0)
            assert (await rig.prefill.one(Cancel, "waiting")).reason == "gateway_gone"
            left = first.connection
            assert left is not None
            await until(lambda: left.closed)
            rig.gateway = second
            prompt = Prompt("again", 0, ids(9), with_max(GREEDY, 12))
            assert await serve(rig, prompt) == expected(ids(9), with_max(GREEDY, 12))
            assert not first.answers["again"].tokens and not second.answers["decoding"].tokens
            await first.close()
            assert second.connection is not None and not second.connection.closed
            await rig.at_rest()
            await second.close()

    asyncio.run(go())
