"""Pages to pixels: golden digests, legible and uncut lines, boxes that hold the ink, PNGs that keep every pixel, fonts with licences."""

import hashlib
import string
from itertools import product

import numpy as np
import pytest
from PIL import Image

from stairstep.tiny import fonts
from stairstep.tiny.fonts import PRETRAINING_FONTS, WORLD_FONTS, glyph, text_width
from stairstep.tiny.layouts import LAYOUTS, PRETRAINING_LAYOUTS, SHIFTED_LAYOUTS, WORLD_LAYOUTS
from stairstep.tiny.render import HEIGHT, WIDTH, Line, TilePage, draw, fits, room, wrap, write_png

PAGE = (Line("Mara Velin", role="title"), Line("Born", "1931", "fact"), Line("Home", "Oltava", "fact"), Line("See notes."))

GOLDEN = {
    ("article", "roboto"): "ce21f38571928bc1",
    ("article", "roboto-slab"): "afb769c1475314e7",
    ("infobox", "roboto"): "c695b4ee97293df0",
    ("infobox", "roboto-slab"): "110ad62d0d8a16f7",
    ("night", "roboto"): "ccdb7e4749dfb7d1",
    ("night", "roboto-slab"): "fbcdbf4faca10a81",
    ("poster", "roboto"): "719981ed8a7bbaf0",
    ("poster", "roboto-slab"): "1d7bf2ea169cdb36",
}


def render_lines(*arguments, **options):
    return draw(*arguments, **options).pixels


def digest(layout, font):
    pixels = [render_lines(PAGE, layout, font, size) for size in (16, 18, 20)]
    pixels.append(render_lines(["The quick brown", "fox jumps over a", "lazy dog (1234),", "WHYZ XQUJ 56789."], layout, font, 18))
    return hashlib.sha256(np.stack(pixels).tobytes()).hexdigest()[:16]


@pytest.mark.parametrize(("layout", "font"), list(product(WORLD_LAYOUTS + SHIFTED_LAYOUTS, WORLD_FONTS)))
def test_golden_pixels_of_the_world(layout, font):
    """The same with Pillow 11.0 to 13.0 (FreeType 2.13.2 to 2.14.3), because the world's fonts are never hinted."""
    assert digest(layout, font) == GOLDEN[layout, font]


def test_families_of_the_world_and_of_the_pretraining_are_apart():
    assert not set(WORLD_FONTS) & set(PRETRAINING_FONTS)
    assert not {*WORLD_LAYOUTS, *SHIFTED_LAYOUTS} & set(PRETRAINING_LAYOUTS)
    assert {*WORLD_LAYOUTS, *SHIFTED_LAYOUTS, *PRETRAINING_LAYOUTS} == set(LAYOUTS)


@pytest.mark.parametrize("font", WORLD_FONTS + PRETRAINING_FONTS)
def test_every_printable_character_has_a_glyph_of_its_own(font):
    for bold in (False, True):
        drawn = {character: glyph(font, 20, bold, character) for character in string.printable[:94]}
        assert all(one.mask.max() > 90 for one in drawn.values())
        assert len({one.mask.tobytes() for one in drawn.values()}) == 94
        assert all(1 < one.advance < 25 for one in drawn.values())
        assert glyph(font, 20, bold, " ").mask.sum() == 0


def test_every_font_has_its_licence_and_is_small():
    files = {path.name: path for path in fonts._FOLDER.iterdir()}
    assert set(files) >= {name for pair in fonts._FILES.values() for name in pair}
    assert sum(path.stat().st_size for path in files.values()) < 1_000_000
    for family in fonts._FILES:
        name = f"LICENSE-{family.removesuffix('-condensed')}.txt"
        assert "license" in files[name].read_text().lower()
    with pytest.raises(ValueError, match="there is no font 'comic'"):
        glyph("comic", 20, False, "a")


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_a_page_holds_its_text_legibly(layout):
    pixels = render_lines(PAGE, layout, "roboto", 20)
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    assert pixels.dtype == np.uint8
    look = LAYOUTS[layout]
    for ink, ground in (
        (look.title, look.band or look.paper),
        (look.ink, look.panel or look.paper),
        (look.label, look.panel or look.paper),
    ):
        assert (pixels == ink).all(axis=2).sum() > 30, "the ink is there in full strength"
        assert abs(sum(ink) - sum(ground)) > 180, "and stands out from its ground"


