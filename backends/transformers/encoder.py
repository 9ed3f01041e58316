"""A loaded encoder with a head, a vector of scores per sequence: tokenizing, padding, forward pass and step report.

Imported on the engine's thread only, since it imports torch and transformers.
"""

import argparse
import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import transformers
from torch.nn.utils.rnn import pad_sequence

from backends.spec import BackendError
from backends.steps import StepReporter
from backends.transformers.batching import pick
from backends.transformers.sequences import SequenceJob, TokenSequence, Truncation

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    tokens: int
    sequences: int
    length: int | None


def load(model: str, head: Any, arguments: argparse.Namespace, reporter: StepReporter) -> "Encoder":
    """Load `model` with `head`, a transformers auto class. Raises BackendError or what transformers raises."""
    transformers.logging.set_verbosity_error()  # its warnings may quote inputs
    transformers.logging.disable_progress_bar()
    common = {"revision": arguments.revision or "main", "trust_remote_code": arguments.trust_remote_code}
    tokenizer = transformers.AutoTokenizer.from_pretrained(model, **common)
    network, report = head.from_pretrained(
        model, use_safetensors=True, dtype=_dtype(arguments), output_loading_info=True, **common
    )
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise BackendError(f"it has no weights for {missing}: name a model that was trained for this task")
    limits = Limits(arguments.max_batch_tokens, arguments.max_batch_sequences, arguments.max_model_len)
    return Encoder(network.to(arguments.device).eval(), tokenizer, limits, reporter)


def _dtype(arguments: argparse.Namespace) -> Any:
    if arguments.dtype != "auto":
        return getattr(torch, arguments.dtype)
    return torch.float32 if arguments.device == "cpu" else "auto"


class Encoder:
    """One sequence, one vector of scores. Runs on the engine's thread; tokenizes on a thread of its own."""

    def __init__(self, network: Any, tokenizer: Any, limits: Limits, reporter: StepReporter) -> None:
        self.config = network.config
        self._network = network
        self._tokenizer = tokenizer
        self._reporter = reporter
        self._limits = limits
        self._pad = _pad_token(network, tokenizer)
        self._activation = _activation(self.config)
        self.length = _longest_input(network, tokenizer, limits.length)
        # Tokenizers keep the way of truncation as state, so only one thread may use one.
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    async def tokenize(self, texts: list[str], truncation: Truncation | None, special: bool) -> list[list[int]]:
        """Token ids of each text."""
        call = partial(self._tokenize, texts, truncation, special)
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, call)

    def cut(self, ids: list[int], truncation: Truncation | None) -> list[int]:
        """Token ids that came as such, truncated. Raises ValueError for an id outside the vocabulary."""
        if ids and not 0 <= min(ids) <= max(ids) < self.config.vocab_size:
            raise ValueError(f"token ids must be from 0 to {self.config.vocab_size - 1}")
        if truncation is None or len(ids) <= truncation.length:
            return ids
        left = (truncation.side or self._tokenizer.truncation_side) == "left"
        return ids[-truncation.length :] if left else ids[: truncation.length]

    def warm_up(self) -> None:
        ids = self._tokenize(["warm up"], None, special=True)[0] or [0]
        self.run([SequenceJob("", TokenSequence(ids))])

    def pick(self, sizes: Sequence[int]) -> list[int]:
        return pick(sizes, self._limits.tokens, self._limits.sequences)

    def run(self, jobs: Sequence[SequenceJob]) -> None:
        """One forward pass, or several halves of it where the device's memory does not suffice."""
        try:
            scores = self._forward(jobs)
        except torch.OutOfMemoryError:
            if len(jobs) == 1:
                raise
            half = len(jobs) // 2
            logger.warning("out of memory at %d sequences: halving; lower max-batch-tokens", len(jobs))
            self.run(jobs[:half])
            self.run(jobs[half:])
            return
        for job, row in zip(jobs, scores, strict=True):
            job.future.set_result((self._activation(row) if job.work.activate else row).tolist())

    def _forward(self, jobs: Sequence[SequenceJob]) -> torch.Tensor:
        """Scores (sequences, labels) as float32 on the CPU. Reports the step even if it fails: it took its energy."""
        started = time.monotonic_ns()
        lengths = torch.tensor([len(job.work.ids) for job in jobs])
        longest = int(lengths.max())
        try:
            rows = [torch.tensor(job.work.ids) for job in jobs]
            ids = pad_sequence(rows, batch_first=True, padding_value=self._pad)
            mask = (torch.arange(longest) < lengths[:, None]).long()
            device = self._network.device
            with torch.inference_mode():
                logits = self._network(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
            return cast(
                torch.Tensor, logits.float().cpu()
            )  # which waits for the device, so that the step's end is true
        finally:
            count = len(jobs)
            requests = [job.request for job in jobs]
            self._reporter.report(started, time.monotonic_ns(), requests, [longest] * count, [0] * count)

    def _tokenize(self, texts: list[str], truncation: Truncation | None, special: bool) -> list[list[int]]:
        if truncation is None:
            encoded = self._tokenizer(texts, add_special_tokens=special, truncation=False)
        else:
            usual = self._tokenizer.truncation_side
            self._tokenizer.truncation_side = truncation.side or usual
            try:
                encoded = self._tokenizer(
                    texts, add_special_tokens=special, truncation=True, max_length=truncation.length
                )
            finally:
                self._tokenizer.truncation_side = usual
        return list(encoded["input_ids"])


def _pad_token(network: Any, tokenizer: Any) -> int:
    """Decoders with a head find a sequence's end by its padding; without a token for it, the end token serves."""
    candidates = (tokenizer.pad_token_id, network.config.pad_token_id, tokenizer.eos_token_id)
    pad = next((token for token in candidates if token is not None), 0)
    network.config.pad_token_id = pad
    return int(pad)


def _activation(config: Any) -> Any:
    """From scores to what vLLM answers as `probs`."""
    if config.problem_type == "regression":
        return torch.nn.Identity()
    if config.problem_type == "multi_label_classification" or (config.problem_type is None and config.num_labels == 1):
        return torch.sigmoid
    return partial(torch.softmax, dim=-1)


def _longest_input(network: Any, tokenizer: Any, asked: int | None) -> int:
    """Tokens the model can take: by its position embeddings, by its tokenizer, and by the operator."""
    positions = getattr(network.config, "max_position_embeddings", None)
    for name, module in network.named_modules():
        offset = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and positions and offset is not None:
            positions -= offset + 1  # RoBERTa counts positions from behind the padding's
    return min(length for length in (positions, tokenizer.model_max_length, asked) if length)
