"""What Prometheus reads: the metrics of the design, with bounded labels and counters that only rise."""

import dataclasses
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs
from prometheus_client.parser import text_string_to_metric_families

from proxy.energy.attribution import DeviceBalance
from proxy.energy.quantities import Microjoules
from proxy.energy.receipt import Tokens
from proxy.export.metrics import KEY_LABELS, Metrics
from tests.export.nodes import Meter, balance, snapshot
from tests.receipts import receipt, unavailable


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(["chat", "painter"])


def samples(metrics: Metrics) -> Iterator[tuple[str, dict[str, str], float]]:
    """Read as Prometheus reads: from the rendered text."""
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            yield sample.name, sample.labels, sample.value


def value(metrics: Metrics, metric: str, /, **labels: str) -> float | None:
    found = [number for seen, theirs, number in samples(metrics) if seen == metric and labels.items() <= theirs.items()]
    return sum(found) if found else None


def test_a_request_is_counted_and_timed(metrics: Metrics) -> None:
    endpoint = "/v1/chat/completions"
    metrics.request_finished("chat", endpoint, 200, 0.4)
    metrics.request_finished("chat", endpoint, 200, 0.6)
    metrics.request_finished("chat", endpoint, 503, 0.1)
    assert value(metrics, "joulegate_requests_total", model="chat", endpoint=endpoint, code="200") == 2
    assert value(metrics, "joulegate_requests_total", model="chat", endpoint=endpoint, code="503") == 1
    assert value(metrics, "joulegate_request_duration_seconds_count", model="chat", endpoint=endpoint) == 3
    assert value(metrics, "joulegate_request_duration_seconds_sum", model="chat") == pytest.approx(1.1)


def test_tokens_first_tokens_and_requests_in_flight(metrics: Metrics) -> None:
    metrics.tokens("chat", Tokens(prompt=12))
    metrics.tokens("chat", Tokens(completion=40))
    metrics.tokens("chat", Tokens(completion=2))
    metrics.first_token("chat", 0.05)
    metrics.in_flight("chat", 1)
    metrics.in_flight("chat", 1)
    metrics.in_flight("chat", -1)
    assert value(metrics, "joulegate_tokens_total", model="chat", kind="prompt") == 12
    assert value(metrics, "joulegate_tokens_total", model="chat", kind="completion") == 42
    assert value(metrics, "joulegate_time_to_first_token_seconds_count", model="chat") == 1
    assert value(metrics, "joulegate_requests_in_flight", model="chat") == 1
    assert value(metrics, "joulegate_requests_in_flight", model="painter") == 0


def test_a_settled_receipt_moves_every_energy_metric(metrics: Metrics) -> None:
    metrics.receipt_settled(receipt("a", key="ann"), Microjoules(11_106_000))
    labels = {"model": "chat", "task": "chat"}
    assert value(metrics, "joulegate_energy_joules_total", part="gpu", **labels) == pytest.approx(10.1)
    assert value(metrics, "joulegate_energy_joules_total", part="host", **labels) == pytest.approx(2.24)
    assert value(metrics, "joulegate_energy_joules_total", part="wasted", **labels) == 0
    assert value(metrics, "joulegate_emissions_grams_total", kind="operational", **labels) == pytest.approx(0.000192)
    assert value(metrics, "joulegate_request_energy_joules_sum", **labels) == pytest.approx(12.34)
    assert value(metrics, "joulegate_output_token_energy_joules_sum", model="chat") == pytest.approx(12.34 / 40)
    assert value(metrics, "joulegate_interval_ratio_sum", model="chat") == pytest.approx(0.9 / 12.34)
    assert value(metrics, "joulegate_provisional_error_ratio_sum", model="chat") == pytest.approx(0.1)
    assert value(metrics, "joulegate_key_energy_joules_total", key="ann") == pytest.approx(12.34)


def test_what_was_not_measured_moves_nothing(metrics: Metrics) -> None:
    metrics.receipt_settled(unavailable(), None)
    assert value(metrics, "joulegate_energy_joules_total") is None
    assert value(metrics, "joulegate_request_energy_joules_count") is None


def test_ratios_of_nothing_are_not_observed(metrics: Metrics) -> None:
    base = receipt("a")
    assert base.figures is not None
    nothing = structs.replace(base.figures.parts, gpu=Microjoules(0), host=Microjoules(0))
    empty = structs.replace(base, figures=structs.replace(base.figures, parts=nothing), tokens=Tokens(completion=0))
    metrics.receipt_settled(empty, Microjoules(5))
    assert value(metrics, "joulegate_request_energy_joules_count", model="chat") == 1
    for name in ("interval_ratio", "provisional_error_ratio", "output_token_energy_joules"):
        assert value(metrics, f"joulegate_{name}_count", model="chat") == 0


