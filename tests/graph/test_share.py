"""What is computed once for all blocks, and what looks alike but is not shared."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, fx

import dqar_fx
from dqar_fx.graph.capture import lift_constants, module_stack, readable
from dqar_fx.graph.effects import target_name
from dqar_fx.graph.guard import guard_nodes, guard_sites
from dqar_fx.graph.share import share_repeated
from dqar_fx.graph.sites import find_sites
from tests.graph.conftest import capture, captured_model, equal, ops, region, traced
from tests.models import NUM_STEPS, make_dit, sample

X, T = torch.randn(2, 4), torch.randn(4)


def shared(function: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    """The graph after the pass, once it is known that it computes the same bits and that its argument is unchanged."""
    inputs = inputs or (X, T)
    gm = traced(function, *inputs)
    text = readable(gm)
    after = share_repeated(gm)
    assert readable(gm) == text  # the input is untouched
    given = copy.deepcopy(inputs), copy.deepcopy(inputs)
    torch.manual_seed(1)
    expected = gm(*given[0])
    torch.manual_seed(1)
    assert equal(after(*given[1]), expected)
    assert equal(given[1], given[0])  # and what it writes into its inputs is the same
    assert readable(share_repeated(after)) == readable(after)  # nothing left to do
    return after


def is_left_alone(function: Callable[..., Any], *inputs: Tensor) -> bool:
    return readable(shared(function, *inputs)) == readable(traced(function, *(inputs or (X, T))))


def test_what_three_blocks_compute_alike_is_computed_once_before_them() -> None:
    def blocks(x: Tensor, t: Tensor) -> Tensor:
        x = x.relu()
        x = x + torch.sin(t * 0.5)
        x = x * torch.sin(t * 0.5)
        return x - torch.sin(t * 0.5)

    assert_expected_inline(
        readable(shared(blocks)),
        """\
