"""Tiny random models for vLLM, made on the spot: `python tiny_models.py FOLDER` (in vLLM's environment).

`FOLDER/llama` chats (with a template), `FOLDER/bert` classifies, `FOLDER/paligemma` sees; their tokenizers are trained
on this very file.
"""

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GemmaConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

TEXT = Path(__file__).read_text()
TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)

#: vLLM puts the picture before the text by itself.
TEXT_PARTS = (
    "{% for message in messages %}{% for part in message['content'] if part['type'] == 'text' %}"
    "{{ part['text'] }}{% endfor %}{% endfor %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def llama(folder: Path) -> None:
    fast = byte_tokenizer()
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=8192,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
        dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def bert(folder: Path) -> None:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator([TEXT], trainers.WordPieceTrainer(vocab_size=512, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
    fast.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        id2label={0: "NEGATIVE", 1: "POSITIVE"},
        label2id={"NEGATIVE": 0, "POSITIVE": 1},
        dtype="float32",
    )
    BertForSequenceClassification(config).save_pretrained(folder)


def paligemma(folder: Path) -> None:
    """A picture is 4 by 4 patches of 14 pixels. Its weights have names that vLLM 0.32 does not know: load dummies."""
    pictures = SiglipImageProcessorPil(size={"height": 56, "width": 56})
    pictures.image_seq_length = 16
    fast = byte_tokenizer()
    fast.add_tokens(["\n"])  # vLLM ends the prompt with it
    processor = PaliGemmaProcessor(pictures, fast, chat_template=TEXT_PARTS)
    processor.save_pretrained(folder)
    ends = {"bos_token_id": fast.bos_token_id, "eos_token_id": fast.eos_token_id, "pad_token_id": fast.eos_token_id}
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2}
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            image_size=56,
            patch_size=14,
            projection_dim=64,
            vision_use_head=False,
            **sizes,
        ),
        text_config=GemmaConfig(
            vocab_size=len(fast),
            hidden_size=64,
            intermediate_size=128,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=1024,
            **sizes,
            **ends,
        ),
        image_token_index=processor.image_token_id,
        projection_dim=64,
        hidden_size=64,
        dtype="float32",
        **ends,
    )
    PaliGemmaForConditionalGeneration(config).save_pretrained(folder)


if __name__ == "__main__":
    torch.manual_seed(0)
    llama(Path(sys.argv[1]) / "llama")
    bert(Path(sys.argv[1]) / "bert")
    paligemma(Path(sys.argv[1]) / "paligemma")
