"""llama.cpp's own server in this process: `python -m backends.llamacpp.server --model FILE --port N ...`."""

import argparse
import signal
import sys
from typing import Any

import xllamacpp

from backends.llamacpp.options import OPTIONS

# Each open stream holds one of the server's threads, and so does a health check.
_HTTP_THREADS = 256


def parameters(options: argparse.Namespace) -> Any:
    """llama.cpp's parameters for these options; only what serves inference listens, and only on this machine."""
    params = xllamacpp.CommonParams()
    params.model.path = options.model
    params.model_alias = {options.alias}
    params.hostnames = ["127.0.0.1"]
    params.port = options.port
    params.n_threads_http = _HTTP_THREADS
    params.cors_origins = ""
    params.ui = params.endpoint_slots = params.endpoint_props = params.endpoint_metrics = False
    params.use_jinja = True
    params.verbosity = 2  # warnings and errors; every request would be several lines otherwise
    params.cache_ram_mib = 0  # prompts are not kept beyond the slots; unbounded, they took gigabytes
    _compute(params, options)
    return params


def _compute(params: Any, options: argparse.Namespace) -> None:
    params.n_parallel = options.parallel
    params.n_ctx = options.ctx_size * options.parallel  # the slots divide it
    params.n_batch, params.n_ubatch = options.batch_size, min(options.ubatch_size, options.batch_size)
    params.cpuparams.n_threads = options.threads
    params.flash_attn_type = {
        "on": xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED,
        "off": xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED,
        "auto": xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_AUTO,
    }[options.flash_attn]
    params.cache_type_k = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{options.cache_type_k.upper()}")
    params.cache_type_v = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{options.cache_type_v.upper()}")
    params.embedding = options.embeddings == "on"
    params.chat_template = options.chat_template
    params.mmproj.path = options.mmproj
    if options.gpu_layers is not None:
        params.n_gpu_layers = options.gpu_layers


def main() -> None:
    parser = argparse.ArgumentParser(prog="backends.llamacpp.server", allow_abbrev=False)
    parser.add_argument("--model", required=True, help="the path of a GGUF file")
    parser.add_argument("--alias", required=True, help="the name it is served under")
    parser.add_argument("--port", type=int, required=True)
    for option in OPTIONS.values():
        parser.add_argument(f"--{option.name}", type=option.parse, default=option.default, help=option.meaning)
    options = parser.parse_args()
    # Not Python's handlers: they would wait until the engine comes back to Python, while it loads or for ever.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        server = xllamacpp.Server(parameters(options))
    except Exception as error:
        sys.exit(f"ERROR cannot load {options.model}: {error}")
    while server:
        signal.pause()


if __name__ == "__main__":
    main()
