"""`joulegate doctor`: which meters and backends this machine has, and why not the others."""

import importlib.util
from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from proxy.config import Config
from proxy.meter.discover import Discovery, discover
from proxy.settings import meter_settings

#: The modules an engine needs, by kind of backend, and how to get them.
_ENGINES = {
    "llamacpp": (("xllamacpp",), "pip install 'joulegate[llamacpp]'"),
    "transformers": (("torch", "transformers"), "pip install 'joulegate[transformers]'"),
    "diffusers": (("torch", "diffusers", "transformers"), "pip install 'joulegate[diffusers]'"),
    "vllm": (("vllm",), "pip install 'joulegate[vllm]', or give the backend a `python:` of its own that has vllm"),
}


def examine(config: Config) -> None:
    """Print the report."""
    console = Console(highlight=False, soft_wrap=True)
    discovery = discover(meter_settings(config.energy.meters))
    try:
        console.print(_meters(discovery))
        console.print(_backends())
        console.print(_models(config))
    finally:
        for meter in discovery.meters:
            meter.close()


def _meters(discovery: Discovery) -> Table:
    table = Table("device", "meter", "what it is", title="Meters", title_justify="left")
    for meter in discovery.meters:
        kind = f"[yellow]{meter.kind} (an estimate)[/]" if meter.estimated else f"[green]{meter.kind}[/]"
        error = "" if meter.accuracy_ratio is None else f", ±{meter.accuracy_ratio:.0%}"
        table.add_row(meter.device, kind, meter.name + error)
    for problem in discovery.problems:
        table.add_row("-", f"[red]no {problem.meter}[/]", escape(f"{problem.why}; cure: {problem.cure}"))
    return table


def _backends() -> Table:
    table = Table("backend", "usable", "how to get it", title="Backends", title_justify="left")
    for kind, missing, cure in _engines():
        usable = f"[red]no: {', '.join(missing)} not installed[/]" if missing else "[green]yes[/]"
        table.add_row(kind, usable, escape(cure) if missing else "")
    table.add_row("remote", "[green]yes[/]", "")
    return table


def _engines() -> Iterator[tuple[str, list[str], str]]:
    for kind, (modules, cure) in _ENGINES.items():
        yield kind, [name for name in modules if importlib.util.find_spec(name) is None], cure


def _models(config: Config) -> Table:
    table = Table("model", "backend", "devices", title="Configured models", title_justify="left")
    for model in config.models:
        for spec in model.specs():
            table.add_row(spec.id, f"{spec.kind}: {spec.model or spec.url}", ", ".join(spec.device_names))
    return table
