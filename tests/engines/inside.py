"""What the tests put inside vLLM, as a plugin of it: a witness, and what its CPU build has switched off.

The witness writes down every batch that the model itself computes, independently of the scheduler that the step
reports are made from: when, how many tokens, and the sum of their positions. `ENGINE_WITNESS` names its folder. It
can draw a batch out by `ENGINE_PAUSE` seconds.

`ENGINE_ASYNC` lets vLLM schedule asynchronously, as it does by default on GPUs: its CPU platform says that this "is
not required on CPU" and switches it off. What is missing for it are CUDA's streams and events, of which code that runs
on the CPU needs none; scheduler, engine and workers are vLLM's own and keep two batches in flight.

`ENGINE_PIPELINE` lets it run a pipeline eagerly: its workers make the buffers between their stages while they warm up,
which the CPU's do not when nothing is compiled (vLLM 0.32 fails an assertion there, with or without joulegate).

`ENGINE_EYES` lets it see without torchvision, of which no build on PyPI fits the CPU's torch: what it asks it for, one
function that counts tokens, transformers has a second time for those who work with Pillow.
"""

import contextlib
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def plug_in() -> None:
    """Called by vLLM in each of its processes."""
    if os.environ.get("ENGINE_WITNESS"):
        _witness(Path(os.environ["ENGINE_WITNESS"]))
    if os.environ.get("ENGINE_ASYNC"):
        _schedule_asynchronously()
    if os.environ.get("ENGINE_PIPELINE"):
        _make_room_between_stages()
    if os.environ.get("ENGINE_EYES"):
        _see_by_pillow()


def _witness(folder: Path) -> None:
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    forward = CPUModelRunner._model_forward
    pause = float(os.environ.get("ENGINE_PAUSE", "0"))
    path = folder / f"{os.getpid()}.jsonl"

    def seen(
        runner: Any, input_ids: Any = None, positions: Any = None, *args: Any, **kwargs: Any
    ) -> Any:  # as vLLM's own
        began = time.monotonic_ns()
        time.sleep(pause)
        output = forward(runner, input_ids, positions, *args, **kwargs)
        entry = {
            "began": began,
            "ended": time.monotonic_ns(),
            "tokens": int(positions.shape[-1]),
            "positions": int(positions.sum()),
        }
        with path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        return output

    CPUModelRunner._model_forward = seen


def _schedule_asynchronously() -> None:
    import torch
    from vllm.platforms.cpu import CpuPlatform

    class Nothing:
        """A stream or an event where nothing runs beside the caller."""

        def __init__(self, *args: object, **kwargs: object) -> None: ...

        def record(self, *args: object) -> None: ...

        def synchronize(self) -> None: ...

        def wait_stream(self, *args: object) -> None: ...

        def wait_event(self, *args: object) -> None: ...

    check = CpuPlatform.check_and_update_config.__func__

    def keep(cls: type, vllm_config: Any) -> None:
        wanted = vllm_config.scheduler_config.async_scheduling
        check(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = wanted

    CpuPlatform.check_and_update_config = classmethod(keep)
    for module, name in ((torch, "Event"), (torch.cuda, "Event"), (torch.cuda, "Stream")):
        setattr(module, name, Nothing)
    stand_ins = {"current_stream": lambda *_: Nothing(), "stream": lambda *_: contextlib.nullcontext()}
    for name, stand_in in stand_ins.items():
        setattr(torch.cuda, name, stand_in)


def _make_room_between_stages() -> None:
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    gather = CPUModelRunner.sync_and_gather_intermediate_tensors

    def with_room(runner: Any, *args: Any, **kwargs: Any) -> Any:
        if runner.intermediate_tensors is None:
            runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
            )
        return gather(runner, *args, **kwargs)

    CPUModelRunner.sync_and_gather_intermediate_tensors = with_room


def _see_by_pillow() -> None:
    folder = "transformers.models.pixtral"
    sys.modules[f"{folder}.image_processing_pixtral"] = importlib.import_module(
        f"{folder}.image_processing_pil_pixtral"
    )
