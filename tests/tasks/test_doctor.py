"""The doctor: one mistake is one ✗ that says what to do, no check hides another, and nothing that it prints is a secret."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Qwen3VLConfig

from stairstep.models import weights
from stairstep.models.encoder import Encoder
from stairstep.models.inputs import Inputs, load_tokenizer
from stairstep.models.load import _adopt_specials
from stairstep.models.placement import place
from stairstep.models.sources import shipped_bases
from stairstep.settings import DataError, InputError, MissingDataError, build, from_plain
from stairstep.tasks import Recipe
from stairstep.tasks.doctor import Check, Finding, Patient, PreflightError, examine, good, machine, preflight, services, table
from stairstep.tasks.doctor.estimate import disk_estimate, graph_bytes, memory_estimate, trained_count
from stairstep.tasks.doctor.findings import run_checks
from stairstep.tiny.configs import write_random_checkpoint

MakeRecipe = Callable[..., Recipe]
CANARY = "sk-test-canary-5f2e"


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {one.check: one for one in findings}


def states(findings: list[Finding]) -> dict[str, str]:
    return {one.check: one.answer.state for one in findings}


# --- a recipe that is well, and one that is not


def test_a_sound_recipe_is_ready(recipe: MakeRecipe) -> None:
    findings = examine(recipe())
    found = by_name(findings)
    assert {name for name, one in found.items() if one.answer.state == "bad"} <= {"versions"}
    assert not any(one.stops for one in findings)
    assert {name for name, one in found.items() if one.answer.state == "open"} == {"archives", "reader", "grader", "trackers"}
    assert "train: 40 rows in train_hn.jsonl" in found["pairs"].answer.said
    assert "text: " in found["pairs"].answer.said
    assert "tinywiki: 12 questions, 36 tiles from " in found["question sets"].answer.said
    assert "found above the file" in found["question sets"].answer.said
    assert found["tiles"].answer.said.startswith("all ")
    assert "6 visual tokens" in found["tiles"].answer.said
    assert "llm_attention: 8 modules, vit_attention: 4 modules" in found["adapter"].answer.said
    assert "about " in found["memory"].answer.said
    assert table(findings).splitlines()[-1].startswith("ready")


def test_every_mistake_is_found_at_once_and_hides_nothing(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_API_KEY_FILE", raising=False)
    findings = examine(
        recipe(
            "data.train=[{path: nowhere.jsonl}, {path: train_hn.jsonl}, {path: neither.jsonl}]",
            "evaluation.sets=[{path: no-set.json}]",
            "model.adapter.target_regex='no_such_layer'",
            "trackers.wandb=online",
        )
    )
    found = by_name(findings)
    assert [one.check for one in findings if one.stops] == ["pairs", "question sets", "adapter", "trackers"]
    assert "nowhere.jsonl" in found["pairs"].answer.said and "neither.jsonl" in found["pairs"].answer.said
    assert "no-set.json" in found["question sets"].answer.said
    assert "matches no layer" in found["adapter"].answer.said
    assert found["memory"].answer.said == "not looked at: see adapter"
    assert found["tiles"].answer.state == "good"
    shown = table(findings)
    assert "\n✗ trackers " in shown
    assert shown.splitlines()[-1].startswith("not ready: pairs, question sets, adapter, trackers")


def test_a_check_that_breaks_is_told_as_ours_and_stops_nothing() -> None:
    def broken(patient: None) -> Any:
        return 1 / 0

    findings = run_checks((Check("broken", broken), Check("after", lambda patient: good("still looked at"))), None)
    assert states(findings) == {"broken": "bad", "after": "good"}
    assert findings[0].answer.defect and not findings[0].stops
    assert "ZeroDivisionError" in findings[0].answer.said and "test_doctor.py:" in findings[0].answer.said
    assert "report it" in findings[0].answer.do


def test_what_lies_on_other_machines_stops_nothing_here(tree: dict[str, Any]) -> None:
    tree["data"]["train"] = [{"path": "nowhere.jsonl"}]
    tree["cluster"] = {"workers": 2, "address": "ray://head:10001", "device": "cuda"}
    tree["trackers"] = {"wandb": "off"}
    patient = Patient(build(Recipe, from_plain(tree, "test")), deep=False)
    assert patient.elsewhere
    findings = run_checks(
        (Check("pairs", lambda one: (_ for _ in ()).throw(DataError("no file")), local=True),), patient, patient.elsewhere
    )
    assert findings[0].answer.state == "bad" and not findings[0].stops
    assert "only where workers run on this machine" in findings[0].answer.do


# --- data


@pytest.fixture
def spoiled(tree: dict[str, Any], micro: SimpleNamespace, tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe over a copy of the world, which a test may spoil."""
    world = tmp_path / "world"
    shutil.copytree(micro.world, world)
    tree["data"]["roots"] = [str(world)]
    return lambda **data: build(Recipe, from_plain({**tree, "data": {**tree["data"], **data}}, "test"))


