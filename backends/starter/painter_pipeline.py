"""The Diffusers pipeline of the starter model `painter`: pixel-space text-to-image diffusion of small pictures.

Load it like any pipeline, but by its own class: `PainterPipeline.from_pretrained("backends/starter/painter")`.
Diffusers looks class names up in its own package only; on the class itself there is no lookup and no remote code.
"""

from collections.abc import Callable, Sequence
from math import isqrt
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, ImagePipelineOutput, UNet2DConditionModel
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch.nn.functional import pixel_shuffle
from transformers import CLIPTextModel, PreTrainedTokenizerFast

StepCallback = Callable[["PainterPipeline", int, torch.Tensor, dict[str, torch.Tensor]], dict[str, torch.Tensor] | None]

STEPS = 12  # more of them add grain


def position_channels(size: int) -> torch.Tensor:
    """Fixed channels that tell a convolution where it is, shape (10, size, size).

    Per axis: the position, and two octaves of its sine and cosine.
    """
    axis = torch.linspace(-1, 1, size)
    waves = torch.stack([axis, *(f(torch.pi * k * axis) for k in (1, 2) for f in (torch.sin, torch.cos))])
    return torch.cat([waves[:, None, :].expand(-1, size, -1), waves[:, :, None].expand(-1, -1, size)])


