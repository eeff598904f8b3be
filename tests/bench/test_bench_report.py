"""Percentiles, tables and result files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import report

FLOATS = st.floats(-1e6, 1e6)


@given(values=st.lists(FLOATS, min_size=1, max_size=50), percent=st.floats(0, 100))
def test_percentile_equals_numpy(values: list[float], percent: float) -> None:
    assert report.percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)), abs=1e-6)


@pytest.mark.parametrize(("values", "percent"), [([], 50), ([1.0], 101), ([1.0], -1)])
def test_percentile_of_nothing_or_outside_is_refused(values: list[float], percent: float) -> None:
    with pytest.raises(ValueError, match="percentile"):
        report.percentile(values, percent)


def test_spread_of_no_values_is_none_and_not_zero() -> None:
    assert report.spread([]) is None
    assert report.spread([2.0, 4.0]) == pytest.approx(
        {"min": 2, "mean": 3, "p50": 3, "p90": 3.8, "p99": 3.98, "count": 2}
    )


def test_table_columns_are_aligned() -> None:
    lines = report.table(["name", "s"], [["a", "1.25"], ["longer", "2"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].endswith(":|")


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0.0123, "12.3 ms"), (1.234, "1.23 s"), (0.9999, "1 s"), (27.31, "27.3 s")]
)
def test_seconds(value: float | None, text: str) -> None:
    assert report.seconds(value) == text


def test_result_file_is_whole_and_names_its_origin(tmp_path: Path) -> None:
    head = report.provenance("serve")
    report.write_json(tmp_path / "results" / "x.json", head)
    read = json.loads((tmp_path / "results" / "x.json").read_text())
    assert read["machine"]["cores"] >= 1
    assert read["machine"]["cpu"]
    assert read["versions"]["mlx"]
    assert list((tmp_path / "results").iterdir()) == [tmp_path / "results" / "x.json"]
