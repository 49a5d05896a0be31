"""What is taken out of a graph to be computed once: what stays the same, is safe to keep, and pays."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dqar_fx import CacheConfig
from dqar_fx.graph.capture import readable
from dqar_fx.graph.hoist import SEVERAL, Hoisted
from dqar_fx.graph.keys_values import find_stored
from dqar_fx.graph.lossless import mark_lossless
from dqar_fx.graph.lower import Lowerer
from dqar_fx.graph.savings import savings
from dqar_fx.graph.specialise import Outcome
from dqar_fx.runtime.cache import Kept
from dqar_fx.runtime.lossless import constant_inputs
from dqar_fx.runtime.program import CapturedGraph
from tests.graph.conftest import (
    MODELS,
    WIDTH,
    Attention,
    attend,
    capture_call,
    captured_model,
    equal,
    ops,
    tokens,
)

CONSTANT = partial(constant_inputs, latents="hidden_states")
HEADS = 2


def graph_of(gm: fx.GraphModule, target: str = "output", *, constant: Any = CONSTANT) -> CapturedGraph:
    regions = mark_lossless(gm, [r for r in find_stored(gm, target) if not r.site.reason], CONSTANT)
    return CapturedGraph(gm, regions, CacheConfig(target), Lowerer(lambda gm, _: gm), {}, constant=constant)


def given_once(graph: CapturedGraph, arguments: tuple[Any, ...]) -> list[Any]:
    """What a call gives that computes what is kept, what one gives that is given it, and what is kept."""
    outcomes = (Outcome.COMPUTE,) * graph.num_sites
    sizes = graph.sizes_of(arguments)
    kept = Kept((), (), ([], []), inference=False)
    first = graph.run(arguments, outcomes, None, sizes, kept)
    before = [value.clone() for value in kept.values or ()]
    later = graph.run(arguments, outcomes, None, sizes, kept)
    assert equal(kept.values, before)  # nobody has written into it
    plain = graph.run(arguments, outcomes, None, sizes)
    assert equal(first, plain)
    assert equal(later, plain)
    return before


class Cross(nn.Module):
    """Queries of one stream, keys and values of another."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
        return self.out(attend(self.q(x), *self.kv(prompt).chunk(2, -1)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.attn2 = Attention(), Cross()

    def forward(self, x: Tensor, prompt: Tensor, table: Tensor) -> Tensor:
        x = x + self.attn1(x * table)
        return x + self.attn2(x, prompt)


class Denoiser(nn.Module):
    """Blocks that attend to a projected prompt, and know positions by a table."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def prompt(self, x: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        return self.project(prompt)

    def table(self, x: Tensor, timestep: Tensor) -> Tensor:
        return (torch.arange(x.shape[1])[:, None] / torch.arange(1, WIDTH + 1)).cos()

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Any:
        prompt = self.prompt(hidden_states, timestep, encoder_hidden_states)
        table, x = self.table(hidden_states, timestep), hidden_states * timestep
        for block in self.blocks:
            x = block(x, prompt, table)
        return x


def captured(
    model: nn.Module, target: str = "output", *, dynamic: bool | None = None
) -> tuple[CapturedGraph, tuple[Any, ...]]:
    gm, arguments = capture_call(model.eval(), tokens(), torch.tensor(3.0), tokens(length=4), dynamic=dynamic)
    return graph_of(gm, target), arguments


def hoisted(graph: CapturedGraph) -> Hoisted:
    assert graph.hoisted is not None
    return graph.hoisted


def test_keys_values_and_tables_are_computed_first_and_equal_blocks_share_that() -> None:
    graph, arguments = captured(Denoiser())
    kept = given_once(graph, arguments)
    # A table for all, and keys and values for each block, as the attention takes them.
    assert [tuple(value.shape) for value in kept] == [(5, WIDTH), *[(2, HEADS, 4, WIDTH // HEADS)] * 6]
    assert [name.lower() for name in hoisted(graph).inputs] == ["l_encoder_hidden_states_"]
    assert len(hoisted(graph).parameters) == 2 * (1 + 3)
    first = [piece for piece in graph.pieces if piece.hoisted]
    assert [ops(piece.gm)["linear"] for piece in first] == [1, 1, 1, 1]
    assert len({piece.key for piece in first}) == 2
    rest = [piece for piece in graph.pieces if not piece.hoisted]
    assert len({piece.key for piece in rest}) <= len({piece.key for piece in graph.plain})
    assert sum(ops(piece.gm)["linear"] for piece in rest) == 3 * (2 + 2)  # nothing of the prompt is left
    assert not any(ops(piece.gm)["cos"] for piece in rest)


def test_the_graph_that_is_given_stays_as_it_was() -> None:
    gm, _ = capture_call(Denoiser().eval(), tokens(), torch.tensor(3.0), tokens(length=4))
    before = readable(gm)
    graph = graph_of(gm)
    assert graph.hoisted is not None
    assert readable(gm) == before
    plain = graph_of(gm, constant=None)
    assert plain.hoisted is None
    assert [piece.key for piece in plain.pieces] == [piece.key for piece in graph.plain]


def test_keys_and_values_that_would_be_stored_are_hoisted_instead() -> None:
    graph, arguments = captured(Denoiser(), "kv")
    given_once(graph, arguments)
    assert [region.site.lossless for region in graph.regions] == [False, True] * 3
    assert hoisted(graph).sites == {1, 3, 5}
    assert {site for piece in graph.pieces for site in piece.sites} == {0, 2, 4}
    assert {site for piece in graph.plain for site in piece.sites} == set(range(6))
    assert len({piece.key for piece in graph.pieces if not piece.hoisted}) <= len({p.key for p in graph.plain})


class CrossBlock(Block):
    def forward(self, x: Tensor, prompt: Tensor, table: Tensor) -> Tensor:
        return x + self.attn2(x * table, prompt)


class OnlyCross(Denoiser):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(CrossBlock() for _ in range(3))


def test_where_every_guard_goes_the_rest_is_still_cut_into_blocks() -> None:
    graph, arguments = captured(OnlyCross(), "kv")
    given_once(graph, arguments)
    assert not any(piece.sites for piece in graph.pieces)
    labels = [piece.label for piece in graph.pieces if not piece.hoisted]
    assert labels == ["blocks.0", "blocks.1", "blocks.2"]


# -- what is left alone: by soundness -------------------------------------------------------------------------------


class Modulated(Denoiser):
    def prompt(self, x: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        return self.project(prompt * timestep)


class ThroughMemory(Denoiser):
    """The latents reach the prompt by a write whose result nobody names."""

    def prompt(self, x: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        prompt = prompt.clone()
        prompt[:, :1].add_(x[:, :1])
        return self.project(prompt)


class Noisy(Denoiser):
    def prompt(self, x: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        return self.project(prompt + torch.randn_like(prompt))


class Counting(Denoiser):
    """Scales the prompt by what it counts itself."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def prompt(self, x: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.project(prompt * self.calls)


class Autocast(Denoiser):
    """The projection is another operator inside of the mode."""

    def prompt(self, x: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            prompt = self.project(prompt).float()
        return prompt + timestep


@pytest.mark.parametrize("kind", [Modulated, ThroughMemory, Noisy, Counting, Autocast])
def test_what_does_not_stay_the_same_stays_in_its_place(kind: type[Denoiser]) -> None:
    graph, _ = captured(kind())
    assert hoisted(graph).inputs == ()  # the table of positions is all
    assert len(hoisted(graph).kept) == 1


class OwnMemory(Denoiser):
    def prompt(self, x: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        made = torch.empty_like(prompt)
        made[:] = self.project(prompt)
        return made


def test_a_value_may_be_made_by_writes_if_these_stay_the_same_too() -> None:
    graph, arguments = captured(OwnMemory())
    assert len(given_once(graph, arguments)) == 7
    rest = fx.Graph()
    rest.graph_copy(hoisted(graph).gm.graph, {})
    assert ops(hoisted(graph).gm)["setitem"] == 1  # in the part that stands first, and nowhere else


class Unread(Denoiser):
    """Attends once more to the prompt, for nobody."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Any:
        result = super().forward(hidden_states, timestep, encoder_hidden_states)
        self.blocks[0].attn2(result, self.project(encoder_hidden_states)).mul(2)
        return result


@pytest.mark.parametrize("target", ["output", "kv"])
def test_an_attention_whose_value_nobody_reads_stays_in_the_graph(target: str) -> None:
    graph, arguments = captured(Unread(), target)
    assert graph.num_sites == 7
    given_once(graph, arguments)


class Returning(Denoiser):
    """Hands the projected prompt to the caller, who may write into it."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Any:
        prompt = self.project(encoder_hidden_states)
        x = hidden_states * timestep
        for block in self.blocks:
            x = block(x, prompt, timestep)
        return x, prompt


class Written(Denoiser):
    """Writes into the projected prompt where it goes on."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Any:
        prompt = self.project(encoder_hidden_states)
        x = hidden_states * timestep
        for block in self.blocks:
            x = x + block.attn1(x) + prompt.mean(1, keepdim=True)
            prompt += timestep
        return x


class Viewing(Denoiser):
    """Hands the prompt on as it is."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Any:
        x = hidden_states * timestep
        for block in self.blocks:
            x = x + block.attn1(x) + encoder_hidden_states[:, :1].expand(-1, 5, -1).to(x.dtype)
        return x


@pytest.mark.parametrize("kind", [Written, Viewing])
def test_what_is_written_into_or_only_looks_at_an_input_is_not_kept(kind: type[Denoiser]) -> None:
    graph, _ = captured(kind())
    assert graph.hoisting is None
    assert graph.pieces is graph.plain


def test_what_the_caller_is_handed_is_not_kept_but_what_is_made_of_it_is() -> None:
    graph, arguments = captured(Returning())
    assert [value.shape[1] for value in given_once(graph, arguments)] == [HEADS] * 6  # keys and values, not the prompt


# -- what is left alone: because it does not pay --------------------------------------------------------------------


def test_the_models_of_diffusers_keep_what_pays() -> None:
    shapes = {name: [] if graph.hoisted is None else _kept_shapes(graph) for name, graph in _graphs().items()}
    assert shapes == {
        "dit": [],
        "pixart": [(1, 2, 6, 8)] * 4,  # keys and values of two cross-attentions
        "sd3": [(1, 16), (1, 6, 16)],  # the pooled and the whole prompt, projected
        "flux": [(1, 16), (1, 6, 16), (22, 8), (22, 8)],  # these, and tables of cosines and sines
        "wan": [(1, 32, 1, 12), (1, 32, 1, 12), *[(1, 2, 6, 12)] * 4],
    }


def _graphs() -> dict[str, CapturedGraph]:
    return {name: graph_of(captured_model(name)[0]) for name in MODELS}


def _kept_shapes(graph: CapturedGraph) -> list[tuple[int, ...]]:
    nodes = {n.name: n for n in hoisted(graph).gm.graph.nodes}
    return [tuple(nodes[name].meta["example_value"].shape) for name in hoisted(graph).kept]


def test_a_model_out_of_which_nothing_is_hoisted_has_the_pieces_it_had() -> None:
    gm, _ = captured_model("dit")
    graph = graph_of(gm)
    assert graph.hoisting is None
    assert [piece.key for piece in graph.pieces] == [piece.key for piece in graph_of(gm, constant=None).pieces]


class Table(Denoiser):
    """Blocks that read no prompt."""

    make: Callable[[Tensor], Tensor]

    def __init__(self, make: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.make = make
        self.adapter = nn.Parameter(torch.randn(2, 2, WIDTH))

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        x = self.make(self, hidden_states * timestep, encoder_hidden_states)
        for block in self.blocks:
            x = x + block.attn1(x)
        return x


def waves(count: int) -> Callable[[Any, Tensor, Tensor], Tensor]:
    """A table of as many kernels, read in one place."""

    def make(_: Any, x: Tensor, prompt: Tensor) -> Tensor:
        table = torch.arange(float(WIDTH))
        for _ in range(count - 1):
            table = table.sin()
        return x * table

    return make


def mask(tokens: int) -> Callable[[Any, Tensor, Tensor], Tensor]:
    """A mask for each pair of tokens, made of one for each token by many kernels."""

    def make(_: Any, x: Tensor, prompt: Tensor) -> Tensor:
        each = torch.arange(float(tokens))
        both = each[:, None] * each[None]
        for _ in range(SEVERAL):
            both = both.sin()
        return x * both.mean()

    return make


def merged(model: Any, x: Tensor, prompt: Tensor) -> Tensor:
    """An adapter that is merged into its weight at every call."""
    weight = model.project.weight + model.adapter[0].mT @ model.adapter[1]
    return F.linear(x, weight)


def blown_up(model: Any, x: Tensor, prompt: Tensor) -> Tensor:
    """One number for each token, projected to the model's width."""
    return x * F.linear(prompt[..., :1].repeat(1, 64, 1), model.project.weight[:, :1]).mean()


@pytest.mark.parametrize(
    ("make", "kept"),
    [
        (waves(SEVERAL - 1), []),  # a compiler fuses these into what reads them
        (waves(SEVERAL), [(WIDTH,)]),
        (mask(200), [()]),  # what is made of the large one in the end, never that
        (merged, []),
        (blown_up, [()]),
        (lambda model, x, prompt: x * model.project.weight.half().float()[0], []),  # casts of a parameter
        (lambda model, x, prompt: x + prompt[:, :1], []),
        (lambda model, x, prompt: x + prompt[:, :1].exp(), []),  # a kernel, fused into the next
        (lambda model, x, prompt: x + model.project(prompt)[:, :1], [(2, 1, WIDTH)]),
        (lambda model, x, prompt: x + F.embedding(prompt[:, 0, 0].long(), model.project.weight)[:, None], []),
    ],
)
def test_a_value_is_kept_where_there_is_work_behind_it(make: Any, kept: list[tuple[int, ...]]) -> None:
    graph, _ = captured(Table(make))
    assert (_kept_shapes(graph) if graph.hoisted is not None else []) == kept


class Grouped(Denoiser):
    """Keys that several heads share, repeated for them; and a bias for each pair of tokens."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        x = hidden_states * timestep
        for block in self.blocks:
            key, value = block.attn2.kv(encoder_hidden_states).chunk(2, -1)
            key, value = (part.unflatten(-1, (2, -1)).transpose(1, 2).repeat_interleave(4, 1) for part in (key, value))
            query = block.attn2.q(x).unflatten(-1, (2, -1)).transpose(1, 2).repeat_interleave(4, 1)
            x = x + F.scaled_dot_product_attention(query, key, value)[:, ::4].transpose(1, 2).flatten(2)
        return x


def test_keys_are_kept_as_they_were_before_they_were_repeated() -> None:
    graph, arguments = captured(Grouped())
    kept = given_once(graph, arguments)
    assert [tuple(value.shape) for value in kept] == [(2, 2, 4, WIDTH // 2)] * 6
    assert len({value.untyped_storage().data_ptr() for value in kept}) == 6  # clones, here, of views of three


class PairBlock(Block):
    def forward(self, x: Tensor, prompt: Tensor, table: Tensor) -> Tensor:
        return x + self.attn1(torch.matmul(table[:5, :5], x))


class Wide(Denoiser):
    """Every block reads a table for each pair of tokens, made by one kernel."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.blocks = nn.ModuleList(PairBlock() for _ in range(2))

    def table(self, x: Tensor, timestep: Tensor) -> Tensor:
        each = torch.arange(float(x.shape[1] * self.factor))
        return each[:, None] * each[None]


@pytest.mark.parametrize(("factor", "kept"), [(1, True), (20, False)])
def test_a_table_that_all_blocks_read_is_kept_if_it_is_no_larger_than_what_they_hand_on(
    factor: int, kept: bool
) -> None:
    graph, _ = captured(Wide(factor))
    sizes = [size for size in _kept_shapes(graph) if len(size) == 2] if graph.hoisted is not None else []
    assert sizes == ([(5, 5)] if kept else [])


# -- with open sizes, and what it saves -----------------------------------------------------------------------------


def test_with_sizes_left_open_it_is_the_same() -> None:
    graph, arguments = captured(Denoiser(), dynamic=True)
    assert len(given_once(graph, arguments)) == 7


def test_what_it_saves_is_counted() -> None:
    graph, _ = captured(Denoiser())
    found = savings(hoisted(graph))
    batch, text = 2, 4
    projections = 2 * batch * text * WIDTH * (WIDTH + 3 * 2 * WIDTH)
    weights = 4 * (WIDTH * WIDTH + WIDTH + 3 * (2 * WIDTH * WIDTH + 2 * WIDTH))
    assert (found.values, found.flops, found.weight_bytes) == (7, projections, weights)
    assert found.bytes == 4 * (5 * WIDTH + 3 * batch * text * 2 * WIDTH)
    parameters = sum(p.nbytes for p in Denoiser().parameters())
    assert found.total_weight_bytes == parameters
    assert 0 < found.flop_share < found.weight_share < 1


def test_a_graph_can_be_copied_with_what_was_hoisted() -> None:
    graph, _ = captured(Denoiser())
    assert readable(copy.deepcopy(hoisted(graph).gm)) == readable(hoisted(graph).gm)
