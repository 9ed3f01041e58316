"""`python -m backends.transformers.server`: serve one Transformers model on 127.0.0.1."""

import argparse
from typing import Any

from backends.launching import parser
from backends.serving import Engine, Host, JobQueue, app, main, serve
from backends.steps import StepReporter
from backends.transformers import OPTIONS
from backends.transformers.tasks import TASKS


def run(arguments: argparse.Namespace) -> int:
    task = TASKS[arguments.task]
    reporter = StepReporter.from_environment()
    host: Host[Engine[Any]] = Host(lambda: task.load(arguments, reporter), JobQueue(arguments.max_queue), reporter)
    application = app(arguments.name, host, task.posts(host, arguments))
    return serve(application, host, arguments.port, "transformers", arguments.model)


if __name__ == "__main__":
    main(run, parser("backends.transformers.server", OPTIONS).parse_args())
