"""Write the JSON schema of recipes, so that editors complete and check them.

python -m jobs.schema                 writes recipes/schema.json
"""

from __future__ import annotations

import json
from pathlib import Path

from jobs.common import run
from stairstep.settings import json_schema
from stairstep.tasks import Recipe

PLACE = Path(__file__).parent.parent / "recipes" / "schema.json"


def schema_text() -> str:
    """The schema as the file holds it."""
    return json.dumps(json_schema(Recipe, "Stairstep recipe"), indent=2, ensure_ascii=False) + "\n"


def main(arguments: list[str]) -> int:
    """Write the file; takes no arguments."""
    if arguments:
        print(f"jobs.schema takes no arguments, found {' '.join(arguments)}")
        return 2
    PLACE.write_text(schema_text(), encoding="utf-8")
    print(f"wrote {PLACE}")
    return 0


if __name__ == "__main__":
    run(main)
