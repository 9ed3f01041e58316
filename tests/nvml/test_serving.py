"""Whatever becomes of the GPU's meter, the proxy answers, and no answer says 0 J."""

from pathlib import Path

from tests.nvml.conftest import Lab
from tests.nvml.serving import through_faults, without_a_sensor

NOT_SUPPORTED, TIMEOUT, GPU_IS_LOST = 3, 10, 15
FAULTS = [("any", GPU_IS_LOST), ("fields", TIMEOUT), ("energy_field", NOT_SUPPORTED)]  # the others: test_readings.py


def test_the_proxy_serves_through_every_fault_and_no_answer_is_a_false_zero(lab: Lab, tmp_path: Path) -> None:
    lab.stub.busy(0.5)
    answers, log = lab.run(through_faults, lab.stub, str(tmp_path), FAULTS)
    assert len(answers) == len(FAULTS)
    for answer in answers:
        assert answer.status_code == 200
        assert answer.meter_up == 0
        assert answer.energy["energy_joules"] is None or answer.energy["energy_joules"] > 0
        assert answer.receipt["energy_joules"] > 0
        assert answer.receipt["low_joules"] <= answer.receipt["energy_joules"] <= answer.receipt["high_joules"]
        doubt = answer.receipt["high_joules"] - answer.receipt["low_joules"]
        assert doubt > 0.2 * answer.receipt["energy_joules"]  # nobody saw when in the outage it was used
        assert answer.receipt["meter"] == "nvml-counter"
    assert log.count("cure:") >= len(FAULTS)


def test_a_gpu_that_cannot_be_metered_gives_answers_without_figures(lab: Lab, tmp_path: Path) -> None:
    for fault in ("energy_field", "energy_call", "instant_gpu", "instant_module", "average_gpu", "average_module"):
        lab.stub.fault(fault, NOT_SUPPORTED)
    lab.stub.fault("power_usage", NOT_SUPPORTED)
    answer = lab.run(without_a_sensor, str(tmp_path))
    assert answer.status_code == 200
    assert answer.energy["energy_joules"] is None
    assert answer.headers["x-energy-status"] == "unavailable"
    assert "x-energy-joules" not in answer.headers
    assert answer.meter_up is None