def test_missing_and_bad_tiles_are_named(spoiled: Callable[..., Recipe], tmp_path: Path) -> None:
    candidates = sorted((tmp_path / "world" / "test" / "tiles").glob("*.png"))
    candidates[3].write_bytes(b"no image")
    row = json.loads((tmp_path / "world" / "train_hn.jsonl").read_text().splitlines()[0])
    (tmp_path / "world" / row["chunk_path"]).unlink()
    found = by_name(examine(spoiled()))
    assert found["pairs"].stops and "1 tiles are missing" in found["pairs"].answer.said
    assert row["chunk_path"].rsplit("/", 1)[-1] in found["pairs"].answer.said
    assert found["tiles"].stops and candidates[3].name in found["tiles"].answer.said
    assert "data.max_quarantined=2" in found["tiles"].answer.do
    accepted = by_name(examine(spoiled(max_quarantined=2)))
    assert accepted["tiles"].answer.state == "good" and "2 bad ones accepted" in accepted["tiles"].answer.said


def test_archives_are_looked_into_and_what_they_lack_is_named(spoiled: Callable[..., Recipe], tmp_path: Path) -> None:
    world = tmp_path / "world"
    shards = sorted((world / "images").iterdir())
    for shard in shards:
        with tarfile.open(world / f"{shard.name}.tar", "w") as tar:
            tar.add(shard, f"images/{shard.name}")
        shutil.rmtree(shard)
    sources = [{"path": "shard_*.tar"}, {"path": "tiles.tar", "unpacked_at": "test/tiles"}]
    found = by_name(examine(spoiled(archives=sources)))
    assert not [one for one in found.values() if one.stops]
    assert "files in them; no file matches tiles.tar: those tiles must be unpacked" in found["archives"].answer.said
    (world / "shard_000.tar").rename(world / "away.tar")
    found = by_name(examine(spoiled(archives=sources)))
    assert [one.check for one in found.values() if one.stops] == ["pairs", "tiles"]
    assert "tiles are missing" in found["pairs"].answer.said and "'tiles.tar' of data.archives" in found["pairs"].answer.said
    (world / "shard_000.tar").write_bytes(b"no archive")
    found = by_name(examine(spoiled(archives=sources)))
    assert found["archives"].stops and "shard_000.tar: this is no tar archive" in found["archives"].answer.said
    assert found["tiles"].answer.said == "not looked at: see archives"


def test_what_was_not_fetched_is_told_with_how_to_fetch_it(spoiled: Callable[..., Recipe], tmp_path: Path) -> None:
    fetch = [{"repo": "someone/pages"}, {"repo": "someone/questions"}]
    complete = by_name(examine(spoiled(fetch=fetch)))
    assert not [one.check for one in complete.values() if one.answer.do.startswith("python -m jobs.fetch")]
    shutil.rmtree(tmp_path / "world")
    (tmp_path / "world").mkdir()
    found = by_name(examine(spoiled(fetch=fetch, archives=[{"path": "shard_*.tar"}])))
    assert found["archives"].answer.state == "open" and "no file matches shard_*.tar: not fetched yet" in found["archives"].answer.said
    for name in ("pairs", "question sets"):
        assert found[name].stops
        assert found[name].answer.do == "python -m jobs.fetch with this recipe brings someone/pages, someone/questions"
    assert by_name(examine(spoiled()))["pairs"].answer.do == "", "nothing is named that could be fetched"


