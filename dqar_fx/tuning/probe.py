"""A model that does at every call what it is told, so that it can be timed."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dqar_fx.calls import make_call
from dqar_fx.config import CacheConfig
from dqar_fx.errors import TuningError
from dqar_fx.graph.lower import Lowerer
from dqar_fx.graph.sites import Site
from dqar_fx.graph.specialise import Outcome, Variant
from dqar_fx.runtime.entered import Entered
from dqar_fx.runtime.generation import Generation, StepTable
from dqar_fx.runtime.program import CapturedGraph, Outcomes
from dqar_fx.runtime.runtime import Runtime
from dqar_fx.schedule import Schedule


class _Constantly(list[bool]):
    """The same at every step, however many there are."""

    def __init__(self, value: bool) -> None:
        super().__init__([value])

    def __getitem__(self, _step: Any) -> Any:
        return super().__getitem__(0)


class _Told(StepTable):
    """Not a plan's table, but one set of outcomes for every step."""

    def __init__(self, outcomes: Outcomes) -> None:
        self.count = len(outcomes)
        self.num_steps = sys.maxsize
        self.reuses = False  # or what is lossless would be decided by what was stored
        self.uses_store = _Constantly(any(outcome is not Outcome.COMPUTE for outcome in outcomes))
        self._decided = outcomes, ("schedule",) * self.count

    def decide(self, *_: object) -> tuple[Outcomes, tuple[str, ...]]:
        """What was told."""
        return self._decided


class _ToldRuntime(Runtime):
    """Runs the same code as any runtime, but for the decision."""

    outcomes: Outcomes | None = None  # of the whole call; None: everything stores

    def __init__(self, cache: CacheConfig, lowerer: Lowerer, variants: dict[object, Variant]) -> None:
        super().__init__(Schedule.none(), cache, None, None, _refuse)
        self.lowerer = lowerer
        self.variants = variants
        self._told: dict[tuple[Outcomes | None, int, int], _Told] = {}

    def _table(self, _generation: object, graph: CapturedGraph, first: int, total: int | None) -> StepTable | None:
        if total is None:
            return None
        key = self.outcomes, first, graph.num_sites
        table = self._told.get(key)
        if table is None:
            count = graph.num_sites
            mine = (Outcome.STORE,) * count if self.outcomes is None else self.outcomes[first : first + count]
            table = self._told[key] = _Told(mine)
        return table


def _refuse(*_: Any) -> Any:
    raise AssertionError("the lowerer is another one")


class Probe:
    """``model``, captured as ``optimize`` would, on given inputs. The model itself is left as it is.

    Use as a context: on leaving, what was stored is freed.

    Args:
        model: not compiled; it may be optimised.
        args, kwargs: of one call.
        cache: how values are stored.
        lowerer: compiles pieces.
        variants: the specialised pieces; with those of another runtime (and its lowerer) they are compiled once for
            both.
        dynamic, fullgraph: as for ``optimize``.

    Attributes:
        sites: all that are rewritten.
        graphs: those of a call in the order in which they run, each with the number of its first site.
    """

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        cache: CacheConfig,
        lowerer: Lowerer,
        variants: dict[object, Variant],
        dynamic: bool | None,
        fullgraph: bool,
    ) -> None:
        self._runtime = _ToldRuntime(cache, lowerer, variants)
        self._call = make_call(model, self._runtime, dynamic=dynamic, fullgraph=fullgraph)
        self._name = type(model).__name__
        self._args, self._kwargs = args, dict(kwargs)
        self._generation = Generation(explicit=True, pool=self._runtime.pool)
        self._entered = Entered(self._runtime, self._generation, lambda _: None)
        self._step = 0
        self.sites: tuple[Site, ...] = ()
        self.graphs: list[tuple[CapturedGraph, int]] = []

    def __enter__(self) -> Probe:
        """Call the model once: capture it, and store every value.

        Raises:
            DqarError: the model cannot be captured, or has no attention.
            TuningError: it ran outside of its graphs.
        """
        self._entered.__enter__()
        try:
            self.run(None)
            self.sites = self._runtime.sites
            if not self.sites:
                raise TuningError(
                    f"{self._name} ran outside of its compiled graphs, so nothing can be measured. Dynamo stepped "
                    f"aside: is it disabled here (torch.compiler.set_stance), or a dispatch mode active?"
                )
        except BaseException:
            self.__exit__()
            raise
        first = 0
        for graph in self._runtime.graphs:
            self.graphs.append((graph, first))
            first += graph.num_sites
        return self

    def __exit__(self, *error: object) -> None:
        self._entered.__exit__(*error)
        self._runtime.release()

    def run(self, outcomes: Outcomes | None) -> Any:
        """One call of the model, with one outcome for each site (None: all compute and store). What is read is what was
        stored last: its values are no matter here."""
        self._runtime.outcomes = outcomes
        self._runtime.begin_step(self._step)
        self._step += 1
        return self._call(*self._args, **self._kwargs)

    @property
    def site_bytes(self) -> list[int]:
        """What each site stores."""
        found = self._generation.site_bytes()
        return [found[site.index] for site in self.sites]

    @property
    def device(self) -> torch.device:
        """Where the values that leave the attentions are."""
        graph = next(graph for graph, _ in self.graphs if graph.num_sites)
        name = graph.regions[0].exits[0]
        value = next(node.meta["example_value"] for node in graph.captured.graph.nodes if node.name == name)
        return torch.device(value.device)
