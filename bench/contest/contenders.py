"""The contenders: how each cache is put on a model, and how the model is then compiled.

``NAME`` is the cache on the eager model, ``NAME@WAY`` the same compiled:

* ``whole``: ``model.compile()`` with the hooks in it. Dynamo breaks the graph or compiles again wherever a hook makes
  it; its limit of 8 recompiles is raised, or it would run the model eagerly from then on.
* ``blocks``: ``model.compile_repeated_blocks()``, hooks included.
* ``under``: what the hooks wrap is compiled, each block (or attention) a graph of its own, the hooks stay in Python.

Schedules: caches of attention outputs follow one plan, ``interval(every, warmup)``; one that counts for itself is set
to refresh as often. Thresholds that a cache comes with were chosen on trained weights; what they decide on random ones
says nothing. So caches that look before they read get one at which they reuse about as many steps as the plan.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import dqar_fx
from contest.models import Sampler

#: Names of the peers' attentions and of nothing else, in all models.
ATTENTIONS = r".*blocks\.\d+\.attn\d?"
#: Every difference is below it: what limits reuse then is how often in a row it may be.
ANY = 1e9
#: What caches that ask for the timestep are told in the warm-up: more than any bound of theirs.
WARM = 950
#: Below it FasterCache adjusts high frequencies as well.
LATE = 301


class Contender:
    """A model made ready to be called; the base class is the model as it is.

    Args:
        sampler: the model, its scheduler and its inputs.
        schedule: of the attention outputs.
        way: how to compile, see above; "" for eager.
    """

    #: Whether the attention outputs are reused by exactly the schedule's plan.
    follows_plan = False
    #: The ways it can be compiled, the best one first.
    ways: tuple[str, ...] = ("whole", "blocks")
    #: What compiles for it can be one graph.
    fullgraph = False

    def __init__(self, sampler: Sampler, schedule: dqar_fx.Schedule, way: str) -> None:
        self.sampler, self.schedule, self.way = sampler, schedule, way
        self.model = sampler.model
        self.notes: list[str] = []
        reuse = schedule.plan(1, sampler.steps).reuse[:, 0]
        #: Steps that compute before the first one that reuses, and the interval behind them.
        self.warm = int(reuse.argmax()) if reuse.any() else sampler.steps
        self.every = int(schedule.refresh or 1)
        if way == "under":
            self.compile_under()
        self.apply()
        if way == "whole":
            self.raise_limit()
            self.model.compile(fullgraph=self.fullgraph)
        elif way == "blocks":
            self.raise_limit()
            self.compile_blocks(fullgraph=self.fullgraph)

    def raise_limit(self) -> None:
        """Let Dynamo compile a frame as often as a generation has steps, for each block."""
        limit = 64 + 2 * self.sampler.steps * len(self.sampler.blocks())
        torch._dynamo.config.recompile_limit = limit
        torch._dynamo.config.accumulated_recompile_limit = 16 * limit

    def compile_blocks(self, **settings: Any) -> None:
        """diffusers' own regional compilation; for classes that name no repeated blocks they are named here."""
        if not getattr(self.model, "_repeated_blocks", None):
            self.model._repeated_blocks = self.sampler.block_classes
            self.notes.append(f"repeated blocks named by the benchmark: {', '.join(self.sampler.block_classes)}")
        self.model.compile_repeated_blocks(**settings)

    def compile_under(self) -> None:
        """Compile each block's forward before hooks are put around it."""
        self.raise_limit()
        for block in self.sampler.blocks():
            block.forward = torch.compile(block.forward, fullgraph=True)

    def apply(self) -> None:
        """Put the cache on the model; nothing here."""

    def before(self, step: int) -> None:
        """Told ahead of every step."""

    def start(self) -> None:
        """Told ahead of every generation."""

    def finish(self) -> None:
        """Told behind every generation."""

    def call(self, **inputs: Any) -> Any:
        """Call the model."""
        return self.model(**inputs)

    def draw(self, after: Callable[[int], None] = lambda _: None) -> Tensor:
        """One generation."""
        self.start()
        try:
            return self.sampler.draw(self.call, self.before, after)
        finally:
            self.finish()

    def holders(self) -> Iterable[Any]:
        """Objects that hold what is cached."""
        return ()

    def cache_bytes(self) -> int:
        """Bytes of the memory held by the cache now."""
        return held_bytes(self.holders())

    def reuse_ratio(self) -> float | None:
        """Share of the attentions that were read in the last generation, where the cache can tell."""
        return None

    @contextlib.contextmanager
    def uncompiled(self) -> Iterator[None]:
        """As long as this is entered, the same runs eagerly."""
        torch.compiler.set_stance("force_eager")
        try:
            yield
        finally:
            torch.compiler.set_stance("default")


