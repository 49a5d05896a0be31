"""Forks, lifted constants, and the module paths of a captured graph."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn

from dqar_fx.graph.capture import clean_path, fork, is_parameter, lift_constants, module_stack, readable, source_name
from dqar_fx.graph.effects import storages
from tests.graph.conftest import Block, Transformer, capture, capture_call, equal, ops, tokens, traced


@pytest.mark.parametrize(
    ("raw", "path"),
    [
        ("L['self']", ""),
        ("L['model'].blocks.0.attn", "blocks.0.attn"),
        ("L['self'].__dict__['_modules']['blocks'].0.attn", "blocks.0.attn"),
        ("L['self']._modules['blocks']._modules['0'].attn", "blocks.0.attn"),
        ("L['self'].stages[1].blocks[0]", "stages.1.blocks.0"),
        ("attn1", "attn1"),  # behind a graph break
    ],
)
def test_module_paths_are_cleaned(raw: str, path: str) -> None:
    assert clean_path(raw) == path


def test_a_fork_shares_tensors_and_metadata_values_and_nothing_else() -> None:
    gm, inputs = capture_call(Transformer(), tokens(), torch.tensor(1.0))
    text, copy = readable(gm), fork(gm)
    assert readable(copy) == text
    for mine, theirs in zip(copy.graph.nodes, gm.graph.nodes, strict=True):
        assert mine.meta is not theirs.meta
        assert storages(mine) == storages(theirs)  # so aliasing can still be read off
    for node in list(copy.graph.nodes)[-3:-1]:
        node.meta.clear()
        node.replace_all_uses_with(next(iter(copy.graph.nodes)))
        copy.graph.erase_node(node)
    assert readable(gm) == text
    assert all(n.meta for n in gm.graph.nodes if n.op == "call_function")
    assert equal(fork(gm)(*inputs), gm(*inputs))


def test_constants_become_trailing_inputs_in_order_each_once() -> None:
    root = nn.Module()
    root.a, root.b = torch.tensor([2.0]), torch.tensor([3.0])
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(tuple(graph.call_function(torch.mul, (x, graph.get_attr(name))) for name in "aba"))
    before = fx.GraphModule(root, graph)
    text = readable(before)
    after, constants = lift_constants(before)
    assert_expected_inline(
        readable(after),
        """\
input x
input constant_0
input constant_1
mul = mul(x, constant_0)
mul_1 = mul(x, constant_1)
mul_2 = mul(x, constant_0)
return (mul, mul_1, mul_2)""",
    )
    assert equal(constants, [root.a, root.b])
    assert equal(after(torch.ones(1), *constants), before(torch.ones(1)))
    assert all(is_parameter(n) == (n.name != "x") for n in after.graph.nodes if n.op == "placeholder")
    assert readable(lift_constants(after)[0]) == readable(after)  # nothing left to do
    assert lift_constants(after)[1] == []
    assert readable(before) == text


def test_constants_of_a_graph_without_inputs_are_lifted() -> None:
    root = nn.Module()
    root.c = torch.tensor([2.0])
    graph = fx.Graph()
    graph.output(graph.call_method("neg", (graph.get_attr("c"),)))
    after, constants = lift_constants(fx.GraphModule(root, graph))
    assert equal(after(*constants), torch.tensor([-2.0]))


def test_a_submodule_of_a_higher_order_operator_stays_an_attribute() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.linear, x, use_reentrant=False)

    gm, inputs = capture_call(Checkpointed(), torch.randn(2, 4))
    lifted, constants = lift_constants(gm)
    assert [n.op for n in lifted.graph.nodes].count("get_attr") == 1
    assert equal(lifted(*inputs, *constants), gm(*inputs))


def test_parameters_are_told_from_arguments() -> None:
    model = Transformer()
    model.register_buffer("shift", torch.ones(1))
    model.forward = lambda x, timestep: Transformer.forward(model, x + model.shift, timestep)
    gm = capture(model, tokens(), torch.tensor(1.0))
    given = [n for n in gm.graph.nodes if n.op == "placeholder"]
    arguments = [source_name(n) for n in given if not is_parameter(n)]
    assert arguments == ["L['x']", "L['timestep']"]
    assert len(given) - 2 == len([*model.parameters(), *model.buffers()])


def test_every_call_of_a_module_has_a_key_of_its_own() -> None:
    first, second = Block(), Block()
    second.attn = first.attn  # one module under two names: Dynamo numbers its calls under each name
    model = Transformer(first, second, first)
    calls = {}
    for node in capture(model, tokens(), torch.tensor(1.0)).graph.nodes:
        for call in module_stack(node):
            if call.type_name == "Attention":
                calls[call.key] = call.path
    assert sorted(calls.values()) == ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]


def test_inputs_and_outputs_have_no_module() -> None:
    gm = capture(Transformer(), tokens(), torch.tensor(1.0))
    assert all(module_stack(n) == () for n in gm.graph.nodes if n.op in ("placeholder", "output"))
    attention = gm.graph.find_nodes(op="call_function", target=torch.nn.functional.scaled_dot_product_attention)[1]
    assert [(c.path, c.type_name) for c in module_stack(attention)] == [
        ("blocks.1", "Block"),
        ("blocks.1.attn", "Attention"),
    ]


def test_readable_shows_methods_keywords_and_nested_arguments() -> None:
    gm = traced(lambda x: (torch.cat([x, x], dim=0).view((4,)), x[1:]), torch.ones(2))
    assert_expected_inline(
        readable(gm),
        """\
input x
cat = cat([x, x], dim=0)
view = cat.view((4,))
getitem = getitem(x, slice(1, None, None))
return (view, getitem)""",
    )
    assert ops(gm) == {"cat": 1, "view": 1, "getitem": 1}
