"""What a model's attentions do from step to step when nothing is reused: how sharp they are, how fast they change."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from torch.overrides import TorchFunctionMode

    from dqar_fx.cli.evaluation_runs import Task
    from dqar_fx.cli.models import Painter

#: How old a value is in the comparison of what to store: the older of the two that ``interval(every=3)`` reads.
AGE = 2
#: Tokens of the attention map that is kept: more than that nobody can tell apart in a picture.
TOKENS = 64


def measure(task: Task, painter: Painter) -> dict[str, Any]:
    """Draw the first batch with the eager model, and look at every ``scaled_dot_product_attention``.

    Returns:
        ``entropy`` (nats, mean over heads and rows), ``change`` (relative L2 distance of an attention's result from
        that of the step before), ``stale_output`` and ``stale_keys`` (the same distance if the result, or the keys and
        values under fresh queries, are ``AGE`` steps old), each ``[step][site]`` with None where there is nothing to
        compare with; ``maps``: attention weights ``[query][key]`` of one head, with fresh and with old keys.
    """
    import torch

    found: dict[str, Any] = {name: [] for name in ("entropy", "change", "stale_output", "stale_keys")}
    history: list[deque[tuple[Tensor, ...]]] = []  # [site]: (key, value, result) of the last steps
    site = itertools.count()
    last: list[tuple[Tensor, Tensor, Tensor]] = []  # [site]: query, key and old key of the step that is kept

    def next_step() -> None:
        nonlocal site
        site = itertools.count()
        for rows in found.values():
            rows.append([])

    def look(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Tensor:
        from dqar_fx.metrics import attention_entropy

        result = attend(q, k, v, *rest, **options)
        if len(found["entropy"]) > task.steps:
            return result  # the decoder's
        number = next(site)
        if number == len(history):
            history.append(deque(maxlen=AGE))
        past = history[number]
        mask = options.get("attn_mask", rest[0] if rest else None)
        entropy = attention_entropy(q, k, scale=options.get("scale"), mask=mask)
        found["entropy"][-1].append(float(entropy.mean()))
        found["change"][-1].append(_distance(past[-1][2], result) if past else None)
        old = past[0] if len(past) == AGE else None
        found["stale_output"][-1].append(_distance(old[2], result) if old else None)
        stale = attend(q, old[0], old[1], *rest, **options) if old else None
        found["stale_keys"][-1].append(_distance(stale, result) if stale is not None else None)
        if old and len(found["entropy"]) == task.steps // 2 + 1:
            last.append((q[0, 0], k[0, 0], old[0][0, 0]))
        past.append((k, v, result))
        return result

    next_step()
    with torch.no_grad(), _watching(look):
        task.draw(painter, task.seeds[0], next_step)
    for rows in found.values():
        del rows[task.steps :]  # the last tick opened a step that never came
    maps: dict[str, Any] | None = None
    if last:
        q, k, old_k = last[len(last) // 2]
        maps = {"site": len(last) // 2, "step": task.steps // 2}
        for name, key in (("fresh", k), ("stale", old_k)):
            weights = torch.softmax((q @ key.T).float() * q.shape[-1] ** -0.5, dim=-1)
            maps[name] = [[round(float(w), 4) for w in row[:TOKENS]] for row in weights[:TOKENS]]
    return {**found, "age": AGE, "maps": maps}


def _distance(old: Tensor, new: Tensor) -> float:
    return float((old - new).float().norm() / new.float().norm())


def _watching(look: Callable[..., Tensor]) -> TorchFunctionMode:
    """Inside, every attention is given to ``look`` instead, with the operator itself before its arguments."""
    from torch.nn.functional import scaled_dot_product_attention
    from torch.overrides import TorchFunctionMode

    class Watching(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = kwargs or {}
            if func is not scaled_dot_product_attention:
                return func(*args, **given)
            named = [given.pop(name) for name in ("query", "key", "value")[len(args) :]] if len(args) < 3 else []
            return look(func, *args, *named, **given)

    return Watching()
