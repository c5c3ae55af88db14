"""What the tests of the reader app share: a folder with random weights, pages to read, requests about them."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from stairstep.models.sources import locate
from stairstep.tasks.pretraining.base import load_generating, write_model


def write_reader(folder: Path) -> Path:
    """The tiny reader's architecture with random weights under which question and pixels decide the answer, mostly letters."""
    like = locate("tiny-reader", None, "test").folder
    model = load_generating(like, fresh=True, init_seed=3)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            weight.copy_(mean + (0.3 if weight.ndim == 1 else 0.15) * torch.randn(weight.shape, generator=draw))
        model.model.language_model.embed_tokens.weight[256:] *= 0.1
    write_model(folder, like, model, torch.float32)
    return folder


def page(seed: int, height: int = 96, width: int = 64, form: str = "PNG") -> bytes:
    """An image file of coloured squares."""
    draw = np.random.default_rng(seed)
    squares = draw.integers(0, 256, (-(-height // 16), -(-width // 16), 3), dtype=np.uint8)
    pixels = squares.repeat(16, 0).repeat(16, 1)[:height, :width]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def image_part(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(data).decode()}}


def ask(model: str, question: str, images: list[bytes], system: str = "", **more: Any) -> dict[str, Any]:
    """A request as the reader's client makes it: the question first, then the tiles."""
    user = {"role": "user", "content": [{"type": "text", "text": question}, *map(image_part, images)]}
    messages = [{"role": "system", "content": system}, user] if system else [user]
    return {"model": model, "messages": messages, "max_tokens": 12, "temperature": 0.0, **more}