def test_two_sets_of_one_name_are_told(recipe: MakeRecipe) -> None:
    [path] = [one.path for one in recipe().evaluation.sets]
    found = by_name(examine(recipe(f"evaluation.sets=[{{path: {path}}}, {{path: {path}, limit: 3}}]")))
    assert found["question sets"].stops and "two sets of results are called 'tinywiki'" in found["question sets"].answer.said


def test_tiles_found_good_are_remembered_as_training_remembers_them(recipe: MakeRecipe, caplog: pytest.LogCaptureFixture) -> None:
    one = recipe()
    examine(one)
    assert list(Path(one.run.root).glob("tiles-good-*.jsonl"))
    with caplog.at_level("INFO", logger="stairstep"):
        examine(one)
    assert "Checked 0 tiles" in caplog.text


def test_a_task_that_draws_its_pages_needs_no_rows(tree: dict[str, Any]) -> None:
    tree["task"] = {"kind": "glyphs"}
    found = by_name(examine(build(Recipe, from_plain(tree, "test"))))
    for name in ("pairs", "question sets", "tiles"):
        assert "draws its own pages" in found[name].answer.said


def test_a_variable_that_is_not_set_leaves_the_rest_to_be_looked_at(tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_ROOT", raising=False)
    tree["data"]["roots"] = ["$NO_SUCH_ROOT"]
    found = by_name(examine(build(Recipe, from_plain(tree, "test"))))
    assert found["recipe"].stops and "$NO_SUCH_ROOT" in found["recipe"].answer.said
    assert found["pairs"].answer.said == "not looked at: see recipe"
    assert found["adapter"].answer.state == found["memory"].answer.state == "good"


# --- model and machine


def test_the_quick_part_never_asks_the_network(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def network(*arguments: Any) -> Path:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("stairstep.tasks.doctor.models.fetch", network)
    monkeypatch.setattr("stairstep.tasks.doctor.patient.fetch", network)
    monkeypatch.setattr("stairstep.models.sources.fetch", network)
    one = recipe("model.base=nobody/has-this-model")
    preflight(one)
    found = by_name(examine(one))
    assert "the hub was asked" in found["model"].answer.said  # the whole examination does ask


def test_an_adapter_that_does_not_fit_is_told(recipe: MakeRecipe, tmp_path: Path) -> None:
    from stairstep.models.load import load_encoder

    folder = tmp_path / "adapter"
    load_encoder(recipe().model, trainable=True).save(folder)
    assert f"{folder} fits" in by_name(examine(recipe(f"model.start={folder}")))["adapter"].answer.said
    other = by_name(examine(recipe(f"model.start={folder}", "model.adapter.rank=3")))["adapter"]
    assert other.stops and "LoRA rank 2 there and 3 here" in other.answer.said


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_cuda_recipe_on_a_machine_without_one(recipe: MakeRecipe) -> None:
    found = by_name(examine(recipe("cluster.device=cuda")))
    assert found["device"].stops and "torch sees no GPU" in found["device"].answer.said
    assert found["memory"].answer.state == "open"
    assert "there is no GPU to hold it against" in found["memory"].answer.said


def test_too_little_memory_or_disk_stops_the_run(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "machine_memory", lambda: 2**20)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage(10, 9, 1))
    found = by_name(examine(recipe("cluster.device=cpu")))
    assert found["memory"].stops and "model.gradient_checkpointing=true" in found["memory"].answer.do
    assert found["disk"].stops and "make room" in found["disk"].answer.do


@pytest.mark.parametrize(
    ("lock", "range_", "state", "stops", "said"),
    [
        ("{there}", ">=2", "good", False, "as locked"),
        ("{major}.0.1", ">=2", "good", False, "as locked but for torch"),
        ("1.0.0", ">=1", "bad", False, "locked 1.0.0"),
        ("1.0.0", ">=1,<2", "bad", True, "pyproject.toml says torch>=1,<2"),
    ],
)
def test_versions_against_the_lock(recipe: MakeRecipe, tmp_path: Path, lock: str, range_: str, state: str, stops: bool, said: str) -> None:
    there = torch.__version__.partition("+")[0]
    (tmp_path / "requirements").mkdir()
    locked = lock.format(there=there, major=there.split(".")[0])
    (tmp_path / "requirements" / "base.txt").write_text(f"torch=={locked} \\\n    --hash=sha256:00\n")
    (tmp_path / "pyproject.toml").write_text(f'[project]\ndependencies = ["torch{range_}"]\n')
    answer = machine.versions(Patient(recipe()), tmp_path)
    assert (answer.state, answer.state == "bad" and answer.needed) == (state, stops), answer
    assert said in answer.said


def test_a_missing_package_stops_only_who_needs_it(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    real = machine._installed
    monkeypatch.setattr(machine, "_installed", lambda name: None if name == "wandb" else real(name))
    assert "wandb" not in machine.versions(Patient(recipe())).said
    answer = machine.versions(Patient(recipe("trackers.wandb=offline")))
    assert answer.state == "bad" and answer.needed and "wandb is not installed" in answer.said


# --- the estimates, against what is measured


def measured_graph(function: Callable[[], torch.Tensor]) -> int:
    """The bytes that a forward pass really keeps for its backward pass, parameters not counted."""
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        base = tensor if tensor._base is None else tensor._base
        if not isinstance(base, nn.Parameter):
            seen[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = function()
    assert kept.requires_grad
    return sum(seen.values())


def shrunk(dtype: str, targets: dict[str, bool], **more: Any) -> tuple[Recipe, Encoder]:
    """The 2B model at a quarter of its width, with two layers in either tower."""
    tree = json.loads((shipped_bases()["qwen3_vl_embedding_2b"] / "config.json").read_text())
    text, vision = tree["text_config"], tree["vision_config"]
    text |= {"num_hidden_layers": 2, "hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 4, "num_key_value_heads": 2}
    vision |= {"depth": 2, "deepstack_visual_indexes": [0], "hidden_size": 256, "intermediate_size": 1024, "num_heads": 4}
    vision["out_hidden_size"] = text["hidden_size"]
    tokenizer = load_tokenizer(shipped_bases()["tiny-embedder"])
    text["vocab_size"] = len(tokenizer)
    config = Qwen3VLConfig.from_dict(tree)
    _adopt_specials(config, tokenizer)
    checkpointing = more.pop("gradient_checkpointing", False)
    adapter = {"rank": 8, "alpha": 8, "targets": targets, **more}
    plain = {"model": {"dtype": dtype, "gradient_checkpointing": checkpointing, "adapter": adapter}}
    recipe = build(Recipe, from_plain(plain, "test"))
    placed, placement = place(weights.from_seed(config, 0, weights.DTYPES[dtype], "sdpa"), recipe.model.adapter)
    inputs = Inputs(tokenizer, config, {"query": "", "document": ""}, 512)
    return recipe, Encoder(placed, inputs, recipe.model, "sdpa", {}, placement).train()


LLM = {"llm_attention": True}
BOTH = {"llm_attention": True, "vit_attention": True, "vit_mlp": True}


@pytest.mark.parametrize(
    ("dtype", "targets", "more"),
    [
        ("bfloat16", LLM, {}),
        ("bfloat16", {"llm_attention": True, "llm_mlp": True}, {}),
        ("bfloat16", BOTH, {}),
        ("float32", BOTH, {"dropout": 0.0}),
        ("bfloat16", BOTH, {"dora": True}),
    ],
)
def test_the_estimate_of_a_chunk_is_near_what_it_keeps(dtype: str, targets: dict[str, bool], more: dict[str, Any]) -> None:
    recipe, encoder = shrunk(dtype, targets, **more)
    tiles = [torch.randint(0, 255, (3, 160, 192), dtype=torch.uint8) for _ in range(2)]
    found = measured_graph(lambda: encoder.encode_tiles(tiles))
    estimated = graph_bytes(recipe, encoder.model, "cpu").of(2 * encoder.tile_tokens(160, 192), 2 * 30 * 4)
    assert found > 2**20
    assert 0.8 < estimated / found < 1.3, (estimated, found)


def test_checkpointing_keeps_a_fraction(caplog: pytest.LogCaptureFixture) -> None:
    plain, encoder = shrunk("bfloat16", BOTH)
    saving = build(Recipe, from_plain({"model": {"dtype": "bfloat16", "gradient_checkpointing": True}}, "test"))
    saving = replace(saving, model=replace(saving.model, adapter=plain.model.adapter))
    tokens, patches = 1000, 4000
    assert (
        graph_bytes(saving, encoder.model, "cuda").of(tokens, patches) < graph_bytes(plain, encoder.model, "cuda").of(tokens, patches) / 4
    )


def test_what_is_not_trained_keeps_nothing() -> None:
    recipe, encoder = shrunk("bfloat16", LLM)
    graph = graph_bytes(recipe, encoder.model, "cuda")
    assert graph.patch == 0 and graph.token > 0


def test_the_parts_of_v8r_are_what_arithmetic_says() -> None:
    """Seed 000's model: 2.13 billion frozen numbers in bfloat16; 25,427,968 trained ones in float32, five times over."""
    from stairstep.models.load import build_on_meta
    from stairstep.tasks import load_recipe

    root = Path(__file__).resolve().parents[2]
    recipe = load_recipe(root / "recipes" / "v8r.yaml", ["data.roots=[.]"])
    model, _ = build_on_meta(recipe.model)
    assert trained_count(model) == 25_427_968
    estimate = memory_estimate(recipe, model, (1024, 864), [], "cuda")
    assert estimate.parts["base"] == 2 * (2_152_960_000 - 25_427_968)
    assert estimate.parts["trained"] == 4 * 5 * 25_427_968
    assert estimate.chunk == "4 tiles of 864 visual tokens"
    more = memory_estimate(recipe, model, None, [], "cuda")
    assert more.parts["one chunk"] > 4 * estimate.parts["one chunk"] and "the most that the recipe lets one have" in more.chunk
    disk = disk_estimate(recipe, model, 400, 7426)
    assert disk["checkpoints"] == 9 * 4 * 3 * 25_427_968
    assert disk["embeddings"] == 9 * (400 + 7426) * 2048 * 4


# --- reader, grader, trackers


def test_the_reader_is_asked_a_real_question(recipe: MakeRecipe, tmp_path: Path) -> None:
    base = write_random_checkpoint(tmp_path / "reader", "reader")
    one = recipe(f"evaluation.reader={{kind: local, model: {base}, max_new_tokens: 3}}")
    found = by_name(examine(one))
    assert not found["reader"].stops
    assert "In what year was the painter Mara Velin born?" in found["reader"].answer.said
    assert found["grader"].answer.said == "exact: '1931' for '1931' is correct, '1874' is incorrect"
    (base / "model.safetensors").unlink()
    missing = by_name(examine(one))["reader"]
    assert missing.stops and "there is no model.safetensors" in missing.answer.said
    with pytest.raises(InputError, match=r"evaluation\.reader\.model: .* there is no model\.safetensors"):
        preflight(one)


def test_the_page_holds_what_is_asked() -> None:
    assert services.page().lines[-1] == f"Born {services.RIGHT}"
    assert services.page().render().shape == (128, 192, 3)
    assert not any(services.WRONG in line for line in services.page().lines)


@pytest.mark.skipif(
    not (shipped_bases()["tiny-reader"] / "model.safetensors").is_file(), reason="the tiny reader's weights are not shipped yet"
)
def test_the_shipped_reader_reads_the_page(recipe: MakeRecipe) -> None:
    assert (
        services.ask_reader(recipe("evaluation.reader={kind: local, model: tiny-reader}", "tiles.max_visual_tokens=64")) == services.RIGHT
    )


def test_a_grader_that_accepts_everything_is_found_out(recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_random_checkpoint(tmp_path / "reader", "reader")
    monkeypatch.setattr(services, "ask_grader", lambda recipe: services.Grades("correct", "correct"))
    patient = Patient(recipe(f"evaluation.reader={{kind: local, model: {base}}}"), deep=False)
    answer = services.grader(patient)
    assert answer.state == "bad" and answer.needed and "'1874' is correct" in answer.said


@pytest.fixture
def endpoints(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    """A reader and a judge as real servers, reached with a key."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "evaluation"))
    from evaluation_server import EvaluationServer

    monkeypatch.setenv("READER_API_KEY", CANARY)
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    read = EvaluationServer(lambda request: services.RIGHT if services.question() in request.prompt else "what?")
    judge = EvaluationServer(lambda request: "A" if f"<answer>{services.RIGHT}</answer>" in request.prompt else "B")
    with read, judge:
        yield read, judge


def behind(recipe: MakeRecipe, endpoints: tuple[Any, Any]) -> Recipe:
    """The recipe with the reader and the judge of these servers."""
    read, judge = endpoints
    return recipe(
        f"evaluation.reader={{kind: endpoint, base_url: '{read.url}', model: some-reader, backoff_s: 0.01, timeout_s: 5}}",
        f"evaluation.grader={{kind: openai, base_url: '{judge.url}', model: some-judge, backoff_s: 0.01, timeout_s: 5, asks: 2}}",
    )


def test_endpoints_are_asked_and_their_keys_not_shown(recipe: MakeRecipe, endpoints: tuple[Any, Any]) -> None:
    findings = examine(behind(recipe, endpoints))
    found = by_name(findings)
    assert found["reader"].answer.said.startswith(f"some-reader at {endpoints[0].url}: ")
    assert found["reader"].answer.state == "good" and "is answered '1931'" in found["reader"].answer.said
    assert found["grader"].answer.said == (f"some-judge at {endpoints[1].url}: '1931' for '1931' is correct, '1874' is incorrect")
    assert CANARY not in table(findings) + json.dumps([one.plain() for one in findings])


def test_an_endpoint_that_is_down_or_talks_nonsense_is_told(recipe: MakeRecipe, endpoints: tuple[Any, Any]) -> None:
    from evaluation_server import region, status, text

    one = behind(recipe, endpoints)
    read, judge = endpoints
    read.next(status(500), status(500))
    judge.next(text("CORRECT, I would say"), text("a long essay"))
    patient = Patient(one)
    found = by_name(run_checks((Check("reader", services.reader), Check("grader", services.grader)), patient))
    assert found["reader"].stops and "evaluation.reader: " in found["reader"].answer.said
    assert found["grader"].stops and "gave no grade" in found["grader"].answer.said
    judge.next(region(), region())
    [regional] = run_checks((Check("grader", services.grader),), patient)
    assert regional.stops and "OPENAI_BASE_URL" in regional.answer.said and "us.api.openai.com" in regional.answer.said
    assert CANARY not in str(found) + regional.answer.said


def test_the_quick_part_asks_no_endpoint_but_wants_its_key(
    recipe: MakeRecipe, endpoints: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    preflight(behind(recipe, endpoints))
    assert not endpoints[0].received and not endpoints[1].received
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.delenv("OPENAI_API_KEY_FILE", raising=False)
    read = endpoints[0].url
    with pytest.raises(InputError, match="needs a key: set the variable OPENAI_API_KEY"):
        preflight(
            recipe(f"evaluation.reader={{kind: endpoint, base_url: '{read}', model: some-reader}}", "evaluation.grader={kind: openai}")
        )


def test_a_key_is_never_printed(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    findings = examine(recipe("trackers.wandb=online"))
    assert by_name(findings)["trackers"].answer.said == "W&B online: a key is there, project stairstep"
    assert CANARY not in table(findings) + json.dumps([one.plain() for one in findings])


# --- before training


def test_the_quick_part_of_a_sound_recipe_writes_nothing(recipe: MakeRecipe) -> None:
    one = recipe()
    preflight(one)
    assert not Path(one.run.root).exists()


def test_one_mistake_is_the_error_that_training_would_meet(recipe: MakeRecipe) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl: there is no such data file") as error:
        preflight(recipe("data.train=[{path: nowhere.jsonl}]"))
    assert type(error.value) is MissingDataError


def test_several_are_told_together(recipe: MakeRecipe) -> None:
    with pytest.raises(PreflightError) as error:
        preflight(recipe("data.train=[{path: nowhere.jsonl}]", "model.adapter.target_regex='no_such_layer'"))
    said = str(error.value)
    assert "2 checks before the start failed (--no-preflight starts all the same)" in said
    assert "✗ pairs: " in said and "✗ adapter: " in said
    assert error.value.exit_code == 2


def test_bad_tiles_are_left_to_the_runs_own_check(spoiled: Callable[..., Recipe], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for tile in (tmp_path / "world" / "test" / "tiles").glob("*.png"):
        tile.write_bytes(b"no image")
    preflight(spoiled())
    assert "tiles looked at cannot be used" in caplog.text and "judges" in caplog.text
    with pytest.raises(PreflightError, match="tiles looked at cannot be used"):
        preflight(spoiled(check_tiles=False))
