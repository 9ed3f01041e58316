"""Counters and histograms that cost the data path an addition: no lock, no look-up; a collector tells them Prometheus.

prometheus-client's own take a lock and, for a histogram, a walk over the buckets each time, some 20 µs for all that one
request moves. They are written on the event loop only; a scrape reads them as they are.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

Labels = tuple[str, ...]


class Sum:
    """One series of a counter or gauge."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0

    def add(self, amount: float) -> None:
        self.value += amount


class Distribution:
    """One series of a histogram over ascending bounds."""

    __slots__ = ("_bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self._bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative, as Prometheus has them."""
        seen, found = 0, []
        for bound, count in zip((*self._bounds, float("inf")), list(self.counts), strict=True):
            seen += count
            found.append(("+Inf" if bound == float("inf") else str(float(bound)), float(seen)))
        return found


class Sums:
    """A counter's or a gauge's series by their labels."""

    def __init__(self, name: str, text: str, labels: Labels, *, gauge: bool = False) -> None:
        self._described = name, text, labels
        self._family = GaugeMetricFamily if gauge else CounterMetricFamily
        self._series: dict[Labels, Sum] = {}

    def labels(self, *values: str) -> Sum:
        return self._series.setdefault(values, Sum())

    def metric(self) -> Metric:
        name, text, labels = self._described
        family = self._family(name, text, labels=labels)
        for values, series in list(self._series.items()):
            family.add_metric(values, series.value)
        return family


class Distributions:
    """A histogram's series by their labels."""

    def __init__(self, name: str, text: str, labels: Labels, bounds: Sequence[float]) -> None:
        self._described = name, text, labels
        self._bounds = bounds
        self._series: dict[Labels, Distribution] = {}

    def labels(self, *values: str) -> Distribution:
        found = self._series.get(values)
        if found is None:
            found = self._series[values] = Distribution(self._bounds)
        return found

    def metric(self) -> Metric:
        name, text, labels = self._described
        family = HistogramMetricFamily(name, text, labels=labels)
        for values, series in list(self._series.items()):
            family.add_metric(values, series.buckets(), series.sum)
        return family


class TalliesCollector(Collector):
    def __init__(self, families: Sequence[Sums | Distributions]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        for family in self._families:
            yield family.metric()