class NoCache(Contender):
    """The model without any cache."""

    fullgraph = True


class Hooked(Contender):
    """One of diffusers' caches: hooks, whose state ends with a generation."""

    #: Pipelines name the branch of guidance for some of them; guidance is one call here, so there is one branch.
    context = False

    def start(self) -> None:
        """Forget the generation before, as pipelines do at the end of one."""
        from diffusers.hooks import HookRegistry

        HookRegistry.check_if_exists_or_initialize(self.model).reset_stateful_hooks(recurse=True)

    def finish(self) -> None:
        """Free what is held."""
        Hooked.start(self)

    def call(self, **inputs: Any) -> Any:
        """Call the model within the context that pipelines enter."""
        if not self.context:
            return self.model(**inputs)
        from diffusers.hooks.hooks import CacheContext, _set_cache_context

        # What CacheMixin.cache_context does, for DiT and PixArt as well, which are no CacheMixin.
        _set_cache_context(self.model, CacheContext("cond"))
        try:
            return self.model(**inputs)
        finally:
            _set_cache_context(self.model, None)

    def hooks(self) -> list[tuple[nn.Module, Any]]:
        """Every hook of diffusers with the module it hangs on."""
        found = ((m, getattr(m, "_diffusers_hook", None)) for m in self.model.modules())
        return [(module, hook) for module, registry in found if registry for hook in registry.hooks.values()]

    def holders(self) -> Iterable[Any]:
        """The hooks' states."""
        for _, hook in self.hooks():
            yield getattr(hook, "state", None)
            yield getattr(getattr(hook, "state_manager", None), "_state_cache", None)

    def before(self, step: int) -> None:
        """Keep what ``phase`` says."""
        late = float(self.sampler.scheduler.timesteps[step]) < LATE
        self._phase = WARM if step < self.warm else 200 if late else 600

    def phase(self) -> int:
        """For caches that ask for the timestep: what part of the generation it is in.

        Three values, not one for each step, for compiled code is guarded on what a callback returns.
        """
        return self._phase

    _phase = WARM


class PyramidAttentionBroadcast(Hooked):
    """PAB: attention outputs, by the very plan of the schedule."""

    follows_plan = True
    ways = ("whole", "under", "blocks")

    def apply(self) -> None:
        """Hooks on all attentions; they reuse wherever the warm-up is over."""
        from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

        kinds = ("spatial", "cross")
        config = PyramidAttentionBroadcastConfig(
            **{f"{kind}_attention_block_skip_range": self.every for kind in kinds},
            **{f"{kind}_attention_timestep_skip_range": (0, WARM) for kind in kinds},
            current_timestep_callback=self.phase,
        )
        apply_pyramid_attention_broadcast(self.model, config)
        self.counted = [hook for _, hook in self.hooks()]
        #: PAB refreshes where its own count of calls is a multiple of the interval. The schedule counts from the last
        #: step of the warm-up, so the count starts where that makes the two the same.
        self.offset = -(self.warm - 1) % self.every
        if self.way == "under":
            self.take_out_of_graphs()
        self.notes.append("counters started so that it refreshes by the plan")

    def compile_under(self) -> None:
        """Each attention, and what is around it in its block, a graph; done once the hooks are on."""

    def take_out_of_graphs(self) -> None:
        """The hooks in Python, the attention that they wrap compiled, and the rest of the block around them."""
        self.raise_limit()
        for module, hook in self.hooks():
            hook.fn_ref.original_forward = torch.compile(hook.fn_ref.original_forward, fullgraph=True)
            module.forward = torch.compiler.disable(module.forward)
        self.compile_blocks()

    def start(self) -> None:
        """Reset, and start the counts so that the plan is met."""
        super().start()
        for hook in self.counted:
            hook.state.iteration = self.offset


