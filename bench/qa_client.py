"""What asking a reader costs on the asking side: 400 questions with 3 tiles of 875×1024 each, against a server that answers at once.

python bench/qa_client.py                       400 questions through this client, 40 through each of the ways it is compared with
python bench/qa_client.py --compared 400        as many through all of them

Compared in the same run with what people do today (the openai library in a pool of 4 threads, each tile opened with PIL and encoded as PNG
again), with the same pool sending the files' own bytes, and with this client at a configured tile size. The server is another process and
reads requests without looking at them. Every tile is another file, so that nothing is encoded once for two questions. Times of `--compared`
questions are scaled to all of them. Writes bench/results/qa_client.json; exit code 1 if this client's own time, the CPU seconds of all its
threads, is 20 s or more: on a machine with nothing else to do its wall time is no longer, and on a busy one that says little.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from stairstep.evaluation.chat import ChatClient
from stairstep.evaluation.readers import SYSTEM, RemoteReader, RemoteReaderSettings
from stairstep.records import describe_environment, write_json

RESULTS = Path(__file__).parent / "results" / "qa_client.json"
SERVER = Path(__file__).parent.parent / "tests" / "evaluation" / "evaluation_server.py"
HEIGHT, WIDTH, TILES = 1024, 875, 3
PATTERNS = 12  # tiles that differ in their pixels; the files are all different ones
MOST_S = 20.0

Ask = Callable[[str, Sequence[Path]], str]
Way = tuple[str, Ask, int, int]  # its name, how it asks, how many questions, in how many threads


@dataclass(frozen=True)
class Row:
    """One way to ask: seconds for all questions, and what was measured."""

    way: str
    wall_s: float
    cpu_s: float
    measured: int


def draw_tile(seed: int) -> bytes:
    """A page as a browser shows it: lines of small text, and a picture."""
    rng = np.random.default_rng(seed)
    page = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(page)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz      "))
    for y in range(20, HEIGHT - 20, 17):
        pen.text((20, y), "".join(rng.choice(letters, 100 if y > 400 else 62)), fill=(32, 33, 34))
    coarse = Image.fromarray(rng.integers(0, 256, (24, 20, 3), dtype=np.uint8)).resize((330, 380), Image.Resampling.BICUBIC)
    grain = rng.integers(-6, 7, (380, 330, 3))
    picture = np.clip(np.asarray(coarse, dtype=np.int16) + grain, 0, 255).astype(np.uint8)
    page.paste(Image.fromarray(picture), (520, 15))
    file = io.BytesIO()
    page.save(file, "PNG")
    return file.getvalue()


def write_tiles(folder: Path, count: int) -> list[Path]:
    """Tile files, each with a path of its own."""
    patterns = []
    for number in range(PATTERNS):
        pattern = folder / f"pattern-{number}.png"
        pattern.write_bytes(draw_tile(number))
        patterns.append(pattern)
    files = [folder / f"tile-{number}.png" for number in range(count)]
    for number, file in enumerate(files):
        try:
            os.link(patterns[number % PATTERNS], file)
        except OSError:
            shutil.copyfile(patterns[number % PATTERNS], file)
    return files


def timed(ask: Ask, tiles: Sequence[Path], numbers: range, threads: int) -> tuple[float, float]:
    """Wall and CPU seconds of this process for some of the questions."""
    asked = [(f"What does page {number} say?", tiles[TILES * number : TILES * (number + 1)]) for number in numbers]
    wall, cpu = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(threads) as pool:
        answers = list(pool.map(lambda one: ask(*one), asked))
    assert answers == ["an answer"] * len(asked), "a question was lost"
    return time.perf_counter() - wall, time.process_time() - cpu


def measured(ways: Sequence[Way], tiles: Sequence[Path], total: int, rounds: int) -> list[Row]:
    """All ways in turn, a share of their questions each round, so that a busy machine is busy for all of them; scaled to `total`."""
    spent = [(0.0, 0.0)] * len(ways)
    for turn in range(rounds):
        for place, (_, ask, count, threads) in enumerate(ways):
            numbers = range(count * turn // rounds, count * (turn + 1) // rounds)
            wall, cpu = timed(ask, tiles, numbers, threads)
            spent[place] = (spent[place][0] + wall, spent[place][1] + cpu)
    return [Row(way, wall * total / count, cpu * total / count, count) for (way, _, count, _), (wall, cpu) in zip(ways, spent, strict=True)]


def ours(url: str, image_pixels: int | None = None) -> Ask:
    """This client."""
    settings = RemoteReaderSettings(base_url=url, image_pixels=image_pixels)
    reader = RemoteReader(settings, ChatClient(settings, "reader"))
    return lambda question, tiles: reader.answer(question, tiles).text


def todays(url: str, again: bool) -> Ask:
    """The openai library with its own retries; `again`: tiles are opened with PIL and encoded as PNG again."""
    import openai

    client = openai.OpenAI(api_key="none", base_url=url)

    def encoded(path: Path) -> str:
        data = path.read_bytes()
        if again:
            file = io.BytesIO()
            with Image.open(io.BytesIO(data)) as image:
                image.convert("RGB").save(file, "PNG")
            data = file.getvalue()
        return f"data:image/png;base64,{base64.b64encode(data).decode()}"

    def ask(question: str, tiles: Sequence[Path]) -> str:
        images = [{"type": "image_url", "image_url": {"url": encoded(tile)}} for tile in tiles]
        content = [{"type": "text", "text": question}, *images]
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]
        reply = client.chat.completions.create(
            model="Qwen/Qwen3-VL-4B-Instruct",
            messages=messages,  # type: ignore[arg-type]
            max_tokens=200,
            temperature=0.0,
        )
        return reply.choices[0].message.content or ""

    return ask


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--compared", type=int, default=40, help="questions through each of the other ways")
    parser.add_argument("--rounds", type=int, default=5, help="in which the ways take turns")
    options = parser.parse_args()
    total, few = options.questions, min(options.compared, options.questions)
    with tempfile.TemporaryDirectory(prefix="qa-client-") as folder:
        tiles = write_tiles(Path(folder), TILES * total)
        size = sum(tile.stat().st_size for tile in tiles) / len(tiles)
        print(f"{total} questions, {TILES} tiles of {WIDTH}×{HEIGHT} each, {size / 1e3:.0f} kB a tile\n")
        server = subprocess.Popen([sys.executable, str(SERVER)], stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            for warm in (ours(url), todays(url, again=False)):
                warm("Are you there?", tiles[:1])
            ways: list[Way] = [
                ("Stairstep, 16 in flight, the files' own bytes", ours(url), total, 16),
                ("openai, 4 threads, PIL, PNG encoded again (today)", todays(url, again=True), few, 4),
                ("openai, 4 threads, the files' own bytes", todays(url, again=False), few, 4),
                ("Stairstep, 16 in flight, shrunk to 448,000 pixels", ours(url, 448_000), few, 16),
            ]
            rows = measured(ways, tiles, total, min(options.rounds, few))
        finally:
            server.terminate()
            server.wait()
    print(f"{'way':<52} {'wall s':>8} {'CPU s':>8} {'ms each':>9} {'measured':>9}")
    for row in rows:
        print(f"{row.way:<52} {row.wall_s:>8.1f} {row.cpu_s:>8.1f} {row.wall_s / total * 1000:>9.1f} {row.measured:>9}")
    mine, today = rows[:2]
    ratios = {"wall": today.wall_s / mine.wall_s, "cpu": today.cpu_s / mine.cpu_s}
    print(f"\n{ratios['wall']:.1f} times less wall time and {ratios['cpu']:.1f} times less CPU time than today's way")
    print(f"this client's own {mine.cpu_s:.1f} s are {'below' if mine.cpu_s < MOST_S else 'NOT below'} {MOST_S:g} s", end="")
    print(f"; {os.getloadavg()[0]:.1f} processes wanted {os.cpu_count()} cores")
    RESULTS.parent.mkdir(exist_ok=True)
    facts = {"questions": total, "tile_bytes": round(size), "rows": [asdict(row) for row in rows], "ratios": ratios}
    write_json(RESULTS, {**facts, "load_average": os.getloadavg()[0], "environment": describe_environment(devices=False)})
    return 0 if mine.cpu_s < MOST_S else 1


if __name__ == "__main__":
    sys.exit(main())
