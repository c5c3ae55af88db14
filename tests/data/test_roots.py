"""Where data may lie: links, `..` and absolute paths against the roots, compared with the operating system's own resolution."""

import os
from pathlib import Path

import pytest

from stairstep.data import Roots, resolve_inside, roots_of
from stairstep.settings import DataError


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """in/ (a root) with a real folder, a link to it and a link out; out/ beside it."""
    (tmp_path / "in" / "real" / "deep").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    for file in ("in/real/a.png", "in/real/deep/b.png", "out/secret.png"):
        (tmp_path / file).write_bytes(b"x")
    (tmp_path / "in" / "same").symlink_to("real")
    (tmp_path / "in" / "away").symlink_to("../out")
    (tmp_path / "in" / "leak.png").symlink_to("../out/secret.png")
    (tmp_path / "in" / "alias.png").symlink_to("real/a.png")
    (tmp_path / "alias").symlink_to("in")
    return tmp_path


@pytest.mark.parametrize("text", ["real/a.png", "./real/a.png", "same/a.png", "same/../real/a.png", "real//a.png", "same/deep/../a.png"])
def test_every_spelling_of_a_path_inside_is_placed_where_the_system_would_find_it(places: Path, text: str) -> None:
    folder = str(places / "in")
    placed = Roots([folder]).place(text, folder)
    assert placed == os.path.realpath(os.path.join(folder, text)) == str(places.resolve() / "in/real/a.png")


def test_absolute_paths_inside_are_placed_and_do_not_meet_relative_ones_of_the_same_name(places: Path) -> None:
    folder = str(places / "in" / "real")
    roots = Roots([places / "in"])
    assert roots.place("a.png", folder) == f"{places.resolve()}/in/real/a.png"
    assert roots.place(f"{places}/in/real/deep/b.png", folder) == f"{places.resolve()}/in/real/deep/b.png"
    with pytest.raises(ValueError, match=r"leads to /a\.png"):
        roots.place("/a.png", folder)


@pytest.mark.parametrize(
    "text", ["../out/secret.png", "away/secret.png", "same/../../out/secret.png", "/etc/passwd", "real/../../../x.png"]
)
def test_paths_that_leave_are_refused_and_told_what_to_do(places: Path, text: str) -> None:
    folder = str(places / "in")
    with pytest.raises(ValueError, match=r"outside data\.roots .*add its folder to data\.roots"):
        Roots([folder]).place(text, folder)


def test_a_folder_beside_a_root_with_a_longer_name_is_outside(places: Path) -> None:
    (places / "in2").mkdir()
    with pytest.raises(ValueError, match="outside"):
        Roots([places / "in"]).place("../in2/x.png", str(places / "in"))


@pytest.mark.parametrize("text", ["real/", "..", ".", "real/..", "/", "real/a\0.png", "re\0al/a.png"])
def test_a_path_that_can_name_no_file_is_refused(places: Path, text: str) -> None:
    with pytest.raises(ValueError, match="expected the path of a file"):
        Roots([places]).place(text, str(places / "in"))


def test_a_root_may_itself_be_a_link_and_so_may_the_way_to_it(places: Path) -> None:
    through = str(places / "alias")
    assert Roots([through]).place("real/a.png", through) == f"{places.resolve()}/in/real/a.png"
    assert Roots([places / "in"]).place("real/a.png", through) == f"{places.resolve()}/in/real/a.png"
    assert resolve_inside(places / "in/real/a.png", [through]) == places.resolve() / "in/real/a.png"


def test_the_file_system_root_as_a_root_allows_everything(places: Path) -> None:
    assert Roots(["/"]).place(f"{places}/out/secret.png", "/") == f"{places.resolve()}/out/secret.png"


def test_resolve_inside_follows_the_file_itself(places: Path) -> None:
    """`place` costs no system call per file and so lets a linked file pass; `resolve_inside` is the one that sees it."""
    roots = Roots([places / "in"])
    assert roots.place("leak.png", str(places / "in")) == f"{places.resolve()}/in/leak.png"
    with pytest.raises(DataError, match=r"leak\.png: this leads to .*out/secret\.png, which lies outside data\.roots"):
        resolve_inside(places / "in" / "leak.png", roots)
    assert resolve_inside(places / "in" / "alias.png", roots) == places.resolve() / "in/real/a.png"
    assert resolve_inside(places / "in" / "absent.png", roots) == places.resolve() / "in/absent.png"


def test_folders_are_resolved_once_and_files_not_at_all(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    real_lstat = os.lstat

    def lstat(path: str, *args: object, **named: object) -> os.stat_result:
        asked.append(os.fspath(path))
        return real_lstat(path, *args, **named)  # type: ignore[arg-type]

    roots = Roots([places / "in"])
    monkeypatch.setattr(os, "lstat", lstat)
    for number in range(1000):
        roots.place(f"real/deep/{number}.png", str(places / "in"))
        roots.place(f"same/{number}.png", str(places / "in"))
    assert 0 < len(asked) < 60
    assert not any(path.endswith(".png") for path in asked)


def test_recipe_roots_are_relative_to_the_base_and_must_exist(places: Path) -> None:
    assert roots_of(["in", str(places / "out")], places, "/nowhere").folders == (f"{places.resolve()}/in", f"{places.resolve()}/out")
    assert roots_of([], places, places / "out").folders == (f"{places.resolve()}/out",)
    with pytest.raises(DataError, match=r"data\.roots\[1\]: there is no folder '.*absent'"):
        roots_of(["in", "absent"], places, places)
