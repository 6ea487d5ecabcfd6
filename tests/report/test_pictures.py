"""Bits per weight against KL as a picture: every point stands where its numbers say."""

from __future__ import annotations

import math
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from quant.errors import QuantError
from quant.evaluation.comparison import Compared
from quant.evaluation.quality import Evaluation, Measured
from quant.report.pictures import plot


def compared(path: str, bits: float | None, kl: float, error: float = 0.001) -> Compared:
    measured = Evaluation(
        path=path,
        against="m/source",
        text="text.txt",
        tokens=100,
        chunks=3,
        perplexity=Measured(9, 1),
        source_perplexity=Measured(8, 1),
        kl=Measured(kl, error),
        top1=Measured(0.9, 0.1),
        perplexity_increase=0.1,
    )
    return Compared(measured, "w4a16", bits, 1000)


SETS = {
    "usual": [
        compared("out/a", 4.25, 0.006),
        compared("out/b", 8.25, 0.00002, 0.00003),
        compared('out/<c> & "d"', 4.3, 0.004),
    ],
    "one": [compared("out/a", 4.25, 0.006)],
    "zero": [compared("a", 16.0, 0.0, 0.0), compared("b", 4.0, 0.5)],
    "alike": [compared("x/a", 4.0, 0.5, 0.0), compared("y/a", 4.0, 0.5, 0.0)],
    "wide": [
        compared("a", 2.0, 90.0),
        compared("b", 8.0, 1e-7, math.nan),
        compared("c", 8.0, math.nan),
        compared("d", None, 1.0),
    ],
}


@pytest.mark.parametrize("name", SETS)
def test_the_html_is_one_file_whose_points_stand_where_the_numbers_say(name: str, tmp_path: Path) -> None:
    done = SETS[name]
    plot(tmp_path / "p.html", [one.to_dict() for one in done])
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert "http" not in page and "<script" not in page and page.count("<tr>") == 1 + len(done)
    svg = ET.fromstring(re.search(r"<svg.*?</svg>", page, re.S)[0])  # type: ignore[index]
    drawn = [
        c
        for c in done
        if c.bits_per_weight is not None and c.evaluation.kl and math.isfinite(c.evaluation.kl.mean)
    ]
    places = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in svg.iter("circle")]
    assert len(places) == len(drawn)
    width, height = map(float, svg.attrib["viewBox"].split()[2:])
    for (x, y), one in zip(places, drawn, strict=True):
        assert 90 <= x <= width - 170 and 20 <= y <= height - 50
        for (x2, y2), other in zip(places, drawn, strict=True):
            assert (x < x2) == (one.bits_per_weight < other.bits_per_weight)  # type: ignore[operator]
            assert (y > y2) == (one.evaluation.kl.mean < other.evaluation.kl.mean)  # type: ignore[union-attr]
    labels = [t.text for t in svg.iter("text") if t.get("class") == "label"]
    wanted = {"usual": ["a", "b", '<c> & "d"'], "alike": ["x/a", "y/a"]}.get(
        name, [c.evaluation.path.rpartition("/")[2] for c in drawn]
    )
    assert labels == wanted
    ticks = [float(t.text) for t in svg.iter("text") if t.text and re.fullmatch(r"[-\d.e]+", t.text)]
    assert len(ticks) >= 4


def test_a_picture_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QuantError, match="nothing is drawn"):
        plot(tmp_path / "p.html", [one.to_dict() for one in SETS["wide"][2:]])


@pytest.mark.parametrize("name", SETS)
def test_the_png_is_a_picture(name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plots` is not installed")
    plot(tmp_path / "p.png", [one.to_dict() for one in SETS[name]])
    raw = (tmp_path / "p.png").read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n" and len(raw) > 10_000
    assert "matplotlib.pyplot" not in sys.modules  # no window system, no global state


def test_labels_of_points_close_together_are_all_readable(tmp_path: Path) -> None:
    crowd = [compared(f"out/checkpoint-{i:02}", 4.1 + i / 1000, 0.005 + i / 1e5) for i in range(12)]
    plot(tmp_path / "p.html", [one.to_dict() for one in crowd])
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    svg = ET.fromstring(re.search(r"<svg.*?</svg>", page, re.S)[0])  # type: ignore[index]
    width, height = map(float, svg.attrib["viewBox"].split()[2:])
    boxes = []
    for text in svg.iter("text"):
        if text.get("class") == "label":
            left, base = float(text.attrib["x"]), float(text.attrib["y"])
            boxes.append((left, base - 11, left + 6.6 * len(text.text or ""), base + 2))
    assert len(boxes) == 12 and len(re.findall('class="error"', page)) >= 12 and "KL 0" in page
    for i, (left, top, right, bottom) in enumerate(boxes):
        assert 0 <= left and right <= width and 0 <= top and bottom <= height
        for other in boxes[:i]:
            assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
