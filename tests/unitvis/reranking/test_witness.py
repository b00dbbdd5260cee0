"""The witness: winners computed again from the images given, and what it refuses."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

import unitvis
from support import brute
from support.scans import arrays, images, pictures, scan, tiny_net, two_convolutions
from unitvis import Recorder, UnitvisError
from unitvis.reranking.witness import witnesses
from unitvis.state.sampling import mixed, smallest_hashes

COUNT = 40
LAYERS = ["0", "2"]
OTHERS = "the images given are not those that were recorded under their ids: 'image .*' gave .* and gives .* now"


def pixels() -> Tensor:
    return images(COUNT, 12)


def shuffled() -> Iterator[tuple[Tensor, Tensor]]:
    """Batches in random order, with their ids."""
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(3))
    return iter([(pixels()[some], some) for some in order.split(13)])


def recorded(*, with_ids: bool, precision: str = "fp32") -> Recorder:
    with Recorder(two_convolutions(), LAYERS, precision=precision, batch_size=7) as recorder:
        for batch, ids in shuffled():
            recorder(batch, ids if with_ids else None)
    return recorder


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_loop_that_shuffles_must_hand_over_ids(precision: str) -> None:
    with pytest.raises(
        UnitvisError, match=f"{OTHERS}; a loop that shuffles, augments or leaves images out must hand over ids"
    ):
        recorded(with_ids=False, precision=precision).result(images=pixels())
    run = recorded(with_ids=True, precision=precision).result(images=pixels())
    found = brute.responses(two_convolutions(), LAYERS, pixels(), brute.canonical_batches(pixels()))
    if precision == "fp32":
        brute.check(run, found)
    assert run.manifest["witness"]["images"] == 16
    assert run.manifest["witness"]["responses"] > 16
    assert brute.wrong(run, two_convolutions(), pixels()) == 0


def test_one_image_among_the_witnesses_that_differs_is_enough() -> None:
    with Recorder(two_convolutions(), ["2"], 5) as recorder:
        recorder(pixels())
    winners = recorder.result(images=pixels()).winners.tolist()
    assert len(winners) > 16
    changed = 0
    for id in winners:
        other = pixels()
        other[id] = other[id].flip(-1) * 0.9
        try:
            recorder.result(images=other)
        except UnitvisError as error:
            assert f"'image {id}' gave" in str(error)  # noqa: PT017
            changed += 1
    assert changed == 16


@pytest.mark.parametrize("units", [300, 20])
def test_witnesses_win_for_as_many_units_as_a_greedy_choice_after_the_last_winner_finds(units: int) -> None:
    rng = np.random.default_rng(0)
    winners = np.stack([rng.choice(200, 5, replace=False) for _ in range(units)])
    winners[:4, 3:] = -1
    winners[-2:] = -1  # units without a winner
    wins = {image: set(np.nonzero((winners == image).any(1))[0].tolist()) for image in np.unique(winners).tolist()}
    del wins[-1]
    chosen, covered = list[int](), set[int]()
    for number in range(16):
        left = [(len(wins[image] - covered), -int(mixed(np.array([image]))[0]), image) for image in wins]
        chosen.append(max(one for one in left if one[2] not in chosen)[2] if number else max(wins))
        covered |= wins[chosen[-1]]
    assert witnesses(winners).tolist() == sorted(chosen)
    assert len(covered) > np.isin(winners, smallest_hashes(np.array(sorted(wins)), 16)).any(1).sum()


def test_few_winners_are_all_witnesses() -> None:
    assert witnesses(np.array([[3, 5, -1], [5, 7, -1], [7, 3, 9]])).tolist() == [3, 5, 7, 9]
    assert witnesses(np.full((2, 3), -1)).tolist() == []


def test_a_loop_that_leaves_an_image_out_must_hand_over_ids() -> None:
    """Wherever it does: the winners are refused if one of them stands under another image's id, and right if none."""
    pool, refused = images(120, 12), []
    for left_out in (40, 100, 112, 119):
        kept = [id for id in range(120) if id != left_out]
        with Recorder(two_convolutions(), ["0", "2"], 3) as recorder:
            recorder(pool[kept])
        found = brute.responses(two_convolutions(), ["0", "2"], pool[kept], brute.canonical_batches(pool[kept]))
        run = recorder.result()
        brute.check(run, found)  # under the counted ids
        refused.append(bool(run.winners.max() >= left_out))
        if refused[-1]:
            with pytest.raises(UnitvisError, match=f"{OTHERS}; .* leaves images out must hand over ids"):
                recorder.result(images=pool)
        else:
            assert arrays(recorder.result(images=pool)) == arrays(run)
    assert set(refused) == {False, True}


