"""Prometheus metrics of one node: its own registry, no globals, and labels that no client can multiply.

The data path and the settling of receipts count here; all that has a state of its own is read off a snapshot when
Prometheus asks (`operations.py`). Label children are looked up once and kept, because finding them is most of the cost.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import generate_latest

from proxy.energy.quantities import Microjoules, joules
from proxy.energy.receipt import Figures, Receipt, Tokens
from proxy.export.operations import OperationsCollector
from proxy.export.snapshot import OperationsSnapshot
from proxy.export.tallies import Distribution, Distributions, Sum, Sums, TalliesCollector

#: The label of a model that is not configured, such as one a client made up.
UNKNOWN = "unknown"
#: So many keys get a label of their own; the others share one.
KEY_LABELS = 1000
OTHER_KEYS = "other"

REQUEST_JOULES = (1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1e3, 3e3, 1e4, 3e4, 1e5)
TOKEN_JOULES = (1e-3, 3e-3, 0.01, 0.03, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
REQUEST_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
FIRST_TOKEN_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
RATIOS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)

_TOKENS = ("prompt", "completion", "cached")


@dataclass(frozen=True, slots=True)
class _Energy:
    """The children that one settled receipt of a model and task moves."""

    gpu: Sum
    host: Sum
    overhead: Sum
    wasted: Sum
    operational: Sum
    request: Distribution
    output_token: Distribution
    interval: Distribution
    provisional_error: Distribution


class Metrics:
    """Cheap methods for the data path; `render` for Prometheus. `models` are the configured ones."""

    def __init__(self, models: Iterable[str]) -> None:
        self._registry = CollectorRegistry()
        self._models = {UNKNOWN: UNKNOWN}
        self._declare_requests()
        self._declare_energy()
        self.know(models)
        ProcessCollector(registry=self._registry)

    def know(self, models: Iterable[str]) -> None:
        """These models are configured now. Earlier ones stay known: their last receipts may be yet to settle."""
        for name in (*models, UNKNOWN):
            self._models[name] = name
            self._first_token[name] = self._all_first_tokens.labels(name)
            self._tokens[name] = tuple(self._all_tokens.labels(name, kind) for kind in _TOKENS)
            self._in_flight[name] = self._all_in_flight.labels(name)

    def watch(self, snapshot: Callable[[], OperationsSnapshot]) -> None:
        """Read the metrics of devices, meters, backends and the grid off this from now on."""
        self._registry.register(OperationsCollector(snapshot))

    def render(self) -> bytes:
        """The text format 0.0.4."""
        return generate_latest(self._registry)

    # the data path

    def request_finished(self, model: str, endpoint: str, code: int, seconds: float) -> None:
        """A request of a model ended with a status code (499: the client went away). `endpoint` is one of our paths."""
        name = self._model(model)
        counted = self._finished.get((name, endpoint, code))
        if counted is None:
            counted = self._requests.labels(name, endpoint, str(code)), self._duration.labels(name, endpoint)
            self._finished[name, endpoint, code] = counted
        requests, duration = counted
        requests.value += 1
        duration.observe(seconds)

    def first_token(self, model: str, seconds: float) -> None:
        self._first_token[self._model(model)].observe(seconds)

    def tokens(self, model: str, tokens: Tokens) -> None:
        """What a backend's usage said of one request."""
        prompt, completion, cached = self._tokens[self._model(model)]
        prompt.value += tokens.prompt or 0
        completion.value += tokens.completion or 0
        cached.value += tokens.cached or 0

    def in_flight(self, model: str, change: int) -> None:
        self._in_flight[self._model(model)].value += change

    def receipt_settled(self, receipt: Receipt, provisional_energy: Microjoules | None) -> None:
        """`provisional_energy` is what the client was told at the response's end, if it was told anything."""
        figures = receipt.figures
        if figures is None:
            return
        request = receipt.request
        children = self._energy_of(request.model, request.task)
        parts, energy = figures.parts, figures.energy
        children.gpu.add(joules(parts.gpu))
        children.host.add(joules(parts.host))
        children.overhead.add(joules(parts.overhead))
        children.wasted.add(joules(parts.wasted))
        children.operational.add(figures.operational)
        children.request.observe(energy)
        if receipt.tokens.completion:
            children.output_token.observe(energy / receipt.tokens.completion)
        if request.key is not None:
            self._key(request.key).add(energy)
        _observe_ratios(children, figures, provisional_energy)

    # within

    def _declare_requests(self) -> None:
        self._requests = Sums("joulegate_requests", "Requests that ended.", ("model", "endpoint", "code"))
        self._duration = Distributions(
            "joulegate_request_duration_seconds",
            "From the request's arrival to its response's end.",
            ("model", "endpoint"),
            REQUEST_SECONDS,
        )
        self._finished: dict[tuple[str, str, int], tuple[Sum, Distribution]] = {}
        self._all_first_tokens = Distributions(
            "joulegate_time_to_first_token_seconds",
            "From the request's arrival to its stream's first token.",
            ("model",),
            FIRST_TOKEN_SECONDS,
        )
        self._first_token: dict[str, Distribution] = {}
        self._all_tokens = Sums("joulegate_tokens", "Tokens as the backends' usage says.", ("model", "kind"))
        self._tokens: dict[str, tuple[Sum, ...]] = {}
        self._all_in_flight = Sums("joulegate_requests_in_flight", "Requests under way.", ("model",), gauge=True)
        self._in_flight: dict[str, Sum] = {}
        families: list[Sums | Distributions] = [
            self._requests,
            self._duration,
            self._all_first_tokens,
            self._all_tokens,
            self._all_in_flight,
        ]
        self._registry.register(TalliesCollector(families))

    def _declare_energy(self) -> None:
        self._parts = Sums(
            "joulegate_energy_joules",
            "Settled energy of requests within the boundary, by part.",
            ("model", "task", "part"),
        )
        self._emissions = Sums("joulegate_emissions_grams", "Grams of CO2e of requests.", ("model", "task", "kind"))
        self._request_energy = Distributions(
            "joulegate_request_energy_joules", "Energy of a request.", ("model", "task"), REQUEST_JOULES
        )
        self._token_energy = Distributions(
            "joulegate_output_token_energy_joules", "Energy of a request per output token.", ("model",), TOKEN_JOULES
        )
        self._interval = Distributions(
            "joulegate_interval_ratio", "Width of a settled receipt's interval over its energy.", ("model",), RATIOS
        )
        self._provisional_error = Distributions(
            "joulegate_provisional_error_ratio",
            "How far the provisional energy was from the settled one, over the settled one.",
            ("model",),
            RATIOS,
        )
        self._energies: dict[tuple[str, str], _Energy] = {}
        self._key_energy = Sums("joulegate_key_energy_joules", "Energy of requests by key.", ("key",))
        self._keys: dict[str, Sum] = {}
        families: list[Sums | Distributions] = [
            self._parts, self._emissions, self._request_energy, self._token_energy, self._interval,
            self._provisional_error, self._key_energy,
        ]  # fmt: skip
        self._registry.register(TalliesCollector(families))

    def _model(self, name: str) -> str:
        return self._models.get(name, UNKNOWN)

    def _energy_of(self, model: str, task: str) -> _Energy:
        name = self._model(model)
        known = self._energies.get((name, task))
        if known is None:
            gpu, host, overhead, wasted = (
                self._parts.labels(name, task, part) for part in ("gpu", "host", "overhead", "wasted")
            )
            known = self._energies[name, task] = _Energy(
                gpu,
                host,
                overhead,
                wasted,
                operational=self._emissions.labels(name, task, "operational"),
                request=self._request_energy.labels(name, task),
                output_token=self._token_energy.labels(name),
                interval=self._interval.labels(name),
                provisional_error=self._provisional_error.labels(name),
            )
        return known

    def _key(self, key: str) -> Sum:
        counter = self._keys.get(key)
        if counter is None:
            label = key if len(self._keys) < KEY_LABELS else OTHER_KEYS
            counter = self._key_energy.labels(label)
            if label == key:
                self._keys[key] = counter
        return counter


def _observe_ratios(children: _Energy, figures: Figures, provisional: Microjoules | None) -> None:
    """Ratios of nothing are nothing: a receipt of 0 J has none."""
    energy = figures.parts.total
    if energy <= 0:
        return
    children.interval.observe((figures.high - figures.low) / energy)
    if provisional is not None:
        children.provisional_error.observe(abs(provisional - energy) / energy)
