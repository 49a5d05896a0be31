"""What moves over a cut into the next run of nodes, and what must stay where it is."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dqar_fx.graph.capture import lift_constants, readable
from dqar_fx.graph.cuts import sink
from dqar_fx.graph.effects import mode_spans
from dqar_fx.graph.guard import guard_sites
from dqar_fx.graph.partition import partition
from dqar_fx.graph.sites import find_sites
from tests.graph.conftest import MODELS, WIDTH, Block, Transformer, capture, captured_model, equal, ops, region, traced

Runs = list[tuple[str, list[fx.Node]]]
X = torch.randn(2, 5, WIDTH)
W = torch.randn(WIDTH, WIDTH)


def cut(gm: fx.GraphModule, *starts: str) -> Runs:
    """The nodes of a graph in runs called "0", "1", ..., cut before each of the nodes named."""
    runs: Runs = [("0", [])]
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if node.name in starts:
            runs.append((str(len(runs)), []))
        runs[-1][1].append(node)
    assert len(runs) == len(starts) + 1
    return runs


def text(runs: Runs) -> str:
    return " | ".join(f"{label}: {' '.join(n.name for n in run)}" for label, run in runs)


def sunk(gm: fx.GraphModule, *starts: str, inputs: Sequence[Tensor]) -> str:
    """The runs after ``sink``, once it is known that they compute the same bits and that nothing given has changed."""
    runs = cut(gm, *starts)
    before, graph = text(runs), readable(gm)
    after = sink(runs)
    assert text(runs) == before
    assert readable(gm) == graph
    assert text(sink(after)) == text(after)  # nothing left to do

    moved = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    rest = [n for n in gm.graph.nodes if n.op == "placeholder"], [n for n in gm.graph.nodes if n.op == "output"]
    for node in itertools.chain(rest[0], *(run for _, run in after), rest[1]):
        copies[node] = moved.node_copy(node, lambda n: copies[n])
    moved.lint()  # every value is made before it is read
    given = [x.clone() for x in inputs], [x.clone() for x in inputs]
    assert equal(fx.GraphModule(gm, moved)(*given[0]), gm(*given[1]))
    return text(after)


def sunk_function(function: Callable[..., Any], *starts: str, inputs: Sequence[Tensor] = (X, W)) -> str:
    return sunk(traced(function, *inputs), *starts, inputs=inputs)


def test_the_residual_add_moves_to_the_norm_that_reads_it() -> None:
    def two_blocks(x: Tensor, w: Tensor) -> Tensor:
        y = x + 0.5 * F.linear(x, w)
        return F.linear(F.layer_norm(y, (WIDTH,)), w)

    assert sunk_function(two_blocks, "layer_norm") == "0: linear | 1: mul add layer_norm linear_1"


def test_there_is_nothing_to_move() -> None:
    def heavy_tail(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(F.linear(F.relu(x), w), w)

    assert sunk_function(heavy_tail) == "0: relu linear linear_1"
    assert sunk_function(heavy_tail, "linear_1") == "0: relu linear | 1: linear_1"


def test_a_run_of_nothing_else_is_joined_to_the_next() -> None:
    def light_middle(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(x, w) * 2 + x), w)

    assert sunk_function(light_middle, "add", "linear_1") == "0: linear | 2: mul add relu linear_1"


def test_what_a_later_run_than_the_next_reads_stays() -> None:
    def long_skip(x: Tensor, w: Tensor) -> Tensor:
        early = F.relu(x)
        near = early + 1
        return F.linear(near, w) + early

    assert sunk_function(long_skip, "linear", "add_1") == "0: relu | 1: add linear | 2: add_1"


def test_what_the_model_returns_stays() -> None:
    def returns_it(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = F.linear(x, w) * 2
        return y, F.linear(y, w)

    assert sunk_function(returns_it, "linear_1") == "0: linear mul | 1: linear_1"


def test_what_its_own_run_still_needs_stays() -> None:
    def read_twice(x: Tensor, w: Tensor) -> Tensor:
        y = x * 2
        return F.linear(y, w) + y

    assert sunk_function(read_twice, "add") == "0: mul linear | 1: add"


def test_tuple_items_stay_with_their_tuple() -> None:
    def halves(x: Tensor, w: Tensor) -> Tensor:
        shift, gate = F.linear(x, w).chunk(2, -1)
        return F.linear(torch.cat([shift * 2, gate + 1], -1), w)

    assert sunk_function(halves, "cat") == "0: linear chunk getitem getitem_1 | 1: mul add cat linear_1"


def test_guards_stay_with_their_attention() -> None:
    def attention(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x + F.scaled_dot_product_attention(x, x, x), w)

    name = "scaled_dot_product_attention"
    gm = guard_sites(gm := traced(attention, X, W), [region(gm, name, name)])
    assert sunk(gm, "linear", inputs=(X, W)) == f"0: {name} reuse_or_compute getitem | 1: add linear"


# -- in-place writes and modes --------------------------------------------------------------------------------------


def written_later(x: Tensor, w: Tensor) -> Tensor:
    y = x * 2
    z = F.linear(y, w)
    return y.add_(z)


def view_of_what_is_written(x: Tensor, w: Tensor) -> Tensor:
    y = F.linear(x, w)
    rows = y.view(-1, WIDTH)
    y.mul_(2)
    return F.linear(rows, w)


def writes_itself(x: Tensor, w: Tensor) -> Tensor:
    y = F.linear(x, w)
    return F.linear(F.relu(y, inplace=True), w) + y


def input_is_written_after_it_was_read(x: Tensor, w: Tensor) -> Tensor:
    y = x * 2
    x.add_(1)
    return F.linear(y, w) + x


@pytest.mark.parametrize(
    ("function", "starts", "expected"),
    [
        (written_later, ["linear"], "0: mul | 1: linear add_"),
        (view_of_what_is_written, ["linear_1"], "0: linear view mul_ | 1: linear_1"),
        (writes_itself, ["linear_1"], "0: linear relu | 1: linear_1 add"),
        (input_is_written_after_it_was_read, ["linear"], "0: mul add_ | 1: linear add"),
    ],
)
def test_what_is_written_in_place_stays(function: Callable[..., Any], starts: list[str], expected: str) -> None:
    assert sunk_function(function, *starts) == expected


def test_what_autocast_rounds_stays_inside() -> None:
    def rounded(x: Tensor, w: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = F.linear(x, w).softmax(-1)
            inside = torch.exp(y)
        return F.linear(inside.float() * 2, w)

    gm = capture(rounded, X, W)
    (_, end), *_ = mode_spans(gm.graph.nodes)
    assert end is not None
    last = [n.name for n in gm.graph.nodes if n.op == "call_function" and "linear" in str(n.target)][-1]
    before, after = sink(cut(gm, last))
    assert {n.name for n in before[1]} >= {"inside", end.name}
    assert after[1][0].name not in ("y", "inside")


# -- whole models ---------------------------------------------------------------------------------------------------


def fused_and_not(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Fused pieces compute the same bits, are as many, hold the same sites, and blocks are as equal as before."""
    regions = [r for r in find_sites(gm) if not r.site.reason]
    whole, constants = lift_constants(guard_sites(gm, regions))
    plain, fused = partition(whole, regions), partition(whole, regions, fuse=True)
    assert [p.label for p in fused] == [p.label for p in plain]
    assert [p.sites for p in fused] == [p.sites for p in plain]
    assert sum((ops(p.gm) for p in fused), Counter()) == sum((ops(p.gm) for p in plain), Counter())
    values = dict(zip((n.name for n in whole.graph.nodes if n.op == "placeholder"), (*inputs, *constants), strict=True))
    for piece in fused:
        values |= zip(piece.outputs, piece.gm(*(values[name] for name in piece.inputs)), strict=True)
    result = next(n for n in whole.graph.nodes if n.op == "output").args[0]
    assert equal(fx.map_arg(result, lambda n: values[n.name]), gm(*inputs))
    # The first block takes in the prologue's tail, each other one the tail of a block: those are equal still.
    plain_keys, fused_keys = ([p.key for p in pieces if p.sites] for pieces in (plain, fused))
    assert len(set(fused_keys)) <= len(set(plain_keys)) + 2
    assert fused_keys != plain_keys


@pytest.mark.parametrize("name", MODELS)
def test_fused_pieces_of_diffusers_models_compute_the_same(name: str) -> None:
    fused_and_not(*captured_model(name))


def test_middle_blocks_still_share_their_compiled_piece() -> None:
    model: nn.Module = Transformer(*(Block() for _ in range(5)))
    gm = capture(model, X, torch.tensor(1.0))
    regions = [r for r in find_sites(gm) if not r.site.reason]
    whole, _ = lift_constants(guard_sites(gm, regions))
    keys = [p.key for p in partition(whole, regions, fuse=True) if p.sites]
    assert len(set(keys[1:])) == 1