class PainterPipeline(DiffusionPipeline):  # type: ignore[misc]  # diffusers ships no types
    """Text to image by v-prediction on pixel-unshuffled pixels; there is no VAE.

    The latents are (batch, 3 f^2, size / f, size / f), with f the factor of the unshuffling.
    The text conditions the UNet twice: token states by cross-attention, and their sum as the class embedding.
    """

    model_cpu_offload_seq = "text_encoder->unet"
    _callback_tensor_inputs = ("latents", "prompt_embeds")

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        text_encoder: CLIPTextModel,
        unet: UNet2DConditionModel,
        scheduler: DDIMScheduler,
    ) -> None:
        super().__init__()
        self.register_modules(tokenizer=tokenizer, text_encoder=text_encoder, unet=unet, scheduler=scheduler)
        self._unshuffle = isqrt(unet.config.out_channels // 3)
        self._interrupt = False
        self._guidance_scale = 1.0
        self._num_timesteps = 0

    @property
    def native_size(self) -> int:
        """Pixels on each side of the picture that the model draws, before it is resized to the requested size."""
        return int(self.unet.config.sample_size * self._unshuffle)

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` from a step callback to skip the steps that are left."""
        return self._interrupt

    def encode_prompt(self, prompt: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token states (batch, tokens, width), zero where padded, and the mask (batch, tokens).

        Unknown words are left out: the known ones draw what they can; with none left it is as for an empty prompt.
        """
        device, longest = self.text_encoder.device, self.text_encoder.config.max_position_embeddings
        unknown, padding = self.tokenizer.unk_token_id, self.tokenizer.pad_token_id
        encoded = self.tokenizer(list(prompt)).input_ids
        rows = [[token for token in row if token != unknown][:longest] for row in encoded]
        width = max(1, *map(len, rows))
        ids = torch.tensor([row + [padding] * (width - len(row)) for row in rows], device=device)
        mask = (ids != padding).long()
        states = self.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return states.to(self.unet.dtype) * mask[..., None], mask

    def predict(
        self, latents: torch.Tensor, timestep: torch.Tensor, prompt_embeds: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """The velocity v at `timestep`, of the shape of `latents`."""
        where = position_channels(latents.shape[-1]).to(latents).expand(len(latents), -1, -1, -1)
        return self.unet(  # type: ignore[no-any-return]  # diffusers ships no types
            torch.cat([latents, where], dim=1),
            timestep,
            encoder_hidden_states=prompt_embeds,
            encoder_attention_mask=mask,
            class_labels=prompt_embeds.sum(dim=1),
        ).sample

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures in [0, 1], shape (batch, 3, native size, native size). A step's latents give a noisy preview."""
        return (pixel_shuffle(latents.float(), self._unshuffle) / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = STEPS,
        guidance_scale: float | None = None,
        num_images_per_prompt: int | None = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **_: Any,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw `num_images_per_prompt` pictures for each prompt, in the prompts' order, resized to `height` by `width`.

        Guidance is 1 by default, which takes one pass a step, or 1.3 with a negative prompt; 3 ruins pictures.
        `output_type` is `pil`, `np`, `pt` or `latent`. What only other pipelines know is ignored. Raises `ValueError`
        for sizes or counts below 1, lists that differ in length, and unknown callback tensors.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if negative_prompt is None or isinstance(negative_prompt, str):
            negative_prompt = [negative_prompt or ""] * len(prompts)
        negatives = list(negative_prompt)
        size = (self.native_size if width is None else width, self.native_size if height is None else height)
        copies = 1 if num_images_per_prompt is None else num_images_per_prompt
        steps = STEPS if num_inference_steps is None else num_inference_steps
        self._check_inputs(prompts, negatives, (*size, copies, steps), callback_on_step_end_tensor_inputs)
        self._interrupt = False
        if guidance_scale is None:
            guidance_scale = 1.3 if any(negatives) else 1.0
        self._guidance_scale = guidance_scale

        texts = [*negatives, *prompts] if self.do_classifier_free_guidance else prompts
        prompt_embeds, mask = (t.repeat_interleave(copies, dim=0) for t in self.encode_prompt(texts))
        if isinstance(generator, list) and len(generator) != len(prompts) * copies:
            raise ValueError(f"{len(generator)} generators for {len(prompts) * copies} images")
        shape = (len(prompts) * copies, self.unet.config.out_channels, *[self.unet.config.sample_size] * 2)
        latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=self.unet.dtype)
        latents = self._denoise(
            latents=latents,
            prompt_embeds=prompt_embeds,
            mask=mask,
            steps=steps,
            callback=callback_on_step_end,
            tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        images = latents if output_type == "latent" else self._finish(self.decode_latents(latents), size, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check_inputs(
        self, prompts: list[str], negatives: list[str], counts: tuple[int, ...], tensor_inputs: Sequence[str]
    ) -> None:
        if not prompts or min(counts) < 1:
            raise ValueError(f"need a prompt, and width, height, images and steps of 1 or more, not {counts}")
        if len(negatives) != len(prompts):
            raise ValueError(f"{len(negatives)} negative prompts for {len(prompts)} prompts")
        if unknown := set(tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(f"callback tensors must be among {self._callback_tensor_inputs}, not {sorted(unknown)}")

    def _denoise(
        self,
        *,
        latents: torch.Tensor,
        prompt_embeds: torch.Tensor,
        mask: torch.Tensor,
        steps: int,
        callback: StepCallback | None,
        tensor_inputs: Sequence[str],
    ) -> torch.Tensor:
        self.scheduler.set_timesteps(steps, device=latents.device)
        self._num_timesteps = steps
        with self.progress_bar(total=steps) as progress:
            for index, timestep in enumerate(self.scheduler.timesteps):
                if self._interrupt:
                    break
                velocity = self._guided_velocity(latents, timestep, prompt_embeds, mask)
                latents = self.scheduler.step(velocity, timestep, latents).prev_sample
                if callback is not None:
                    tensors = {"latents": latents, "prompt_embeds": prompt_embeds}
                    changed = callback(self, index, timestep, {name: tensors[name] for name in tensor_inputs}) or {}
                    latents = changed.get("latents", latents)
                    prompt_embeds = changed.get("prompt_embeds", prompt_embeds)
                progress.update()
        return latents

    def _guided_velocity(
        self, latents: torch.Tensor, timestep: torch.Tensor, prompt_embeds: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        if not self.do_classifier_free_guidance:
            return self.predict(latents, timestep, prompt_embeds, mask)
        without, with_text = self.predict(torch.cat([latents, latents]), timestep, prompt_embeds, mask).chunk(2)
        return without + self._guidance_scale * (with_text - without)

    @staticmethod
    def _finish(pixels: torch.Tensor, size: tuple[int, int], output_type: str) -> Any:
        """Resize (batch, 3, h, w) in [0, 1] to `size` (width, height) as diffusers' `output_type` says."""
        arrays = (pixels.permute(0, 2, 3, 1) * 255).round().byte().cpu().numpy()
        pictures = [Image.fromarray(a).resize(size, Image.Resampling.BICUBIC) for a in arrays]
        if output_type == "pil":
            return pictures
        batch = np.stack([np.asarray(p, dtype=np.float32) / 255 for p in pictures])
        return batch if output_type == "np" else torch.from_numpy(batch).permute(0, 3, 1, 2)
