"""What a model must cost, from its own config and its device's data sheet: where the cost model begins."""

#: What kernels reach of a data sheet's peaks: matrix products, attention, memory.
_PRODUCTS, _ATTENTION, _MEMORY = 0.6, 0.4, 0.8
#: Of the range between idle and highest power: what a busy device draws in any case, and its busy units in addition.
_STATIC, _COMPUTE, _TRAFFIC = 0.1, 0.6, 0.45
_LAUNCH_SECONDS, _LAUNCH_SEQUENCE_SECONDS = 1e-3, 1e-5


def prior_from_model(
    *,
    parameters: float,
    peak_flops: float,
    bandwidth: float,
    idle_watts: float,
    max_watts: float,
    layers: int = 0,
    kv_width: int = 0,
    attention_width: int | None = None,
    parameter_bytes: float = 2.0,
    kv_bytes: float = 2.0,
    active_parameters: float | None = None,
    devices: int = 1,
) -> dict[str, float]:
    """Coefficients for a `Model` event: seconds, joules and watts (`docs/cost-model.md`), per device.

    `peak_flops` (FLOP/s, dense, at the weights' precision) and `bandwidth` (bytes/s) are one device's, of `devices`
    that share the model evenly. `kv_width` is key/value heads × head size. `attention_width`, query heads × head size,
    is derived where left out. `active_parameters` are those a token passes (mixture of experts).
    Raises ValueError for figures that cannot be.
    """
    if min(parameters, peak_flops, bandwidth, idle_watts, max_watts - idle_watts, devices) <= 0:
        raise ValueError("parameters, peak_flops, bandwidth, idle_watts and devices must be positive, max_watts > idle")
    width = attention_width or ((parameters / (12 * layers)) ** 0.5 if layers else 0.0)
    share = 1 / devices
    duration = {
        "launch": _LAUNCH_SECONDS,
        "launch_sequence": _LAUNCH_SEQUENCE_SECONDS,
        "compute_token": share * 2 * (active_parameters or parameters) / (_PRODUCTS * peak_flops),
        "compute_attention": share * 4 * layers * width / (_ATTENTION * peak_flops),
        "memory_step": share * parameter_bytes * parameters / (_MEMORY * bandwidth),
        "memory_context": share * 2 * layers * kv_width * kv_bytes / (_MEMORY * bandwidth),
    }
    return duration | _energies(duration, idle_watts, max_watts - idle_watts) | {"idle_watts": idle_watts}


def _energies(duration: dict[str, float], idle_watts: float, dynamic_watts: float) -> dict[str, float]:
    """Joules: the time each unit is busy, times what it draws when it is."""
    compute, traffic = _COMPUTE * dynamic_watts, _TRAFFIC * dynamic_watts
    static = idle_watts + _STATIC * dynamic_watts
    return {
        "step": traffic * duration["memory_step"],
        "sequence": static * duration["launch_sequence"],
        "token": compute * duration["compute_token"],
        "attention": compute * duration["compute_attention"],
        "context": traffic * duration["memory_context"],
        "static_watts": static,
    }
