"""What `verify` says of a winner that is wrong."""

from __future__ import annotations

from support.scans import images, scan, two_convolutions
from unitvis.scanning.verify import verify


def test_positions_are_told_where_they_differ() -> None:
    model = two_convolutions()
    run = scan(model, images(5, 12), ["2"], 2)
    image, (row, column) = run["2"].images[3, 1], run["2"].positions[3, 1].tolist()
    value = f"{run['2'].values[3, 1]:.9g}"
    other = (row + 1) % 8
    run["2"].positions[3, 1, 0] = other
    found = verify(run, model)
    assert found["wrong"] == 1
    said = f"{value} at row {other}, column {column} in the run, {value} at row {row}, column {column} now"
    assert found["first_wrong"] == f"image {image} in layer '2': {said}"
    run["2"].positions[3, 1, 0] = row
    run["2"].values[3, 1] += 1
    assert verify(run, model)["first_wrong"].endswith(f" in the run, {value} now")