class FasterCache(Hooked):
    """FasterCache: extrapolated attention outputs, and at most steps no unconditional branch."""

    ways = ("blocks", "whole")

    def apply(self) -> None:
        """Attentions every ``every`` steps; the unconditional branch every fifth, its default."""
        from diffusers.hooks import FasterCacheConfig, apply_faster_cache

        case = self.sampler.case
        split = ("hidden_states", "encoder_hidden_states", "timestep", "class_labels")
        config = FasterCacheConfig(
            spatial_attention_block_skip_range=self.every,
            attention_weight_callback=lambda _: 0.5,
            tensor_format="BCFHW" if len(case.latents) == 4 else "BCHW",
            is_guidance_distilled=not case.guided,
            current_timestep_callback=self.phase,
            _unconditional_conditional_input_kwargs_identifiers=split,
        )
        apply_faster_cache(self.model, config)


class FirstBlockCache(Hooked):
    """FirstBlockCache: all blocks but the first, where that changed little since they were last computed."""

    context = True
    ways = ("under", "blocks", "whole")

    def apply(self) -> None:
        """With the threshold at which a run without reuse says that it reuses as many steps as the plan."""
        from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

        plan = self.schedule.plan(1, self.sampler.steps).reuse_ratio
        threshold = threshold_for(plan, self._first_residuals())
        apply_first_block_cache(self.model, FirstBlockCacheConfig(threshold=threshold))
        self.notes.append(f"threshold {threshold:.3g}, to reuse about as many steps as the plan")

    def _first_residuals(self) -> list[Tensor]:
        """What the first block adds at each step of an eager run."""
        residuals: list[Tensor] = []
        index = int(self.sampler.case.kind == "FluxTransformer2DModel")  # Flux's blocks return the text first

        def keep(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            residuals.append((output[index] if isinstance(output, tuple) else output) - before)

        handle = self.sampler.blocks()[0].register_forward_hook(keep, with_kwargs=True)
        with self.uncompiled():
            self.sampler.draw(self.model)
        handle.remove()
        return residuals


class TaylorSeer(Hooked):
    """TaylorSeer: attention outputs, extrapolated to first order."""

    context = True

    def apply(self) -> None:
        """Every ``every`` steps; its own phase, one step beside the plan's."""
        from diffusers.hooks import TaylorSeerCacheConfig, apply_taylorseer_cache

        config = TaylorSeerCacheConfig(
            cache_interval=self.every, disable_cache_before_step=self.warm, max_order=1,
            taylor_factors_dtype=self.sampler.dtype, cache_identifiers=[ATTENTIONS],
        )  # fmt: skip
        apply_taylorseer_cache(self.model, config)
        self.notes.append("refreshes as often as the plan, a step or two beside it")


class MagCache(Hooked):
    """MagCache: all blocks, by how their residual's magnitude went in a run before."""

    context = True
    ways = ("under", "blocks", "whole")

    def apply(self) -> None:
        """Measure the ratios in one eager run, then apply them."""
        from diffusers.hooks import HookRegistry, MagCacheConfig, apply_mag_cache

        steps = self.sampler.steps
        # One step more than there are, or the ratios would be printed and forgotten at the last.
        apply_mag_cache(self.model, MagCacheConfig(calibrate=True, num_inference_steps=steps + 1))
        with self.uncompiled():
            self.sampler.draw(self.call)
        states = [s for _, hook in self.hooks() for s in hook.state_manager._state_cache.values()]
        ratios = list(states[0].calibration_ratios)
        self.finish()
        names = {name for _, registry in self._registries() for name in registry.hooks}
        for name in names:
            HookRegistry.check_if_exists_or_initialize(self.model).remove_hook(name, recurse=True)
        HookRegistry.check_if_exists_or_initialize(self.model).invalidate_child_registries_cache()
        config = MagCacheConfig(
            threshold=ANY, max_skip_steps=self.every - 1, num_inference_steps=steps,
            retention_ratio=self.warm / steps, mag_ratios=ratios,
        )  # fmt: skip
        apply_mag_cache(self.model, config)
        self.notes.append("no threshold, so that it reuses as many steps as the plan")

    def _registries(self) -> list[tuple[nn.Module, Any]]:
        return [(m, m._diffusers_hook) for m in self.model.modules() if hasattr(m, "_diffusers_hook")]


class DBCache(Contender):
    """cache-dit's DBCache, F1B0: the first block computes, the others are their residual where it changed little."""

    ways = ("blocks", "whole")
    fullgraph = True
    forecast = False

    def apply(self) -> None:
        """Warm-up and longest run of reuse as the schedule's; compiled with cache-dit's own settings of Inductor."""
        import cache_dit

        self.cache_dit = cache_dit
        if self.way:
            cache_dit.set_compile_configs()
            self.fullgraph = self.way == "blocks"  # its logic is between the blocks, in Python
        cache_dit.enable_cache(self.model, **self._settings())
        self.notes.append("no threshold, so that it reuses as many steps as the plan")

    def _settings(self) -> dict[str, Any]:
        config = self.cache_dit.DBCacheConfig(
            Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=ANY,
            max_warmup_steps=self.warm, max_continuous_cached_steps=self.every - 1,
            num_inference_steps=self.sampler.steps, enable_separate_cfg=False,
        )  # fmt: skip
        settings = {"cache_config": config}
        if self.forecast:
            settings["calibrator_config"] = self.cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1)
        return settings

    def start(self) -> None:
        """A fresh context, as its pipelines take one for every run."""
        self.cache_dit.refresh_context(self.model, **self._settings())

    def holders(self) -> Iterable[Any]:
        """The contexts of the model."""
        yield vars(self.model._context_manager)


