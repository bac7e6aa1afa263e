"""The lessons' index: a small picture of each, and the tables of lessons in README.md and notebooks/README.md.

    python tools/thumbnails.py            # after `make refresh`, which calls it
    python tools/thumbnails.py --check    # only name what is missing or older than its lesson

A picture is a figure from the lesson's stored outputs, scaled to 320 x 180 pixels. docs/_static/thumbnails/ has the
pictures and digests.json, which says of which figures they were made. Exit code: 0, or 1 when ``--check`` finds one.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import nbformat
from _notebooks import NOTEBOOKS, ROOT
from PIL import Image

FOLDER = ROOT / "docs" / "_static" / "thumbnails"
DIGESTS = FOLDER / "digests.json"
SIZE = (320, 180)
LARGEST = 25_000  # bytes
COLUMNS = 4  # of the README's table


class Lesson(NamedTuple):
    """What the index says of a lesson.

    Attributes:
        cell: id of the cell whose figure is shown.
        question: what the lesson answers, in one line.
        shows: what is to be seen in the figure, for those who do not see it.
    """

    cell: str
    question: str
    shows: str


LESSONS = {
    "01_toy_boundary_matching": Lesson(
        "l01-05-06",
        "Can a trained network alone rebuild points that look like its lost training data?",
        "Random points move to where the network's BatchNorm statistics match",
    ),
    "02_quantizers_and_clipping": Lesson(
        "c024",
        "Which 2ⁿ values should a tensor take, and what does the choice cost?",
        "Histograms of four tensors with the clip thresholds of four rules",
    ),
    "03_what_batchnorm_remembers": Lesson(
        "l03-06-01",
        "Do two numbers per channel suffice to turn noise into images, and why do these look alike?",
        "Channel means of real images are spread, those of ZeroQ's images lie close together",
    ),
    "04_image_generation": Lesson(
        "l04-08-02",
        "Which losses make a generator's images a substitute for the data?",
        "Rows of generated digits, one row per loss, above real digits",
    ),
    "05_data_free_distillation": Lesson(
        "l05-06-04",
        "Can a smaller network learn from a larger one without a single image?",
        "Accuracy of students taught with real images, by three data-free methods, and with noise",
    ),
    "06_loss_ablations": Lesson(
        "l06-06-01",
        "Which terms of a method help, and what must a table show before you believe it?",
        "Accuracy without each term of DFQF, and the paired differences of single seeds",
    ),
    "07_w4a4_fine_tuning": Lesson(
        "l07-07-17",
        "How does a checkpoint become a working 4-bit or 2-bit network without data?",
        "At 4, 3 and 2 bits, fine-tuning gains more the fewer the bits",
    ),
    "08_adversarial_ensembles": Lesson(
        "l08-03-06",
        "Are several generators and students better than one of each, and how would we know?",
        "What a student has not learned yet with one generator and with four, and both errors by round",
    ),
    "09_diverse_samples_adaround": Lesson(
        "l09-06-04",
        "How different are synthetic images from one another, and does it matter?",
        "Accuracy of nearest rounding and of AdaRound on images from five sources",
    ),
    "10_deploy": Lesson(
        "l10-06-10",
        "Does the low-bit network leave PyTorch as integers, with the same predictions?",
        "Sizes of the FP32, int8 and int4 files",
    ),
    "11_your_own_model": Lesson(
        "l11-07-10",
        "What do I do with a checkpoint of my own, and what if it fails?",
        "Mixed bit widths lose less than one bit width of the same size",
    ),
}


def figure_of(name: str) -> bytes:
    """The figure of a lesson that its thumbnail shows, as it is stored in the notebook."""
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    cell = next(cell for cell in notebook.cells if cell.get("id") == LESSONS[name].cell)
    return base64.b64decode(next(out.data["image/png"] for out in cell.outputs if "image/png" in out.get("data", {})))


def digest_of(figure: bytes) -> str:
    """Sixteen digits that change with the figure."""
    return hashlib.sha256(figure).hexdigest()[:16]


def thumbnail(figure: bytes) -> bytes:
    """The figure on a white card of SIZE, as a PNG of as many colors as fit into LARGEST bytes."""
    picture = Image.open(io.BytesIO(figure)).convert("RGB")
    picture.thumbnail(SIZE, Image.Resampling.LANCZOS)
    card = Image.new("RGB", SIZE, "white")
    card.paste(picture, ((SIZE[0] - picture.width) // 2, (SIZE[1] - picture.height) // 2))
    for colors in (128, 64, 32, 16):
        content = io.BytesIO()
        card.quantize(colors).save(content, format="PNG", optimize=True)
        if content.tell() <= LARGEST:
            break
    return content.getvalue()


def number_and_title(name: str) -> str:
    """The title of a lesson, such as "07 · W4A4 fine-tuning"."""
    first = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells[0].source
    return first.partition("\n")[0].removeprefix("# ")


def front_table() -> str:
    """The README's table: COLUMNS lessons in a row."""
    cells = [
        f'<td width="{100 // COLUMNS}%" valign="top"><a href="notebooks/{name}.ipynb">'
        f'<img src="docs/_static/thumbnails/{name}.png" alt="{lesson.shows}"><br>'
        f"<b>{number_and_title(name)}</b></a><br>{lesson.question}</td>"
        for name, lesson in LESSONS.items()
    ]
    rows = ["\n".join(cells[start : start + COLUMNS]) for start in range(0, len(cells), COLUMNS)]
    return "\n".join(["<table>", *(f"<tr>\n{row}\n</tr>" for row in rows), "</table>"])


