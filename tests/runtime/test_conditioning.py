"""What a call is conditioned on tells one run from another."""

import pytest
import torch

from dqar_fx.runtime.conditioning import Conditioning, InputReader, Relation, SourceReader, is_conditioning

FIRST, LAST, EARLIER = Relation.FIRST, Relation.LAST, Relation.EARLIER
EQUAL, SHAPE, OTHER = Relation.EQUAL, Relation.SHAPE, Relation.OTHER
NAMES = ["hidden_states", "encoder_hidden_states", "timestep", "added_cond_kwargs", "block_controlnet_hidden_states"]
read = InputReader(NAMES, "timestep")


def relations(*calls: dict[str, object]) -> list[Relation]:
    """How each call relates to those before it, one call a step."""
    seen = Conditioning()
    found = []
    for call in calls:
        inputs = read((), call)
        found.append(seen.relation("", inputs))
        seen.note("", inputs, repeated=False)
    return found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("encoder_hidden_states", True),
        ("class_labels", True),
        ("prompt_embeds_mask", True),
        ("img_ids", True),
        ("y", True),
        ("audio_hidden_states", False),
        ("block_controlnet_hidden_states", False),
        ("timestep_cond", False),
        ("latents_history", False),
        ("image_rotary_emb", False),
    ],
)
def test_names_say_what_stays_the_same_during_a_run(name: str, expected: bool) -> None:
    assert is_conditioning(name) is expected


def test_the_latents_the_timestep_and_residuals_are_left_out() -> None:
    given = {name: torch.zeros(1) for name in NAMES}
    assert list(read((), given)) == ["encoder_hidden_states", "added_cond_kwargs"]
    assert list(read(tuple(given.values()), {})) == ["encoder_hidden_states", "added_cond_kwargs"]


def test_the_latents_may_come_after_the_timestep() -> None:
    assert list(InputReader(["t", "x", "y"], "t")((), {n: torch.zeros(1) for n in "txy"})) == ["y"]


def test_tensors_in_lists_and_dicts_count() -> None:
    inputs = read(
        (), {"added_cond_kwargs": {"resolution": torch.zeros(1), "ids": [torch.zeros(1)], "time": torch.zeros(1)}}
    )
    assert list(inputs) == ["added_cond_kwargs.resolution", "added_cond_kwargs.ids.0"]


def test_a_captured_graph_names_its_arguments() -> None:
    sources = ["L['self']._parameters['w']", "L['x']", "L['t']", "L['cond']['ids']", "L['control']"]
    values = [torch.zeros(1) for _ in sources]
    assert list(SourceReader(sources, 2)(values)) == ["L['cond']['ids']"]


def test_the_same_tensor_is_the_same_run() -> None:
    prompt = torch.randn(2, 3)
    views = [{"encoder_hidden_states": prompt[:, :2]} for _ in range(3)]  # another object each time, the same memory
    assert relations(*views) == [FIRST, LAST, LAST]


def test_another_tensor_is_another_run_and_another_shape_is_said() -> None:
    a, b, c = ({"encoder_hidden_states": torch.randn(n, 3)} for n in (2, 2, 1))
    assert relations(a, b, c, c) == [FIRST, OTHER, SHAPE, LAST]


def test_small_tensors_made_anew_at_every_call_are_compared_by_value() -> None:
    calls = [{"encoder_hidden_states": torch.ones(2, 3)} for _ in range(3)]
    assert relations(*calls, {"encoder_hidden_states": torch.zeros(2, 3)}) == [FIRST, LAST, LAST, OTHER]


def test_embeddings_in_other_memory_are_in_doubt_once() -> None:
    calls = [{"encoder_hidden_states": torch.ones(20, 30)} for _ in range(4)]
    assert relations(*calls) == [FIRST, EQUAL, LAST, LAST]


def test_embeddings_in_other_memory_beside_latents_one_step_further_are_of_the_same_run() -> None:
    noise, other = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    latents = {"one step further": 0.8 * noise + 0.1 * other, "other noise": other, "of another size": other[:1]}
    found = {}
    for name, after in latents.items():
        calls = [{"hidden_states": x, "encoder_hidden_states": torch.ones(20, 30)} for x in (noise, after)]
        found[name] = relations(*calls)[-1]
    assert found == {"one step further": LAST, "other noise": EQUAL, "of another size": EQUAL}


def test_calls_that_take_turns_are_told_apart_without_comparing_values(monkeypatch: pytest.MonkeyPatch) -> None:
    cond, uncond = ({"encoder_hidden_states": torch.full((20, 30), i)} for i in range(2))
    seen, found = Conditioning(), []
    for step in range(3):
        if step == 1:
            monkeypatch.setattr(torch, "equal", None)
        for repeated, call in enumerate((cond, uncond)):
            inputs = read((), call)
            found.append(seen.relation("", inputs))
            seen.note("", inputs, repeated=bool(repeated))
    assert found == [FIRST, OTHER, EARLIER, OTHER, EARLIER, OTHER]


def test_equal_values_elsewhere_are_another_run_once_the_memory_was_seen_to_stay() -> None:
    first, second = ({"encoder_hidden_states": torch.ones(2, 3)} for _ in range(2))
    assert relations(first, first, second) == [FIRST, LAST, OTHER]


def test_a_tensor_that_was_written_into_is_another() -> None:
    call = {"encoder_hidden_states": torch.ones(2, 3)}
    seen = Conditioning()
    seen.note("", read((), call), repeated=False)
    call["encoder_hidden_states"].add_(1)
    assert seen.relation("", read((), call)) is OTHER


def test_an_input_that_comes_or_goes_is_a_change() -> None:
    prompt = torch.ones(2, 3)
    assert relations({"encoder_hidden_states": prompt}, {"encoder_hidden_states": prompt, "y": prompt})[-1] is SHAPE


def test_calls_of_one_step_are_all_remembered_and_the_last_one_is_told_from_the_others() -> None:
    cond, uncond = (read((), {"y": torch.full((1,), i)}) for i in range(2))
    seen = Conditioning()
    seen.note("", cond, repeated=False)
    seen.note("", uncond, repeated=True)
    assert [seen.relation("", x) for x in (cond, uncond)] == [EARLIER, LAST]
    assert seen.relation("other branch", cond) is FIRST
