"""nemotron.report.page and .chart: a page that is whole, needs nothing, and shows the curves."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from nemotron.errors import ExitCode, NemotronError
from nemotron.report import read_run, write_page
from nemotron.report.chart import Line, line_chart, number
from nemotron.report.page import report_page

WriteMetrics = Callable[..., Path]
HOSTILE = "<script>alert('x')</script>&\"http://example.com\""


def parsed(page: str) -> ElementTree.Element:
    """Return the page, which is XML as well."""
    return ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n"))  # noqa: S314 - our own


def charts(page: str) -> dict[str, list[str]]:
    """Return the labels of the curves by the title of their chart."""
    return {
        str(figure.findtext("figcaption")): [
            str(curve.findtext("title")) for curve in figure.iter("polyline")
        ]
        for figure in parsed(page).iter("figure")
    }


def test_a_page_has_every_curve_and_every_value(write_metrics: WriteMetrics) -> None:
    write_metrics("out", optimizer={"lr": 0.125})
    page = report_page(read_run("out"))
    assert charts(page) == {
        "Loss (training solid, validation dashed)": ["out training", "out validation"],
        "Gradient norm": ["out"],
        "Learning rate": ["out"],
        "Tokens per second": ["out"],
        "Supervised tokens per second": ["out"],
        "TFLOP/s per rank": ["out"],
        "Peak memory per rank, GiB": ["out"],
    }
    cells = [cell.text for cell in parsed(page).iter("td")]
    assert cells[cells.index("optimizer.lr") + 1] == "0.125"
    assert "2.5 (best)" in cells


def test_a_character_that_xml_forbids_is_spelled_out(write_metrics: WriteMetrics) -> None:
    write_metrics("out", title="a\x07b\ud800\ufffe\x85 \u2028\U0001f600")
    page = report_page(read_run("out"))
    cells = [cell.text for cell in parsed(page).iter("td")]
    assert cells[cells.index("title") + 1] == "a\\x07b\\ud800\\ufffe\x85 \u2028\U0001f600"
    assert page.encode()


def test_two_runs_are_drawn_over_each_other(write_metrics: WriteMetrics) -> None:
    write_metrics("one", optimizer={"lr": 0.1})
    write_metrics("two", optimizer={"lr": 0.2})
    page = report_page(read_run("one"), read_run("two"))
    assert charts(page)["Learning rate"] == ["one", "two"]
    assert len(charts(page)["Loss (training solid, validation dashed)"]) == 4
    rows = [["".join(cell.itertext()) for cell in row] for row in parsed(page).iter("tr")]
    assert ["optimizer.lr", "0.1", "0.2"] in rows


def test_a_page_needs_nothing_else_and_runs_nothing(write_metrics: WriteMetrics) -> None:
    write_metrics("out", hf_model_path=HOSTILE)
    page = report_page(read_run("out"))
    root = parsed(page)
    assert {element.tag for element in root.iter()}.isdisjoint({"script", "link", "img", "iframe"})
    attributes = {name for element in root.iter() for name in element.attrib}
    assert attributes.isdisjoint({"src", "href", "onload", "onclick"})
    assert not re.search(r"url\(|@import", page)
    assert "default-src 'none'" in page
    assert HOSTILE in [cell.text for cell in root.iter("td")]  # as text, not as markup


def test_a_run_without_a_step_has_a_page(write_metrics: WriteMetrics) -> None:
    directory = write_metrics("out")
    (directory / "metrics.jsonl").write_text("")
    assert "Nothing was recorded." in report_page(read_run("out"))


def test_a_curve_goes_through_its_points(write_metrics: WriteMetrics) -> None:
    chart = line_chart([Line("a", [(0, 1.0), (10, 3.0), (20, 2.0)])], x_label="iteration")
    (curve,) = parsed(chart).iter("polyline")
    (x0, y0), (x1, y1), (x2, y2) = (
        tuple(map(float, place.split(","))) for place in curve.attrib["points"].split()
    )
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)  # pixels are given to a tenth
    assert y0 - y2 == pytest.approx(y2 - y1, abs=0.2)
    assert y1 < y2 < y0  # up is less in SVG


def test_a_long_curve_is_thinned_and_keeps_its_extremes() -> None:
    points = [(x, 1.0) for x in range(100_000)]
    points[54_321] = (54_321, 9.0)
    chart = line_chart([Line("a", points)], x_label="iteration")
    assert len(chart) < 30_000
    (curve,) = parsed(chart).iter("polyline")
    heights = {place.split(",")[1] for place in curve.attrib["points"].split()}
    assert len(heights) == 2


@pytest.mark.parametrize("value", [0.0, 5.0, -2.5, 1e-9])
def test_a_constant_is_drawn_with_room_around_it(value: float) -> None:
    chart = line_chart([Line("a", [(1, value), (2, value)])], x_label="iteration")
    assert 3 <= len(list(parsed(chart).iter("line"))) <= 30


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.04125, "0.04125"), (3e-05, "3e-05"), (12345.0, "12.35k"), (2.5e9, "2.5G")],
)
def test_a_number_is_shown_with_four_digits_and_a_unit(value: float, text: str) -> None:
    assert number(value) == text


def test_a_page_goes_where_it_is_wanted_or_is_refused(write_metrics: WriteMetrics) -> None:
    write_metrics("out")
    run = read_run("out")
    assert write_page(run, None, None) == Path("report-out.html")
    assert Path("report-out.html").read_text().startswith("<!DOCTYPE html>")
    with pytest.raises(NemotronError, match="No such file or directory") as caught:
        write_page(run, None, Path("nowhere/page.html"))
    assert caught.value.exit_code is ExitCode.IO
