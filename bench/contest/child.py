"""One contender in a process of its own, told what to do by lines of JSON on its standard input.

Standard output carries the answers, one line of JSON each; whatever else prints goes to standard error.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
import time
import traceback
from typing import Any

import common
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

import dqar_fx
from contest import contenders, models
from dqar_fx.tuning.timing import synchronize

#: Dynamo keeps what it says of the last 64 compilations; a cache that makes it compile at each step has more.
KEPT_METRICS = 100_000


class Clock:
    """Milliseconds of each step, without waiting for the device in between."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[Any] = []

    def mark(self, _step: int = 0) -> None:
        """A step begins or ends."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            synchronize(self.device)
            self.marks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """Between each mark and the next; the device must be done."""
        pairs = list(itertools.pairwise(self.marks))
        if self.device.type == "cuda":
            return [float(a.elapsed_time(b)) for a, b in pairs]
        return [(b - a) * 1e3 for a, b in pairs]


class Work(TorchDispatchMode):
    """Counts attention operators, and FLOP by the formulas of ``torch.utils.flop_counter``."""

    def __init__(self) -> None:
        super().__init__()
        self.attentions = self.flop = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Or Dynamo would step aside for as long as the mode is active, and rewritten graphs would not run."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        attention = "scaled_dot_product" in str(packet)
        self.attentions += attention
        formula = flop_registry.get(packet)
        if formula is not None:
            self.flop += int(formula(*args, **(kwargs or {}), out_val=output))
        elif attention:  # the CPU's flash kernel has no formula
            self.flop += int(sdpa_flop_count(*(x.shape for x in args[:3])))
        return output


class Child:
    """A contender, and what it can be asked."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.device, dtype = torch.device(job["device"]), getattr(torch, job["dtype"])
        if job["threads"]:
            torch.set_num_threads(job["threads"])
        torch._dynamo.utils.set_compilation_metrics_limit(KEPT_METRICS)
        case = models.find(job["model"], small=job["small"], blocks=job["blocks"])
        self.sampler = models.Sampler(case, job["steps"], self.device, dtype)
        kind, way = contenders.split(job["contender"])
        self.contender = kind(self.sampler, dqar_fx.Schedule.parse(job["schedule"]), way)

    def generate(self) -> dict[str, Any]:
        """One generation: ``seconds``, and ``steps_ms`` of each step."""
        clock = Clock(self.device)
        synchronize(self.device)
        started = time.perf_counter()
        clock.mark()
        self.sample = self.contender.draw(clock.mark)
        synchronize(self.device)
        return {"seconds": time.perf_counter() - started, "steps_ms": clock.milliseconds()}

    def finish(self) -> dict[str, Any]:
        """All that is no speed: counts of Dynamo, memory, and one eager generation that is looked into."""
        torch.save(self.sample.cpu(), self.job["sample"])
        found = self.counts()
        found["peak_mib"] = common.peak_mib(self.contender.draw, self.device)
        found["host_ms"] = self.host_milliseconds()
        return {**found, **self.examined(), "note": "; ".join(self.contender.notes)}

    def counts(self) -> dict[str, int]:
        """What Dynamo did since the start."""
        stats, breaks = torch._dynamo.utils.counters["stats"], torch._dynamo.utils.counters["graph_break"]
        again = 0
        for metric in torch._dynamo.utils.get_compilation_metrics():
            found = re.search(r"(\d+)/(\d+)", str(metric.compile_id))
            again += found is not None and int(found[2]) > 0
        return {"captures": int(stats["unique_graphs"]), "breaks": sum(breaks.values()), "recompiles": again}

    def host_milliseconds(self) -> float | None:
        """Median time until a call of the model returns; None on a device that works in the same thread.

        The device is idle when each call begins. A call that reads from the device waits for it, and that counts.
        """
        if self.device.type != "cuda":
            return None
        call, times = self.contender.call, []

        def timed(**inputs: Any) -> Any:
            synchronize(self.device)
            started = time.perf_counter()
            output = call(**inputs)
            times.append((time.perf_counter() - started) * 1e3)
            return output

        self.contender.call = timed  # type: ignore[method-assign]  # for this generation
        self.contender.draw()
        self.contender.call = call  # type: ignore[method-assign]  # as it was
        return common.median(times)

    def examined(self) -> dict[str, Any]:
        """FLOP and attentions of a generation and of a step without a cache, and what the cache holds at most."""
        cached, attentions, totals = [0], [0], [0]
        with self.contender.uncompiled(), Work() as work:

            def after(_step: int) -> None:
                cached.append(self.contender.cache_bytes())
                attentions.append(work.attentions)
                totals.append(work.flop)

            self.contender.draw(after)
            ratio = self.contender.reuse_ratio()
        steps = [b - a for a, b in itertools.pairwise(attentions)]
        flop = [b - a for a, b in itertools.pairwise(totals)]
        if ratio is None:
            ratio = 1 - sum(steps) / (max(steps) * len(steps)) if max(steps) else 0.0
        # The first step computes whatever the cache.
        return {
            "cache_mib": max(cached) / 2**20, "reuse": ratio, "attentions": steps, "flop_steps": flop,
            "bound": flop[0] * len(flop) / sum(flop),
        }  # fmt: skip


def main(job: dict[str, Any]) -> None:
    """Build the contender, then answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # some peers print
    child: Child | None = None
    for command in itertools.chain(["build"], map(str.strip, sys.stdin)):
        try:
            if child is None:
                child = Child(job)
                case = child.sampler.case
                answer: dict[str, Any] = {"title": case.title, "host_bound": case.host_bound}
            else:
                answer = getattr(child, command)()
        except ImportError as error:
            answer = {"error": f"not installed, or another version: {error}"}
        except Exception as error:  # whatever a peer does, the others are measured
            traceback.print_exc()
            message = (str(error).strip().splitlines() or [""])[0]
            answer = {"error": f"{type(error).__name__}: {message}"}
        answers.write(json.dumps(answer) + "\n")
