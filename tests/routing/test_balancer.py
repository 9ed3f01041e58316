"""Which replica takes a request, told synchronously: no time passes here but what the tests say."""

from collections import Counter

import hypothesis.strategies as st
from hypothesis import given

from proxy.routing.balancer import Balancer
from proxy.routing.breaker import Breaker, BreakerPolicy

POLICY = BreakerPolicy(failures=3, pause=1.0, pause_cap=4.0)
EVENTS = st.lists(st.tuples(st.sampled_from(["choose", "good", "bad", "left", "down", "up"]), st.integers(0, 3)))


def balancer(*names: str) -> Balancer:
    made = Balancer(names, POLICY)
    for name in names:
        made.set_live(name, True)
    return made


def broken(now: float = 0.0) -> Breaker:
    breaker = Breaker(POLICY)
    for _ in range(POLICY.failures):
        breaker.failed(now)
    return breaker


def test_the_least_busy_replica_is_chosen() -> None:
    pair = balancer("a", "b")
    assert pair.choose(0, work=5) == "a"
    assert [pair.choose(0) for _ in range(3)] == ["b", "b", "b"]
    pair.release("a", 5, judged=True)
    assert pair.choose(0) == "a"


def test_a_quiet_node_uses_all_replicas_in_turn() -> None:
    trio, chosen = balancer("a", "b", "c"), []
    for _ in range(6):
        name = trio.choose(0)
        assert name is not None
        trio.release(name, 1, judged=True)
        chosen.append(name)
    assert chosen == ["a", "b", "c"] * 2


def test_what_is_not_live_is_not_chosen_and_what_was_tried_only_for_want_of_another() -> None:
    pair = balancer("a", "b")
    assert pair.choose(0, avoid=["a"]) == "b"
    pair.set_live("b", False)
    assert pair.choose(0, avoid=["a"]) == "a"
    pair.set_live("a", False)
    assert pair.choose(0) is None
    assert pair.retry_in(0) is None


def test_a_breaker_opens_after_failures_in_a_row_only() -> None:
    breaker = Breaker(POLICY)
    for judge in (breaker.failed, breaker.failed, lambda _: breaker.succeeded(), breaker.failed, breaker.failed):
        judge(0.0)
    assert breaker.state(0) == "closed"
    breaker.failed(0.0)
    assert (breaker.state(0), breaker.allows(0), breaker.opens_in(0.25)) == ("open", False, 0.75)


def test_half_open_one_probe_at_a_time_decides() -> None:
    breaker = broken()
    assert breaker.state(1) == "half-open"
    breaker.begin(1)
    assert not breaker.allows(1)
    breaker.abandoned()
    assert breaker.allows(1)
    breaker.begin(1)
    breaker.succeeded()
    assert (breaker.state(1), breaker.allows(1)) == ("closed", True)


def test_each_failed_probe_doubles_the_pause_up_to_its_cap() -> None:
    breaker, now, pauses = broken(), 0.0, []
    for _ in range(4):
        pauses.append(breaker.opens_in(now))
        now += pauses[-1]
        breaker.begin(now)
        breaker.failed(now)
    assert pauses == [1, 2, 4, 4]


def test_a_late_failure_does_not_prolong_an_open_breakers_pause() -> None:
    breaker = broken()
    breaker.failed(0.5)
    assert breaker.state(1) == "half-open"


def test_a_replica_started_anew_has_no_past() -> None:
    pair = balancer("a")
    for _ in range(POLICY.failures):
        pair.failed("a", 0)
    assert pair.choose(0) is None
    assert pair.retry_in(0) == 1
    pair.set_live("a", False)
    pair.set_live("a", True)
    assert pair.choose(0) == "a"


def test_a_session_stays_with_its_replica_and_only_the_lost_ones_move() -> None:
    trio = balancer("a", "b", "c")
    sessions = [str(number).encode() for number in range(60)]

    def homes() -> dict[bytes, str | None]:
        found = {}
        for session in sessions:
            found[session] = name = trio.choose(0, affinity=session)
            trio.release(name or "", 1, judged=True)
        return found

    before = homes()
    assert homes() == before
    assert set(before.values()) == {"a", "b", "c"}
    trio.set_live("b", False)
    after = homes()
    assert {session for session in sessions if before[session] != after[session]} == {
        session for session in sessions if before[session] == "b"
    }


def test_one_session_does_not_flood_its_replica() -> None:
    quad = balancer("a", "b", "c", "d")
    assert max(Counter(quad.choose(0, affinity=b"one") for _ in range(40)).values()) <= 22


@given(EVENTS)
def test_outstanding_work_is_what_was_chosen_and_not_released(events: list[tuple[str, int]]) -> None:
    """And nobody is asked who is down or whose breaker is open."""
    names = ["a", "b", "c", "d"]
    all_four, held, live = balancer(*names), Counter[str](), dict.fromkeys(names, True)
    for now, (event, index) in enumerate(events):
        name = names[index]
        if event == "choose":
            chosen = all_four.choose(now)
            if chosen is not None:
                assert live[chosen]
                assert all_four.state(chosen, now) != "open"
                held[chosen] += 1
        elif event in {"up", "down"}:
            live[name] = event == "up"
            all_four.set_live(name, live[name])
        elif held[name]:
            if event == "good":
                all_four.succeeded(name)
            elif event == "bad":
                all_four.failed(name, now)
            all_four.release(name, 1.0, judged=event != "left")
            held[name] -= 1
        assert {n: all_four.outstanding(n) for n in names} == {n: held[n] for n in names}


def test_a_replica_that_leaves_gets_nothing_more_and_is_forgotten_when_it_is_done() -> None:
    pair = balancer("a", "b")
    assert pair.choose(0) == "a"
    pair.keep(["b"])
    assert [pair.choose(0) for _ in range(3)] == ["b"] * 3
    assert pair.outstanding("a") == 1
    pair.failed("a", 0)
    pair.release("a", 1, judged=True)
    assert pair.outstanding("a") == 0
    pair.set_live("a", True)
    assert pair.choose(0, avoid=["b"]) == "b"


def test_a_newcomer_shares_the_work_from_where_the_others_are() -> None:
    trio = balancer("a", "b")
    for _ in range(10):
        trio.release(str(trio.choose(0)), 1, judged=True)
    trio.keep(["a", "b", "c"])
    assert trio.choose(0) == "a"  # the newcomer is not up yet
    trio.release("a", 1, judged=True)
    trio.set_live("c", True)
    chosen = Counter[str]()
    for _ in range(9):
        name = str(trio.choose(0))
        trio.release(name, 1, judged=True)
        chosen[name] += 1
    assert max(chosen.values()) <= 4
