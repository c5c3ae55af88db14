"""Settings of the tiles room: how many visual tokens a tile may have, what a file may ask for, how far decoding runs ahead."""

from __future__ import annotations

from dataclasses import dataclass

from stairstep.records.places import check_places
from stairstep.settings import SettingError, setting

from .geometry import PIXELS_PER_TOKEN, Geometry


@dataclass(frozen=True)
class TileSettings:
    """How tiles become pixels."""

    max_visual_tokens: int = setting(
        1024, minimum=1, doc="Most visual tokens of a tile; a larger one is shrunk. One token covers 32×32 pixels."
    )
    min_visual_tokens: int = setting(4, minimum=1, doc="Fewest visual tokens of a tile; a smaller one is enlarged.")
    max_image_pixels: int = setting(
        80_000_000, minimum=1, doc="Most pixels that a tile's file may announce in its header; a larger one is refused undecoded."
    )
    decode_workers: int | None = setting(None, minimum=1, doc="Threads that decode tiles ahead of their use; null = one a core.")
    prefetch_mb: int = setting(
        512, minimum=1, doc="Most MB of resized pixels that decoding ahead may hold; each worker needs memory for one image besides."
    )

    store: str | None = setting(
        None,
        doc="Folder or URL (s3://…) of the tile store that jobs.preprocess fills; null = `tiles` under the run root. What it has is not "
        "decoded again.",
    )

    def check(self) -> None:
        """What one field alone cannot show; a URL is one that holds no secret."""
        check_places(store=self.store)
        if self.min_visual_tokens > self.max_visual_tokens:
            raise SettingError(
                "min_visual_tokens",
                f"{self.min_visual_tokens} is more than max_visual_tokens = {self.max_visual_tokens}; lower it or raise the other",
            )

    def geometry(self) -> Geometry:
        """The geometry that these settings ask for."""
        return Geometry(self.min_visual_tokens * PIXELS_PER_TOKEN, self.max_visual_tokens * PIXELS_PER_TOKEN)