def test_half_precision_warns_of_fewer_images_without_ids_than_are_given() -> None:
    for ids in (None, list(range(32))):
        with Recorder(two_convolutions(), LAYERS, precision="bf16") as recorder:
            recorder(pixels()[:32], ids)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            recorder.result(images=pixels())
        said = [str(one.message) for one in caught if "recorded without ids" in str(one.message)]
        assert len(said) == (ids is None)
        assert all(one.startswith("32 images were recorded without ids, and 40 were given: if the") for one in said)


def test_images_normalised_elsewhere_may_differ_in_their_last_bits() -> None:
    near = pixels() * (1 + 1e-6)
    run = recorded(with_ids=True).result(images=near)
    assert run.manifest["witness"]["equal"] < run.manifest["witness"]["responses"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "not checked: no images were given"),
        (iter([torch.zeros(1, 3, 12, 12)]), "not checked: a stream is read once"),
    ],
)
def test_what_was_not_checked_says_so(given: object, said: str) -> None:
    assert recorded(with_ids=False).result(images=given).manifest["witness"] == said


def test_other_sizes_and_absent_images_are_refused() -> None:
    with pytest.raises(UnitvisError, match=r"inputs of \[3, 13, 12\], and \[3, 12, 12\] were recorded"):
        recorded(with_ids=True).result(images=torch.zeros(COUNT, 3, 13, 12))
    with pytest.raises(UnitvisError, match=r"there is no image \d+; the array has 5; a loop"):
        recorded(with_ids=True).result(images=pixels()[:5])


@pytest.mark.usefixtures("emulated_half")
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_never_ranks_what_was_not_recorded(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unitvis.reranking.rerank.upper_bound", lambda errors, draws: np.inf)  # so all are computed
    pool, model = pictures(160), tiny_net()
    ids = torch.arange(160)[1::2]
    with Recorder(model, precision=precision) as recorder:
        recorder(pool[ids], ids)
    run = recorder.result(images=pool)
    assert run.manifest["rescored"]["images"] == run.manifest["images"] == 80
    found = brute.responses(model, run.layers, pool[ids], brute.canonical_batches(pool[ids]))
    brute.check(run, found, ids.numpy())


class Vanishing(torch.utils.data.Dataset):
    """Images of which one can be read no more once it is asked to."""

    def __init__(self, pool: Tensor) -> None:
        self.pool, self.gone = pool, -1

    def __len__(self) -> int:
        return len(self.pool)

    def __getitem__(self, index: int) -> Tensor:
        if index == self.gone:
            raise OSError("gone")
        return self.pool[index]


@pytest.mark.usefixtures("emulated_half")
def test_an_image_that_was_recorded_and_is_gone_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unitvis.reranking.rerank.upper_bound", lambda errors, draws: np.inf)
    pool = Vanishing(pictures(80))
    with Recorder(tiny_net(), precision="fp16") as recorder:
        recorder(pool.pool)
    pool.gone = 31
    with pytest.raises(UnitvisError, match=r"'image 31' was scanned and cannot be read now \(OSError: gone\)"):
        recorder.result(images=pool)


def test_a_scan_needs_no_witness_but_a_loop_gives_its_bytes() -> None:
    assert "witness" not in scan(two_convolutions(), pixels(), LAYERS).manifest
    assert arrays(recorded(with_ids=True).result(pixels())) == arrays(scan(two_convolutions(), pixels(), LAYERS))
    assert unitvis.scan(two_convolutions(), iter([pixels()]), LAYERS, progress=False).manifest["images"] == COUNT