input x
input t
mul = mul(t, 0.5)
sin = sin(mul)
relu = x.relu()
add = add(relu, sin)
mul_2 = mul(add, sin)
sub = sub(mul_2, sin)
return sub""",
    )


def test_two_occurrences_are_not_worth_it() -> None:
    def twice(x: Tensor, t: Tensor) -> Tensor:
        return (x + torch.sin(t)) * torch.sin(t)

    assert is_left_alone(twice)


def test_there_is_nothing_to_share() -> None:
    def unlike(x: Tensor, t: Tensor) -> Tensor:
        return x.relu() + t.sin() + t.cos() + x.sin()

    assert is_left_alone(unlike)


def test_what_depends_on_the_stream_is_not_shared_but_its_conditioning_is() -> None:
    def blocks(x: Tensor, t: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(x) * torch.tanh(t)
        return x

    assert ops(shared(blocks)) == {"tanh": 3 + 1, "mul": 3}


def test_equal_numbers_of_other_types_are_other_expressions() -> None:
    def numbers(x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        return t * 1, t * 1.0, t * True, t * 0.0, t * -0.0, x

    assert is_left_alone(numbers, X, torch.arange(3))


def test_a_node_outside_all_blocks_has_no_module() -> None:
    gm = share_repeated(captured_model("dit")[0])
    (sine,) = (n for n in gm.graph.nodes if target_name(n) == "sin")
    assert module_stack(sine) == ()


# -- never shared ---------------------------------------------------------------------------------------------------


def random_like(x: Tensor, t: Tensor) -> Tensor:
    return x + torch.rand_like(t) + torch.rand_like(t) + torch.rand_like(t)


def gaussian(x: Tensor, t: Tensor) -> Tensor:
    return x + torch.randn_like(t) + torch.randn_like(t) + torch.randn_like(t)


def dropouts(x: Tensor, t: Tensor) -> Tensor:
    return x + F.dropout(t, 0.5, True) + F.dropout(t, 0.5, True) + F.dropout(t, 0.5, True)


def coins(x: Tensor, t: Tensor) -> Tensor:
    return x + torch.bernoulli(x) + torch.bernoulli(x) + torch.bernoulli(x)


def draws(x: Tensor, t: Tensor) -> Tensor:
    return x + torch.multinomial(x, 4) + torch.multinomial(x, 4) + torch.multinomial(x, 4)


def counts(x: Tensor, t: Tensor) -> Tensor:
    return x + torch.poisson(x) + torch.poisson(x) + torch.poisson(x)


def alpha_dropouts(x: Tensor, t: Tensor) -> Tensor:
    return x + F.alpha_dropout(t, 0.5, True) + F.alpha_dropout(t, 0.5, True) + F.alpha_dropout(t, 0.5, True)


@pytest.mark.parametrize("function", [random_like, gaussian, dropouts, coins, draws, counts, alpha_dropouts])
def test_random_numbers_are_drawn_as_often_as_before(function: Callable[..., Any]) -> None:
    assert is_left_alone(function, torch.rand(2, 4), T)


def attentions(x: Tensor, t: Tensor) -> Tensor:
    q = x[None, None]
    for _ in range(3):
        x = x + F.scaled_dot_product_attention(q, q, q)[0, 0]
    return x


def test_attentions_are_not_shared() -> None:
    assert ops(shared(attentions))["scaled_dot_product_attention"] == 3


def test_guards_are_not_shared() -> None:
    gm = traced(attentions, X, T)
    names = [n.name for n in gm.graph.nodes if n.name.startswith("scaled_dot_product_attention")]
    guarded = guard_sites(gm, [region(gm, name, name) for name in names])
    after = share_repeated(guarded)
    assert [g.args[0] for g in guard_nodes(after.graph)] == [0, 1, 2]
    assert equal(after(X, T), gm(X, T))


def written_copies(x: Tensor, t: Tensor) -> Tensor:
    for _ in range(3):
        y = t * 2
        y.add_(1)
        x = x + y
    return x


def written_through_a_view(x: Tensor, t: Tensor) -> Tensor:
    for _ in range(3):
        y = t * 2
        y.view(2, 2).add_(1)
        x = x + y
    return x


def read_between_writes(x: Tensor, t: Tensor) -> Tensor:
    for _ in range(3):
        x = x + t.sin()
        t.add_(1)
    return x


def read_through_a_view_between_writes(x: Tensor, t: Tensor) -> Tensor:
    for _ in range(3):
        x = x + t.view(4).sin()
        t.mul_(2)
    return x


def read_before_writes(x: Tensor, t: Tensor) -> Tensor:
    t.add_(1)
    return x + t.sin() + t.sin() + t.sin()


@pytest.mark.parametrize(
    "function",
    [
        written_copies,
        written_through_a_view,
        read_between_writes,
        read_through_a_view_between_writes,
        read_before_writes,
    ],
)
def test_memory_that_is_written_in_place_is_left_alone(function: Callable[..., Any]) -> None:
    assert is_left_alone(function)


def test_a_graph_with_autocast_is_left_alone() -> None:
    def rounded(x: Tensor, t: Tensor) -> Tensor:
        x = x + F.linear(t, t[None]) + F.linear(t, t[None]) + F.linear(t, t[None])
        with torch.autocast("cpu", torch.bfloat16):
            return x + F.linear(t, t[None])

    gm = capture(rounded, X, T)
    assert readable(share_repeated(gm)) == readable(gm)


# -- a real model ---------------------------------------------------------------------------------------------------


def test_a_dit_embeds_its_timestep_once() -> None:
    gm, inputs = captured_model("dit")
    regions = [r for r in find_sites(gm) if not r.site.reason]
    whole, constants = lift_constants(guard_sites(gm, regions))
    before = ops(whole)
    after = share_repeated(whole)
    assert before["sin"] == before["cos"] == 3 + 1  # each block's, and the last layer's, which asks the first block
    assert ops(after)["sin"] == ops(after)["cos"] == 1
    assert len(guard_nodes(after.graph)) == 3
    assert equal(after(*inputs, *constants), gm(*inputs))


def test_an_optimised_dit_embeds_its_timestep_once_and_is_bit_identical() -> None:
    model = dqar_fx.optimize(make_dit(3), dqar_fx.Schedule.none(NUM_STEPS), backend="eager", fullgraph=True)
    assert torch.equal(sample(model), sample(make_dit(3)))
    (graph,) = dqar_fx.runtime(model)._graphs
    assert sum(ops(piece.gm)["sin"] for piece in graph.pieces) == 1
    assert ops(graph.pieces[0].gm)["cos"] == 1
