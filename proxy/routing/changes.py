"""What must happen so that the models that are served become those that are wanted.

Pure: two states in, changes out; `proxy.fleet` acts on them. A backend that is there stays if its settings are wanted,
whatever its place in the list. Of the others, each gives its place to one that is wanted and not there (a swap), as far
as there are both; what is left over joins, or leaves.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count

from backends.spec import BackendSpec
from proxy.routing.registry import ModelPlan


@dataclass(frozen=True, slots=True)
class Swap:
    """`new` is to take over from `old` once it is ready."""

    old: BackendSpec
    new: BackendSpec


@dataclass(slots=True)
class Changes:
    """`plans` can be served at once: all as wanted, but for the old backend of each swap in the new one's place."""

    plans: list[ModelPlan] = field(default_factory=list)
    joining: list[BackendSpec] = field(default_factory=list)
    leaving: list[BackendSpec] = field(default_factory=list)
    swaps: list[Swap] = field(default_factory=list)

    @property
    def starting(self) -> list[BackendSpec]:
        """All that are to be started."""
        return [*self.joining, *(swap.new for swap in self.swaps)]


def changes(present: Iterable[ModelPlan], wanted: Iterable[ModelPlan], used: Collection[str] = ()) -> Changes:
    """From `present` to `wanted`. What is started gets no id in `used`: an id means one backend for good."""
    here = {plan.name: plan.replicas for plan in present}
    ids = {*used, *(spec.id for replicas in here.values() for spec in replicas)}
    found = Changes()
    for plan in wanted:
        _change(plan, here.pop(plan.name, ()), ids, found)
    found.leaving += [spec for replicas in here.values() for spec in replicas]
    return found


def swapped(plans: Iterable[ModelPlan], swap: Swap) -> list[ModelPlan]:
    """The plans after a swap."""
    return [
        replace(plan, replicas=tuple(swap.new if spec.id == swap.old.id else spec for spec in plan.replicas))
        for plan in plans
    ]


def _change(plan: ModelPlan, here: Sequence[BackendSpec], ids: set[str], found: Changes) -> None:
    """One model's changes, added to `found`."""
    rest, numbers = [*here], {spec.replica for spec in here}
    kept = [_take(rest, wanted) for wanted in plan.replicas]
    replicas = []
    for wanted, same in zip(plan.replicas, kept, strict=True):
        if same is not None:
            replicas.append(same)
        elif rest:
            old = rest.pop(0)
            found.swaps.append(Swap(old, _named(wanted, old.replica, ids)))
            replicas.append(old)
        else:
            number = next(number for number in count(1) if number not in numbers)
            numbers.add(number)
            replicas.append(_named(wanted, number, ids))
            found.joining.append(replicas[-1])
    found.leaving += rest
    found.plans.append(replace(plan, replicas=tuple(replicas)))


def _take(rest: list[BackendSpec], wanted: BackendSpec) -> BackendSpec | None:
    """One that is set like this, taken out of `rest`."""
    at = next((at for at, spec in enumerate(rest) if spec.is_set_like(wanted)), None)
    return None if at is None else rest.pop(at)


def _named(wanted: BackendSpec, number: int, ids: set[str]) -> BackendSpec:
    """As this replica, of the first generation that has not been there yet; its id is then one of `ids`."""
    generations = (replace(wanted, replica=number, generation=generation) for generation in count(1))
    spec = next(spec for spec in generations if spec.id not in ids)
    ids.add(spec.id)
    return spec
