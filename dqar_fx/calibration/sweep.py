"""One generation run forwards and then backwards: what each reuse would add to the final sample, to first order.

A sampler is differentiable, and so is what lies around it. Calling ``e`` the error of the final sample, and ``w`` a
random vector of its shape, ``w . e`` is to first order the sum, over everything that is reused, of ``g . (stored -
fresh)``, where ``g`` is the gradient of ``w . sample`` by that attention's result. One backward pass gives ``g`` for
all steps and attentions, and as ``E[(w . e)^2] = |e|^2`` for normal ``w``, a few passes give the error of *any* plan.

The passes are not stored: each model call is run again when the backward pass gets to it, so that memory holds the
latents of all steps, the activations of one, and the values and gradients of the last ``max_age`` steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from dqar_fx.calibration.sampling import Sampler
from dqar_fx.calibration.taps import TappedModel, Visitor, as_stored
from dqar_fx.errors import CalibrationError
from dqar_fx.graph.inspect import first_line
from dqar_fx.graph.specialise import ExitLayout
from dqar_fx.runtime.identity import read_timestep


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of the model, as it was made."""

    step: int
    index: int  # among the calls of its step
    leaves: tuple[Any, ...]  # of its arguments
    followed: frozenset[int]  # the leaves that gradients are followed to: the latents, and what comes from them
    spec: pytree.TreeSpec


@dataclass(slots=True)
class _Visit:
    """A site of a call: its exits, as they are and as they would be read back, and their gradients."""

    fresh: list[Tensor] = field(default_factory=list)
    stored: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor | None] = field(default_factory=list)


