"""What a node writes and aliases, and dead-code removal that keeps every write that somebody can see."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn
from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_mutation
from torch.nn.attention import SDPBackend, sdpa_kernel

from dqar_fx.graph.capture import fork, readable
from dqar_fx.graph.effects import (
    changes_mode,
    closure_forward,
    depending_on,
    eliminate_dead_code,
    finds_size,
    has_late_size,
    mode_spans,
    must_keep,
    storages,
    target_name,
    writers,
    written,
)
from tests.graph.conftest import capture, capture_call, equal, ops, traced


def call(kind: str, target: Any, *args: Any, **kwargs: Any) -> tuple[fx.Node, fx.Node]:
    """One call in a graph of its own, and ``a``; ``"a"`` and ``"b"`` among the arguments stand for its inputs."""
    graph = fx.Graph()
    nodes = {name: graph.placeholder(name) for name in "ab"}

    def node(value: Any) -> Any:
        if isinstance(value, (list, dict)):
            return [node(v) for v in value] if isinstance(value, list) else {k: node(v) for k, v in value.items()}
        return nodes.get(value, value) if isinstance(value, str) else value

    made = graph.create_node(kind, target, tuple(map(node, args)), {k: node(v) for k, v in kwargs.items()})
    return made, nodes["a"]


WRITES = {
    "method with an underscore": ("call_method", "add_", "a", 1),
    "method of an operator": ("call_method", "__iadd__", "a", "b"),
    "method setitem": ("call_method", "__setitem__", "a", 0, 1.0),
    "function with an underscore": ("call_function", torch.fill_, "a", 1.0),
    "a list of tensors": ("call_function", torch._foreach_add_, ["a"], 1.0),
    "iadd": ("call_function", operator.iadd, "a", "b"),
    "setitem": ("call_function", operator.setitem, "a", 0, "b"),
    "positional inplace": ("call_function", F.silu, "a", True),
    "operator of the dispatcher": ("call_function", torch.ops.aten.add_.Tensor, "a", "b"),
    "operator without its overload": ("call_function", torch.ops.aten.mul_, "a", "b"),
}


@pytest.mark.parametrize("node", WRITES.values(), ids=WRITES.keys())
def test_a_write_into_the_first_argument_is_seen(node: tuple[Any, ...]) -> None:
    made, first = call(*node)
    assert written(made) == [first]


def test_writes_into_other_arguments_are_seen() -> None:
    out, first = call("call_function", torch.add, "b", 1, out="a")
    assert written(out) == [first]
    inplace, first = call("call_function", F.relu, "a", inplace=True)
    assert written(inplace) == [first]
    named, first = call("call_function", torch.ops.aten.add.out, "b", "b", out="a")
    assert written(named) == [first]
    kernel, _ = call("call_function", triton_kernel_wrapper_mutation, kernel_idx=0, kwargs={"x": "b", "out": "a"})
    assert [n.name for n in written(kernel)] == ["b", "a"]  # what a kernel of the user's writes is not known


@pytest.mark.parametrize(
    "node",
    [
        ("call_method", "add", "a", 1),
        ("call_function", torch.add, "a", 1),
        ("call_function", F.silu, "a"),
        ("call_function", F.silu, "a", False),
        ("call_function", F.scaled_dot_product_attention, "a", "a", "b", None, 0.0, True),
        ("call_function", torch.ops.aten.add.Tensor, "a", "b"),
        ("call_method", "__len__", "a"),
        ("call_function", operator.and_, "a", "b"),  # ends like a method that writes
        ("call_function", operator.or_, "a", "b"),
    ],
    ids=lambda node: target_name(call(*node)[0]),
)
def test_a_pure_call_writes_nothing(node: tuple[Any, ...]) -> None:
    assert written(call(*node)[0]) == []


def test_a_custom_operator_writes_what_its_schema_says() -> None:
    @torch.library.custom_op("dqar_test::fill_second", mutates_args={"y"})
    def fill_second(x: Tensor, y: Tensor) -> None:
        y.copy_(x)

    for target in (torch.ops.dqar_test.fill_second, torch.ops.dqar_test.fill_second.default):
        made, _ = call("call_function", target, "a", "b")
        assert [n.name for n in written(made)] == ["b"]


def test_a_view_shares_the_storage_of_its_base_and_a_copy_does_not() -> None:
    def model(x: Tensor) -> tuple[Tensor, ...]:
        return x.view(-1), x.data, x[0], x.transpose(0, 1), x.chunk(2), x.clone(), x + 1

    gm = capture(model, torch.randn(2, 4))
    base = next(iter(gm.graph.nodes))
    shares = {
        target_name(n): storages(n) == storages(base) for n in gm.graph.nodes if n.op not in ("output", "placeholder")
    }
    assert shares == {
        "view": True, "_get_data_attr": True, "getitem": True, "transpose": True, "chunk": True, "clone": False,
        "add": False,
    }  # fmt: skip
    assert writers(gm.graph.nodes, storages(base)) == []


class PositionTable(nn.Module):
    """CogVideoX: a table is filled in place through ``.data``, and nothing uses what the filling returns."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        table = x.new_zeros(2, 3, 4, requires_grad=False)
        table.data[:, 1:].copy_(self.linear(x)[:, 1:])  # nobody uses what copy_ returns
        table[:, 0] = 2.0  # nor is there anything to use of a setitem
        return x + table


