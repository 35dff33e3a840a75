"""A CPU's decode worker that answers one step late, as a GPU's does: rows name rows of a step whose tokens the service has not seen."""

from __future__ import annotations

from dataclasses import replace

from duomo.engine.decode_step import DecodeRow, Joining
from services.decode.worker import DecodeWorker, StepInput, StepOutput


class LateWorker(DecodeWorker):
    """Right where the service is right about what is in flight: a token comes from the row that a step names, whoever had it."""

    _out: StepOutput | None = None
    _fed: tuple[Joining, ...] = ()

    def run(self, step: StepInput) -> StepOutput | None:  # type: ignore[override]  # what it stands for answers None at first
        rows = tuple(replace(row, source=self._known(row)) for row in step.rows)
        before, self._out = self._out, super().run(replace(step, rows=rows))
        self._fed = tuple(row.source for row in rows if isinstance(row.source, Joining))
        return before

    def finish(self) -> StepOutput:
        before, self._out = self._out, None
        assert before is not None
        return before

    def _known(self, row: DecodeRow) -> Joining:
        if isinstance(row.source, Joining):
            return replace(row.source, sampling=replace(row.source.sampling, output_ids=tuple(row.source.sampling.output_ids)))
        assert self._out is not None, "nothing is under way"
        token_id, sampling = self._out.tokens[row.source].token_id, self._fed[row.source].sampling
        return Joining(token_id=token_id, sampling=replace(sampling, output_ids=(*sampling.output_ids, token_id)))
