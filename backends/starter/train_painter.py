"""Train, or with `--evaluate` measure, the starter model `painter`: `python -m backends.starter.train_painter`.

Needs the Debian package `fonts-noto-color-emoji` and the PyPI package `emoji`, besides the extra `diffusers`.
"""

import argparse
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from PIL import Image
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch.nn.functional import mse_loss, pixel_unshuffle
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from backends.starter.painter_data import COLOURS, Thing, canonical_words, render, synonyms, vocabulary, words
from backends.starter.painter_pipeline import PainterPipeline, position_channels

FOLDER = Path(__file__).parent / "painter"
UNSHUFFLE = 4  # the UNet works on a grid of cells of 4 x 4 pixels
GRID = 8
SIZE = GRID * UNSHUFFLE
WIDTH = 128  # of the text states
MAX_TOKENS = 24
SPECIAL = PADDING, UNKNOWN, END = "[PAD]", "[UNK]", "[EOS]"
HELD_OUT = 10  # one in this many pairs of thing and colour is never trained, to measure combination


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word. Canonical words come first, so that training can ignore the synonyms after them."""
    vocab = {word: index for index, word in enumerate([*SPECIAL, *canonical_words(), *synonyms()])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\p{L}\p{N}]+"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PADDING, unk_token=UNKNOWN, eos_token=END, model_max_length=MAX_TOKENS
    )


def build_pipeline(seed: int) -> PainterPipeline:
    """The untrained pipeline; the same seed gives the same weights."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=MAX_TOKENS, pad_token_id=0, bos_token_id=2, eos_token_id=2,
    )  # fmt: skip
    channels = 3 * UNSHUFFLE**2
    unet = UNet2DConditionModel(
        sample_size=GRID, in_channels=channels + len(position_channels(GRID)), out_channels=channels,
        block_out_channels=(96, 192), layers_per_block=1, norm_num_groups=16, attention_head_dim=4,
        cross_attention_dim=WIDTH,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        resnet_time_scale_shift="scale_shift",
        class_embed_type="simple_projection", projection_class_embeddings_input_dim=WIDTH,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", rescale_betas_zero_snr=True,
        timestep_spacing="trailing", clip_sample=True,
    )  # fmt: skip
    return PainterPipeline(tokenizer, CLIPTextModel(text_config), unet, scheduler)


@dataclass(frozen=True)
class Gallery:
    """The training pictures, rendered: (things, colours + 1, 3, size, size) in [-1, 1]; colour 0 is the emoji's own."""

    things: list[Thing]
    pictures: torch.Tensor

    @classmethod
    def rendered(cls, size: int) -> "Gallery":
        things = vocabulary()
        pictures = np.stack([[render(thing, size, colour) for colour in (None, *COLOURS)] for thing in things])
        return cls(things, torch.from_numpy(pictures).permute(0, 1, 4, 2, 3).float() / 127.5 - 1)

    def pairs(self, *, held_out: bool) -> list[tuple[int, int]]:
        """Indices of (thing, colour ≥ 1) pairs: those that training never sees, or those that it does."""
        every = [(t, c) for t, thing in enumerate(self.things) if thing.colourable for c in range(1, len(COLOURS) + 1)]
        return [(t, c) for t, c in every if ((7 * t + 3 * c) % HELD_OUT == 0) == held_out]

    def prompts(self, pairs: list[tuple[int, int]]) -> list[str]:
        """What to ask for to get these (thing, colour): "cat", "blue cat"."""
        return [" ".join([*([*COLOURS][c - 1 : c] if c else []), self.things[t].name]) for t, c in pairs]

    def nearest(self, drawings: torch.Tensor, colours: int | None = None) -> list[tuple[int, int]]:
        """The (thing, colour) nearest in pixel space to each drawing (n, 3, size, size), among the first `colours`."""
        candidates = self.pictures[:, :colours]
        best = torch.cdist(drawings.flatten(1), candidates.flatten(0, 1).flatten(1)).argmin(dim=1)
        return [divmod(int(index), candidates.shape[1]) for index in best]

    def score(self, drawings: torch.Tensor, wanted: list[tuple[int, int]], colours: int | None = None) -> "Score":
        found = self.nearest(drawings, colours)
        things = sum(f[0] == w[0] for f, w in zip(found, wanted, strict=True))
        return Score(len(wanted), things, sum(f == w for f, w in zip(found, wanted, strict=True)))


