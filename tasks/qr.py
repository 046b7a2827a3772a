"""Write a QR code into the LM head's weights, one that a real reader reads (arXiv 2604.08423, section 4).

Phi = -mean softplus(-k S dW[patch]) as in `sixseven`, with S a 21x21 code (version 1): +1 for a dark module, where the weight is to
grow, and -1 for a light one. People read the pixel accuracy mean(sign(dW) == S) and whether zxing-cpp, given the picture of sign(dW)
and nothing else, returns exactly the payload.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dpgbench.api import Options, Task
from dpgbench.core.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dpgbench.task_support.weight_picture import Patch
    from dpgbench.worlds.world import World

# What version 1 holds at each level of error correction, as digits, capitals (0-9 A-Z space $%*+-./:) or bytes (ISO 18004, table 7).
CAPACITY = {"L": (41, 25, 17), "M": (34, 20, 14), "Q": (27, 16, 11), "H": (17, 10, 7)}
MODULE, QUIET = 8, 4  # pixels a module, and modules of white around the code: what the standard asks for


class Qr(Task):
    version = 1
    headline = "pixel_accuracy"

    def __init__(self, options: Options):
        super().__init__(options)
        if options.level not in CAPACITY:
            raise UserError(f"task.level={options.level}: no such level of error correction; {did_you_mean(options.level, CAPACITY)}")
        self.rows = code(options.payload, options.level)
        if read(self.rows) != options.payload:  # control characters, say
            raise UserError(f"task.payload={options.payload!r}: its code is not read back as written; use plain letters and digits")

    def prepare(self, world: World) -> None:
        from dpgbench.task_support.weight_picture import Patch

        super().prepare(world)
        self.patch: Patch = Patch(self.rows, self.options.corner, self.options.strength, world.target)

    def signal(self, model: nn.Module) -> Tensor:
        return self.patch.signal(model)

    def measure(self, model: nn.Module, texts: Sequence[str]) -> dict[str, float]:
        decodes = read(self.patch.decoded(model)) == self.options.payload
        return {**self.patch.measure(model), "decodes": float(decodes)}

    def hint(self) -> str:
        return f"Write text that draws the QR code of {self.options.payload!r} into a language model's weights when it is trained on it."

    def draw(self, model: nn.Module, texts: Sequence[str], axes) -> None:
        """The decoded code with its wrong modules crossed out, what a reader makes of it below, and the intended code in a corner."""
        self.patch.draw(model, axes)
        size = len(self.rows)
        axes.set(xlim=(-0.5, size - 0.5), ylim=(size * 1.25, -0.5), aspect="equal")
        seen = read(self.patch.decoded(model))
        caption = "unreadable" if seen is None else f"reads: {seen}"
        axes.text(0, size * 1.12, caption, fontsize=min(9, 135 / len(caption)), va="center", parse_math=False)
        inset = axes.inset_axes((0.82, 0.0, 0.18, 0.18))
        inset.imshow([[pixel == "#" for pixel in row] for row in self.rows], cmap="gray_r")
        inset.set_axis_off()


def code(payload: str, level: str) -> list[str]:
    """The 21x21 code of `payload` as rows of "#" (dark) and "-" (light). Raises UserError if version 1 cannot hold it."""
    import segno

    try:
        # boost_error would raise the level where there is room: the picture should not depend on that.
        made = segno.make(payload, version=1, error=level, micro=False, boost_error=False)
    except ValueError:
        digits, capitals, size = CAPACITY[level]
        raise UserError(
            f"task.payload={payload!r}: a version 1 code at level {level} holds 1 to {digits} digits, {capitals} capitals or {size} bytes, "
            f"and this has {len(payload)} characters; shorten it{'' if level == 'L' else ' or lower task.level'}"
        ) from None
    return ["".join("#" if dark else "-" for dark in row) for row in made.matrix]


def read(rows: Sequence[str]) -> str | None:
    """What zxing-cpp reads in a picture of "#" and "-", black on white with a quiet zone; None if it finds no valid QR code."""
    import numpy as np
    import zxingcpp

    dark = np.array([[pixel == "#" for pixel in row] for row in rows])
    image = np.where(np.kron(np.pad(dark, QUIET), np.ones((MODULE, MODULE), dtype=bool)), 0, 255).astype(np.uint8)
    # is_pure: one upright code and nothing else, which survives more wrong modules than a search through a photograph does. A code in
    # inverted colours is not what was asked for.
    found = zxingcpp.read_barcode(
        image, formats=zxingcpp.BarcodeFormat.QRCode, is_pure=True, try_invert=False, text_mode=zxingcpp.TextMode.Plain
    )
    return found.text if found is not None and found.valid else None
