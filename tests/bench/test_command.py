"""`python -m bench.attribution`: its table and its JSON."""

import json
from pathlib import Path

import pytest

from bench.attribution.__main__ import main
from bench.attribution.evaluate import PROVISIONAL, REFERENCE, SETTLED
from bench.attribution.peers import PEERS


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    path: Path = tmp_path_factory.mktemp("bench") / "accuracy.json"
    assert main(["--quick", "--only", "4 req/s", "--only", "foreign load", "--seed", "3", "--json", str(path)]) == 0
    loaded: dict[str, object] = json.loads(path.read_text())
    return loaded


def rows(document: dict[str, object]) -> list[dict[str, object]]:
    loads, hard = document["loads"], document["stresses"]
    assert isinstance(loads, list)
    assert isinstance(hard, list)
    return [*loads, *hard]


def test_the_json_says_that_it_is_simulated_and_how_to_repeat_it(document: dict[str, object]) -> None:
    assert document["simulated"] is True
    assert document["seed"] == 3
    assert isinstance(document["versions"], dict)
    assert {"python", "numpy", "joulegate"} <= set(document["versions"])
    assert document["failed"] == {}


def test_the_json_has_every_split_of_every_scenario(document: dict[str, object]) -> None:
    assert [row["scenario"] for row in rows(document)] == ["4 req/s", "foreign load"]
    for row in rows(document):
        assert isinstance(row["errors"], dict)
        assert set(row["errors"]) == {SETTLED, PROVISIONAL, REFERENCE, *PEERS}


def test_conservation_holds_and_nobody_is_missing(document: dict[str, object]) -> None:
    for row in rows(document):
        ledger = row["ledger"]
        assert isinstance(ledger, dict)
        assert ledger["largest_residual_microjoules"] == 0
        assert ledger["missing"] == 0


def test_joulegate_errs_less_than_every_peer(document: dict[str, object]) -> None:
    for row in rows(document):
        errors = row["errors"]
        assert isinstance(errors, dict)
        assert errors[REFERENCE]["mape"] < errors[SETTLED]["mape"] < min(errors[peer]["mape"] for peer in PEERS)


def test_an_unknown_scenario_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err


def test_tables_show_every_split_and_say_what_is_simulated(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "--only", "0.5 req/s"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Simulated")
    assert all(label in printed for label in (SETTLED, PROVISIONAL, REFERENCE, *PEERS))