class Captions:
    """Draws (caption, thing, colour) samples, plain and recoloured; one caption in ten is empty."""

    def __init__(self, gallery: Gallery, seed: int) -> None:
        self._random = random.Random(seed)
        self._names = [thing.name for thing in gallery.things]
        self._pairs = gallery.pairs(held_out=False)
        every = [word for name in self._names for word in words(name)]
        self._telling = {word for word in every if every.count(word) == 1} - set(COLOURS)

    def __iter__(self) -> Iterator[tuple[str, int, int]]:
        colours = [None, *COLOURS]
        while True:
            plain = self._random.random() < 0.6
            thing, colour = (self._random.randrange(len(self._names)), 0) if plain else self._random.choice(self._pairs)
            caption = [*([str(colours[colour])] if colour else []), *self._called(self._names[thing])]
            yield "" if self._random.random() < 0.1 else " ".join(caption), thing, colour

    def _called(self, name: str) -> list[str]:
        """The name's words, or the one that tells it from the others ("cake"); a tangerine is also an orange."""
        if name == "tangerine" and self._random.random() < 0.3:
            return ["orange"]
        telling = [word for word in words(name) if word in self._telling]
        return [self._random.choice(telling)] if telling and self._random.random() < 0.3 else words(name)


@dataclass(frozen=True)
class Phase:
    """A stretch of training with a learning rate, and a taste in noise, of its own."""

    steps: int
    peak: float  # learning rate
    horizon: int  # steps of the half cosine that the learning rate goes along
    decay: int  # steps at the end over which it goes to 0 besides
    bias: float  # timesteps are drawn as u ** bias: below 1 there is more of high noise
    ceiling: float  # loss weight min(SNR + 1, ceiling) on x0: how much details count against what the text tells

    def learning_rate(self, step: int) -> float:
        """Share of the peak at `step`, counted from 0."""
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(step / self.horizon, 1)))
        return min(1.0, (step + 1) / 100) * cosine * min(1.0, max(0, self.steps - step) / self.decay)


# First what a text looks like, which shows at high noise; then how to draw it without grain, which shows at low noise.
PHASES = (
    Phase(steps=4_800, peak=1e-3, horizon=8_000, decay=1_500, bias=0.5, ceiling=5),
    Phase(steps=1_600, peak=5e-4, horizon=1_600, decay=1_600, bias=1.0, ceiling=50),
)


def training_loss(
    pipeline: PainterPipeline, captions: list[str], pictures: torch.Tensor, generator: torch.Generator, phase: Phase
) -> torch.Tensor:
    """Weighted error of the v-prediction, mean over a batch of pictures (batch, 3, size, size)."""
    clean = pixel_unshuffle(pictures, UNSHUFFLE)
    noise = torch.randn(clean.shape, generator=generator)
    share = torch.rand(len(clean), generator=generator) ** phase.bias
    steps = (pipeline.scheduler.config.num_train_timesteps * share).long()
    signal = pipeline.scheduler.alphas_cumprod[steps]
    snr = signal / (1 - signal)
    weight = (phase.ceiling / (snr + 1)).clamp(max=1)
    target = pipeline.scheduler.get_velocity(clean, noise, steps)
    noisy = pipeline.scheduler.add_noise(clean, noise, steps)
    with torch.autocast("cpu", torch.bfloat16):  # a quarter faster than float32 on a core with AVX512-BF16
        states, mask = pipeline.encode_prompt(captions)
        velocity = pipeline.predict(noisy, steps, states, mask)
    loss = weight * mse_loss(velocity.float(), target, reduction="none").mean(dim=(1, 2, 3))
    return torch.mean(loss)


def train(folder: Path, batch: int, seed: int, save_every: int, first: int = 1) -> None:
    """Train from scratch, or from `folder` and phase `first` on; write `folder` now and then and after each phase."""
    torch.set_num_threads(1)
    gallery = Gallery.rendered(SIZE)
    for number, phase in enumerate(PHASES[first - 1 :], start=first):
        pipeline = build_pipeline(seed) if number == 1 else PainterPipeline.from_pretrained(folder, dtype=torch.float32)
        print(f"phase {number} of {len(PHASES)}: {phase}")
        train_phase(phase, pipeline.to(torch.float32), gallery, folder, batch, seed + number - 1, save_every)


def train_phase(
    phase: Phase, pipeline: PainterPipeline, gallery: Gallery, folder: Path, batch: int, seed: int, save_every: int
) -> None:
    """Train the pipeline's weights in place, and write the averaged ones to `folder`."""
    parts = torch.nn.ModuleList([pipeline.unet, pipeline.text_encoder]).train()
    average = AveragedModel(parts, multi_avg_fn=get_ema_multi_avg_fn(0.995))  # type: ignore[no-untyped-call]  # torch's gap
    optimizer = torch.optim.AdamW(parts.parameters(), lr=phase.peak, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, phase.learning_rate)
    generator, samples = torch.Generator().manual_seed(seed), iter(Captions(gallery, seed))
    began, running = time.monotonic(), 0.0
    for step in range(1, phase.steps + 1):
        captions, things, colours = zip(*(next(samples) for _ in range(batch)), strict=True)
        pictures = gallery.pictures[list(things), list(colours)]
        loss = training_loss(pipeline, list(captions), pictures, generator, phase)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's gap
        torch.nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(parts)
        running += (loss.item() - running) * max(0.01, 1 / step)
        if step % 100 == 0:
            print(f"step {step}/{phase.steps} loss {running:.4f} {time.monotonic() - began:.0f} s", flush=True)
        if step % save_every == 0 or step == phase.steps:
            save(pipeline, average.module, folder)


