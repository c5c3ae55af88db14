"""The board of a run, of several runs, or of a sweep: one HTML file that opens from disk, without a network.

python -m jobs.report runs/tinywiki                          runs/tinywiki/report.html
python -m jobs.report runs/a runs/b --out both.html          curves over each other, any two compared; by default beside the first
python -m jobs.report runs/staircase --watch                 a sweep, served on this machine and updated while it goes on
python -m jobs.report runs/staircase --text --csv all.csv    the tables in the terminal, and every number as CSV

Nothing is computed again: scores are those of the run folders. docs/board.md says what each view says and does not say.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from jobs.common import readable, run
from stairstep.board import BoardServer, Folders, Live, as_csv, board_text, check_place, content, html_page
from stairstep.records import write_atomically
from stairstep.records.places import ObjectFolder, place
from stairstep.settings import InputError

PICTURES = 48


def main(arguments: list[str]) -> int:
    """Write the page, or serve it, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("folders", nargs="+", metavar="RUN|SWEEP", help="run folders, or one sweep's; also by URL")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the page goes; default: report.html in the folder")
    parser.add_argument(
        "--thumbnails", type=int, default=PICTURES, metavar="N", help=f"pictures of tiles in a runs' page, at most; default {PICTURES}"
    )
    parser.add_argument("--text", action="store_true", help="print the tables; the page is written only if --out says where")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write one row a run and evaluated step, with all numbers")
    parser.add_argument("--watch", action="store_true", help="serve the page on 127.0.0.1 and update it, until Ctrl-C; nothing is written")
    parser.add_argument("--port", type=int, default=0, help="for --watch; default: any that is free")
    options = parser.parse_args(arguments)
    if options.thumbnails < 0:
        raise InputError(f"--thumbnails {options.thumbnails}: expected 0 or more")
    if options.watch and (options.out or options.text or options.csv):
        raise InputError(
            "--watch serves the page and writes nothing; leave out --out, --text and --csv, or run a second time without --watch"
        )
    if options.port and not options.watch:
        raise InputError("--port is for --watch")
    remote = [one for one in map(place, options.folders) if isinstance(one, ObjectFolder)]
    if remote and options.watch:
        raise InputError("--watch follows folders of this machine; leave it out for one in an object store, and run it again for news")
    if remote and len(options.folders) > 1 and not (options.out or options.text):
        raise InputError("say by --out where the page over runs in an object store goes")
    folders = Folders([readable(one) for one in options.folders])
    if options.watch:
        return watch(folders, options.thumbnails, options.port)
    out = options.out or (None if options.text else folders.target)
    for option, path in {"--csv": options.csv, "--out": out}.items():
        if path:
            check_place(option, path)
    board = folders.read()
    if options.csv:
        write_atomically(options.csv, as_csv(board))
        print(options.csv)
    if options.text:
        print(board_text(board, folders))
    if out:
        page = html_page(content(board, folders, options.thumbnails))
        if remote and not options.out:
            remote[0].put(out.name, page)
        else:
            write_atomically(out, page)
        print(remote[0].where(out.name) if remote and not options.out else out)
    return 0


def watch(folders: Folders, pictures: int, port: int) -> int:
    """Serve until Ctrl-C."""
    server = BoardServer(Live(folders, lambda: content(folders.read(), folders, pictures)), port)
    print(f"the board is at {server.address} (Ctrl-C ends it)", flush=True)
    try:
        server.serve()
    except KeyboardInterrupt:
        print("ended")
    return 0


if __name__ == "__main__":
    run(main)