@given(st.lists(st.integers(0, 10**10), max_size=20))
def test_the_parts_counted_are_the_receipts_energy(energies: list[int]) -> None:
    metrics = Metrics(["chat"])
    for number, energy in enumerate(energies):
        metrics.receipt_settled(receipt(str(number), gpu=energy), None)
    counted = value(metrics, "joulegate_energy_joules_total") or 0.0
    assert counted == pytest.approx(sum(energies) / 1e6 + 2.24 * len(energies), abs=1e-5)


def test_clients_cannot_multiply_labels(metrics: Metrics) -> None:
    for number in range(50):
        made_up = f"model-{number}"
        metrics.request_finished(made_up, "/v1/chat/completions", 404, 0.1)
        metrics.tokens(made_up, Tokens(prompt=1))
        metrics.first_token(made_up, 0.1)
        metrics.in_flight(made_up, 1)
        metrics.receipt_settled(receipt(str(number), model=made_up), None)
    models = {labels["model"] for _, labels, _ in samples(metrics) if "model" in labels}
    assert models == {"chat", "painter", "unknown"}
    assert value(metrics, "joulegate_requests_total", model="unknown", code="404") == 50


def test_keys_beyond_the_limit_share_a_label(metrics: Metrics) -> None:
    for number in range(KEY_LABELS + 5):
        metrics.receipt_settled(receipt(str(number), key=f"key-{number}"), None)
    keys = {labels["key"] for _, labels, _ in samples(metrics) if "key" in labels}
    assert len(keys) == KEY_LABELS + 1
    assert value(metrics, "joulegate_key_energy_joules_total", key="other") == pytest.approx(5 * 12.34)


def test_the_snapshot_is_shown(metrics: Metrics) -> None:
    metrics.watch(lambda: snapshot(lost=3))
    device = {"device": "gpu:0", "name": "NVIDIA H100", "meter": "nvml-counter"}
    assert value(metrics, "joulegate_device_energy_joules_total", **device) == 4321.0
    assert value(metrics, "joulegate_device_power_watts", **device) == 410.2
    assert value(metrics, "joulegate_account_energy_joules_total", device="gpu:0", account="requests") == 4000.0
    assert value(metrics, "joulegate_account_energy_joules_total", device="gpu:0", account="foreign") == 20.0
    assert value(metrics, "joulegate_pending_energy_joules", device="gpu:0") == 1.000001
    assert value(metrics, "joulegate_conservation_residual_joules", device="gpu:0") == 0
    assert value(metrics, "joulegate_attribution_fit_error_ratio", backend="chat", device="gpu:0") == 0.02
    assert value(metrics, "joulegate_step_reports_total", backend="painter") == 7
    assert value(metrics, "joulegate_step_reports_lost_total", backend="chat") == 3
    assert value(metrics, "joulegate_step_reports_lost_total", backend="painter") == 0
    assert value(metrics, "joulegate_backend_up", model="chat", backend="chat") == 1
    assert value(metrics, "joulegate_meter_up", device="host", meter="rapl") == 1
    assert value(metrics, "joulegate_meter_disagreement_ratio", device="gpu:0") == 0.01
    grid = {"zone": "FRA", "source": "codecarbon"}
    assert value(metrics, "joulegate_grid_carbon_intensity_grams_per_kwh", **grid) == 56.0
    assert value(metrics, "joulegate_store_up") == 1


def test_what_nobody_knows_has_no_sample(metrics: Metrics) -> None:
    silent = dataclasses.replace(balance(), power=None, idle_power=None)
    metrics.watch(lambda: dataclasses.replace(snapshot(silent), meters=[Meter("gpu:0", "nvml-counter", up=False)]))
    assert value(metrics, "joulegate_device_power_watts") is None
    assert value(metrics, "joulegate_device_idle_power_watts") is None
    assert value(metrics, "joulegate_meter_disagreement_ratio") is None
    assert value(metrics, "joulegate_carbon_intensity_age_seconds") is None
    assert value(metrics, "joulegate_meter_up", device="gpu:0") == 0


def test_a_broken_balance_shows_as_residual(metrics: Metrics) -> None:
    broken: DeviceBalance = dataclasses.replace(balance(), idle=Microjoules(balance().idle - 5))
    metrics.watch(lambda: snapshot(broken))
    assert value(metrics, "joulegate_conservation_residual_joules", device="gpu:0") == pytest.approx(5e-6)


def test_two_nodes_in_one_process_do_not_share_counts() -> None:
    one, other = Metrics(["chat"]), Metrics(["chat"])
    one.tokens("chat", Tokens(prompt=1))
    assert value(other, "joulegate_tokens_total", kind="prompt", model="chat") == 0


def test_the_process_itself_is_watched(metrics: Metrics) -> None:
    assert (value(metrics, "process_resident_memory_bytes") or 0) > 0


def test_every_metric_has_help_and_no_creation_times(metrics: Metrics) -> None:
    metrics.watch(snapshot)
    metrics.receipt_settled(receipt("a"), None)
    families = list(text_string_to_metric_families(metrics.render().decode()))
    assert all(family.documentation for family in families)
    assert not [name for name, _, _ in samples(metrics) if name.endswith("_created")]
