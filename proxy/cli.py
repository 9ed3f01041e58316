"""The command line. Exit codes: 0 done, 1 it failed, 2 bad input or usage; errors are one line on standard error."""

import logging
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from proxy.errors import ConfigError, JoulegateError
from proxy.trace import TraceError

if TYPE_CHECKING:
    from proxy.config import Config

app = typer.Typer(
    name="joulegate",
    help="An OpenAI-compatible inference proxy that tells every request its joules.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="YAML file; without one, the starter models.")
]


def main() -> None:
    """Run the command line; ends the process with its exit code."""
    command = typer.main.get_command(app)
    try:
        sys.exit(command.main(prog_name="joulegate", standalone_mode=False) or 0)
    except typer.TyperException as error:
        _stop(error.format_message(), 2)
    except TraceError as error:
        typer.echo(str(error), err=True)  # TRACE:LINE: reason, to the letter
        sys.exit(2)
    except ConfigError as error:
        _stop(str(error), 2)
    except (JoulegateError, OSError) as error:
        _stop(str(error), 1)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)


def _stop(message: str, code: int) -> NoReturn:
    if message:
        typer.echo("joulegate: " + " ".join(message.split()), err=True)
    sys.exit(code)


@app.command()
def serve(
    config: ConfigOption = None,
    host: Annotated[str | None, typer.Option(help="Where to listen; the configuration's, or 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="The configuration's, or 8000.")] = None,
    record: Annotated[Path | None, typer.Option(help="Write a trace of all samples and steps to this file.")] = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Start the backends and the proxy. SIGHUP has the configuration file read again."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])  # until there is something that can heed it
    from proxy.serve import run  # noqa: PLC0415 - the other commands need no server
    from proxy.settings import check  # noqa: PLC0415

    if host == "":
        raise typer.BadParameter("should name an address; an empty one would be every address", param_hint="--host")
    changes = {name: value for name, value in (("host", host), ("port", port)) if value is not None}

    def settings() -> "Config":
        read = _configuration(config)
        return read.model_copy(update={"server": read.server.model_copy(update=changes)})

    def read_again() -> "Config":
        read = settings()
        check(read)
        return read

    first = settings()
    _set_up_logging(log_level)
    run(first, record, read_again if config is not None else None)


@app.command("check-config")
def check_config(file: Path) -> None:
    """Say whether a configuration can be used."""
    from proxy.config import load  # noqa: PLC0415
    from proxy.settings import check  # noqa: PLC0415

    loaded = load(file)
    check(loaded)
    typer.echo(f"{file}: ok, {len(loaded.models)} models")


@app.command()
def doctor(config: ConfigOption = None) -> None:
    """Say which meters and backends this machine has, and why not the others."""
    from proxy.doctor import examine  # noqa: PLC0415

    examine(_configuration(config))


@app.command()
def replay(trace: Path) -> None:
    """Attribute a recorded run with the code that serves live traffic."""
    from proxy.replay import replay as run_replay  # noqa: PLC0415

    run_replay(trace, sys.stdout)


@app.command()
def receipts(
    config: ConfigOption = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many, the newest first.")] = 20,
    after: Annotated[str | None, typer.Option(help="The id of the last receipt of the page before.")] = None,
    model: Annotated[str | None, typer.Option(help="Only this model's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, as GET /v1/energy/receipts.")] = False,
) -> None:
    """List the receipts in the configured store."""
    from proxy.receipts import show  # noqa: PLC0415

    show(_configuration(config), limit=limit, after=after, model=model, as_json=as_json)


def _configuration(path: Path | None) -> "Config":
    from proxy.config import Config, load  # noqa: PLC0415

    return load(path) if path is not None else Config()


def _set_up_logging(level: str) -> None:
    names = {"debug", "info", "warning", "error"}
    if level.lower() not in names:
        raise typer.BadParameter(f"should be one of {', '.join(sorted(names))}", param_hint="--log-level")
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S")
    for noisy in ("aiohttp", "asyncio", "httpx", "uvicorn.error"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
