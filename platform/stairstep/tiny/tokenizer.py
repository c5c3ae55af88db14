"""The tiny models' tokenizer and processor files: one token a character, with Qwen's special tokens and chat template.

It is Qwen's own tokenizer class with a vocabulary of the 256 bytes and no merges: a printable ASCII character is one token, any other
is as many as it has bytes, and none is unknown. The built files ship in `processor/`, from where every tiny checkpoint gets its copy, so
that `AutoTokenizer`, `AutoProcessor` and vLLM load one like any Qwen3-VL.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

FILES = Path(__file__).parent / "processor"

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TOKEN_IDS = {token: 256 + index for index, token in enumerate(SPECIAL_TOKENS)}
VOCABULARY = 264  # the 256 bytes and the special tokens, rounded up to a multiple of 8

MIN_PIXELS, MAX_PIXELS = 4 * 32 * 32, 1024 * 32 * 32

_CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' or 'image' in part or 'image_url' in part %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif part.type == 'video' or 'video' in part %}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' }}
            {%- elif 'text' in part %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def build_tokenizer(folder: Path) -> Path:
    """Writes the tokenizer, chat template and processor files into a folder, which is made if need be, and returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    _tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(_CHAT_TEMPLATE, encoding="utf-8")
    for name, tree in _configs().items():
        (folder / name).write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    return folder


def copy_processor(folder: Path) -> None:
    """Puts the shipped tokenizer and processor files into a checkpoint's folder."""
    for path in sorted(FILES.iterdir()):
        shutil.copyfile(path, folder / path.name)


def _tokenizer() -> Tokenizer:
    alphabet = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.normalizer = normalizers.NFC()
    # Without merges it does not matter where text is cut into words; the cut is there because Qwen's class has one.
    split = pre_tokenizers.Split(Regex(r"\s+|\S+"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def _configs() -> dict[str, dict[str, Any]]:
    added = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    pixels = {
        "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
    }
    return {
        "tokenizer_config.json": {
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": {str(TOKEN_IDS[token]): {"content": token, **added} for token in SPECIAL_TOKENS},
            "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": 4096,
            "pad_token": "<|endoftext|>",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
        "preprocessor_config.json": {**pixels, "image_processor_type": "Qwen2VLImageProcessorFast"},
        "video_preprocessor_config.json": {**pixels, "video_processor_type": "Qwen3VLVideoProcessor"},
    }
