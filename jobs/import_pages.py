"""Make tiles of your own pages, with skeletons of pairs and of a question set to fill in: docs/data.md.

python -m jobs.import_pages FOLDER --out DIR                     pictures, PDFs and saved web pages below a folder
python -m jobs.import_pages a.png b.pdf --out DIR                single files
python -m jobs.import_pages --urls FILE --out DIR                web pages, one address a line

The same command goes on with DIR after a kill, and takes in what has been added to the sources. The exit code is 1 where a page failed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from jobs.common import run
from stairstep.records import logging_setup
from stairstep.tasks.import_pages import TileSize, import_pages, summary


def main(arguments: list[str]) -> int:
    """Import, then tell what was done and what to do next."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", type=Path, metavar="SOURCE", help="a folder, which is searched, or a file")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder, or one that an import has begun")
    parser.add_argument("--urls", type=Path, metavar="FILE", help="a text file with one http or https address a line")
    parser.add_argument("--width", type=int, default=TileSize.width, help="widest tile in pixels; a wider page is shrunk")
    parser.add_argument("--height", type=int, default=TileSize.height, help="highest tile in pixels; a higher page is cut")
    parser.add_argument("--browser", type=Path, metavar="PATH", help="the Chromium for web pages; default: the one on PATH")
    options = parser.parse_intermixed_args(arguments)
    logging_setup()
    done = import_pages(options.sources, options.urls, options.out, TileSize(options.width, options.height), options.browser)
    print(summary(done, options.out))
    return 1 if done.failures else 0


if __name__ == "__main__":
    run(main)
