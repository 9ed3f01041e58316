"""A prior from a model's config."""

from functools import partial

import pytest

from proxy.energy.prior import prior_from_model
from proxy.energy.step_model import DURATION, ENERGY

H100 = partial(prior_from_model, peak_flops=989e12, bandwidth=3.35e12, idle_watts=70.0, max_watts=700.0)


def test_it_names_every_coefficient() -> None:
    prior = H100(parameters=8e9, layers=32, kv_width=1024)
    assert set(prior) == {*DURATION, *ENERGY, "idle_watts"}
    assert min(prior.values()) > 0


def test_reading_the_weights_and_a_tokens_arithmetic_are_of_the_right_size() -> None:
    prior = H100(parameters=8e9, layers=32, kv_width=1024)
    assert prior["memory_step"] == pytest.approx(0.006, rel=0.3)  # 16 GB at some 2.7 TB/s
    assert 100 < prior["memory_step"] / prior["compute_token"] < 400  # tokens at which a step turns compute-bound


def test_devices_share_a_model_evenly() -> None:
    one, two = (H100(parameters=8e9, layers=32, kv_width=1024, devices=n) for n in (1, 2))
    assert two["token"] == pytest.approx(one["token"] / 2)
    assert two["static_watts"] == one["static_watts"]


def test_a_mixture_of_experts_computes_with_some_parameters_and_reads_all() -> None:
    dense = H100(parameters=30e9, layers=48, kv_width=512)
    mixture = H100(parameters=30e9, active_parameters=3e9, layers=48, kv_width=512)
    assert mixture["compute_token"] == pytest.approx(dense["compute_token"] / 10)
    assert mixture["memory_step"] == dense["memory_step"]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="max_watts > idle"):
        prior_from_model(parameters=8e9, peak_flops=1e15, bandwidth=1e12, idle_watts=100, max_watts=50)