def save(pipeline: PainterPipeline, averaged: torch.nn.Module, folder: Path) -> None:
    """Write the averaged weights in fp16, with each synonym's embedding copied from its word's."""
    unet, text_encoder = averaged.children()
    finished = build_pipeline(seed=0)
    finished.unet.load_state_dict(unet.state_dict())
    finished.text_encoder.load_state_dict(text_encoder.state_dict())
    embedding = finished.text_encoder.get_input_embeddings().weight.data
    for word, target in synonyms().items():
        ids = pipeline.tokenizer.convert_tokens_to_ids([word, target])
        embedding[ids[0]] = embedding[ids[1]]
    finished.to(torch.float16).save_pretrained(folder)


def draw(pipeline: PainterPipeline, prompts: list[str], seed: int, batch: int = 16) -> torch.Tensor:
    """One picture a prompt, (prompts, 3, size, size) in [-1, 1]; the seeds count up from `seed`."""
    pictures = []
    for start in range(0, len(prompts), batch):
        texts = prompts[start : start + batch]
        generators = [torch.Generator().manual_seed(seed + start + index) for index in range(len(texts))]
        pictures.append(pipeline(texts, generator=generators, output_type="pt", return_dict=False)[0])
    return torch.cat(pictures) * 2 - 1


@dataclass(frozen=True)
class Score:
    """How many of `total` drawings had their own training picture as nearest neighbour."""

    total: int
    thing: int  # the right thing, whatever its colour
    exact: int  # the right thing in the right colour

    def __str__(self) -> str:
        return f"{self.thing}/{self.total} things ({self.thing / self.total:.1%}), {self.exact} in the right colour too"


def evaluate(folder: Path, seeds: list[int], sheet: Path | None) -> None:
    """Print the figures of the model card, and write a sheet of drawings if asked to."""
    torch.set_num_threads(1)
    pipeline, gallery = PainterPipeline.from_pretrained(folder, dtype=torch.float32), Gallery.rendered(SIZE)
    pipeline.set_progress_bar_config(disable=True)
    own = [(thing, 0) for thing in range(len(gallery.things))]
    drawings = torch.cat([draw(pipeline, gallery.prompts(own), seed) for seed in seeds])
    print("vocabulary, among the plain pictures:", gallery.score(drawings, own * len(seeds), colours=1))
    print("vocabulary, among all pictures:", gallery.score(drawings, own * len(seeds)))
    found = gallery.nearest(drawings, colours=1)
    missed = {gallery.things[w].name for (f, _), (w, _) in zip(found, own * len(seeds), strict=True) if f != w}
    print("missed at least once:", ", ".join(sorted(missed)) or "none")
    chatty = [f"Please draw me the loveliest {thing.name}, standing in Tasmania!" for thing in gallery.things]
    print("in a sentence of unknown words:", gallery.score(draw(pipeline, chatty, seeds[0]), own, colours=1))
    for label, held_out in (("trained", False), ("never trained", True)):
        pairs = random.Random(0).sample(gallery.pairs(held_out=held_out), 150)
        score = gallery.score(draw(pipeline, gallery.prompts(pairs), seeds[0]), pairs)
        print(f"colours and things, pairs {label}:", score)
    if sheet is not None:
        write_sheet(drawings[: len(own)], sheet)


def write_sheet(pictures: torch.Tensor, path: Path, columns: int = 20) -> None:
    """Tile (pictures, 3, size, size) in [-1, 1] into one PNG."""
    blank = torch.ones(-len(pictures) % columns, *pictures.shape[1:])
    rows = torch.cat([pictures, blank]).reshape(-1, columns, *pictures.shape[1:])
    tiled = rows.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    Image.fromarray(((tiled + 1) * 127.5).round().byte().numpy()).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--evaluate", action="store_true", help="measure the trained model instead of training one")
    parser.add_argument("--evaluation-seeds", type=int, nargs="+", default=[100_000, 200_000, 300_000])
    parser.add_argument("--sheet", type=Path, help="with --evaluate: write the drawings of the vocabulary to this PNG")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--first-phase", type=int, default=1, help="2 takes up where phase 1 has left --folder")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=400)
    arguments = parser.parse_args()
    if arguments.evaluate:
        evaluate(arguments.folder, arguments.evaluation_seeds, arguments.sheet)
        return
    train(arguments.folder, arguments.batch, arguments.seed, arguments.save_every, arguments.first_phase)


if __name__ == "__main__":
    main()
