"""Owns the plan of a goodput campaign: which servers stand side by side, how they are started, which loads they get. Knows no process.

A plan is TOML. `[values]` are names that commands, environments and options may use as {name}; {out} is the folder of the results. Sides
of a phase run at the same time, its `prepare` commands before them; phases follow one another.
"""

from __future__ import annotations

import shlex
import tomllib
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ProcessPlan(_Strict):
    """A command as a shell would split it, and what its environment has beside this one's."""

    command: str
    env: dict[str, str] = {}


class LoadPlan(_Strict):
    """One run of `duomo bench serve`: its mix, its rates, and options of its own."""

    mix: str
    rates: str
    options: list[str] = []

    @property
    def name(self) -> str:
        return self.mix.replace(":", "x").replace(",", "_")


class SidePlan(_Strict):
    """Servers that are asked as one. gpus: that they use; stand_for: how many such sides the figures are told for (two replicas, of which
    one was measured at half of the rate). is_peer: ours are judged by the best of these. ready: a path that answers 200 once one serves.
    behind: URLs of servers behind these, which have to be ready too."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    urls: list[str] = Field(min_length=1)
    gpus: int = Field(ge=0)
    stand_for: int = Field(default=1, ge=1)
    is_peer: bool = False
    ready: str = "/v1/models"
    behind: list[str] = []
    start_limit_s: float = Field(default=300.0, gt=0)
    processes: list[ProcessPlan] = Field(min_length=1)
    loads: list[LoadPlan] = Field(min_length=1)


class PhasePlan(_Strict):
    """Sides that run beside one another, on cards of their own."""

    name: str
    prepare: list[str] = []
    sides: list[SidePlan] = Field(min_length=1)


class Plan(_Strict):
    """options: of every load. limits_from: the side whose unloaded times multiples are of; limits_mix: the lengths that are measured for
    it, alone, before any load."""

    values: dict[str, str] = {}
    options: list[str] = []
    limits_from: str
    limits_mix: str
    phases: list[PhasePlan] = Field(min_length=1)

    @property
    def limits_load(self) -> LoadPlan:
        """Without what of `options` a load this short cannot have. What counts of it are the times alone, before it."""
        return LoadPlan(mix=self.limits_mix, rates="2", options=["--arrivals", "constant", "--duration-s", "2", "--ramp-s", "0"])

    def sides(self) -> list[SidePlan]:
        return [side for phase in self.phases for side in phase.sides]


class PlanError(ValueError):
    """What is wrong with a plan, with the file and the key."""


def read_plan(file: Path, values: Mapping[str, str]) -> Plan:
    """values: instead of the file's. Raises PlanError."""
    try:
        plan = Plan.model_validate(tomllib.loads(file.read_text()))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise PlanError(f"{file}: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise PlanError(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    if unknown := set(values) - {*plan.values, "out"}:
        raise PlanError(f"--set {sorted(unknown)[0]}: {file} has {', '.join(sorted(plan.values)) or 'no values'}")
    plan = _filled(file, plan, {**plan.values, **values})
    names = [side.name for side in plan.sides()]
    if twice := {name for name in names if names.count(name) > 1}:
        raise PlanError(f"{file}: two sides are named {sorted(twice)[0]}")
    if plan.limits_from not in {side.name for side in plan.phases[0].sides}:
        raise PlanError(f"{file}: limits_from: {plan.limits_from!r} is no side of the first phase, and the others need its times")
    return plan


def _filled(file: Path, plan: Plan, values: Mapping[str, str]) -> Plan:
    """With every {name} replaced, in commands (one word each, whatever it holds), environments and options."""
    words = {name: shlex.quote(value) for name, value in values.items()}

    def fill(text: str, by: Mapping[str, str] = values) -> str:
        try:
            return text.format_map(by)
        except (KeyError, ValueError, IndexError) as error:
            raise PlanError(f"{file}: {text!r}: {error} is none of values ({', '.join(sorted(values))})") from error

    def filled(side: SidePlan) -> SidePlan:
        processes = [
            each.model_copy(update={"command": fill(each.command, words), "env": {name: fill(value) for name, value in each.env.items()}})
            for each in side.processes
        ]
        loads = [
            each.model_copy(update={"rates": fill(each.rates), "options": [fill(option) for option in each.options]}) for each in side.loads
        ]
        return side.model_copy(update={"processes": processes, "loads": loads})

    phases = [
        phase.model_copy(update={"prepare": [fill(each, words) for each in phase.prepare], "sides": [filled(side) for side in phase.sides]})
        for phase in plan.phases
    ]
    for text in (
        *(each.command for side in plan.sides() for each in side.processes),
        *(each for phase in plan.phases for each in phase.prepare),
    ):
        try:
            shlex.split(text)
        except ValueError as error:
            raise PlanError(f"{file}: command {text!r}: {error}") from error
    return plan.model_copy(update={"phases": phases, "options": [fill(option) for option in plan.options]})
