"""The gate against float64 sorts, against the models' own routers, and against the sequential definition of a capacity."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from duomo_kernels import _gate_plan, _grid_board
from duomo_kernels._bounds import bound, error
from duomo_kernels._gate_capacity import Capacity, Overflow
from duomo_kernels._routing import GROUP_TILES, GateRule, Routing
from duomo_kernels.gate import empty_routing, gate, gate_reference

SWITCH = GateRule(top_k=1)
OLMOE = GateRule(top_k=8)
QWEN = GateRule(top_k=8, normalise=True)
MIXTRAL = GateRule(top_k=2, normalise=True)
DEEPSEEK = GateRule(top_k=8, scoring="sigmoid", normalise=True, num_groups=8, top_groups=4, routed_scale=2.5)
POISON = -123456789


def poisoned(num_tokens: int, top_k: int, num_experts: int, tile_rows: int, device: torch.device) -> Routing:
    out = empty_routing(num_tokens, top_k, num_experts, tile_rows, device)
    for field in fields(out):
        tensor = getattr(out, field.name)
        if isinstance(tensor, Tensor):
            tensor.fill_(torch.nan if tensor.dtype == torch.float32 else POISON)
    return out


def poisoned_overflow(num_tokens: int, num_experts: int, device: torch.device) -> Overflow:
    over = Overflow.empty(num_tokens, num_experts, device)
    for field in fields(over):
        getattr(over, field.name).fill_(torch.nan if field.name == "lost_T" else POISON)
    return over


def differing(ours: Routing, ref: Routing) -> list[str]:
    """Names of fields that differ; weights by the bound, all else exactly."""
    num_tiles = int(ref.num_tiles)
    wrong = [] if error(ours.weights_TK, ref.weights_TK) <= bound(torch.float32) else ["weights_TK"]
    if int(ours.num_tiles) != num_tiles or not torch.equal(ours.tiles_M5[:num_tiles].cpu(), ref.tiles_M5[:num_tiles].cpu()):
        wrong.append("tiles")
    exact = ("ids_TK", "counts_E", "offsets_E1", "routed_R", "place_R")
    return wrong + [name for name in exact if not torch.equal(getattr(ours, name).cpu(), getattr(ref, name).cpu())]


def random_logits(num_tokens: int, num_experts: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens * 1000 + num_experts)
    return (torch.randn(num_tokens, num_experts, generator=generator) * 2).to(dtype).to(device)


def both(
    logits: Tensor, rule: GateRule, tile_rows: int, bias: Tensor | None = None, num_valid: int | None = None
) -> tuple[Routing, Routing]:
    (num_tokens, num_experts), device = logits.shape, logits.device
    valid = None if num_valid is None else torch.tensor([num_valid], dtype=torch.int32, device=device)
    out = poisoned(num_tokens, rule.top_k, num_experts, tile_rows, device)
    ours = gate(logits, rule, tile_rows=tile_rows, bias_E=bias, num_valid=valid, out=out)
    return ours, gate_reference(logits, rule, tile_rows=tile_rows, bias_E=bias, num_valid=num_valid)


def bias_of(num_experts: int, device: torch.device) -> Tensor:
    return torch.randn(num_experts, generator=torch.Generator().manual_seed(7)).to(device) * 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "rule"),
    [
        (1, 64, OLMOE),
        (7, 8, MIXTRAL),
        (16, 128, QWEN),
        (63, 60, GateRule(top_k=4)),
        (257, 24, MIXTRAL),
        (35, 128, QWEN),
        (17, 512, GateRule(top_k=10, normalise=True)),
        (19, 16, GateRule(top_k=16, scoring="sigmoid")),
        (40, 5, SWITCH),
    ],
)
def test_choice_order_and_tiles(num_tokens: int, num_experts: int, rule: GateRule, dtype: torch.dtype, device: torch.device) -> None:
    ours, ref = both(random_logits(num_tokens, num_experts, device, dtype), rule, 16)
    assert differing(ours, ref) == []


@pytest.mark.parametrize("num_tokens", [1, 13, 35])
@pytest.mark.parametrize(
    ("num_experts", "rule"),
    [(256, DEEPSEEK), (60, replace(DEEPSEEK, num_groups=3, top_groups=2)), (64, GateRule(top_k=6, num_groups=4, top_groups=2))],
)
def test_groups_and_bias(num_tokens: int, num_experts: int, rule: GateRule, device: torch.device) -> None:
    logits = random_logits(num_tokens, num_experts, device)
    for bias in (bias_of(num_experts, device), None):
        ours, ref = both(logits, rule, 8, bias)
        assert differing(ours, ref) == []
    ours, ref = both(logits, replace(rule, num_groups=1, top_groups=1), 8, bias_of(num_experts, device))
    assert differing(ours, ref) == []


@pytest.mark.parametrize(("num_tokens", "num_valid"), [(9, 0), (9, 5), (70, 33), (70, 70), (70, 99)])
def test_padding_counts_for_nothing(num_tokens: int, num_valid: int, device: torch.device) -> None:
    logits = random_logits(num_tokens, 24, device)
    logits[num_valid:] = torch.nan
    ours, ref = both(logits, replace(QWEN, top_k=3), 4, num_valid=num_valid)
    assert differing(ours, ref) == []
    assert int(ours.counts_E.sum()) == min(num_valid, num_tokens) * 3 and not ours.weights_TK[num_valid:].any()


def test_one_expert_takes_everything_and_groups_of_tiles(device: torch.device) -> None:
    num_tokens = 2 * GROUP_TILES * 2 + 3
    logits = random_logits(num_tokens, 20, device)
    logits[:, 11] = 50
    ours, ref = both(logits, SWITCH, 2)
    assert differing(ours, ref) == []
    assert int(ours.counts_E[11]) == num_tokens and int(ours.num_tiles) == 2 * GROUP_TILES + 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_go_to_the_lowest_expert_and_zeros_are_one(dtype: torch.dtype, device: torch.device) -> None:
    logits = torch.randint(-2, 3, (37, 48), generator=torch.Generator().manual_seed(0)).to(dtype).to(device)
    logits[::3] = torch.where(logits[::3] == 0, -0.0, logits[::3])
    logits[5, ::2], logits[6] = 0.0, -0.0
    logits[7, 3:] = -torch.inf
    ours, ref = both(logits, OLMOE, 16)
    assert differing(ours, ref) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_not_a_number_still_routes_to_experts(dtype: torch.dtype, device: torch.device) -> None:
    logits = random_logits(20, 24, device, dtype)
    logits[3], logits[4, 5] = torch.nan, -torch.nan
    ours = gate(logits, QWEN, tile_rows=16, out=poisoned(20, 8, 24, 16, device))
    assert all(len(set(row)) == 8 and 0 <= min(row) and max(row) < 24 for row in ours.ids_TK.tolist())
    assert sorted(ours.routed_R.tolist()) == list(range(160)) and bool(ours.weights_TK[3].isnan().all())


def test_weights_hold_where_logits_are_far_apart(device: torch.device) -> None:
    logits = random_logits(16, 32, device) * 30
    for rule in (OLMOE, QWEN, replace(QWEN, scoring="sigmoid"), replace(OLMOE, routed_scale=2.5)):
        ours, ref = both(logits, rule, 16)
        assert differing(ours, ref) == [], rule


def test_many_chunks_a_program(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setattr(_gate_plan, "FUSED_TOKENS", 16)
    for programs in (4, 1):  # 3 and 9 chunks, the second too many rows for a byte
        monkeypatch.setattr(_gate_plan, "MAX_PROGRAMS", programs)
        ours, ref = both(random_logits(267, 40, device), MIXTRAL, 16, num_valid=261)
        assert differing(ours, ref) == []


def test_a_row_does_not_depend_on_the_batch(device: torch.device) -> None:
    logits = random_logits(70, 64, device)
    whole = gate(logits, QWEN, tile_rows=16)
    for first, rows in ((0, 1), (30, 5), (41, 29)):
        part = gate(logits[first : first + rows].contiguous(), QWEN, tile_rows=16)
        assert torch.equal(part.ids_TK, whole.ids_TK[first : first + rows])
        assert torch.equal(part.weights_TK, whole.weights_TK[first : first + rows])


@pytest.mark.parametrize("spoil", ["logit", "bias", "tile_rows", "num_valid", "scale"])
def test_a_wrong_gate_fails(spoil: str, device: torch.device) -> None:
    logits, bias = random_logits(30, 64, device), bias_of(64, device)
    ref = gate_reference(logits, DEEPSEEK, tile_rows=8, bias_E=bias)
    if spoil == "logit":
        logits[17, int(ref.ids_TK[17, 0])] -= 8
    wrong_bias = bias.roll(1) if spoil == "bias" else bias
    rule = replace(DEEPSEEK, routed_scale=2.5 * (1 + 2.0**-12)) if spoil == "scale" else DEEPSEEK
    valid = torch.tensor([29 if spoil == "num_valid" else 30], dtype=torch.int32, device=device)
    ours = gate(logits, rule, tile_rows=7 if spoil == "tile_rows" else 8, bias_E=wrong_bias, num_valid=valid)
    assert differing(ours, ref) != []


def test_switch_is_the_papers_formula(device: torch.device) -> None:
    """Switch Transformers (arXiv 2101.03961), equation 1: the one expert of largest p = exp(h) / sum exp(h), weighted by p."""
    logits = random_logits(21, 16, device)
    ours = gate(logits, SWITCH, tile_rows=16)
    exp_TE = logits.double().exp()
    p_T, ids_T = (exp_TE / exp_TE.sum(-1, keepdim=True)).max(-1)
    assert torch.equal(ours.ids_TK[:, 0].long(), ids_T) and error(ours.weights_TK[:, 0], p_T) <= bound(torch.float32)


@pytest.mark.parametrize("name", ["qwen3_moe", "olmoe", "mixtral", "deepseek_v3"])
def test_the_models_own_router(name: str, device: torch.device) -> None:
    transformers = pytest.importorskip("transformers")
    num_experts, rule = {"qwen3_moe": (128, QWEN), "olmoe": (64, OLMOE), "mixtral": (8, MIXTRAL), "deepseek_v3": (64, DEEPSEEK)}[name]
    module = __import__(f"transformers.models.{name}.modeling_{name}", fromlist=["x"])
    prefix = {"qwen3_moe": "Qwen3Moe", "olmoe": "Olmoe", "mixtral": "Mixtral", "deepseek_v3": "DeepseekV3"}[name]
    sizes: dict[str, object] = {"hidden_size": num_experts, "num_experts_per_tok": rule.top_k, "norm_topk_prob": rule.normalise}
    sizes["num_local_experts" if name == "mixtral" else "num_experts"] = num_experts
    if name == "deepseek_v3":
        sizes |= {"n_routed_experts": num_experts, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5}
    config = getattr(transformers, f"{prefix}Config")(**sizes)
    router = getattr(module, f"{prefix}{'TopkRouter' if name == 'deepseek_v3' else 'TopKRouter'}")(config)
    router.weight.data = torch.eye(num_experts)  # hidden states are the logits
    bias = None
    if name == "deepseek_v3":
        bias = bias_of(num_experts, torch.device("cpu"))
        router.e_score_correction_bias.data = bias
    logits = random_logits(29, num_experts, torch.device("cpu"))
    with torch.no_grad():
        _, weights_TK, ids_TK = router(logits)
    order = weights_TK.argsort(-1, descending=True) if bias is None else ids_TK.argsort(-1)
    ours = gate(logits.to(device), rule, tile_rows=16, bias_E=None if bias is None else bias.to(device))
    ours_ids, ours_weights = ours.ids_TK.cpu().long(), ours.weights_TK.cpu()
    if bias is not None:  # chosen in no order
        mine = ours_ids.argsort(-1)
        ours_ids, ours_weights = ours_ids.gather(1, mine), ours_weights.gather(1, mine)
    assert torch.equal(ours_ids, ids_TK.gather(1, order))
    assert error(ours_weights, weights_TK.gather(1, order).double()) <= bound(torch.float32)


def run_capacity(
    logits: Tensor, rule: GateRule, capacity: Capacity, bias: Tensor | None = None, num_valid: int | None = None
) -> tuple[Routing, Overflow, Routing, Overflow]:
    (num_tokens, num_experts), device = logits.shape, logits.device
    ours_over, ref_over = poisoned_overflow(num_tokens, num_experts, device), poisoned_overflow(num_tokens, num_experts, device)
    valid = None if num_valid is None else torch.tensor([num_valid], dtype=torch.int32, device=device)
    out = poisoned(num_tokens, rule.top_k, num_experts, 4, device)
    ours = gate(logits, rule, tile_rows=4, bias_E=bias, num_valid=valid, capacity=capacity, overflow=ours_over, out=out)
    ref = gate_reference(logits, rule, tile_rows=4, bias_E=bias, num_valid=num_valid, capacity=capacity, overflow=ref_over)
    return ours, ours_over, ref, ref_over


def same_overflow(ours: Overflow, ref: Overflow) -> bool:
    exact = all(torch.equal(getattr(ours, name), getattr(ref, name)) for name in ("overflow_E", "dropped", "rerouted", "exceeded"))
    return exact and error(ours.lost_T[:, None], ref.lost_T[:, None].double()) <= bound(torch.float32)


@pytest.mark.parametrize("overflow", ["drop", "residual", "reroute", "error"])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "rule", "num_valid"),
    [(13, 8, MIXTRAL, None), (40, 12, replace(OLMOE, top_k=3), 35), (17, 64, DEEPSEEK, 15), (16, 5, SWITCH, 0)],
)
def test_capacity_is_its_definition(
    overflow: str, num_tokens: int, num_experts: int, rule: GateRule, num_valid: int | None, device: torch.device
) -> None:
    logits = random_logits(num_tokens, num_experts, device) + torch.linspace(2, 0, num_experts, device=device)
    bias = bias_of(num_experts, device) if rule is DEEPSEEK else None
    for factor in (1.1,) if overflow == "reroute" else (0.6, 1.1, 100.0):
        capacity = Capacity(factor=factor, overflow=overflow, near=0.1)  # type: ignore[arg-type]  # parametrised by name
        ours, ours_over, ref, ref_over = run_capacity(logits, rule, capacity, bias, num_valid)
        assert differing(ours, ref) == [] and same_overflow(ours_over, ref_over)
        if overflow == "reroute" and num_valid != 0:
            assert int(ours_over.rerouted) > 0, "the case reroutes nothing: it tests nothing"


def test_a_limit_is_exact_and_one_off_is_seen(device: torch.device) -> None:
    logits = torch.zeros(100, 10, device=device)
    logits[:, 4] = 1
    _, over, _, _ = run_capacity(logits, SWITCH, Capacity(factor=1.1))
    assert int(over.dropped) == 100 - 11 and int(over.exceeded) == 1  # in binary, 1.1 * 100 / 10 is above 11
    ours, _, _, _ = run_capacity(logits, SWITCH, Capacity(factor=1.1))
    _, _, ref, _ = run_capacity(logits, SWITCH, Capacity(factor=1.2))
    assert differing(ours, ref) != []


def test_what_residual_adds_is_what_was_lost(device: torch.device) -> None:
    logits = random_logits(40, 8, device) + torch.linspace(3, 0, 8, device=device)
    full = gate(logits, MIXTRAL, tile_rows=4)
    ours, over, _, _ = run_capacity(logits, MIXTRAL, Capacity(factor=1.0, overflow="residual"))
    assert int(over.dropped) > 0 and error(ours.weights_TK.sum(-1) + over.lost_T, full.weights_TK.double().sum(-1)) <= bound(torch.float32)


@pytest.mark.parametrize("rows", [4, 8])
@pytest.mark.parametrize(
    ("num_tokens", "num_valid", "num_experts", "rule"),
    [
        (50, None, 24, MIXTRAL),
        (41, 33, 5, SWITCH),
        (70, None, 32, MIXTRAL),
        (37, 30, 60, replace(OLMOE, scoring="sigmoid")),
        (33, None, 128, QWEN),
        (21, 19, 256, DEEPSEEK),
        (18, None, 60, replace(DEEPSEEK, num_groups=3, top_groups=2)),
        (19, 17, 512, GateRule(top_k=10, normalise=True)),
    ],
)
def test_programs_that_share_a_board(
    num_tokens: int,
    num_valid: int | None,
    num_experts: int,
    rule: GateRule,
    rows: int,
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
) -> None:
    """The interpreter runs one program after the other and cannot wait: a second launch finds the first's counts on the board.

    A new board, because the first launch would take another test's counts for its own, and write past its tensors.
    """
    _grid_board.board.cache_clear()
    monkeypatch.setattr(_gate_plan, "is_interpreted", lambda: False)
    monkeypatch.setattr(_gate_plan, "num_sms", lambda device: 132)
    monkeypatch.setattr(_gate_plan, "WAVE_ROWS", (rows,))
    logits = random_logits(num_tokens, num_experts, device)
    bias = bias_of(num_experts, device) if rule.num_groups > 1 else None
    for _ in range(2):
        ours, ref = both(logits, rule, 4, bias, num_valid=num_valid)
    assert differing(ours, ref) == []


@pytest.mark.parametrize("overflow", ["drop", "residual", "error"])
def test_a_capacity_over_a_board(overflow: str, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    _grid_board.board.cache_clear()
    monkeypatch.setattr(_gate_plan, "is_interpreted", lambda: False)
    monkeypatch.setattr(_gate_plan, "num_sms", lambda device: 132)
    logits = random_logits(29, 64, device) + torch.linspace(2, 0, 64, device=device)
    capacity = Capacity(factor=1.1, overflow=overflow)  # type: ignore[arg-type]  # parametrised by name
    for _ in range(2):
        ours, ours_over, ref, ref_over = run_capacity(logits, OLMOE, capacity, num_valid=27)
    assert differing(ours, ref) == [] and same_overflow(ours_over, ref_over)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [17, 257, 1000, 1024, 1025, 5000, 40000])
def test_large_and_replayed(num_tokens: int, device: torch.device) -> None:
    """The grid barrier, again and again in one graph, with other logits in each replay."""
    logits = random_logits(num_tokens, 128, device)
    out = poisoned(num_tokens, 8, 128, 128, device)
    gate(logits, QWEN, tile_rows=128, out=out)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(3):
            gate(logits, QWEN, tile_rows=128, out=out)
    for seed in range(2):
        logits.copy_(random_logits(num_tokens + seed + 1, 128, device)[:num_tokens])
        graph.replay()
        assert differing(out, gate_reference(logits, QWEN, tile_rows=128)) == []


@pytest.mark.gpu
def test_streams_and_graphs_at_once(device: torch.device) -> None:
    """Two graphs captured on one stream and an eager stream, all at once: nobody counts on another's counter."""
    inputs = [random_logits(1024 - i, 64, device) for i in range(3)]
    outs = [poisoned(len(x), 8, 64, 16, device) for x in inputs]
    for x, out in zip(inputs, outs, strict=True):
        gate(x, OLMOE, tile_rows=16, out=out)
    torch.cuda.synchronize()
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    for graph, x, out in zip(graphs, inputs, outs, strict=False):
        with torch.cuda.graph(graph):
            for _ in range(20):
                gate(x, OLMOE, tile_rows=16, out=out)
    streams = [torch.cuda.Stream() for _ in range(3)]  # type: ignore[no-untyped-call]  # torch ships no types for it
    torch.cuda.synchronize()
    for _ in range(5):
        for stream, graph in zip(streams, graphs, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
        with torch.cuda.stream(streams[2]):
            for _ in range(20):
                gate(inputs[2], OLMOE, tile_rows=16, out=outs[2])
    torch.cuda.synchronize()
    for x, out in zip(inputs, outs, strict=True):
        assert differing(out, gate_reference(x, OLMOE, tile_rows=16)) == []


@pytest.mark.parametrize("rule", [GateRule(top_k=8), GateRule(top_k=4, normalise=True)], ids=["as it is", "normalised"])
def test_invariant_weights_do_not_know_how_many_rows_there_are(rule: GateRule, device: torch.device) -> None:
    """Across every plan: one row, one program, several in one kernel, several kernels."""
    logits = torch.randn(1025 if device.type == "cuda" else 65, 60, device=device)
    whole = gate(logits, rule, tile_rows=16, is_invariant=True)
    for num_rows in (1, 7, 16, 17, 64, 1024):
        if num_rows <= len(logits):
            part = gate(logits[:num_rows].contiguous(), rule, tile_rows=16, is_invariant=True)
            assert torch.equal(part.weights_TK, whole.weights_TK[:num_rows]) and torch.equal(part.ids_TK, whole.ids_TK[:num_rows])
