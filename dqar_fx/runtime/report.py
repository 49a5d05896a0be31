"""What a user may ask of a runtime: counts, decisions, and a report that hides nothing."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from dqar_fx.graph.savings import NOTHING, Savings
from dqar_fx.graph.sites import Site
from dqar_fx.graph.timestep_values import TimestepValues
from dqar_fx.plan import Plan
from dqar_fx.runtime.cuda_graphs import GraphCounts
from dqar_fx.runtime.decisions import Decision, Measured, plot

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Stats:
    """Counts of one generation (the current or last of the calling thread), and of what was compiled for the model.

    Attributes:
        decisions: ``(step, branch, site, action, reason)`` of every site in every call, in order.
        measurements: ``(step, branch, site, entropy, change, difference)`` of every site that measured, by branch, step
            and site.
        cache_bytes: bytes held now by the generation's stored values and by what it computed once; 0 once it was left
            or reset.
        captures: graphs that Dynamo captured.
        graph_breaks: breaks between them.
        variants: compiled pieces, one for each (piece, outcome, input signature) that was needed.
        compile_seconds: time spent rewriting and compiling them.
        cuda_graphs: what became of steps as CUDA graphs; None where that is off.
        shortcuts: calls since ``optimize`` that went past Dynamo's guards on the model, which had not been written into
            since they last passed.
    """

    decisions: tuple[Decision, ...]
    cache_bytes: int
    captures: int
    graph_breaks: int
    variants: int
    compile_seconds: float
    measurements: tuple[Measured, ...] = ()
    cuda_graphs: GraphCounts | None = None
    shortcuts: int = 0

    def plot(self, path: str | Path | None = None, *, title: str = "", size: tuple[float, float] = (9.0, 5.0)) -> Any:
        """Draw the decisions, step by site, coloured by reason; see ``Plan.plot`` for ``path`` and ``size``.

        Raises:
            RuntimeStateError: no step has run.
        """
        return plot(self.decisions, path, title=title, size=size)

    @property
    def steps(self) -> int:
        """Number of different steps that were run."""
        return len({d.step for d in self.decisions})

    @property
    def computed(self) -> int:
        """How often an attention was computed."""
        return sum(d.action == "compute" for d in self.decisions)

    @property
    def reused(self) -> int:
        """How often an attention was read from the cache."""
        return sum(d.action == "reuse" for d in self.decisions)

    @property
    def shared(self) -> int:
        """Of these, how often a branch of guidance took what another had stored at the same step."""
        return sum(d.reason == "shared" for d in self.decisions)

    @property
    def reuse_ratio(self) -> float:
        """``reused / (reused + computed)``, 0 before the first call."""
        return self.reused / len(self.decisions) if self.decisions else 0.0


@dataclass(frozen=True, slots=True)
class GraphBreak:
    """A place where Dynamo could not go on in one graph."""

    reason: str
    where: str

    @classmethod
    def of(cls, reason: Any) -> GraphBreak:
        """From Dynamo's ``GraphCompileReason``."""
        frames = list(getattr(reason, "user_stack", None) or [])
        where = f"{frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}" if frames else "unknown place"
        return cls(str(reason.reason).strip().split("\n", 1)[0], where)