def test_boxes_name_the_characters_in_reading_order_and_hold_all_ink():
    drawing = draw(PAGE, "plain", "open-sans", 20)
    written = "".join(character for character, *_ in drawing.characters)
    assert written == "MaraVelinBorn1931HomeOltavaSeenotes."
    covered = np.zeros((HEIGHT, WIDTH), dtype=bool)
    for _, left, top, right, bottom in drawing.characters:
        assert 0 <= left < right <= WIDTH
        assert 0 <= top < bottom <= HEIGHT
        covered[top:bottom, left:right] = True
    ink = (drawing.pixels != 255).any(axis=2)
    assert ink.sum() > 500
    assert not (ink & ~covered).any()


def test_places_of_the_values():
    def first_of_value(layout):
        return next(box[1] for box in draw(PAGE, layout, "roboto", 18).characters if box[0] in "1O")

    label = text_width("Born ", "roboto", 18)
    assert first_of_value("plain") < label + 15
    assert first_of_value("infobox") > 80
    last = [box[3] for box in draw(PAGE, "poster", "roboto", 18).characters if box[0] == "1"]
    assert WIDTH - 14 < last[-1] <= WIDTH - 6


def test_lines_that_do_not_fit_are_an_error_and_wrapped_ones_fit():
    text = "a sentence that is much longer than one line of a page can be"
    assert not fits(["Title", text], "plain", "caladea", 18)
    with pytest.raises(ValueError, match="do not fit 192×128"):
        render_lines(["Title", text], "plain", "caladea", 18)
    lines = wrap(text, "plain", "caladea", 18)
    assert " ".join(lines) == text
    assert len(lines) >= 3
    assert all(text_width(line, "caladea", 18) <= room("plain") for line in lines)
    assert fits(["Title", *lines[:3]], "plain", "caladea", 18)
    assert fits(["Title"] * 4, "plain", "caladea", 18)
    assert not fits(["Title"] * 5, "plain", "caladea", 18)
    assert render_lines(["Wide page", text], "plain", "caladea", 18, width=640, height=64).shape == (64, 640, 3)


def test_a_page_transcribes_itself_and_takes_another_value():
    page = TilePage(PAGE, "article", "roboto", 18)
    assert page.lines == ("Mara Velin", "Born 1931", "Home Oltava", "See notes.")
    other = page.exchanged("1931", "1824")
    assert other.lines == ("Mara Velin", "Born 1824", "Home Oltava", "See notes.")
    changed = (page.render() != other.render()).any(axis=(1, 2)).nonzero()[0]
    assert len(changed) > 0
    assert changed.max() - changed.min() < 20, "only the line with the value changes"
    text = TilePage((Line("Torv", role="title"), Line("Born in 1931. Died in 19310.")), "plain", "roboto", 18)
    assert text.exchanged("1931", "1500").lines[1] == "Born in 1500. Died in 19310."


def test_a_png_keeps_every_pixel(tmp_path):
    page = render_lines(PAGE, "poster", "roboto", 20)
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    for pixels, mode in ((page, "P"), (noise, "RGB")):
        write_png(tmp_path / "one.png", pixels)
        with Image.open(tmp_path / "one.png") as image:
            assert image.mode == mode
            assert (np.asarray(image.convert("RGB")) == pixels).all()
    write_png(tmp_path / "page.png", page)
    assert (tmp_path / "page.png").stat().st_size < 5000