class DBCacheTaylorSeer(DBCache):
    """DBCache whose residual is extrapolated to first order."""

    forecast = True


class Dqar(Contender):
    """dqar_fx, with its cache as text; it compiles by itself."""

    cache = "int8"
    follows_plan = True
    ways = ("own",)
    _ahead: int | None = None  # bytes of what is computed for all steps at once; only compiled models do

    def apply(self) -> None:
        """``optimize``, with the backend that the way stands for."""
        self.optimize("inductor" if self.way else "eager")

    def optimize(self, backend: str) -> None:
        """Rewrite the model; the pieces are compiled with ``backend``."""
        dqar_fx.optimize(
            self.model, self.schedule, cache=dqar_fx.CacheConfig.parse(self.cache), scheduler=self.sampler.scheduler,
            backend=backend, fullgraph=True,
        )  # fmt: skip

    def draw(self, after: Callable[[int], None] = lambda _: None) -> Tensor:
        """One generation, which the runtime is told of: the inputs are the same memory every time."""
        runtime = dqar_fx.runtime(self.model)

        def behind(step: int) -> None:
            if self._ahead is None:
                self._ahead = runtime.report().timed_bytes
            after(step)

        with runtime.generation(self.sampler.steps):
            return super().draw(behind)

    def cache_bytes(self) -> int:
        """As the runtime counts them, and what the compiled model held besides."""
        return int(dqar_fx.runtime(self.model).stats.cache_bytes) + (self._ahead or 0)

    def reuse_ratio(self) -> float | None:
        """As the runtime counts it."""
        return float(dqar_fx.runtime(self.model).stats.reuse_ratio)

    @contextlib.contextmanager
    def uncompiled(self) -> Iterator[None]:
        """The same rewritten graphs run as they are, from here on."""
        dqar_fx.restore(self.model)
        self.optimize("eager")
        yield


