"""The configuration as the parts take it: plain values for what must not know the configuration's form."""

from pathlib import Path

from sqlalchemy import make_url

from proxy import grid
from proxy.api.receipts import encode_receipt
from proxy.config import Carbon, Config, Meters, Moderation, Store
from proxy.energy.carbon import Intensity
from proxy.errors import ConfigError
from proxy.meter.discover import MeterSettings
from proxy.relay.translations import Moderation as ModerationTranslation
from proxy.store.receipts import ReceiptStore


def meter_settings(meters: Meters) -> MeterSettings:
    return MeterSettings(
        nvml=meters.nvml,
        rapl=meters.rapl,
        rapl_root=meters.rapl_root,
        estimate=meters.estimate,
        replay=meters.replay,
    )


def moderation_terms(config: Config) -> ModerationTranslation:
    """How each configured classifier moderates."""
    configured = {model.name: model.moderation for model in config.models if isinstance(model.moderation, Moderation)}
    benign = {name: frozenset(map(str.lower, terms.benign)) for name, terms in configured.items() if terms.benign}
    return ModerationTranslation(benign, {name: terms.threshold for name, terms in configured.items()})


def receipt_store(store: Store) -> ReceiptStore:
    """The store of receipts, which opens its database when it is first needed; raises ConfigError for a bad URL."""
    try:
        return ReceiptStore(store.url, encode_receipt)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def learnt_path(store: Store) -> Path | None:
    """Where what is learnt of the backends' costs is kept: beside a SQLite file; nowhere for other stores."""
    url = make_url(store.url)
    beside = url.get_backend_name() == "sqlite" and url.database not in {None, "", ":memory:"}
    return Path(f"{url.database}.learnt.json") if beside else None


def check(config: Config) -> None:
    """What the form of a configuration does not tell; raises ConfigError."""
    carbon_intensity(config.energy.carbon)
    receipt_store(config.store).close()


def carbon_intensity(carbon: Carbon) -> Intensity:
    """The grid's intensity; raises ConfigError for a zone that the data does not have."""
    try:
        source = grid.intensity_source(
            carbon.source, country=carbon.country, region=carbon.region, grams_per_kwh=carbon.grams_per_kwh
        )
    except ValueError as error:
        raise ConfigError(f"energy.carbon: {error}") from error
    return source.current()
