"""Stand-ins for the encoder and the reader: deterministic, counting, and strict about how they may be called."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn


def vector_of(content: bytes, dimension: int, weight: float) -> torch.Tensor:
    seed = int.from_bytes(hashlib.sha256(content).digest()[:7], "little")
    vector = torch.randn(dimension, generator=torch.Generator().manual_seed(seed)) + weight
    return vector / vector.norm()


class FakeEncoder(nn.Module):
    """Vectors from content and one weight; refuses mixed shapes, training mode and gradients."""

    def __init__(self, weight: float = 0.0, dimension: int = 12) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))
        self.frozen = nn.Dropout()
        self.dimension = dimension
        self.device = torch.device("cpu")
        self.tile_batches: list[int] = []
        self.text_batches: list[list[str]] = []

    def _check(self) -> None:
        assert not self.training and not self.frozen.training, "evaluated in training mode"
        assert torch.is_inference_mode_enabled(), "gradients were on"

    def encode_texts(self, texts: Sequence[str], role: str) -> torch.Tensor:
        self._check()
        assert len({self.text_tokens(text, role) for text in texts}) == 1, "texts of several lengths in one batch"
        self.text_batches.append(list(texts))
        return torch.stack([vector_of(f"{role}:{text}".encode(), self.dimension, self.weight.item()) for text in texts])

    def encode_tiles(self, pixels: Sequence[torch.Tensor]) -> torch.Tensor:
        self._check()
        assert len({tuple(one.shape) for one in pixels}) == 1, "tiles of several sizes in one batch"
        self.tile_batches.append(len(pixels))
        return torch.stack([vector_of(one.numpy().tobytes(), self.dimension, self.weight.item()) for one in pixels])

    def text_tokens(self, text: str, role: str) -> int:
        return 2 + len(text.split()) + (role == "query")

    def tile_tokens(self, height: int, width: int) -> int:
        return 3 + height * width // 1024

    def state_digest(self) -> str:
        return f"fake-{self.weight.item()}-{self.dimension}"


class FakeReader:
    """A tile file holds `<h>x<w>:<anything>`; its pixels follow from its bytes. `broken` in it cannot be decoded."""

    def __init__(self, key: str = "geometry-a") -> None:
        self.key = key
        self.decoded: list[Path] = []
        self.closed = 0

    def id(self, path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def ahead(self, paths: Sequence[Path]) -> Stream:
        return Stream(self, iter(paths))


class Stream(Iterator[SimpleNamespace]):
    """Like the reader's own: no generator, so nothing closes it but its user."""

    def __init__(self, reader: FakeReader, paths: Iterator[Path]) -> None:
        self.reader, self.paths = reader, paths

    def __next__(self) -> SimpleNamespace:
        path = next(self.paths)
        data = path.read_bytes()
        if b"broken" in data:
            raise ValueError(f"{path}: broken")
        h, w = map(int, data.split(b":")[0].split(b"x"))
        seed = int.from_bytes(hashlib.sha256(data).digest()[:7], "little")
        pixels = torch.randint(0, 256, (3, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        self.reader.decoded.append(path)
        return SimpleNamespace(id=self.reader.id(path), path=path, pixels=pixels)

    def close(self) -> None:
        self.reader.closed += 1


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Shapes this small gain nothing from threads, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fakes() -> SimpleNamespace:
    return SimpleNamespace(Encoder=FakeEncoder, Reader=FakeReader, vector_of=vector_of)


@pytest.fixture
def tiles(tmp_path: Path):
    """Writes tile files `name: content` into a folder and returns their paths."""

    def write(**contents: str) -> list[Path]:
        folder = tmp_path / "tiles"
        folder.mkdir(exist_ok=True)
        paths = []
        for name, content in contents.items():
            path = folder / f"{name}.png"
            path.write_text(content)
            paths.append(path)
        return paths

    return write