class DqarNative(Dqar):
    """Attention outputs in the model's own dtype."""

    cache = "native"


class DqarInt4(Dqar):
    """Attention outputs in INT4."""

    cache = "int4"


class DqarKeysValues(Dqar):
    """Keys and values in INT8."""

    cache = "kv:int8"
    follows_plan = False


class DqarNone(Dqar):
    """Nothing reused."""

    follows_plan = False

    def apply(self) -> None:
        """The same with a schedule that computes throughout."""
        self.schedule = dqar_fx.Schedule.none(self.sampler.steps)
        super().apply()


CONTENDERS: dict[str, type[Contender]] = {
    "none": NoCache,
    "dqar-none": DqarNone,
    "dqar-native": DqarNative,
    "dqar-int8": Dqar,
    "dqar-int4": DqarInt4,
    "dqar-kv": DqarKeysValues,
    "pab": PyramidAttentionBroadcast,
    "fastercache": FasterCache,
    "firstblock": FirstBlockCache,
    "taylorseer": TaylorSeer,
    "magcache": MagCache,
    "dbcache": DBCache,
    "dbcache-taylor": DBCacheTaylorSeer,
}
#: Everything is measured against this one.
BASELINE = "none@whole"
#: What regional compilation costs at the start.
REGIONAL = "none@blocks"
#: With all peers eager, and compiled in the way that their class names first.
DEFAULT = (
    REGIONAL, "none", "dqar-none@own", "dqar-native@own", "dqar-int8@own", "dqar-int4@own", "dqar-kv@own",
    "dqar-native",
    *(name + way for name in list(CONTENDERS)[6:] for way in (f"@{CONTENDERS[name].ways[0]}", "")),
)  # fmt: skip


def split(name: str) -> tuple[type[Contender], str]:
    """The class and the way to compile that ``name`` stands for.

    Raises:
        ValueError: there is no such contender, or it cannot be compiled in that way.
    """
    kind, _, way = name.partition("@")
    if kind not in CONTENDERS:
        raise ValueError(f"there is no contender {kind!r}. There are: {', '.join(CONTENDERS)}.")
    ways = CONTENDERS[kind].ways
    if way and way not in ways:
        raise ValueError(f"{name!r}: {kind} can be compiled as {' or '.join(f'{kind}@{w}' for w in ways)}.")
    return CONTENDERS[kind], way


def references(name: str) -> tuple[str, ...]:
    """What ``name``'s error is measured against: the same without its cache, or else the next that took part."""
    kind, way = split(name)
    if issubclass(kind, Dqar):
        own = "dqar-none@own" if way else "none"
    else:
        own = {"": "none", "whole": BASELINE, "blocks": REGIONAL, "under": REGIONAL}[way]
    return own, *(other for other in (BASELINE, "none") if other != own)


def threshold_for(ratio: float, residuals: list[Tensor]) -> float:
    """The threshold at which FirstBlockCache's rule, asked about these residuals, reuses at most ``ratio`` of them."""

    def reused(threshold: float) -> float:
        kept, count = residuals[0], 0
        for residual in residuals[1:]:
            if (residual - kept).abs().mean() / kept.abs().mean() > threshold:
                kept = residual
            else:
                count += 1
        return count / len(residuals)

    low, high = -6.0, 1.0  # of log10
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (low, middle) if reused(10**middle) > ratio else (middle, high)
    return float(10**low)


def held_bytes(roots: Iterable[Any]) -> int:
    """Bytes of all tensors that can be reached from ``roots`` through containers and the peers' own objects."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    pending = list(roots)
    while pending:
        item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            pending.extend(item.values())
        elif isinstance(item, (list, tuple, set)):
            pending.extend(item)
        elif type(item).__module__.startswith(("diffusers.hooks", "cache_dit")) and hasattr(item, "__dict__"):
            pending.extend(vars(item).values())
    return sum(storages.values())
