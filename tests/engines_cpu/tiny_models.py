"""Make tiny random models of stock architectures: `python tiny_models.py FOLDER`.

A process of its own, so that the tests' process loads no torch. Beside each model stands what it should answer.
"""

import json
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
)

WORDS = ["a", "the", "film", "is", "good", "bad", "great", "awful", "red", "blue", "cat", "dog", "on", "of", "with"]
TEXTS = ["the film is great", "awful", "a good film with a bad dog on the red cat"]
POSITIONS = 64


def word_tokenizer(first: list[str], begin: str, end: str, unknown: str, longest: int) -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate([*first, *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}", special_tokens=[(begin, vocabulary[begin]), (end, vocabulary[end])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token=first[0], unk_token=unknown, bos_token=begin, eos_token=end,
        model_max_length=longest,
    )  # fmt: skip


def make_classifier(folder: Path) -> None:
    torch.manual_seed(1)
    tokenizer = word_tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]"], "[CLS]", "[SEP]", "[UNK]", POSITIONS)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=POSITIONS, num_labels=3, initializer_range=0.5,
        id2label={0: "NEGATIVE", 1: "NEUTRAL", 2: "POSITIVE"}, label2id={"NEGATIVE": 0, "NEUTRAL": 1, "POSITIVE": 2},
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    expected = []
    for text in TEXTS:  # each alone, so without padding
        with torch.inference_mode():
            logits = model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits[0]
        expected.append({"text": text, "ids": tokenizer(text).input_ids, "logits": logits.tolist()})
    (folder / "expected.json").write_text(json.dumps(expected))
    BertModel(config).save_pretrained(folder.parent / "headless")
    tokenizer.save_pretrained(folder.parent / "headless")


def make_pickled(source: Path, folder: Path) -> None:
    """The classifier, saved as pickles, which run code when loaded."""
    model = BertForSequenceClassification.from_pretrained(source)
    folder.mkdir()
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_text((source / file).read_text())
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def make_stable_diffusion(folder: Path) -> None:
    torch.manual_seed(2)
    tokenizer = word_tokenizer(["<|end|>", "<|start|>"], "<|start|>", "<|end|>", "<|end|>", 16)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=1, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=32, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 16), norm_num_groups=8, down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=4,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=unet,
        scheduler=DDIMScheduler(clip_sample=False), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


def main(folder: Path) -> None:
    make_classifier(folder / "classifier")
    make_pickled(folder / "classifier", folder / "pickled")
    make_stable_diffusion(folder / "stable_diffusion")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
