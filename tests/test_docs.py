"""The documents do not rot: seed 000's flags each have their row, keys and values are the recipe's, commands parse."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Sequence
from math import comb
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import yaml

from jobs.serve_reader import ServeSettings
from stairstep.data.fetch_report import UNITS, Count
from stairstep.evaluation.comparison import _QA_PARTS, LEVEL, METRICS, compare, compare_family
from stairstep.evaluation.evaluated import Evaluated, Row, Side
from stairstep.evaluation.statistics import wilson
from stairstep.evaluation.table import short
from stairstep.models.load import build_on_meta, trainable_line
from stairstep.settings import build, from_plain, to_plain
from stairstep.settings.hints import options_of
from stairstep.settings.yaml_text import parse_yaml
from stairstep.tasks import Recipe, load_recipe
from stairstep.tasks.climb import METRICS as CLIMB_METRICS

ROOT = Path(__file__).resolve().parents[1]
V8R = ROOT / "recipes" / "v8r.yaml"
REPRODUCE = ROOT / "docs" / "reproduce.md"
PAIRS_LINE, TEXTS_LINE = "Loaded %d valid pairs from %s", "Loaded %d text pairs from %s"
SET_LINE = "Loaded test '%s': %d questions, %d tiles from %s"
VARIANTS = sorted((ROOT / "recipes" / "v8r").glob("*.yaml"))

SEED_COMMAND = r"""
cd train CUDA_VISIBLE_DEVICES= uv run python train_contrastors.py \
 --data-split-dir "$DATA_ROOT/screenshot-training-natural-filtered-v2" \
 --text-warmup-steps 50 \
 --text-data-dir "$DATA_ROOT/text-qa-pair" \
 --test-data "$DATA_ROOT/screenshot-training/test_miniv8/test_miniv8.json" \
 --max-steps 350 \
 --batch-size 64 \
 --grad-cache-chunk 4 \
 --num-hard-negatives 2 \
 --lr 7e-6 \
 --warmup-steps 20 \
 --scheduler cosine \
 --test-batch-size 16 \
 --eval-steps 25 \
 --test-eval-steps 50 \
 --save-steps 50 \
 --max-num-visual-tokens 4096 \
 --lora-vit \
 --simpleqa-max-examples 1000 \
 --vllm-url http://localhost:8200/v1 \
 --vllm-model Qwen/Qwen3-VL-4B-Instruct \
 --wandb-run-name v8r \
 --output-dir "$OUTPUT_DIR/v8_r_warmup50_lr7e6_lora_vit_350"
"""
# The flags of all further commands that the seed's text names: hf download, the unpacking script, vllm serve.
SEED_FURTHER_FLAGS = {
    "--repo-type",
    "--include",
    "--local-dir",
    "--dataset-dir",
    "--dtype",
    "--port",
    "--max-model-len",
    "--gpu-memory-utilization",
    "--api-key",
}
# Values of the command that are the recipe's too, letter by letter or as a path below the same root; the others are explained in their row.
ALIKE = {
    "--text-warmup-steps",
    "--text-data-dir",
    "--test-data",
    "--max-steps",
    "--batch-size",
    "--grad-cache-chunk",
    "--num-hard-negatives",
    "--lr",
    "--warmup-steps",
    "--scheduler",
    "--eval-steps",
    "--test-eval-steps",
    "--save-steps",
    "--max-num-visual-tokens",
    "--simpleqa-max-examples",
    "--vllm-url",
    "--vllm-model",
    "--wandb-run-name",
}
KNOBS = [
    "bidirectional",
    "dora",
    "rslora",
    "vit_rank",
    "llm_mlp",
    "vit_unfrozen",
    "text_mix",
    "text_curriculum",
    "fresh_after_text_warmup",
    "siglip",
    "label_smoothing",
    "hardness",
    "ema_decay",
    "reversed",
    "count:",
    "constant",
    "cosine_restarts",
    "query_side",
    "hard_negatives",
]


def seed_flags() -> dict[str, str | None]:
    """The flags of the seed's command with their values."""
    words = shlex.split(SEED_COMMAND.replace("\\\n", " "))
    flags: dict[str, str | None] = {}
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith("--"):
            flags[word] = None if following.startswith("--") else following.removeprefix("$DATA_ROOT/")
    return flags


def tables(path: Path) -> list[list[list[str]]]:
    """The tables of a document: rows of cells, headings first."""
    found: list[list[list[str]]] = []
    inside = False
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("| "):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if not inside:
                found.append([])
            if not set("".join(cells)) <= {"-", ":", " "}:
                found[-1].append(cells)
        inside = line.startswith("| ")
    return found


