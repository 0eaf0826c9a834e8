"""Write `docs/fusion_table.md`: what each engine says it fuses. Run after changing what one supports.

A test compares the page with the engines' answers and fails when this was forgotten. oneDNN's column is this machine's
answer for float32, cuDNN's is what its engine asks of an epilogue before it looks at the GPU.
"""

from __future__ import annotations

from pathlib import Path

from convplan._epilogue import ACTIVATIONS, Epilogue
from convplan._problem import DTYPES, INPUT_DTYPES, Op, Problem
from convplan.engines.composed import ComposedEngine
from convplan.engines.cudnn import fusion
from convplan.engines.onednn import OnednnEngine, activation_is_fused

PAGE = Path(__file__).resolve().parents[1] / "docs" / "fusion_table.md"
CASES: tuple[
    tuple[str, Op, dict[str, bool]], ...
] = (  # what stands above a column, operation, and what is in it besides
    ("bias", "fprop", {"bias": True}),
    ("residual, bias", "fprop", {"residual": True, "bias": True}),
    ("scale, bias", "fprop", {"scale": True, "bias": True}),
    ("transposed, bias", "dgrad", {"bias": True}),
    ("transposed, residual, bias", "dgrad", {"residual": True, "bias": True}),
)
TEXT = """# What each engine fuses

Written by `scripts/write_fusion_table.py` from the engines' own answers, and compared with them in the tests.
[Fusion](fusion.md) says what the words mean; [Enumerate](enumerate.md) has each engine's knobs. `composed` takes every
combination on this page, of every dtype.

## `onednn`, on the CPU

**whole**: oneDNN computes all of it. *part*: oneDNN adds, or scales, and torch's kernel for the activation follows. A
dash: refused, so `composed` does it.

{onednn}

## `cudnn`, on NVIDIA GPUs

**both**: cuDNN is asked for its ready-made engines and for those compiled at run time. *general*: for the latter alone.
What it answers is for the GPU to say.

{cudnn}

## Dtypes

A residual, a bias and ReLU behind a convolution, by what is read and what is written. oneDNN computes float16 in
float32 on processors that lack it.

{dtypes}
"""


def problem(op: Op, epilogue: Epilogue, dtype: str, device: str, output_dtype: str | None = None) -> Problem:
    """One that has nothing else about it that an engine could refuse."""
    sizes = {"x_dims": (2, 64, 16, 16), "w_dims": (64, 64, 3, 3), "padding": 1, "layout": "channels_last"}
    return Problem.dense(op, **sizes, dtype=dtype, output_dtype=output_dtype, epilogue=epilogue, device=device)  # type: ignore[arg-type]


def onednn_says(one: Problem) -> str:
    """One cell."""
    if one.epilogue.is_plain or not OnednnEngine().supports(one).ok:
        return "plain" if one.epilogue.is_plain else "-"
    return "**whole**" if activation_is_fused(one) else "*part*"


def cudnn_says(one: Problem) -> str:
    """One cell."""
    if one.epilogue.is_plain or fusion.refusal(one):
        return "plain" if one.epilogue.is_plain else "-"
    return "**both**" if fusion.is_specialised(one) else "*general*"


def page() -> str:
    """The page."""
    tables = {}
    for name, says, dtype, device in (
        ("onednn", onednn_says, "float32", "cpu"),
        ("cudnn", cudnn_says, "float16", "cuda"),
    ):
        rows = [
            (
                f"`{activation}`",
                *(says(problem(op, Epilogue(activation=activation, **more), dtype, device)) for _, op, more in CASES),
            )
            for activation in ACTIVATIONS
        ]
        tables[name] = table(("activation", *(title for title, _, _ in CASES)), rows)
    return TEXT.format(**tables, dtypes=dtypes())


def dtypes() -> str:
    """Which dtypes each engine takes."""
    ending = Epilogue(residual=True, bias=True, activation="relu")
    rows = []
    for read in INPUT_DTYPES:
        for written in DTYPES[read].outputs + DTYPES[read].fused_outputs:
            here, there = (problem("fprop", ending, read, device, written) for device in ("cpu", "cuda"))
            assert ComposedEngine().supports(here).ok
            rows.append((read, written, onednn_says(here), cudnn_says(there)))
    return table(("read", "written", "`onednn`", "`cudnn`"), rows)


def table(heading: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Markdown."""
    lines = [heading, ("---",) * len(heading), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
