"""A configuration that is read again while the proxy runs: what of it can be taken on, and when.

`compare` decides, purely; `Reloads` sees to it that one reload follows the other.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from pydantic import BaseModel

from proxy.config import Config
from proxy.errors import ConfigError

log = logging.getLogger("joulegate.reload")

#: What holds for as long as the process lives, by section.
_FOR_LIFE = {"server": ("host", "port"), "store": ("url",), "energy": ("sample_hz", "meters")}
_SECTIONS = ("server", "auth", "store", "energy")


@dataclass(frozen=True, slots=True)
class Comparison:
    """`config` is the wanted one as far as it can be had; `changed` and `restart` are paths of fields.

    Those in `changed` are other in `config`, those in `restart` would be after a restart. Backends are in neither:
    what is to happen to them depends on which of them are there.
    """

    config: Config
    changed: tuple[str, ...]
    restart: tuple[str, ...]


def compare(running: Config, wanted: Config) -> Comparison:
    """What becomes of a running node's configuration when it is to be another."""
    config = wanted.model_copy(update={section: _with_for_life(section, running, wanted) for section in _FOR_LIFE})
    changed = [path for section in _SECTIONS for path in _differing(section, running, config)]
    restart = [path for section in _SECTIONS for path in _differing(section, config, wanted)]
    return Comparison(config, (*changed, *_changed_models(running, config)), tuple(restart))


def _with_for_life(section: str, running: Config, wanted: Config) -> BaseModel:
    mine: BaseModel = getattr(running, section)
    theirs: BaseModel = getattr(wanted, section)
    return theirs.model_copy(update={field: getattr(mine, field) for field in _FOR_LIFE[section]})


def _differing(section: str, one: Config, other: Config) -> list[str]:
    return [f"{section}.{field}" for field in _fields(getattr(one, section), getattr(other, section))]


def _changed_models(running: Config, config: Config) -> list[str]:
    """What is said of a model besides what serves it."""
    before = {model.name: model for model in running.models}
    return [
        f"models[{at}].{field}"
        for at, model in enumerate(config.models)
        if model.name in before
        for field in _fields(before[model.name], model)
        if field not in {"backend", "replicas"}
    ]


def _fields(one: BaseModel, other: BaseModel) -> list[str]:
    return [name for name in type(one).model_fields if getattr(one, name) != getattr(other, name)]


class Reloads:
    """Reads the configuration again when asked to; asked during a reload, once more after it. The newest file wins.

    `read` raises ConfigError for a file that cannot be used, and is None where there is none; it may block.
    """

    def __init__(self, read: Callable[[], Config] | None, take_on: Callable[[Config], Awaitable[None]]) -> None:
        self._read = read
        self._take_on = take_on
        self._asked = asyncio.Event()

    def ask(self) -> None:
        """Have it read again, soon."""
        if self._read is None:
            log.warning("there is nothing to reload: the proxy was started without --config")
        else:
            self._asked.set()

    async def run(self) -> None:
        """For ever."""
        while True:
            await self._asked.wait()
            self._asked.clear()
            if self._read is not None:
                await self._reload(self._read)

    async def _reload(self, read: Callable[[], Config]) -> None:
        try:
            await self._take_on(await asyncio.to_thread(read))
        except ConfigError as error:
            log.error("the configuration is not taken on, all goes on as before: %s", error)
        except Exception:  # whatever it is, the node that runs is worth more
            log.exception("the reload failed midway")