def test_writes_through_views_of_something_live_stay() -> None:
    gm, inputs = capture_call(PositionTable(), torch.randn(2, 3, 4))
    broken = fork(gm)
    broken.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    broken.recompile()
    assert not equal(broken(*inputs), gm(*inputs))  # the trap is real

    kept = eliminate_dead_code(fork(gm))
    kept.recompile()
    assert ops(kept) == ops(gm)
    assert equal(kept(*inputs), gm(*inputs))


def test_dead_code_goes_and_visible_writes_stay() -> None:
    def function(x: Tensor, state: Tensor) -> Tensor:
        dead = x * 2
        dead.add_(1)  # an in-place chain that nothing live reads
        dead.mul_(dead)
        state.mul_(2)  # comes from outside: whoever owns it sees this
        live = x + 1
        live.view(-1).mul_(3)  # through a view
        x.sin()
        return live

    x, state = torch.randn(2, 3), torch.randn(2)
    before = traced(function, x, state)
    after = eliminate_dead_code(fork(before))
    after.recompile()
    assert_expected_inline(
        readable(after),
        """\
input x
input state
mul__1 = state.mul_(2)
add = add(x, 1)
view = add.view(-1)
mul__2 = view.mul_(3)
return add""",
    )
    state_before, state_after = state.clone(), state.clone()
    assert equal(after(x, state_after), before(x, state_before))
    assert equal(state_after, state_before)
    assert readable(eliminate_dead_code(fork(after))) == readable(after)  # nothing left to do


def test_a_write_into_an_attribute_of_the_module_stays() -> None:
    root = nn.Module()
    root.register_buffer("calls", torch.zeros(1))
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_method("add_", (graph.get_attr("calls"), 1))
    graph.output(x)
    gm = fx.GraphModule(root, graph)
    assert ops(eliminate_dead_code(fork(gm))) == {"add_": 1}


def mode_change_names(model: Callable[..., Any], *inputs: Any) -> list[tuple[str, str | None]]:
    gm = capture(model, *inputs)
    assert all(must_keep(n) for n in gm.graph.nodes if changes_mode(n))
    return [(start.name, end and end.name) for start, end in mode_spans(gm.graph.nodes)]


def test_autocast_is_one_span_and_nests() -> None:
    def model(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = x @ x
            with torch.autocast("cpu", enabled=False):
                x = x.float() @ x.float()
        return x

    spans = mode_change_names(model, torch.randn(2, 2))
    assert sorted(spans) == [("_enter_autocast", "_exit_autocast_1"), ("_enter_autocast_1", "_exit_autocast")]


def test_a_choice_of_attention_kernel_is_kept_and_spans_to_where_it_is_taken_back() -> None:
    def model(x: Tensor) -> Tensor:
        for _ in range(2):
            with sdpa_kernel(SDPBackend.MATH):
                x = F.scaled_dot_product_attention(x, x, x)
        return x

    spans = mode_change_names(model, torch.randn(1, 2, 4, 4))
    assert spans == [("_sdpa_kernel", "_sdpa_kernel_1"), ("_sdpa_kernel_2", "_sdpa_kernel_3")]
    gm = capture(model, torch.randn(1, 2, 4, 4))
    assert ops(eliminate_dead_code(fork(gm))) == ops(gm)


def test_a_setter_that_is_never_taken_back_spans_to_the_end() -> None:
    graph = fx.Graph()
    graph.placeholder("x")
    start = graph.call_function(torch._C._set_grad_enabled, (False,))
    assert mode_spans(graph.nodes) == [(start, None)]


def test_vmap_survives_dead_code_removal() -> None:
    def model(x: Tensor) -> Tensor:
        return torch.vmap(lambda row: row * 2)(x) + 1

    gm, inputs = capture_call(model, torch.randn(2, 3))
    after = eliminate_dead_code(fork(gm))
    after.recompile()
    assert equal(after(*inputs), gm(*inputs))


def test_what_finds_a_size_is_told_from_what_has_one() -> None:
    def model(x: Tensor, mask: Tensor) -> Tensor:
        found = x[mask]
        return (found * 2).sum(0) + mask.sum()

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        gm = capture(model, torch.randn(3, 4), torch.tensor([True, False, True]))
    late = {n for n in gm.graph.nodes if has_late_size(n)}
    assert {"getitem", "mul"} <= {target_name(n) for n in late}
    assert "sum" not in {target_name(n) for n in late}
    assert [target_name(n) for n in gm.graph.nodes if finds_size(n)] == ["getitem"]
    backed = capture(lambda x: x * 2, torch.randn(3, 4), dynamic=True)
    assert not any(map(has_late_size, backed.graph.nodes))  # a size that an input has is known before


def test_depending_on_follows_memory() -> None:
    def model(x: Tensor) -> Tensor:
        buffer = x.new_zeros(3)
        x = x.sin()
        buffer[:2] = x
        return buffer.cos() + 1

    gm = capture(model, torch.randn(2))
    sine = next(n for n in gm.graph.nodes if target_name(n) == "sin")
    inside = {n for n in gm.graph.nodes if n.op not in ("placeholder", "output")}
    assert "cos" not in map(target_name, closure_forward([sine], inside))
    assert {"sin", "setitem", "cos", "add"} <= set(map(target_name, depending_on([sine], inside)))


def test_closure_forward_stays_within() -> None:
    gm = traced(lambda x: ((x + 1) * 2, x - 1), torch.ones(1))
    nodes = {n.name: n for n in gm.graph.nodes}
    within = {nodes["add"], nodes["mul"]}
    assert closure_forward([nodes["add"]], within) == within
    assert closure_forward([nodes["mul"]], within) == {nodes["mul"]}
