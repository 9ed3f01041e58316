"""The metrics that are read off a snapshot when Prometheus asks, rather than counted as requests go by."""

from collections.abc import Callable, Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from proxy.energy.attribution import DeviceBalance
from proxy.energy.quantities import joules
from proxy.export.snapshot import OperationsSnapshot

Labels = tuple[str, ...]
Samples = Iterable[tuple[Labels, float | None]]


class OperationsCollector(Collector):
    """`snapshot` is taken once per scrape, so that the figures of one scrape belong together."""

    def __init__(self, snapshot: Callable[[], OperationsSnapshot]) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        snapshot = self._snapshot()
        yield from _devices(snapshot.devices)
        yield from _accounts(snapshot.devices)
        yield from _meters(snapshot)
        yield from _backends(snapshot)
        yield from _grid(snapshot)
        yield from _store(snapshot)

    def describe(self) -> Iterator[Metric]:
        """Nothing: asked at registration, when there may be no snapshot yet."""
        return iter(())


def _devices(devices: Iterable[DeviceBalance]) -> Iterator[Metric]:
    of_device = ("device", "name", "meter")
    named = [((row.device, row.name, row.meter), row) for row in devices]
    yield _counter(
        "joulegate_device_energy_joules",
        "Energy by the device's own counter since the start.",
        of_device,
        [(labels, joules(row.counter)) for labels, row in named],
    )
    yield _gauge(
        "joulegate_device_power_watts",
        "Power as the device's meter says it.",
        of_device,
        [(labels, row.power) for labels, row in named],
    )
    yield _gauge(
        "joulegate_device_idle_power_watts",
        "Calibrated power of the idle device.",
        of_device,
        [(labels, row.idle_power) for labels, row in named],
    )


def _accounts(devices: Iterable[DeviceBalance]) -> Iterator[Metric]:
    rows = list(devices)
    yield _counter(
        "joulegate_account_energy_joules",
        "Settled energy of a device by account: requests, idle, foreign, unattributed.",
        ("device", "account"),
        [
            ((row.device, account), joules(energy))
            for row in rows
            for account, energy in (
                ("requests", row.requests),
                ("idle", row.idle),
                ("foreign", row.foreign),
                ("unattributed", row.unattributed),
            )
        ],
    )
    yield _gauge(
        "joulegate_pending_energy_joules",
        "Energy of windows that are not settled yet.",
        ("device",),
        [((row.device,), joules(row.pending)) for row in rows],
    )
    yield _gauge(
        "joulegate_conservation_residual_joules",
        "Counter minus accounts and pending: always 0.",
        ("device",),
        [((row.device,), joules(row.residual)) for row in rows],
    )
    yield _gauge(
        "joulegate_attribution_fit_error_ratio",
        "Relative error of the cost model on closed windows.",
        ("backend", "device"),
        [((backend, row.device), error) for row in rows for backend, error in row.fit_error_ratio.items()],
    )


def _meters(snapshot: OperationsSnapshot) -> Iterator[Metric]:
    yield _gauge(
        "joulegate_meter_up",
        "Whether the meter's last reading succeeded.",
        ("device", "meter"),
        [((meter.device, meter.kind), float(meter.up)) for meter in snapshot.meters],
    )
    yield _gauge(
        "joulegate_meter_disagreement_ratio",
        "How far a second source of the same device is from its meter.",
        ("device",),
        [((meter.device,), meter.disagreement) for meter in snapshot.meters],
    )


def _backends(snapshot: OperationsSnapshot) -> Iterator[Metric]:
    yield _gauge(
        "joulegate_backend_up",
        "Whether the model's backend can serve.",
        ("model", "backend"),
        [(names, float(up)) for names, up in snapshot.backends.items()],
    )
    yield _gauge(
        "joulegate_queue_length",
        "Requests that wait for their turn.",
        ("model",),
        [((model,), float(count)) for model, count in snapshot.queues.items()],
    )
    yield _counter(
        "joulegate_step_reports",
        "Step reports received from a backend.",
        ("backend",),
        [((backend,), count) for backend, count in snapshot.step_reports.items()],
    )
    lost = dict.fromkeys(snapshot.step_reports, 0) | dict(snapshot.step_reports_lost)
    yield _counter(
        "joulegate_step_reports_lost",
        "Step reports a backend sent that never arrived.",
        ("backend",),
        [((backend,), count) for backend, count in lost.items()],
    )


def _grid(snapshot: OperationsSnapshot) -> Iterator[Metric]:
    grid = snapshot.intensity
    labels = (grid.zone, grid.source)
    yield _gauge(
        "joulegate_grid_carbon_intensity_grams_per_kwh",
        "Carbon intensity that receipts are computed with.",
        ("zone", "source"),
        [(labels, grid.grams_per_kwh)],
    )
    yield _gauge(
        "joulegate_carbon_intensity_age_seconds",
        "Age of the carbon intensity, where its source is live.",
        ("zone", "source"),
        [(labels, grid.age_seconds)],
    )


def _store(snapshot: OperationsSnapshot) -> Iterator[Metric]:
    store = snapshot.store
    if store is None:
        return
    yield GaugeMetricFamily("joulegate_store_up", "Whether receipts could be written last time.", float(store.up))
    yield GaugeMetricFamily("joulegate_store_receipts_waiting", "Receipts that wait to be written.", store.waiting)
    yield CounterMetricFamily(
        "joulegate_store_receipts_dropped", "Receipts that were never written.", float(store.dropped)
    )


def _counter(name: str, text: str, labels: Labels, samples: Samples) -> Metric:
    return _filled(CounterMetricFamily(name, text, labels=labels), samples)


def _gauge(name: str, text: str, labels: Labels, samples: Samples) -> Metric:
    return _filled(GaugeMetricFamily(name, text, labels=labels), samples)


def _filled(family: CounterMetricFamily | GaugeMetricFamily, samples: Samples) -> Metric:
    """What nobody knows has no sample: it is not 0."""
    for labels, value in samples:
        if value is not None:
            family.add_metric(labels, value)
    return family