class Sweep:
    """One generation of ``sample``, whose final error under any reuse can be asked for afterwards.

    Args:
        model: the module that ``sample`` calls.
        tapped: the same, with taps.
        sample: ``sample(model, seed)`` runs a generation and returns what is to be kept close.
        timestep: name and position of the model's timestep argument.
        latents: the same of its latents.
        max_age: largest age of a stored value that is looked at, in steps.
    """

    def __init__(
        self,
        model: nn.Module,
        tapped: TappedModel,
        sample: Sampler,
        timestep: tuple[str, int],
        latents: tuple[str, int],
        max_age: int,
    ) -> None:
        self._model = model
        self._tapped = tapped
        self._sample = sample
        self._timestep_argument, self._latents = timestep, latents
        self._max_age = max_age
        self._calls: list[_Call] = []
        self._timestep: object = None
        self._final: Tensor | None = None
        self._anchor = torch.zeros((), requires_grad=True)
        #: What the backward pass that runs does with the call that it gets to.
        self._on_backward: Callable[[_Call, Sequence[Tensor | None]], tuple[Tensor | None, ...]] | None = None
        self._owners: dict[tuple[int, int, int], npt.NDArray[np.int64]] | None = None

    def forwards(self, seed: int) -> Tensor:
        """Run the generation; the final sample, detached.

        Raises:
            CalibrationError: what ``sample`` returns is no tensor, or does not depend on the model in a way that can be
                differentiated.
        """
        self._calls, self._timestep = [], None
        with self._in_place_of_the_model(), _Differentiable():
            try:
                final = self._sample(self._model, seed)
            except RuntimeError as error:
                if "grad" not in str(error):
                    raise
                raise CalibrationError(
                    f"the sampler cannot be differentiated: {first_line(error)}.{_ADVICE}"
                ) from error
        usable: object = final  # whatever it is
        if not (isinstance(usable, Tensor) and usable.is_floating_point() and usable.ndim):
            raise CalibrationError(
                f"sample(model, seed) returned {_what(final)}. Return the latents or images as one floating point "
                f"tensor, samples first; of a pipeline: output_type='latent' (or 'pt'), and its .images."
            )
        if not self._calls:
            raise CalibrationError(
                f"sample(model, seed) did not call the {type(self._model).__name__} that it was given. Call that one, "
                f"as model(...), or give a pipeline that holds it."
            )
        if not final.requires_grad:
            raise CalibrationError(
                f"what sample(model, seed) returned does not follow from the model's results by operations that torch "
                f"can differentiate.{_ADVICE}"
            )
        self._final = final
        return final.detach()

    @property
    def num_steps(self) -> int:
        """Steps of the generation: runs of calls with one timestep."""
        return self._calls[-1].step + 1

    @property
    def num_calls(self) -> int:
        """Calls of the model."""
        return len(self._calls)

    def backwards(self, generator: torch.Generator) -> npt.NDArray[np.float64]:
        """What each reuse would do to the final sample, projected on one random vector for each sample of the batch.

        Args:
            generator: on the CPU; draws the vectors.

        Returns:
            ``c [B, T, S, A + 1]``: to first order, ``w_b . e_b / sqrt(n) = sum c[b, t, s, age]`` over all that a plan
            reuses, for a sample's error ``e_b`` (final with reuse - final without, of ``n`` elements) and normal
            ``w_b``: its mean square is the mean squared error of an element. Where nothing tells the samples of a
            batch apart, B is 1 and the batch is one sample.
        """
        final = self._final
        assert final is not None
        if self._owners is None:
            self._owners = self._find_owners(final)
        num = len(final) if self._separable else 1
        table = _Table(num, self.num_steps, self._tapped.num_sites, self._max_age)
        weights = torch.randn(final.shape, generator=generator).to(final)

        def on_backward(call: _Call, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
            visits, back = self._again(call, gradients, through=True)
            for site, visit in visits.items():
                table.add(call, site, visit, self._rows(call.index, site))
            return back

        self._run_backwards(final, weights, on_backward)
        return table.numpy() / math.sqrt(final.numel() / num)

    # -- the model, in place of which a recorded call stands --------------------------------------------------------

    @contextmanager
    def _in_place_of_the_model(self) -> Iterator[None]:
        before = self._model._compiled_call_impl
        self._model._compiled_call_impl = self._call
        try:
            yield
        finally:
            self._model._compiled_call_impl = before

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        """What the sampler calls."""
        with torch._C.DisableTorchFunction(), torch.enable_grad():
            timestep = read_timestep(_argument(self._timestep_argument, args, kwargs))
            last = self._calls[-1] if self._calls else None
            again = last is not None and timestep == self._timestep
            self._timestep = timestep
            leaves, spec = pytree.tree_flatten((args, kwargs))
            latents = {id(x) for x in pytree.tree_leaves(_argument(self._latents, args, kwargs))}
            followed = frozenset(
                i
                for i, x in enumerate(leaves)
                if isinstance(x, Tensor) and x.is_floating_point() and (id(x) in latents or x.requires_grad)
            )
            # The sampler may write into what it passed; the rest is the same memory at every step.
            leaves = [x.clone() if i in followed else x for i, x in enumerate(leaves)]
            call = _Call(
                0 if last is None else last.step + (not again),
                last.index + 1 if last is not None and again else 0,
                tuple(x.detach() if i in followed else x for i, x in enumerate(leaves)),
                followed,
                spec,
            )
            self._calls.append(call)
            results: list[pytree.TreeSpec] = []
            flat = _Evaluate.apply(self, call, results, self._anchor, *leaves)  # type: ignore[no-untyped-call]
            return pytree.tree_unflatten(list(flat), results[0])

    def evaluate(self, call: _Call) -> tuple[tuple[Any, ...], pytree.TreeSpec]:
        """Run a call for the first time."""
        _, results, spec = self._run(call, _Passing())
        return tuple(x.detach() if isinstance(x, Tensor) else x for x in results), spec

    def _run(self, call: _Call, visitor: Visitor) -> tuple[list[Tensor | None], list[Any], pytree.TreeSpec]:
        """The model, with gradients on: the same graph, whether they are needed or not."""
        tracked: list[Tensor | None] = []
        given: list[Any] = []
        with torch.enable_grad():
            for index, leaf in enumerate(call.leaves):
                source = leaf.detach().requires_grad_() if index in call.followed else None
                tracked.append(source)
                given.append(leaf if source is None else source.clone())  # not a leaf: a model may write into it
            args, kwargs = pytree.tree_unflatten(given, call.spec)
            results, out = pytree.tree_flatten(self._tapped(visitor, args, kwargs))
        return tracked, results, out

    def backward_of(self, call: _Call, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Called by autograd when it gets to ``call``."""
        assert self._on_backward is not None
        if all(g is None for g in gradients):
            return (None,) * len(call.leaves)
        with torch._C.DisableTorchFunction():
            return self._on_backward(call, gradients)

    def _run_backwards(self, final: Tensor, weights: Tensor, on_backward: Callable[..., Any]) -> None:
        self._on_backward = on_backward
        torch.autograd.grad(final, self._anchor, weights, retain_graph=True, allow_unused=True)
        self._on_backward = None

    def _again(
        self, call: _Call, gradients: Sequence[Tensor | None], *, through: bool
    ) -> tuple[dict[int, _Visit], tuple[Tensor | None, ...]]:
        """Run ``call`` again: what its sites hold, with their gradients, and (``through``) the gradients of its inputs.

        The gradients of the sites leave out what one site does through another of the same call: where both reuse, the
        second one does not see the first. Those of the inputs leave out nothing.
        """
        visitor = _Looking(self._anchor.to(_device_of(gradients)))
        tracked, results, _ = self._run(call, visitor)
        pairs = [
            (r, g)
            for r, g in zip(results, gradients, strict=True)
            if g is not None and isinstance(r, Tensor) and r.requires_grad
        ]
        outputs, given = [r for r, _ in pairs], [g for _, g in pairs]
        back: list[Tensor | None] = [None] * len(call.leaves)
        wanted = sorted(call.followed)
        if through and wanted and outputs:
            sources = [t for t in (tracked[i] for i in wanted) if t is not None]  # all of them
            found = torch.autograd.grad(outputs, sources, given, retain_graph=True, allow_unused=True)
            for i, gradient in zip(wanted, found, strict=True):
                back[i] = gradient
        visitor.cut = True
        if outputs:
            torch.autograd.grad(outputs, visitor.anchor, given, allow_unused=True)
        return visitor.visits, tuple(back)

    # -- which row of an exit belongs to which sample ------------------------------------------------------------------

    _separable = True

    def _rows(self, index: int, site: int) -> list[npt.NDArray[np.int64]] | None:
        """For each exit of a site the sample that each of its rows belongs to; None where that is not known."""
        if not self._separable or self._owners is None:
            return None
        exits = sorted(key for key in self._owners if key[:2] == (index, site))
        return [self._owners[key] for key in exits]

    def _find_owners(self, final: Tensor) -> dict[tuple[int, int, int], npt.NDArray[np.int64]]:
        """Ask the last step: a sample's rows are those whose gradient is not zero if only that sample counts."""
        owners: dict[tuple[int, int, int], npt.NDArray[np.int64]] = {}
        if len(final) == 1:
            self._separable = False  # nothing to tell apart
            return owners
        last = self.num_steps - 1
        for sample in range(len(final)):
            weights = torch.zeros_like(final)
            weights[sample] = torch.ones_like(weights[sample])

            def on_backward(
                call: _Call, gradients: Sequence[Tensor | None], sample: int = sample
            ) -> tuple[Tensor | None, ...]:
                if call.step == last:
                    for site, visit in self._again(call, gradients, through=False)[0].items():
                        for number, gradient in enumerate(visit.gradients):
                            key = (call.index, site, number)
                            mine = _touched(visit.fresh[number], gradient)
                            known = owners.setdefault(key, np.full(len(mine), -1))
                            if (known[mine] >= 0).any():
                                self._separable = False
                            known[mine] = sample
                return (None,) * len(call.leaves)

            self._run_backwards(final, weights, on_backward)
            if not self._separable:
                break
        return owners


_ADVICE = (
    " Gradients must get from what the model returns to what sample() returns: no .numpy(), no PIL images, no "
    "torch.inference_mode() (torch.no_grad() does no harm)."
)


class _Evaluate(torch.autograd.Function):
    """A call of the model as one node of autograd's graph; its backward pass runs the model again."""

    @staticmethod
    def forward(
        ctx: Any, sweep: Sweep, call: _Call, specs: list[pytree.TreeSpec], _anchor: Tensor, *_leaves: Any
    ) -> tuple[Any, ...]:
        results, spec = sweep.evaluate(call)
        specs.append(spec)
        ctx.set_materialize_grads(False)
        ctx.sweep, ctx.call = sweep, call
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        return None, None, None, None, *ctx.sweep.backward_of(ctx.call, gradients)


class _Differentiable(TorchFunctionMode):
    """Keeps gradients on under ``torch.no_grad()``, with which samplers are decorated."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _READS:
            args = tuple(x.detach() if isinstance(x, Tensor) else x for x in args)
        with torch.enable_grad():
            return func(*args, **(kwargs or {}))


#: What takes a value out of torch: of a tensor that requires gradients, torch refuses some of these.
_READS = frozenset(
    (Tensor.numpy, Tensor.tolist, Tensor.item, Tensor.__array__, Tensor.__float__, Tensor.__int__, Tensor.__bool__)
)


class _Passing:
    """Looks at nothing."""

    def visit(self, site: int, exits: tuple[Tensor, ...], layouts: Sequence[ExitLayout]) -> tuple[Tensor, ...]:  # noqa: ARG002
        return exits


class _Looking:
    """Keeps what each site holds, and the gradients that get there."""

    def __init__(self, anchor: Tensor) -> None:
        self.anchor = anchor.detach().requires_grad_()
        self.visits: dict[int, _Visit] = {}
        #: True: what gets to a site goes no further.
        self.cut = False

    def visit(self, site: int, exits: tuple[Tensor, ...], layouts: Sequence[ExitLayout]) -> tuple[Tensor, ...]:
        visit = self.visits[site] = _Visit()
        handed_on = []
        for number, (value, layout) in enumerate(zip(exits, layouts, strict=True)):
            fresh = value.detach()
            visit.fresh.append(fresh)
            visit.stored.append(as_stored(fresh, layout))
            visit.gradients.append(None)
            handed = _Handed.apply(value, self.anchor, self, visit, number)  # type: ignore[no-untyped-call]
            handed_on.append(handed)
        return tuple(handed_on)


class _Handed(torch.autograd.Function):
    """An exit, on its way out; its backward pass notes the gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, _anchor: Tensor, looking: _Looking, visit: _Visit, number: int) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.looking, ctx.visit, ctx.number = looking, visit, number
        return value.clone()  # the model may write into it

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Any, ...]:
        if ctx.looking.cut:
            ctx.visit.gradients[ctx.number] = gradient
            return None, None, None, None, None
        return gradient, None, None, None, None


