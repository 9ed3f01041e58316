"""What must happen so that the models that are served become those that are wanted: told without any running."""

from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
from hypothesis import given

from backends.spec import BackendSpec
from proxy.routing.changes import Changes, Swap, changes, swapped
from proxy.routing.registry import ModelPlan


def plan(name: str, *args: dict[str, Any], **more: Any) -> ModelPlan:
    """A model as configured, a replica for each `args`."""
    specs = [BackendSpec(name, "vllm", model="m", args=each, replica=at) for at, each in enumerate(args, start=1)]
    return ModelPlan(tuple(specs), **more)


def ids(plans: list[ModelPlan]) -> list[list[str]]:
    return [[spec.id for spec in plan.replicas] for plan in plans]


def test_what_is_the_same_is_left_alone() -> None:
    here = [plan("chat", {"a": 1}, {"a": 2}), plan("other", {})]
    found = changes(here, [plan("other", {}), plan("chat", {"a": 1}, {"a": 2})])
    assert (found.starting, found.leaving) == ([], [])
    assert ids(found.plans) == [["other"], ["chat", "chat-2"]]


def test_models_come_and_go() -> None:
    found = changes([plan("old", {}, {})], [plan("new", {}, {})])
    assert [spec.id for spec in found.joining] == ["new", "new-2"]
    assert [spec.id for spec in found.leaving] == ["old", "old-2"]
    assert found.swaps == []


def test_other_settings_are_another_backend_and_the_old_one_serves_until_it_is_there() -> None:
    (here, wanted) = plan("chat", {"a": 1}), plan("chat", {"a": 2}, aliases=("gpt",), max_in_flight=3)
    found = changes([here], [wanted])
    (swap,) = found.swaps
    assert (swap.old.id, swap.new.id, swap.new.args) == ("chat", "chat@2", {"a": 2})
    assert found.plans == [replace(wanted, replicas=here.replicas)]
    assert swapped(found.plans, swap) == [replace(wanted, replicas=(swap.new,))]


def test_a_number_is_not_a_truth() -> None:
    assert len(changes([plan("chat", {"flag": 1})], [plan("chat", {"flag": True})]).swaps) == 1


def test_what_is_said_of_a_model_itself_starts_nothing() -> None:
    wanted = plan("chat", {}, aliases=("gpt",), affinity="session", max_in_flight=1, max_queue=2)
    found = changes([plan("chat", {})], [wanted])
    assert found == Changes(plans=[wanted])


def test_a_replica_that_stays_is_not_touched_whatever_its_place_becomes() -> None:
    found = changes([plan("chat", {"a": 1}, {"a": 2})], [plan("chat", {"a": 2})])
    assert [spec.id for spec in found.leaving] == ["chat"]
    assert ids(found.plans) == [["chat-2"]]
    again = changes(found.plans, [plan("chat", {"a": 2}, {"a": 3})], {"chat"})
    assert ids(again.plans) == [["chat-2", "chat@2"]]


def test_what_was_removed_and_comes_again_is_another_backend() -> None:
    found = changes([], [plan("chat", {})], {"chat", "chat@2"})
    assert [spec.id for spec in found.joining] == ["chat@3"]


def test_a_model_named_like_anothers_replica_has_an_id_of_its_own() -> None:
    here = changes([plan("chat", {"a": 1}, {"a": 2})], [plan("chat", {"a": 2})]).plans
    found = changes(here, [plan("chat", {"a": 2}), plan("chat-2", {})])
    assert [spec.id for spec in found.joining] == ["chat-2@2"]


CONFIGURATIONS = st.dictionaries(st.sampled_from("abc"), st.lists(st.integers(0, 3), min_size=1, max_size=4))


@given(st.lists(CONFIGURATIONS, min_size=1, max_size=5), st.randoms())
def test_what_is_wanted_comes_about_and_no_id_is_used_twice(wishes: list[dict[str, list[int]]], chance: Any) -> None:
    served: list[ModelPlan] = []
    used: set[str] = set()
    for wish in wishes:
        wanted = [plan(name, *({"a": a} for a in replicas)) for name, replicas in wish.items()]
        before = {spec.id: spec for each in served for spec in each.replicas}
        found = changes(served, wanted, used)
        started = [spec.id for spec in found.starting]
        assert used.isdisjoint(started)
        assert len({*started}) == len(started)
        used |= {*started}
        served = found.plans
        failed = [swap for swap in found.swaps if chance.random() < 0.3]
        for swap in found.swaps:
            served = served if swap in failed else swapped(served, swap)
        left = {spec.id for spec in found.leaving} | {swap.old.id for swap in found.swaps if swap not in failed}
        after = {spec.id for each in served for spec in each.replicas}
        assert after == (before.keys() | {*started}) - left - {swap.new.id for swap in failed}
        if not failed:
            told = {each.name: sorted(spec.args["a"] for spec in each.replicas) for each in served}
            assert told == {name: sorted(replicas) for name, replicas in wish.items()}


def test_a_swap_knows_nothing_of_other_models() -> None:
    plans = [plan("a", {}), plan("b", {})]
    swap = Swap(plans[0].replicas[0], replace(plans[0].replicas[0], generation=2))
    assert ids(swapped(plans, swap)) == [["a@2"], ["b"]]
