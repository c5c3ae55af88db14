"""A tiny random Qwen3-VL checkpoint as published ones look (`model.` keys, a language head), with a byte tokenizer and Qwen's template."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import Qwen3VLConfig, Qwen3VLModel

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TEMPLATE = """{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}
{%- for part in message.content %}
{%- if part.type == 'image' %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif part.type == 'text' %}{{- part.text }}{%- endif %}
{%- endfor %}{{- '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


def write_tokenizer(folder: Path) -> dict[str, int]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Qwen2Tokenizer", "pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"})
    )
    return {token: tokenizer.token_to_id(token) for token in SPECIALS}


def tiny_config(ids: dict[str, int]) -> dict:
    return {
        "model_type": "qwen3_vl",
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": True,
        "text_config": {
            "model_type": "qwen3_vl_text",
            "head_dim": 16,
            "hidden_size": 64,
            "initializer_range": 0.15,
            "intermediate_size": 96,
            "max_position_embeddings": 4096,
            "num_attention_heads": 4,
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [4, 2, 2], "rope_type": "default"},
            "rope_theta": 10000,
            "vocab_size": 264,
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            "deepstack_visual_indexes": [0, 1],
            "depth": 3,
            "hidden_size": 32,
            "initializer_range": 0.15,
            "intermediate_size": 48,
            "num_heads": 2,
            "num_position_embeddings": 64,
            "out_hidden_size": 64,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    }


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tiny models lose more to threads than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder; its weights are those of `plain(base)`."""
    folder = tmp_path_factory.mktemp("base")
    config = tiny_config(write_tokenizer(folder))
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(7)
    model = Qwen3VLModel(Qwen3VLConfig.from_dict(config))
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", ".bias")):
            torch.nn.init.normal_(parameter, mean=0.0 if name.endswith(".bias") else 1.0, std=0.3)
    state = {f"model.{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    state["lm_head.weight"] = model.language_model.embed_tokens.weight.detach().clone()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def plain_model(base: Path):
    """Bare transformers models of the base, filled key by key with no help from the library."""

    def build() -> Qwen3VLModel:
        model = Qwen3VLModel(Qwen3VLConfig.from_dict(json.loads((base / "config.json").read_text())))
        stored = load_file(base / "model.safetensors")
        model.load_state_dict({key[len("model.") :]: value for key, value in stored.items() if key.startswith("model.")})
        return model.eval()

    return build


@pytest.fixture(scope="session")
def tiles() -> list[torch.Tensor]:
    """Resized tiles of three sizes."""
    draw = torch.Generator().manual_seed(11)
    return [torch.randint(0, 256, (3, *size), generator=draw, dtype=torch.uint8) for size in ((64, 96), (128, 64), (32, 160), (64, 96))]


@pytest.fixture
def make(base: Path):
    """Encoders on the tiny base in float32: `make(trainable=True, rank=4)` puts adapter settings and model settings where they belong."""
    from dataclasses import fields

    from stairstep.models.load import load_encoder
    from stairstep.models.settings import AdapterSettings, ModelSettings

    def build(trainable: bool = False, seed: int = 0, **options):
        own = {one.name for one in fields(ModelSettings)}
        adapter = {"rank": 4, "alpha": 8.0, "dropout": 0.0} | {key: value for key, value in options.items() if key not in own}
        model = {"base": str(base), "dtype": "float32", "adapter": AdapterSettings(**adapter)}
        model |= {key: value for key, value in options.items() if key in own}
        return load_encoder(ModelSettings(**model), "cpu", trainable=trainable, seed=seed)

    return build


def disturb(encoder, scale: float = 0.05) -> None:
    """Moves everything that the encoder trains, as training would."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for members in encoder.groups().values():
            for _, parameter in members:
                parameter += scale * torch.randn(parameter.shape, generator=draw).to(parameter.dtype)


@pytest.fixture
def trained():
    return disturb