@dataclass(frozen=True, slots=True)
class Report:
    """The state of an optimised model; ``str`` gives a table, ``to_dict`` plain values for JSON."""

    schedule: str
    cache: str
    sites: tuple[Site, ...]
    skipped: tuple[Site, ...]
    breaks: tuple[GraphBreak, ...]
    pieces: tuple[int, ...]
    plan: Plan | None
    site_bytes: dict[int, int]
    stats: Stats
    repeats: int
    uncompiled: int
    gates: str = ""
    unmeasured: tuple[str, ...] = ()
    unbalanced: tuple[tuple[str, str], ...] = ()  # (path, reason)
    unshared: str = ""
    hoisted: Savings = NOTHING
    hoisted_bytes: int = 0  # held now
    timed: TimestepValues | None = None  # what is computed for all steps at once
    timed_bytes: int = 0  # held now
    left: tuple[tuple[Site, str], ...] = ()  # sites whose reuse does not pay, as measured
    guarded: tuple[str, ...] = ()  # why Dynamo's guards on the model are checked at every call

    def to_dict(self) -> dict[str, Any]:
        """Everything in the report as numbers, strings, lists and dicts."""
        planned = self.plan.reuse.mean(axis=0).tolist() if self.plan is not None else [None] * len(self.sites)
        sites = []
        for site, ratio in zip(self.sites, planned, strict=False):
            mine = [d for d in self.stats.decisions if d.site == site.index]
            sites.append(
                {
                    "index": site.index,
                    "path": site.path,
                    "kind": site.kind,
                    "owner": site.owner,
                    "lossless": site.lossless,
                    "exits": len(site.exits),
                    "shapes": [[str(s) for s in shape] for shape in site.shapes],
                    "planned_reuse": ratio,
                    "reused": sum(d.action == "reuse" for d in mine),
                    "calls": len(mine),
                    "cache_bytes": self.site_bytes.get(site.index, 0),
                }
            )
        return {
            "schedule": self.schedule,
            "cache": self.cache,
            "gates": self.gates,
            "blocked": dict(Counter(d.reason for d in self.stats.decisions if d.action != "reuse")),
            "unmeasured": list(self.unmeasured),
            "unbalanced": [{"path": path, "reason": reason} for path, reason in self.unbalanced],
            "planned_reuse_ratio": self.plan.reuse_ratio if self.plan is not None else None,
            "num_steps": self.plan.num_steps if self.plan is not None else None,
            "sites": sites,
            "left_computing": [
                {"path": site.path, "kind": site.kind, "reason": reason}
                for site, reason in [*((s, s.reason) for s in self.skipped), *self.left]
            ],
            "graph_breaks": [{"reason": b.reason, "where": b.where} for b in self.breaks],
            "captures": self.stats.captures,
            "pieces": list(self.pieces),
            "variants": self.stats.variants,
            "compile_seconds": self.stats.compile_seconds,
            "steps": self.stats.steps,
            "computed": self.stats.computed,
            "reused": self.stats.reused,
            "shared": self.stats.shared,
            "unshared": self.unshared,
            "reuse_ratio": self.stats.reuse_ratio,
            "hoisted": {
                "values": self.hoisted.values,
                "flops_per_step": self.hoisted.flops,
                "flop_share": self.hoisted.flop_share,
                "weight_bytes_per_step": self.hoisted.weight_bytes,
                "weight_share": self.hoisted.weight_share,
                "bytes": self.hoisted_bytes,
            },
            "timestep_values": {
                "values": len(self.timed.names) if self.timed is not None else 0,
                "weight_bytes_per_step": self.timed.weight_bytes if self.timed is not None else 0,
                "weight_share": self.timed.weight_share if self.timed is not None else 0.0,
                "bytes": self.timed_bytes,
            },
            "cache_bytes": self.stats.cache_bytes,
            "repeated_calls": self.repeats,
            "uncompiled_pieces": self.uncompiled,
            "shortcuts": self.stats.shortcuts,
            "guarded": list(self.guarded),
            "cuda_graphs": asdict(self.stats.cuda_graphs) if self.stats.cuda_graphs is not None else None,
        }

    def __str__(self) -> str:
        data = self.to_dict()
        if not data["captures"]:
            return f"schedule {self.schedule}, cache {self.cache}: nothing captured yet; call the model once."
        ratio = data["planned_reuse_ratio"]
        head = [
            f"schedule {self.schedule}, cache {self.cache}",
            (
                f"captures {data['captures']}, graph breaks {len(self.breaks)}, "
                f"pieces {'+'.join(map(str, self.pieces))}, "
                f"compiled {data['variants']} in {data['compile_seconds']:.1f} s"
            ),
            f"planned reuse {ratio:.1%}" if ratio is not None else "no plan yet",
            (
                f"this generation: {data['steps']} steps, "
                f"reused {data['reused']} of {data['reused'] + data['computed']} ({data['reuse_ratio']:.1%}), "
                f"cache {data['cache_bytes'] / MIB:.2f} MiB"
            ),
        ]
        head.append(f"calls past Dynamo's guards on the model, so far: {self.stats.shortcuts}")
        head += [f"Dynamo's guards on the model are checked at every call: {reason}" for reason in self.guarded]
        if self.hoisted.values:
            head.append(
                f"computed once: {self.hoisted.values} values, {self.hoisted_bytes / MIB:.2f} MiB; "
                f"each later step saves {self.hoisted.flops / 1e9:.3g} GFLOP ({self.hoisted.flop_share:.1%}) and reads "
                f"{self.hoisted.weight_bytes / MIB:.3g} MiB less of the weights ({self.hoisted.weight_share:.1%})"
            )
        if self.timed is not None:
            head.append(
                f"computed for all steps at once: {len(self.timed.names)} values, {self.timed_bytes / MIB:.2f} MiB; "
                f"each later step reads {self.timed.weight_bytes / MIB:.3g} MiB less of the weights "
                f"({self.timed.weight_share:.1%})"
            )
        if self.gates:
            blocked = ", ".join(f"{reason} {count}" for reason, count in data["blocked"].items())
            head += [f"gates: {self.gates}", f"computed because of: {blocked or 'nothing'}"]
            head += [
                f"entropy cannot be measured at {path}: it is no plain scaled_dot_product_attention, so it computes"
                for path in self.unmeasured
            ]
            if data["shared"]:
                head.append(f"of the reused, taken from another branch at the same step: {data['shared']}")
            if self.unshared:
                head.append(f"nothing is shared between branches: {self.unshared}")
        if (graphs := self.stats.cuda_graphs) is not None:
            head.append(
                f"CUDA graphs: {graphs.held} held, recorded {graphs.recorded}, replayed {graphs.replayed}, "
                f"evicted {graphs.evicted}"
            )
            head += [f"without CUDA graphs: {reason}" for reason in graphs.reasons]
        rows = [
            [s["index"], s["path"], s["kind"], s["exits"], " ".join("x".join(shape) for shape in s["shapes"]),
             "exact" if s["lossless"] and ratio else "" if s["planned_reuse"] is None else f"{s['planned_reuse']:.0%}",
             f"{s['reused']}/{s['calls']}",
             f"{s['cache_bytes'] / 1024:.1f}"]
            for s in data["sites"]
        ]  # fmt: skip
        headers = ["site", "path", "kind", "exits", "shape", "planned", "reused", "cache KiB"]
        lines = [*head, tabulate(rows, headers=headers)]
        lines += [f"left computing: {s['path'] or '?'} ({s['kind']}): {s['reason']}" for s in data["left_computing"]]
        lines += [f"not balanced: {path or '?'}: {reason}" for path, reason in self.unbalanced]
        if self.repeats:
            lines.append(
                f"{self.repeats} calls came at a step that had been called already, and computed: if these are the "
                f"branches of guidance, name them: `with runtime.branch('cond'): ...`."
            )
        if self.uncompiled:
            lines.append(f"{self.uncompiled} pieces run as they are, uncompiled: they find a size in values.")
        lines += [f"graph break: {b['reason']} at {b['where']}" for b in data["graph_breaks"]]
        return "\n".join(lines)