def index_table(notebooks: str = "", pictures: str = "../docs/_static/thumbnails/") -> str:
    """One lesson a row, with the folders of notebooks and pictures as the reading document sees them."""
    rows = ["| lesson | question | a figure of it |", "| --- | --- | --- |"]
    for name, lesson in LESSONS.items():
        link = f"[{number_and_title(name)}]({notebooks}{name}.ipynb)"
        rows.append(f"| {link} | {lesson.question} | ![{lesson.shows}]({pictures}{name}.png) |")
    return "\n".join(rows)


def with_table(text: str, table: str) -> str:
    """A document with its table of lessons made anew."""
    return re.sub(
        r"(<!-- lessons -->\n).*?(<!-- end -->)", lambda match: f"{match[1]}{table}\n{match[2]}", text, flags=re.DOTALL
    )


def documents() -> dict[Path, str]:
    """Each document that shows the lessons, as it should read."""
    tables = {ROOT / "README.md": front_table(), NOTEBOOKS / "README.md": index_table()}
    return {path: with_table(path.read_text(encoding="utf-8"), table) for path, table in tables.items()}


def outdated() -> Iterator[str]:
    """Name what ``python tools/thumbnails.py`` would change."""
    digests = json.loads(DIGESTS.read_text(encoding="utf-8")) if DIGESTS.exists() else {}
    for name in LESSONS:
        if not (FOLDER / f"{name}.png").exists() or digests.get(name) != digest_of(figure_of(name)):
            yield f"the thumbnail of {name} is not of the figure that the lesson shows"
    for path, text in documents().items():
        if path.read_text(encoding="utf-8") != text:
            yield f"{path.relative_to(ROOT)} does not list the lessons as they are"


def write() -> None:
    """Make pictures, digests and tables anew."""
    figures = {name: figure_of(name) for name in LESSONS}
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        (FOLDER / f"{name}.png").write_bytes(thumbnail(figure))
    digests = {name: digest_of(figure) for name, figure in figures.items()}
    DIGESTS.write_text(json.dumps(digests, indent=1) + "\n", encoding="utf-8")
    for path, text in documents().items():
        path.write_text(text, encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Write, or name what is outdated; return the exit code."""
    parser = argparse.ArgumentParser(description="The lessons' thumbnails, and the tables that show them.")
    parser.add_argument("--check", action="store_true", help="change nothing, name what is outdated")
    if not parser.parse_args(arguments).check:
        write()
        return 0
    found = list(outdated())
    print("\n".join([*found, "run python tools/thumbnails.py"]) if found else "up to date", file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
