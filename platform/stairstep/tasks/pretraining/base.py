"""What the pretraining tasks share: a whole model that is trained, batches made ahead, and checkpoints that are ordinary model folders."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import Parameter
from transformers import GenerationConfig, Qwen3VLForConditionalGeneration

from stairstep.models.inputs import load_tokenizer
from stairstep.models.sources import locate
from stairstep.models.weights import read_config
from stairstep.settings import RecipeError
from stairstep.training import EvaluationReport, PhaseSettings

from .ahead import Batch, BatchesAhead
from .quick import WIDE, compile_layers, uncompiled

if TYPE_CHECKING:
    from ..recipe import Recipe

_LOG = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
OWN = "task.safetensors"


class Pretraining:
    """A task that trains a generating model whole, in one process, on batches that are functions of seed and step."""

    def __init__(self, recipe: Recipe, device: torch.device, fresh: bool, workers: int) -> None:
        refuse_unused(recipe)
        self.recipe, self.device = recipe, device
        self.folder = locate(recipe.model.base, recipe.model.revision, "model.base").folder
        self.tokenizer = load_tokenizer(self.folder)
        quick = device.type == "cpu" and recipe.model.dtype == "bfloat16"
        attention = recipe.model.attention if recipe.model.attention != "auto" else WIDE if quick else "sdpa"
        self.model: Any = load_generating(self.folder, fresh, recipe.model.init_seed, attention).to(device)
        if quick and not compile_layers(self.model):
            _LOG.info("there is no C++ compiler here; with one (g++, or what CXX names) a step takes two thirds of the time")
        self.seed, self.steps, self.batch = recipe.run.seed, recipe.optim.steps, recipe.optim.batch
        self._ahead = BatchesAhead(self.make_batch, self.steps, workers, device)

    # -- what a task adds

    def make_batch(self, step: int) -> Batch:
        """The batch of a step, on the CPU; runs in other processes."""
        raise NotImplementedError

    def own_tensors(self) -> dict[str, Tensor]:
        """What is trained beside the model."""
        return {}

    # -- what the step loop and the run ask for

    def take(self, step: int) -> tuple[Batch, float]:
        """The batch of a step on the device, and the seconds waited for it."""
        return self._ahead.take(step)

    def groups(self) -> dict[str, list[tuple[str, Parameter]]]:
        """All parameters of the model by part."""
        found: dict[str, list[tuple[str, Parameter]]] = {"llm": [], "vit": [], "merger": []}
        for name, parameter in self.model.named_parameters():
            found[_group(name)].append((name, parameter))
        return found

    def after_update(self) -> None:
        """Nothing has to hold."""

    def validation(self) -> Mapping[str, float]:
        """Fresh data is validation enough."""
        return {}

    def write_results(self, folder: Path, step: int) -> list[str]:
        """Scores are metrics; there are no rows to write."""
        return []

    def save(self, folder: Path) -> None:
        """An ordinary Hugging Face folder with float32 weights, and what the task trains beside them."""
        write_model(folder, self.folder, self.model, torch.float32)
        own = {name: one.detach().cpu().contiguous() for name, one in self.own_tensors().items()}
        if own:
            save_file(own, folder / OWN)

    def load(self, folder: Path) -> None:
        """Take back what `save` wrote."""
        self.model.load_state_dict(_with_head(self.model, load_file(folder / WEIGHTS)))
        own = self.own_tensors()
        if own:
            stored = load_file(folder / OWN)
            with torch.no_grad():
                for name, tensor in own.items():
                    tensor.copy_(stored[name])

    def close(self) -> None:
        """Stop the processes that make batches."""
        self._ahead.close()

    @contextmanager
    def computing(self) -> Iterator[None]:
        """The arithmetic of a step: autocast under bfloat16, and TF32 in what a GPU multiplies in float32."""
        half = self.recipe.model.dtype == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half), _tf32(self.device):
            yield

    @contextmanager
    def looking(self) -> Iterator[None]:
        """No gradients and no training behaviour."""
        self.model.eval()
        try:
            with torch.inference_mode(), uncompiled():
                yield
        finally:
            self.model.train()


@contextmanager
def _tf32(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def report_of(scores: Mapping[str, float]) -> EvaluationReport:
    """Scores as metrics of the exam; pretraining has no selection split."""
    return EvaluationReport({f"exam/{name}": value for name, value in scores.items()})


def load_generating(folder: Path, fresh: bool, init_seed: int, attention: str = "sdpa") -> Any:
    """A generating Qwen3-VL model in float32: the folder's weights, or new ones for its config."""
    if fresh or not (folder / WEIGHTS).is_file():
        if not fresh:
            raise RecipeError(f"model.base: {folder} has no {WEIGHTS}; name the checkpoint of an earlier stage, or start with task glyphs")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(init_seed)
            model = Qwen3VLForConditionalGeneration._from_config(read_config(folder), dtype=torch.float32, attn_implementation=attention)
            _widen(model)
    else:
        model = Qwen3VLForConditionalGeneration.from_pretrained(str(folder), dtype=torch.float32, attn_implementation=attention)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(folder))
    return model.train()


def _widen(model: nn.Module) -> None:
    """Draw the linear layers anew, by their own widths: the usual 0.02 is made for wide models and slows so narrow a one down."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith("lm_head"):
            gain = 1.0 if "visual." in name else 0.5
            nn.init.normal_(module.weight, std=gain / module.in_features**0.5)


def write_model(folder: Path, like: Path, model: Any, dtype: torch.dtype) -> None:
    """A model folder: the weights in `dtype`, everything else as in the folder `like`."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(like.iterdir()):
        if path.suffix in (".json", ".jinja") and not path.name.startswith("trainer") and path.resolve() != (folder / path.name).resolve():
            shutil.copyfile(path, folder / path.name)
    state = {name: one.detach().to("cpu", dtype).contiguous() for name, one in model.state_dict().items() if name != "lm_head.weight"}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def _with_head(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tied language head is the embedding again."""
    return (
        state | {"lm_head.weight": state["model.language_model.embed_tokens.weight"]} if "lm_head.weight" in model.state_dict() else state
    )


def _group(name: str) -> str:
    if not name.startswith("model.visual."):
        return "llm"
    return "merger" if "merger" in name else "vit"


def refuse_unused(recipe: Recipe) -> None:
    """Settings of other tasks that a pretraining task would not act upon are errors, not decoration."""
    kind = recipe.task.kind
    unused = {
        "data": bool(recipe.data.train or recipe.data.validation or recipe.data.text or recipe.data.world),
        "phases": recipe.phases != PhaseSettings(),
        "evaluation.sets": bool(recipe.evaluation.sets or recipe.evaluation.pairs),
        "model.adapter": recipe.model.adapter is not None,
        "cluster.workers": recipe.cluster.workers > 1,
    }
    for key, given in unused.items():
        if given:
            raise RecipeError(f"{key}: task {kind} makes its own data and trains the whole model in one process; leave this key out (null)")
