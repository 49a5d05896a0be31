"""Calls past Dynamo's guards: taken where the model has not changed, and never where it has."""

from __future__ import annotations

import copy
import gc
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dqar_fx
from dqar_fx import Schedule
from dqar_fx.saved import OLDEST_TORCH
from dqar_fx.shortcut.call import MISS, PATIENCE, Binder
from dqar_fx.shortcut.watch import writes_are_noticed
from dqar_fx.supported import is_older
from tests.counting import CountsProducts
from tests.families import DIT, FLUX, SD3, WAN, Family
from tests.models import NUM_STEPS, make_dit, sample, timestep

#: Named in the forward below.
FACTOR = 1.0


def add_bias(x: Tensor) -> Tensor:
    return x + 0.25


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*self.qkv(x).chunk(3, dim=-1))


class Own(nn.Module):
    """Reads its state in every way there is."""

    of_class = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()
        self.mlp = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
        self.number = 1.0
        self.list = [1.0]
        self.table = {"a": {"b": 1.0}}
        self.options = SimpleNamespace(gain=1.0)
        self.pair = (1.0, SimpleNamespace(gain=1.0))
        self.flag = False
        self.function = add_bias
        self.register_buffer("shift", torch.zeros(8))
        self._hidden = 1.0

    @property
    def computed(self) -> float:
        return self._hidden * self.options.gain

    def forward(self, x: Tensor, timestep: Tensor, extra: dict[str, Any] | None = None, *, twice: bool = False) -> Any:
        y = self.attn(x) * self.number * self.list[0] * self.table["a"]["b"] * self.options.gain * self.of_class
        y = y * self.pair[0] * self.pair[1].gain * self.computed * FACTOR + self.shift
        if self.flag:
            y = -y
        if extra is not None:
            y = y * extra["scale"]
        y = self.function(self.mlp(x + y)) + timestep.reshape(-1, 1, 1) * 1e-3
        return (y, y) if twice else y


def make_own() -> Own:
    torch.manual_seed(0)
    return Own().eval().requires_grad_(False)


X = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(3))


def call(model: nn.Module, step: int, **kwargs: Any) -> Any:
    return model(kwargs.pop("x", X), timestep=timestep(step), **kwargs)


