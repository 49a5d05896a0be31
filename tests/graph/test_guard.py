"""One guarded node at each attention, numerics unchanged."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor

from dqar_fx.graph.capture import readable
from dqar_fx.graph.guard import graph_diff, guard_nodes, guard_number, guard_sites, reuse_or_compute
from dqar_fx.graph.sites import find_sites
from tests.graph.conftest import captured_model, equal, ops, region, traced


def attention(x: Tensor, gate: Tensor) -> Tensor:
    normed = x * 3
    out = F.scaled_dot_product_attention(normed, normed, normed)
    return x + gate * out


def joint(x: Tensor) -> tuple[Tensor, Tensor]:
    out = F.scaled_dot_product_attention(x, x, x)
    image = out * 2
    text = image - out  # reads an exit from the inside
    return image + x, text * x


def late_bias(x: Tensor, bias: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(x, x, x)
    out.view(-1).add_(bias)  # nobody uses what this returns
    return out * x


X = torch.randn(1, 2, 4, 3)


def test_every_reader_outside_goes_through_the_guard() -> None:
    before = traced(attention, X, torch.tensor(2.0))
    text = readable(before)
    sites = [region(before, "mul scaled_dot_product_attention", "scaled_dot_product_attention")]
    after = guard_sites(before, sites)
    assert_expected_inline(
        graph_diff(before, after),
        """\
--- graph: captured
+++ graph: guarded
@@ -3,5 +3,7 @@
 mul = mul(x, 3)
 scaled_dot_product_attention = scaled_dot_product_attention(mul, mul, mul)
-mul_1 = mul(gate, scaled_dot_product_attention)
+reuse_or_compute = reuse_or_compute(0, scaled_dot_product_attention)
+getitem = getitem(reuse_or_compute, 0)
+mul_1 = mul(gate, getitem)
 add = add(x, mul_1)
 return add""",
    )
    assert equal(after(X, torch.tensor(2.0)), before(X, torch.tensor(2.0)))
    assert readable(guard_sites(after, sites)) == readable(after)  # nothing left to do
    assert readable(guard_sites(before, [])) == text
    assert graph_diff(before, guard_sites(before, [])) == ""
    assert readable(before) == text  # the input is untouched


def test_several_exits_share_one_guard_and_the_inside_keeps_its_own() -> None:
    before = traced(joint, X)
    after = guard_sites(before, [region(before, "scaled_dot_product_attention mul sub", "mul sub")])
    assert_expected_inline(
        readable(after),
        """\
input x
scaled_dot_product_attention = scaled_dot_product_attention(x, x, x)
mul = mul(scaled_dot_product_attention, 2)
sub = sub(mul, scaled_dot_product_attention)
reuse_or_compute = reuse_or_compute(0, mul, sub)
getitem = getitem(reuse_or_compute, 0)
getitem_1 = getitem(reuse_or_compute, 1)
add = add(getitem, x)
mul_1 = mul(getitem_1, x)
return (add, mul_1)""",
    )
    assert equal(after(X), before(X))


def test_the_guard_waits_for_the_last_write_into_the_exit() -> None:
    before = traced(late_bias, X, torch.tensor(1.0))
    after = guard_sites(
        before, [region(before, "scaled_dot_product_attention view add_", "scaled_dot_product_attention")]
    )
    assert_expected_inline(
        readable(after),
        """\
input x
input bias
scaled_dot_product_attention = scaled_dot_product_attention(x, x, x)
view = scaled_dot_product_attention.view(-1)
add_ = view.add_(bias)
reuse_or_compute = reuse_or_compute(0, scaled_dot_product_attention)
getitem = getitem(reuse_or_compute, 0)
mul = mul(getitem, x)
return mul""",
    )
    assert equal(after(X, torch.tensor(1.0)), before(X, torch.tensor(1.0)))


def test_guards_count_in_the_order_of_the_sites_and_carry_metadata() -> None:
    def two(x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(x, x, x) + x
        return F.scaled_dot_product_attention(y, y, y)

    before = traced(two, X)
    first, second = "scaled_dot_product_attention", "scaled_dot_product_attention_1"
    after = guard_sites(before, [region(before, first, first), region(before, second, second)])
    guards = guard_nodes(after.graph)
    assert [guard_number(g) for g in guards] == [0, 1]
    assert [n.name for n in guards[1].all_input_nodes] == [second]
    for guard in guards:
        (item,) = guard.users
        (value,) = guard.meta["example_value"]
        assert value is item.meta["example_value"] is guard.all_input_nodes[0].meta["example_value"]
    assert next(n for n in after.graph.nodes if n.op == "output").all_input_nodes == list(guards[1].users)
    assert equal(after(X), before(X))


def test_a_guard_computes_when_it_is_called() -> None:
    assert reuse_or_compute(3, X) == (X,)


@pytest.mark.parametrize("name", ["dit", "sd3"])
def test_guarding_a_diffusers_model_adds_guards_and_nothing_else(name: str) -> None:
    before, inputs = captured_model(name)
    text, sites = readable(before), find_sites(before)
    after = guard_sites(before, sites)
    exits = sum(len(r.exits) for r in sites)
    assert ops(after) - ops(before) == {"reuse_or_compute": len(sites), "getitem": exits}
    assert not ops(before) - ops(after)
    assert equal(after(*inputs), before(*inputs))
    assert readable(guard_sites(after, sites)) == readable(after)
    assert readable(before) == text