def _device_of(gradients: Sequence[Tensor | None]) -> torch.device:
    """Where the gradients are."""
    return next(g.device for g in gradients if g is not None)


def _touched(value: Tensor, gradient: Tensor | None) -> npt.NDArray[np.bool_]:
    if gradient is None:
        return np.zeros(value.shape[0], bool)
    touched: npt.NDArray[np.bool_] = gradient.flatten(1).any(1).cpu().numpy()
    return touched


class _Table:
    """The numbers ``c``, as the backward pass goes from the last step to the first.

    At each call the gradient ``g`` and the value ``v`` of a site are there; older values come later. With ``u`` for a
    value as it would be read back, ``c[t, age] = g_t . u_(t - age) - g_t . v_t``: the first product is made when the
    pass gets to ``t - age``, from the gradients of the steps after it, which are kept for so long.
    """

    def __init__(self, samples: int, steps: int, sites: int, max_age: int) -> None:
        self._max_age = max_age
        self._shape = (samples, steps, sites, max_age + 1)
        self._values: npt.NDArray[np.float64] = np.zeros(self._shape)
        self._kept: dict[tuple[int, int], dict[int, list[Tensor | None]]] = {}

    def add(self, call: _Call, site: int, visit: _Visit, rows: list[npt.NDArray[np.int64]] | None) -> None:
        """A site of a call, and for each of its exits the sample that a row belongs to."""
        step = call.step
        kept = self._kept.setdefault((call.index, site), {})
        kept.pop(step + self._max_age + 1, None)
        kept[step] = visit.gradients
        own = self._product(visit.gradients, visit.fresh, rows)
        if own is not None:
            self._values[:, step, site, 1:] -= own[:, None]
        for age in range(1, min(self._max_age, self._shape[1] - 1 - step) + 1):
            product = self._product(kept.get(step + age, ()), visit.stored, rows)
            if product is not None:
                self._values[:, step + age, site, age] += product

    def _product(
        self, gradients: Sequence[Tensor | None], values: Sequence[Tensor], rows: list[npt.NDArray[np.int64]] | None
    ) -> npt.NDArray[np.float64] | None:
        total: npt.NDArray[np.float64] | None = None
        for number, (gradient, value) in enumerate(zip(gradients, values, strict=False)):
            if gradient is None or gradient.shape != value.shape:
                continue
            products = (gradient.float() * value.float()).flatten(1).sum(1).cpu().double().numpy()
            total = np.zeros(self._shape[0]) if total is None else total
            if rows is None:
                total[0] += products.sum()
            else:
                np.add.at(total, np.maximum(rows[number], 0), products)
        return total

    def numpy(self) -> npt.NDArray[np.float64]:
        """``c [B, T, S, A + 1]``; zero where an age is none that the step can have."""
        steps = np.arange(self._shape[1])
        impossible = np.arange(self._shape[3])[None] > steps[:, None]
        self._values[:, impossible.nonzero()[0], :, impossible.nonzero()[1]] = 0
        return self._values


def _argument(place: tuple[str, int], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """An argument of a call, however it was given."""
    name, position = place
    if kwargs.get(name) is not None:
        return kwargs[name]
    return args[position] if 0 <= position < len(args) else None


def _what(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of dtype {value.dtype} and shape {list(value.shape)}"
    return f"a {type(value).__name__}"
