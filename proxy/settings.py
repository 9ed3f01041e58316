"""The configuration as the parts take it: plain values for what must not know the configuration's form."""

from proxy import grid
from proxy.config import Carbon, Meters
from proxy.energy.carbon import Intensity
from proxy.errors import ConfigError
from proxy.meter.discover import MeterSettings


def meter_settings(meters: Meters) -> MeterSettings:
    return MeterSettings(
        nvml=meters.nvml,
        rapl=meters.rapl,
        rapl_root=meters.rapl_root,
        estimate=meters.estimate,
        replay=meters.replay,
    )


def carbon_intensity(carbon: Carbon) -> Intensity:
    """The grid's intensity; raises ConfigError for a zone that the data does not have."""
    try:
        source = grid.intensity_source(
            carbon.source, country=carbon.country, region=carbon.region, grams_per_kwh=carbon.grams_per_kwh
        )
    except ValueError as error:
        raise ConfigError(f"energy.carbon: {error}") from error
    return source.current()