def coded(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def has_key(cls: Any, key: str) -> bool:
    """Whether a dotted key (a list's items as `[]`) exists in a settings class, whichever kind it may take."""
    name, _, rest = key.partition(".")
    plain = name.removesuffix("[]")
    hint = get_type_hints(cls).get(plain)
    if hint is None:
        return False
    options = options_of(hint)
    if name.endswith("[]"):
        options = tuple(item for option in options if get_origin(option) is tuple for item in options_of(get_args(option)[0]))
    if not rest:
        return bool(options)
    return any(has_key(option, rest) for option in options if dataclasses.is_dataclass(option))


def values_at(plain: Any, key: str) -> list[Any]:
    places = [plain]
    for part in key.split("."):
        places = [one[part.removesuffix("[]")] for one in places]
        if part.endswith("[]"):
            places = [item for one in places for item in one]
    return places


FLAGS, FURTHER, FIXED, ABLATIONS = tables(ROOT / "docs" / "seed000.md")
SEED_TEXTS = sorted((ROOT.parent / "shared" / "seeds").glob("000_*.txt"))


def test_keys_are_told_from_words_that_are_none():
    for key in ("optim.rates.llm", "evaluation.sets[].limit", "objective.loss.hardness", "model.adapter.targets.vit_mlp", "data.train"):
        assert has_key(Recipe, key), key
    for key in ("optim.lr", "evaluation.sets.limit", "optim.rates[].llm", "optim.batch.size", "objective.loss.hard", "data.train[].x"):
        assert not has_key(Recipe, key), key


def test_every_flag_of_the_seed_has_its_row_and_no_other_has():
    flags = seed_flags()
    assert len(flags) == 22
    assert flags["--lr"] == "7e-6" and flags["--lora-vit"] is None, "a flag is read with its value, a switch without one"
    assert [coded(row[0]) for row in FLAGS[1:]] == [[flag] for flag in flags]


def test_every_flag_of_its_further_commands_has_a_key_of_the_recipe_or_of_the_reader():
    assert sorted(coded(row[0])[0] for row in FURTHER[1:]) == sorted(SEED_FURTHER_FLAGS)
    plain, served = to_plain(load_recipe(V8R)), to_plain(build(ServeSettings, from_plain({"engine": {"kind": "vllm"}}, "test")))
    for flag, keys, values, note in FURTHER[1:]:
        [key], wanted = coded(keys), coded(values)
        assert [one for one in coded(note) if re.fullmatch(r"[a-z]+\.[\w.\[\]]+", one) and not has_key(Recipe, one)] == []
        recipe = key.startswith("data.")
        assert has_key(Recipe if recipe else ServeSettings, key), flag
        there = values_at(plain if recipe else served, key)
        assert not wanted or yaml.safe_load(wanted[0]) in there, (flag, there)


@pytest.mark.skipif(not SEED_TEXTS, reason="the seeds' texts do not lie beside this checkout")
def test_the_flags_here_are_those_of_the_seeds_text():
    """The lists above are copies, so that the tests need nothing from outside; where the text itself is at hand, it is asked."""
    [text] = [path.read_text(encoding="utf-8") for path in SEED_TEXTS]
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", text)) == seed_flags().keys() | SEED_FURTHER_FLAGS


@pytest.mark.parametrize("row", [*FLAGS[1:], *FIXED[1:]], ids=lambda row: row[0].strip("`"))
def test_a_row_names_keys_that_exist_and_the_values_of_v8r(row: list[str]):
    name, keys, values, note = row[0].strip("`"), coded(row[1]), coded(row[2]), row[3]
    assert [key for key in (*keys, *coded(note)) if re.fullmatch(r"[a-z_]+\.[\w.\[\]]+", key) and not has_key(Recipe, key)] == []
    assert keys
    assert len(values) == len(keys), "as many values as keys"
    plain = to_plain(load_recipe(V8R))
    for key, value in zip(keys, values, strict=True):
        [there] = values_at(plain, key)
        assert parse_yaml(f"value: {value}", "docs").value["value"].value == there, key
        if name in ALIKE:
            assert seed_flags()[name] in (value, str(there)), name


def test_no_two_flags_are_said_to_be_one_key():
    """50 steps are the text warmup, the evaluations and the checkpoints: equal values would hide a key in the wrong row."""
    keys = [key for row in (*FLAGS[1:], *FIXED[1:]) for key in coded(row[1])]
    assert sorted(set(keys)) == sorted(keys)


def test_what_is_alike_is_among_the_flags():
    assert set(seed_flags()) > ALIKE


def leaves(plain: Any, key: str = "") -> dict[str, Any]:
    """The values of a resolved recipe by dotted key, less the name of its run."""
    if isinstance(plain, dict) and plain:
        return {one: value for name, child in plain.items() for one, value in leaves(child, f"{key}.{name}" if key else name).items()}
    return {} if key == "run.name" else {key: plain}


def differences(recipe: Recipe) -> set[str]:
    """The keys in which a recipe is not v8r; what lies below a key that is null counts as that key."""
    mine, its = leaves(to_plain(recipe)), leaves(to_plain(load_recipe(V8R)))
    absent = {key for key in mine.keys() | its.keys() if (key in mine) != (key in its)}
    nulls = {key for key, value in mine.items() if value is None and any(one.startswith(f"{key}.") for one in its)}
    assert all(any(one == null or one.startswith(f"{null}.") for null in nulls) for one in absent), absent
    return nulls | {key for key in mine.keys() & its.keys() if mine[key] != its[key]}


def first_comment(path: Path) -> str:
    return " ".join(line.removeprefix("#").strip() for line in path.read_text().split("extends:")[0].splitlines())


def said_to_differ(path: Path) -> tuple[set[str], dict[str, set[str]]]:
    """The keys that a recipe's first comment names as other than v8r's, and those of them that it gives to a flag."""
    said = re.split(r"\. Measured|;", first_comment(path).split("Other than v8r: ")[1])[0].strip().removesuffix(".")
    keys: set[str] = set()
    flags: dict[str, set[str]] = {}
    for item in said.split(", "):
        found = set(re.findall(r"[a-z_]+(?:\.\w+)+", item))
        keys |= found
        for flag in re.findall(r"\((--[a-z-]+)\)", item):
            flags[flag] = found
    return keys, flags


@pytest.mark.parametrize("path", VARIANTS, ids=lambda path: path.stem)
def test_a_variant_of_v8r_differs_in_exactly_the_keys_that_its_comment_says(path: Path):
    keys, flags = said_to_differ(path)
    assert keys == differences(load_recipe(path))
    mapped = {coded(row[0])[0]: set(coded(row[1])) for row in FLAGS[1:]}
    for flag, group in flags.items():
        assert group == mapped[flag], f"{flag} is {mapped[flag]}, says docs/seed000.md"
    of_flags = {key for group in mapped.values() for key in group}
    assert keys & of_flags == {key for group in flags.values() for key in group}, "a key that is a flag of the seed's is said to be one"


def test_the_stairs_turn_one_of_the_seeds_flags_at_a_time_up_to_v8r_itself():
    stairs = [seed_flags_off(V8R.parent / "v8r" / f"{name}.yaml") for name in ("in_batch", "hard_negatives", "text_warmup", "vit_lora")]
    assert stairs == [
        {"--num-hard-negatives", "--text-warmup-steps", "--lora-vit"},
        {"--text-warmup-steps", "--lora-vit"},
        {"--lora-vit"},
        set(),
    ]


def seed_flags_off(path: Path) -> set[str]:
    """The flags of the seed's command that a recipe takes back, by docs/seed000.md."""
    changed = differences(load_recipe(path))
    off = {coded(row[0])[0] for row in FLAGS[1:] if changed & set(coded(row[1]))}
    plain = to_plain(load_recipe(path))
    values = [value for row in FLAGS[1:] if coded(row[0])[0] in off for key in coded(row[1]) for value in values_at(plain, key)]
    assert not any(values), "off means 0 or false"
    return off


def test_the_usual_tile_is_the_same_pixels_at_1024_and_at_4096_visual_tokens():
    """As docs/seed000.md says; a larger tile is not."""
    low, high = (load_recipe(path).tiles.geometry() for path in (V8R.parent / "v8r" / "vit_rank64_1024.yaml", V8R))
    assert low.resized(1024, 875) == high.resized(1024, 875) == (1024, 864)
    assert high.visual_tokens(1024, 864) == 864
    assert low.resized(2048, 875) != high.resized(2048, 875)


@pytest.mark.parametrize("path", [V8R, *VARIANTS], ids=lambda path: path.stem)
def test_v8r_and_its_variants_pick_their_best_step_by_the_seeds_primary_metric(path: Path):
    assert load_recipe(path).evaluation.selection_metric == "qa"


def test_differences_are_found():
    """What the tests of the variants stand on."""
    assert differences(load_recipe(V8R)) == set()
    assert differences(load_recipe(V8R, ["run.name=other", "optim.steps=351"])) == {"optim.steps"}
    assert differences(load_recipe(V8R, ["model.adapter=null"])) == {"model.adapter"}
    assert len(VARIANTS) == 8


@pytest.mark.parametrize("row", ABLATIONS[1:], ids=lambda row: row[0])
def test_an_ablation_is_an_override_that_changes_v8r(row: list[str]):
    [override] = coded(row[1])
    overrides = override.split(" ") if "[{" not in override else [override]
    changed = load_recipe(V8R, overrides)
    assert changed != load_recipe(V8R)
    for recipe in coded(row[2]):
        assert leaves(to_plain(load_recipe(ROOT / recipe))) == leaves(to_plain(changed)), "the recipe is the override"


def test_every_variant_but_the_two_ends_of_the_stairs_stands_among_the_ablations():
    named = {ROOT / recipe for row in ABLATIONS[1:] for recipe in coded(row[2])}
    assert named == {path for path in VARIANTS if path.stem not in ("base", "vit_lora")}


def test_the_knobs_of_the_ablations_are_all_there():
    text = " ".join(row[1] for row in ABLATIONS)
    assert [knob for knob in KNOBS if knob not in text] == []


# --- what docs/reproduce.md says to expect

# As published, in the seed's text or beside it; the table gives the number of questions of 400 that each stands for.
PUBLISHED = {
    "QA, base, step 0, lower figure": ".715",
    "QA, base, step 0, upper figure": ".730",
    "QA, in-batch negatives alone": ".750",
    "QA, + hard negatives": ".778",
    "QA, + text warmup": ".7825",
    "QA, + ViT LoRA": ".785",
    "QA at 4096 visual tokens, where .785 is given for 1024": ".775",
    "R@1, base": ".688",
    "R@1, trained": ".760",
    "R@3, base": ".833",
    "R@3, trained": ".893",
}


def fenced(path: Path) -> list[str]:
    """The lines of a document that stand in its blocks of code."""
    return [line for block in path.read_text(encoding="utf-8").split("```")[1::2] for line in block.splitlines()]


def test_the_lines_that_a_reproduction_expects_are_the_codes_with_the_recipes_counts():
    recipe = load_recipe(V8R)
    expected = {(one.repo, name): count for one in recipe.data.fetch for name, count in one.expect.items()}
    lines = fenced(REPRODUCE)
    fetched = [f"{Count(name, UNITS[Path(name).suffix], count, count).line()} ({repo})" for (repo, name), count in expected.items()]
    assert [line for line in lines if line.startswith("✓")] == fetched

    rows = {name: count for (_, name), count in expected.items()}
    [questions] = recipe.evaluation.sets
    logged = [(PAIRS_LINE, rows[Path(one.path).name], one.path) for one in (*recipe.data.train, *recipe.data.validation)]
    logged += [(TEXTS_LINE, rows["chunk_*/filtered_hn.jsonl"], one.path) for one in recipe.data.text]
    logged += [(SET_LINE, questions.name, rows["test_miniv8/test_miniv8.json"], rows["test_miniv8/tiles.tar"], "…")]
    assert [line for line in lines if line.startswith("Loaded")] == [form % tuple(values) for form, *values in logged]
    source = (ROOT / "platform" / "stairstep" / "tasks" / "loading.py").read_text(encoding="utf-8")
    assert sorted(re.findall(r'_LOG\.info\("(Loaded [^"]+)"', source)) == sorted({PAIRS_LINE, TEXTS_LINE, SET_LINE})


def test_the_adapters_lines_are_those_of_a_dry_run():
    model, placement = build_on_meta(load_recipe(V8R).model)
    lines = fenced(REPRODUCE)
    assert placement.describe() in lines
    assert trainable_line(model) in lines


def locked(name: str) -> dict[str, str]:
    """The versions that a file of requirements/ pins."""
    text = (ROOT / "requirements" / name).read_text(encoding="utf-8")
    return dict(re.findall(r"^([a-z0-9._-]+)==([^\s;\\]+)", text, re.MULTILINE))


def test_the_papers_environment_is_the_seeds_and_otherwise_the_base():
    """Versions from the seed's own table, and by name in docs/reproduce.md; what hangs on neither torch nor transformers is as it is."""
    paper, base = locked("paper.txt"), locked("base.txt")
    text = REPRODUCE.read_text(encoding="utf-8")
    for name, version in {"torch": "2.9.1", "transformers": "4.57.1", "nvidia-cudnn-cu12": "9.20.0.48"}.items():
        assert paper[name] == version
        assert version in text
    others = {name for name in paper.keys() & base.keys() if paper[name] != base[name]}
    assert others == {"torch", "torchvision", "triton", "transformers", "tokenizers", "huggingface-hub", "sentence-transformers"}
    lock = (ROOT / "requirements" / "paper.txt").read_text(encoding="utf-8")
    assert lock.count("--hash=sha256:") >= len(paper) > 100
    assert "://" not in lock, "no registry's address"


def test_expected_figures_have_their_intervals():
    table, *_ = tables(REPRODUCE)
    rows = {row[0].partition(": ")[0]: row[1:] for row in table[1:]}
    assert {name: row[0] for name, row in rows.items()} == PUBLISHED
    for published, count, interval in rows.values():
        one = wilson(int(count), 400)
        assert interval == f"[{short(one.low)} {short(one.high)}]", count
        assert abs(float(published) - one.value) < 0.0006, "the nearest number of questions, and published in three or four digits"
    text = " ".join(REPRODUCE.read_text(encoding="utf-8").split())
    error = (0.785 * 0.215 / 400) ** 0.5
    assert f"{100 * error:.2f} points at .785" in text
    assert f"Below {short(0.785 - 2 * error)}, two standard errors under .785" in text
    middle, of_base = 0.7225, 2 * (0.7225 * 0.2775 / 400) ** 0.5
    assert f"from {middle - of_base:.2f} to {middle + of_base:.2f}:".replace("0.", ".") in text
    assert "gave .772, .780, .7825 and .785, 309 to 314 questions" in text
    assert "a QA score of at least .772, the lowest" in text
    said = {name: int(rows[name][1]) for name in rows}
    steps = [said[f"QA, {name}"] for name in ("in-batch negatives alone", "+ hard negatives", "+ text warmup", "+ ViT LoRA")]
    before = [said["QA, base, step 0, upper figure"], *steps]
    rises = [after - one for one, after in zip(before, steps, strict=False)]
    most = steps[0] - said["QA, base, step 0, lower figure"]
    assert f"The published steps are {rises[0]} to {most} questions, {rises[1]}, {rises[2]} and {rises[3]}." in text


def test_the_rises_that_a_comparison_shows_are_corrected_as_it_corrects_them():
    """The worst that Holm can do to a p-value is to multiply it by the size of the family, which is the code's."""
    text = " ".join(REPRODUCE.read_text(encoding="utf-8").split())
    alone = len(METRICS) + len(_QA_PARTS)
    assert f"corrected (Holm) for the { {6: 'six'}[alone] } comparisons of this table" in text
    assert f"must be below .05/{alone}" in text
    said = r"A rise of 22 questions does so as long as no more than (\d+) changed at all, one of 25 up to (\d+), one of 28 up to (\d+)"
    found = re.search(said, text)
    assert found is not None
    assert [int(one) for one in found.groups()] == [most_changed(net, alone) for net in (22, 25, 28)]

    stairs = [one for verb, words in commands(REPRODUCE) if verb == "stairstep" for one in words if one.endswith(".yaml")]
    family = (len(stairs) + 1) * (len(CLIMB_METRICS) + len(_QA_PARTS))
    assert f"corrected for all of the climb, {family} comparisons" in text
    assert f"Where 60 of the 400 questions change, {least_rise(60, family)} more of them have to turn right" in text
    assert f"{100 * least_rise(60, family) / 400} points" in text
    assert f"({least_rise(60, 1)} would do without the correction" in text


def answered(changes: Sequence[int]) -> tuple[Side, Side]:
    """Two evaluations of as many questions, half of which were shown a golden tile: 1 turned right, -1 turned wrong, 0 stayed wrong."""
    sides = []
    for name, right in (("before", -1), ("after", 1)):
        rows: list[Row] = [
            {
                "id": str(place),
                "golden_ids": ["right"],
                **dict.fromkeys(("hit@1", "hit@3"), False),
                "reciprocal_rank": 0.0,
                "retrieved": [{"article": "right" if place % 2 else "wrong"}],
                "state": "correct" if change == right else "incorrect",
                "correct": change == right,
            }
            for place, change in enumerate(changes)
        ]
        sides.append(Side(name, [Evaluated(rows, 50, 3, 0.95)]))
    return sides[0], sides[1]


@pytest.mark.parametrize(("rose", "fell", "verdict"), [(54, 29, "better"), (55, 30, "no difference shown")])
def test_a_real_comparison_draws_the_line_where_the_documents_do(rose: int, fell: int, verdict: str):
    """25 of 83 and 25 of 85, and the family that the figures above are computed for."""
    found = compare(*answered([1] * rose + [-1] * fell + [0] * (400 - rose - fell)))
    [qa] = [one for one in found.comparisons if one.metric == "qa"]
    assert found.family == len(METRICS) + len(_QA_PARTS)
    assert (qa.difference.rose, qa.difference.fell, qa.verdict) == (rose, fell, verdict)
    assert qa.p_value == pytest.approx(found.family * mcnemar_p(25, rose + fell))


def test_a_climb_of_four_recipes_is_a_family_of_twenty():
    pairs = [answered([1, -1, 0, 1])] * 5
    assert {one.family for one in compare_family(pairs, CLIMB_METRICS)} == {20}


def most_changed(net: int, factor: int) -> int:
    """Of how many changed questions a rise of `net` is still shown where its p-value is multiplied."""
    return max(changed for changed in range(net, 401, 2) if factor * mcnemar_p(net, changed) < LEVEL)


def least_rise(changed: int, factor: int) -> int:
    """The smallest rise that is shown where so many questions changed."""
    return next(net for net in range(0, changed + 1, 2) if factor * mcnemar_p(net, changed) < LEVEL)


def mcnemar_p(net: int, changed: int) -> float:
    """The exact two-sided p-value of `net` more questions that turned right than wrong, of so many that changed (one less if need be)."""
    wrong = (changed - net) // 2
    n = 2 * wrong + net
    return min(1.0, 2 * sum(comb(n, k) for k in range(wrong + 1)) / 2**n)


def documents() -> list[Path]:
    return [
        ROOT / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
        *sorted((ROOT / "jobs").glob("*.py")),
        *sorted((ROOT / "recipes").rglob("*.yaml")),
    ]


def commands(path: Path) -> list[tuple[str, list[str]]]:
    """The `python -m jobs.…` commands of a document: verb and arguments, less comments in the text beside them."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        for verb, rest in re.findall(r"python -m jobs\.(\w+)((?: +[^`#\n]*)?)", line):
            found.append((verb, shlex.split(re.split(r" {2,}|\. |\)", rest.strip())[0])))
    return found


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_commands_of_the_documents_parse(path: Path):
    for verb, arguments in commands(path):
        source = ROOT / "jobs" / f"{verb}.py"
        assert source.exists(), f"{path.name}: there is no job {verb}"
        text = source.read_text(encoding="utf-8")
        if "add_no_preflight" in text:
            text += (ROOT / "jobs" / "common.py").read_text(encoding="utf-8")
        recipes = [one for one in arguments if one.endswith(".yaml") and "=" not in one]
        overrides = [one for one in arguments if "=" in one]
        assert [one for one in arguments if one.startswith("--") and f'"{one}"' not in text] == [], (path.name, verb, arguments)
        elided = [one.partition("=")[0] for one in overrides if "…" in one]
        assert [key for key in elided if not has_key(Recipe, key)] == [], (path.name, verb, arguments)
        if recipes and (ROOT / recipes[0]).exists():
            load_recipe(ROOT / recipes[0], [one for one in overrides if "…" not in one])


def test_there_are_commands():
    found = {path.name: len(commands(path)) for path in documents()}
    assert found["README.md"] > 3
    assert found["recipes.md"] > 5
    assert found["train.py"] > 3


def test_what_the_documents_link_to_is_there():
    links = [
        (path, link)
        for path in documents()
        if path.suffix == ".md"
        for link in re.findall(r"\]\(([^)#]+)", path.read_text(encoding="utf-8"))
    ]
    assert len(links) > 3
    assert [f"{path.name}: {link}" for path, link in links if "://" not in link and not (path.parent / link).exists()] == []


def test_every_path_of_the_file_map_and_every_job_are_in_the_readme_and_in_the_tree():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    mapped = [coded(row[0])[0] for table in tables(ROOT / "README.md") for row in table[1:]]
    assert "platform/stairstep/" in mapped
    assert [one for one in mapped if not (ROOT / one).exists()] == []
    jobs = {path.stem for path in (ROOT / "jobs").glob("[a-z]*.py")} - {"common"}
    assert jobs == set(re.findall(r"python -m jobs\.(\w+)", readme))