def eager(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What the model gives without its compiled call."""
    return type(model).forward(model, *args, **kwargs)


def warm(model: nn.Module, **kwargs: Any) -> nn.Module:
    """Optimised, without reuse, and called until calls go past the guards."""
    dqar_fx.optimize(model, Schedule.none(50), backend="eager")
    call(model, 0, **kwargs)
    before = shortcuts(model)
    call(model, 1, **kwargs)
    assert shortcuts(model) == before + 1, dqar_fx.runtime(model).report()
    return model


def shortcuts(model: nn.Module) -> int:
    return dqar_fx.runtime(model).stats.shortcuts


def with_set(path: str, value: Any) -> Callable[[nn.Module], None]:
    """What sets the attribute at ``path``; to what ``value`` makes, if that is a ``Made``."""
    *way, name = path.split(".")

    def change(model: nn.Module) -> None:
        target: Any = model
        for part in way:
            target = getattr(target, part)
        setattr(target, name, value.make() if isinstance(value, Made) else value)

    return change


@dataclass(frozen=True)
class Made:
    """A value that is made when it is needed."""

    make: Callable[[], Any]


def times_two(x: Tensor) -> Tensor:
    return x * 2


def negated(self: Own, x: Tensor, timestep: Tensor) -> Any:
    return -Own.forward(self, x, timestep)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a number": with_set("number", 2.0),
    "a flag": with_set("flag", True),
    "a number deep inside": with_set("mlp.1.eps", 1.0),
    "an item of a list": lambda m: m.list.__setitem__(0, 2.0),
    "an item of a nested dictionary": lambda m: m.table["a"].__setitem__("b", 2.0),
    "a nested dictionary": lambda m: m.table.__setitem__("a", {"b": 2.0}),
    "an attribute of a plain object": lambda m: setattr(m.options, "gain", 2.0),
    "an attribute of an object in a tuple": lambda m: setattr(m.pair[1], "gain", 2.0),
    "a tuple": with_set("pair", (2.0, SimpleNamespace(gain=1.0))),
    "what a property reads": with_set("_hidden", 2.0),
    "a function that is an attribute": with_set("function", times_two),
    "a parameter replaced": with_set("mlp.0.weight", Made(lambda: nn.Parameter(torch.ones(8, 8), requires_grad=False))),
    "a parameter written into": lambda m: m.mlp[0].weight.mul_(2),
    "a parameter's data": lambda m: setattr(m.mlp[0].weight, "data", torch.ones(8, 8)),
    "a parameter's data, transposed": lambda m: setattr(m.mlp[0].weight, "data", m.mlp[0].weight.data.t()),
    "a buffer replaced": with_set("shift", Made(lambda: torch.ones(8))),
    "a parameter taken away": with_set("mlp.0.bias", None),
    "a submodule replaced": with_set("mlp.0", Made(lambda: nn.Linear(8, 8).requires_grad_(False))),
    "a submodule of another class": lambda m: setattr(m.mlp[0], "__class__", Doubled),
    "a submodule more": lambda m: m.mlp.append(nn.Linear(8, 8).requires_grad_(False)),
    "the forward of a submodule": lambda m: setattr(m.mlp[0], "forward", times_two),
    "the model's forward": lambda m: setattr(m, "forward", types.MethodType(negated, m)),
}


#: Older ones do not see that a module has become one of another class.
SEES_CLASSES = not is_older(torch.__version__, "2.13")


@pytest.mark.parametrize("what", [each for each in CHANGES if SEES_CLASSES or "class" not in each])
def test_what_is_written_into_the_model_is_seen(what: str, fresh_inference: None) -> None:
    model = warm(make_own())
    changed = make_own()
    for each in (model, changed):
        torch.manual_seed(7)
        CHANGES[what](each)
    expected = changed(X, timestep=timestep(2))
    assert not torch.equal(expected, call(make_own(), 2)), "the change changes nothing"
    for _ in range(3):  # the first time, and when it has been learned anew
        assert torch.equal(call(model, 2), expected)


_forward = Own.forward


def negated_class(self: Own, x: Tensor, timestep: Tensor) -> Any:
    return -_forward(self, x, timestep)


@pytest.mark.parametrize(("name", "value"), [("FACTOR", 3.0), ("Own.of_class", 3.0), ("Own.forward", negated_class)])
def test_what_is_written_into_globals_and_classes_is_seen(
    name: str, value: Any, fresh_inference: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = warm(make_own())
    before = call(model, 2)
    monkeypatch.setattr(f"{__name__}.{name}", value)
    expected = eager(model, X, timestep(2))
    assert not torch.equal(expected, before)
    for _ in range(3):
        assert torch.equal(call(model, 2), expected)


def test_a_cast_model_is_captured_anew(fresh_inference: None) -> None:
    model = warm(make_own())
    expected = call(make_own().double(), 2, x=X.double())
    model.double()
    for _ in range(3):
        assert torch.equal(call(model, 2, x=X.double()), expected)


ARGUMENTS: dict[str, dict[str, Any]] = {
    "another batch": {"x": X[:1].repeat(3, 1, 1)},
    "another length": {"x": torch.cat([X, X], dim=1)},
    "another dtype": {"x": X.double()},
    "other strides": {"x": X.transpose(1, 2).contiguous().transpose(1, 2)},
    "another value": {"twice": True},
    "an argument more": {"extra": {"scale": 2.0}},
    "other contents of an argument": {"extra": {"scale": 3.0}},
}


@pytest.mark.parametrize("what", ARGUMENTS)
def test_other_arguments_are_seen_and_have_calls_of_their_own(what: str, fresh_inference: None) -> None:
    arguments = ARGUMENTS[what]
    model = warm(make_own())
    batch = arguments.get("x", X).shape[0]
    if arguments.get("x", X).dtype != torch.float32:  # which the weights are not
        with pytest.raises(RuntimeError):
            call(model, 2, **arguments)
        assert torch.equal(call(model, 2), eager(model, X, timestep(2)))
        return
    for step in range(2, 5):
        expected = eager(model, arguments.get("x", X), timestep(step, batch=batch),
                         **{k: v for k, v in arguments.items() if k != "x"})  # fmt: skip
        found = model(arguments.get("x", X), timestep=timestep(step, batch=batch),
                      **{k: v for k, v in arguments.items() if k != "x"})  # fmt: skip
        for mine, theirs in zip(*(r if isinstance(r, tuple) else (r,) for r in (found, expected)), strict=True):
            assert torch.equal(mine, theirs)
    before = shortcuts(model)
    for step in range(5, 7):  # the two kinds take turns
        call(model, step)
        model(
            arguments.get("x", X),
            timestep=timestep(step, batch=batch),
            **{k: v for k, v in arguments.items() if k != "x"},
        )
    assert shortcuts(model) == before + 4


def test_arguments_that_are_no_call_of_the_model_raise_what_it_raises(fresh_inference: None) -> None:
    model = warm(make_own())
    for args, kwargs in [((), {}), ((X,), {"x": X, "timestep": timestep(0)}), ((X, timestep(0)), {"unknown": 1})]:
        with pytest.raises(TypeError):
            model(*args, **kwargs)
    assert torch.equal(call(model, 2), eager(model, X, timestep(2)))


def test_a_parameter_given_as_an_argument_is_seen(fresh_inference: None) -> None:
    """Dynamo has captured them as two tensors."""
    model = warm(make_own(), extra={"scale": torch.ones(8)})
    before = shortcuts(model)
    for _ in range(2):
        found = call(model, 2, extra={"scale": model.mlp[0].bias})
        assert torch.equal(found, eager(model, X, timestep(2), {"scale": model.mlp[0].bias}))
    assert shortcuts(model) == before


class Plain(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


MODES: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "force_eager": lambda: torch.compiler.set_stance("force_eager"),
    "fail_on_recompile": lambda: torch.compiler.set_stance("fail_on_recompile"),
    "a dispatch mode": Plain,
    "a dispatch mode that Dynamo ignores": CountsProducts,
    "a function mode": lambda: torch.device("cpu"),
}


@pytest.mark.filterwarnings("ignore:the model ran eager")
@pytest.mark.parametrize("mode", MODES)
def test_modes_of_torch_have_the_effect_that_they_have_on_torch_compile(mode: str, fresh_inference: None) -> None:
    model = warm(make_own())
    with MODES[mode]():
        expected = eager(model, X, timestep(2))
        for _ in range(2):
            assert torch.equal(call(model, 2), expected)
    assert torch.equal(call(model, 2), eager(model, X, timestep(2)))


def test_deterministic_algorithms_and_inference_mode_are_seen(fresh_inference: None) -> None:
    model = warm(make_own())
    captures = dqar_fx.runtime(model).stats.captures
    torch.use_deterministic_algorithms(True)
    try:
        call(model, 2)
    finally:
        torch.use_deterministic_algorithms(False)
    assert dqar_fx.runtime(model).stats.captures == captures + 1
    with torch.inference_mode():
        assert torch.equal(call(model, 3), eager(model, X, timestep(3)))


def test_hooks_on_the_model_run(fresh_inference: None) -> None:
    model = warm(make_own())
    seen: list[str] = []
    handles = [
        model.register_forward_hook(lambda *_: seen.append("own")),
        nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append("all") if m is model else None),
    ]
    try:
        call(model, 2)
        assert sorted(seen) == ["all", "own"]
    finally:
        for handle in handles:
            handle.remove()
    before = shortcuts(model)
    call(model, 3)
    call(model, 4)
    assert shortcuts(model) > before
    assert len(seen) == 2


def test_a_model_that_changes_at_every_call_is_left_to_dynamo(fresh_inference: None) -> None:
    model = warm(make_own())
    for step in range(2, 3 + 2 * PATIENCE):
        model.unrelated = step
        assert torch.equal(call(model, step), eager(model, X, timestep(step)))
    taken = shortcuts(model)
    report = dqar_fx.runtime(model).report()
    assert report.guarded == ("the model keeps changing",)
    assert "keeps changing" in str(report)
    call(model, 40)
    assert shortcuts(model) == taken


def test_changes_between_runs_are_learned_however_many(fresh_inference: None) -> None:
    model = warm(make_own())
    for run in range(2 * PATIENCE):
        model.number = 2.0 + run % 2  # captured twice
        before = shortcuts(model)
        for step in range(3):
            assert torch.equal(call(model, step), eager(model, X, timestep(step)))
        assert shortcuts(model) == before + 2
    assert not dqar_fx.runtime(model).report().guarded


def test_more_kinds_of_calls_than_are_tried_at_a_time_have_one_each(fresh_inference: None) -> None:
    model = warm(make_own())
    lengths = range(3, 9)
    for _ in range(2):
        for length in lengths:
            x = torch.randn(2, length, 8)
            with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
                before = shortcuts(model)
                for step in range(3):
                    assert torch.equal(call(model, step, x=x), eager(model, x, timestep(step)))
                assert shortcuts(model) >= before + 2


def test_a_torch_with_other_guards_does_without(fresh_inference: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dqar_fx.shortcut.call.divide", lambda *_: [].unheard_of)  # type: ignore[attr-defined]
    model = make_own()
    dqar_fx.optimize(model, Schedule.none(50), backend="eager")
    for step in range(3):
        assert torch.equal(call(model, step), eager(model, X, timestep(step)))
    assert shortcuts(model) == 0
    assert "AttributeError" in str(dqar_fx.runtime(model).report())


def test_a_python_that_tells_of_no_writes_does_without(fresh_inference: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert writes_are_noticed()
    monkeypatch.setattr("dqar_fx.shortcut.watch.writes_are_noticed", lambda: False)
    model = make_own()
    dqar_fx.optimize(model, Schedule.none(50), backend="eager")
    for step in range(3):
        call(model, step)
    assert dqar_fx.runtime(model).report().guarded == ("this Python does not tell of writes into objects",)


def test_several_graphs_are_left_to_dynamo(fresh_inference: None) -> None:
    class Broken(Own):
        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:  # type: ignore[override]
            y = super().forward(x, timestep)
            torch._dynamo.graph_break()
            return y + self.attn(x)

    torch.manual_seed(0)
    model = Broken().eval().requires_grad_(False)
    dqar_fx.optimize(model, Schedule.none(50), backend="eager")
    for step in range(3):
        assert torch.equal(call(model, step), eager(model, X, timestep(step)))
    assert shortcuts(model) == 0


def test_dynamo_forgetting_what_it_compiled_is_noticed(fresh_inference: None) -> None:
    model = warm(make_own())
    captures = dqar_fx.runtime(model).stats.captures
    torch._dynamo.reset()
    for _ in range(3):
        assert torch.equal(call(model, 2), eager(model, X, timestep(2)))
    assert dqar_fx.runtime(model).stats.captures == captures + 1


def test_a_parameter_that_also_lies_in_a_list_is_taken_from_there(fresh_inference: None) -> None:
    class Listed(Own):
        def forward(self, x: Tensor, timestep: Tensor) -> Any:  # type: ignore[override]
            return super().forward(x + self.weights[0], timestep) + self.mlp[0].bias

    torch.manual_seed(0)
    model = Listed().eval().requires_grad_(False)
    model.weights = [model.mlp[0].bias]
    warm(model)
    model.weights[0] = nn.Parameter(torch.ones(8), requires_grad=False)
    for step in range(2, 5):
        assert torch.equal(call(model, step), eager(model, X, timestep(step)))


def test_parameters_are_not_fetched(fresh_inference: None) -> None:
    model = warm(make_own())
    (shortcut,) = dqar_fx.runtime(model).shortcuts._known  # type: ignore[union-attr]
    code = shortcut.run.__code__
    loaded = code.co_consts + code.co_names
    assert "_parameters" in shortcut.compiled.code.co_names + shortcut.compiled.code.co_consts
    fetched = {"weight", "bias"} & {name for name in loaded if isinstance(name, str)}
    instructions = len(code.co_code)
    assert instructions < len(shortcut.compiled.code.co_code) / 3, fetched


@pytest.mark.parametrize("family", [DIT, SD3, FLUX, WAN], ids=["DiT", "SD3", "Flux", "Wan"])
def test_whole_generations_of_real_models_take_them(family: Family, fresh_inference: None) -> None:
    model = family.optimized()
    expected = family.sample(model)
    taken = shortcuts(model)
    assert taken >= 4
    again = family.sample(model)
    assert torch.equal(again, expected)
    steps = dqar_fx.runtime(model).stats.steps
    assert shortcuts(model) == taken + steps, "not every call of the second generation"


def test_reuse_by_shortcuts_is_reuse_without(fresh_inference: None) -> None:
    schedule = Schedule.interval(NUM_STEPS, every=2, warmup=1)
    usual, short = make_dit(), make_dit()
    for model in (usual, short):
        dqar_fx.optimize(model, schedule, backend="eager")
    dqar_fx.runtime(usual).shortcuts._known = ()  # type: ignore[union-attr]
    usual._compiled_call_impl.shortcuts.learn = lambda *_: None
    assert torch.equal(sample(usual), sample(short))
    assert torch.equal(sample(usual), sample(short))
    assert (shortcuts(usual), shortcuts(short)) == (0, 2 * NUM_STEPS - 1)
    assert dqar_fx.runtime(usual).stats.decisions == dqar_fx.runtime(short).stats.decisions


@pytest.mark.skipif(is_older(torch.__version__, OLDEST_TORCH), reason="captures are saved from torch 2.13 on")
def test_a_loaded_capture_has_one(fresh_inference: None, tmp_path: Any) -> None:
    model = make_dit()
    inputs = {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": timestep(0), "class_labels": torch.arange(2)}
    dqar_fx.save_compiled(model, inputs, tmp_path / "capture")
    dqar_fx.optimize(model, Schedule.none(NUM_STEPS), backend="eager")
    dqar_fx.load_compiled(model, tmp_path / "capture")
    expected = sample(make_dit())
    assert torch.equal(sample(model), expected)
    assert shortcuts(model) == NUM_STEPS - 1
    handle = model.transformer_blocks[0].register_forward_hook(lambda *_: None)  # seen of loaded captures only
    before = shortcuts(model)
    model(**inputs)
    assert shortcuts(model) == before
    handle.remove()


def test_a_copy_and_a_restored_model_have_none_and_are_freed(fresh_inference: None) -> None:
    older = set(globals())
    model = warm(make_own())
    twin = copy.deepcopy(model)
    assert torch.equal(call(twin, 2), call(model, 2))
    weight = weakref.ref(model.mlp[0].weight)
    runtime = dqar_fx.runtime(model)
    names = {name for name in globals().keys() - older if name.startswith("__compiled_fn")}
    assert names
    dqar_fx.restore(model)
    del model
    torch._dynamo.reset()
    gc.collect()
    assert weight() is None, "the runtime holds the model"
    assert not names.intersection(globals()), "Dynamo's code is held"
    assert runtime.stats.shortcuts > 0


def by_name(a: int, b: int = 2, *rest: int, c: int, d: int = 4, **words: int) -> dict[str, Any]:
    return dict(locals())


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((1,), {"c": 3}), ((1, 5), {"c": 3, "d": 6}), ((1, 2, 7, 8), {"c": 3, "e": 9}), ((), {"a": 1, "c": 0})],
)
def test_arguments_are_bound_as_python_does(args: Any, kwargs: Any) -> None:
    assert Binder(by_name)(args, kwargs) == by_name(*args, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize(("args", "kwargs"), [((), {"c": 1}), ((1,), {}), ((1,), {"a": 1, "c": 2})])
def test_arguments_that_do_not_fit_are_not_bound(args: Any, kwargs: Any) -> None:
    with pytest.raises(TypeError):
        by_name(*args, **kwargs)
    assert Binder(by_name)(args, kwargs) is None  # type: ignore[arg-type]


def test_closures_are_bound() -> None:
    free = 5

    def inner(a: int) -> int:
        return a + free

    assert Binder(inner)((1,), {}) == {"a": 1, "free": 5}  # type: ignore[arg-type]
    assert MISS is not None
