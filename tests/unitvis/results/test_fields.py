"""Every field of a run folder's JSON files and every array, changed one by one: what notices, or why nothing can."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import unitvis
from support.commands import TWO_CONVOLUTIONS, model_file
from support.mutations import changed, places, read, without_hashes, write
from unitvis import UnitvisError
from unitvis.scanning.verify import verify
from unitvis.state.noise_numbers import encoded

READ, VERIFY, TOLD = "read", "verify", "told"
Row = tuple[str, Any, str, str]
SHORT = {"L0": "layers.0", "RF": "layers.0.receptive_field"}

MANIFEST: list[Row] = [
    ("format", 2, READ, "has format 2; this version of unitvis reads format 1"),
    ("model.class", "Other", VERIFY, "model.class is Other and Sequential"),
    ("model.parameters", 9, VERIFY, "model.parameters is 9 and 443"),
    ("model.weights", "00", VERIFY, "model.weights is 00 and "),
    ("model.modules", "00", VERIFY, "model.modules is 00 and "),
    ("model.responses.0", [9.0] * 5, VERIFY, "the network computes something else in 0"),
    ("model.channels.0", encoded(np.ones(6, np.float32)), VERIFY, "the network computes something else in 0"),
    ("model.loud_responses.0", [9.0] * 5, VERIFY, "the network computes something else in 0"),
    ("model.loud_channels.0", encoded(np.ones(6, np.float32)), VERIFY, "the network computes something else in 0"),
    ("model.attributes", {"cap": "1"}, TOLD, "an attribute that the network lacks now is not compared"),
    ("model.spec", "other.py:net", TOLD, "a title; what is loaded is what the user names"),
    ("model.file", "other.pt", TOLD, "never opened; the hash of the weights is compared"),
    ("model.pretrained", False, TOLD, "the hash of the weights is compared"),
    ("input", [3, 14, 12], READ, r"transform.crop is 12 and the input \[14, 12\]"),
    ("layers", {}, READ, "layers is empty"),
    ("L0.name", "x", READ, "layers.0.name is 'x'"),
    ("L0.channels", 7, READ, "6 units in 7 channels"),
    ("L0.height", 20, VERIFY, "layers.0.height is 20 and 10"),
    ("L0.width", 20, VERIFY, "layers.0.width is 20 and 10"),
    ("L0.feeds_relu", False, VERIFY, "layers.0.feeds_relu is false and true"),
    ("L0.fed_by", "2", VERIFY, "layers.0.fed_by is 2 and null"),
    ("L0.unit", "neuron", READ, "layers.0.unit is neuron and unit channel"),
    ("L0.units", 7, READ, "7 units in 6 channels"),
    ("RF.size", [2, 3], READ, r"a box is larger than the receptive field, \[2, 3\]"),
    ("RF.size", [4, 4], VERIFY, r"layers.0.receptive_field.size is \[4, 4\] and \[3, 3\]"),
    ("RF.stride", [2.0, 2.0], VERIFY, r"layers.0.receptive_field.stride is \[2.0, 2.0\] and \[1.0, 1.0\]"),
    ("RF.whole_image", True, READ, "a box is not the whole image"),
    ("RF.method", "unknown", READ, "has the method unknown and the note ''"),
    ("RF.note", "x", READ, "has the method traced and the note 'x'"),
    ("L0.effective_box", 9, VERIFY, "layers.0.effective_box is 9 and 3"),
    ("L0.effective_box", None, VERIFY, "layers.0.effective_box is None and 3"),
    ("L0.nan", {"responses": 0, "units": 1, "first_image": 0}, READ, "nan counts 0 responses in 1 of 6 units"),
    ("L0.nan", {"responses": 1, "units": 1, "first_image": 2}, READ, "nan.first_image is 2, which was not ranked"),
    (
        "L0.nan",
        {"responses": 1, "units": 1, "first_image": 0},
        VERIFY,
        "layer '0' gives no NaN for image 0, which the run says",
    ),
    ("L0.infinite", {"responses": 1, "units": 1, "first_image": 0}, READ, "the manifest counts some infinite"),
    ("L0.unseparated", 1, READ, "0 units are unseparated, and the manifest counts 1"),
    ("k", 3, READ, r"not float32 \[6, 3\]"),
    ("unit", "neuron", READ, "layers.0.unit is channel and unit neuron"),
    ("precision", "bf16", TOLD, "what was asked for; that of the scan is checked"),
    ("plan", "x", TOLD, "why the precision was chosen"),
    ("source.kind", "list", VERIFY, "the run says that its images came from a list"),
    ("source.path", "elsewhere", VERIFY, "the images of the run are not where they were"),
    ("source.images", 7, READ, "images is 5 and 1 failed, and source.images is 7"),
    ("source.names", "00", VERIFY, "source.names is 00 and "),
    ("source.others", 9, TOLD, "files beside the images come and go"),
    ("source.decoding.decoder", "other", VERIFY, "other"),
    ("source.decoding.scaled", True, TOLD, "read by it; pixels that differ give other responses"),
    ("source.decoding.allow_truncated", True, TOLD, "read by it; pixels that differ give other responses"),
    ("transform.resize", 13, VERIFY, "in the run, "),
    ("transform.crop", 11, READ, "transform.crop is 11"),
    ("transform.mean", [0.4] * 3, VERIFY, "in the run, "),
    ("transform.std", [0.3] * 3, VERIFY, "in the run, "),
    ("transform.interpolation", "bicubic", VERIFY, "in the run, "),
    ("fingerprint.device", "cuda", TOLD, "verify says that it ran elsewhere, and compares to rounding"),
    ("fingerprint.hardware", "x", TOLD, "verify says that it ran elsewhere, and compares to rounding"),
    ("fingerprint.torch", "x", TOLD, "verify says that it ran elsewhere, and compares to rounding"),
    ("fingerprint.layout", "x", TOLD, "verify says that it ran elsewhere, and compares to rounding"),
    ("scan.precision", "fp16", READ, "precision is exact, scan.precision fp16, and rescored is missing"),
    ("scan.batch_size", 32, TOLD, "changes no response"),
    ("scan.batch_sizes", [16, 64], READ, r"scan.batch_sizes is \[16, 64\], and scan.precision fp32"),
    ("images", 6, READ, "images is 6, and the coverage holds 5"),
    ("coverage", [[0, 2], [3, 7]], READ, "images is 5, and the coverage holds 6"),
    ("coverage", [], READ, "images is 5, of a folder, and there is no coverage"),
    ("coverage", [[0, 5]], READ, "image 2 failed, and lies in the coverage"),
    ("coverage", [[0, 2], [4, 6], [7, 8]], READ, "image 7 was ranked or failed, and source.images is 6"),
    ("failures", [], READ, "images is 5 and 0 failed, and source.images is 6"),
    ("failures.0.id", 3, READ, "image 3 failed, and lies in the coverage"),
    ("failures.0.name", "x", VERIFY, "the name of image 2, which failed, is 'x' and '2.png'"),
    ("failures.0.reason", "x", TOLD, "what the scan met"),
    ("seconds.preparation", 9.0, TOLD, "a time"),
    ("seconds.scan", 9.0, TOLD, "a time"),
    ("seconds.checkpoints", 9.0, TOLD, "a time"),
    ("seconds.second_pass", 9.0, TOLD, "a time"),
    ("warnings", ["x"], TOLD, "what the scan said"),
    ("files.top.npz", "00", READ, "top.npz is not the one that was written with manifest.json"),
    ("files.sample.npz", "00", READ, "sample.npz is not the one that was written with manifest.json"),
    ("files.images.jsonl", "00", READ, "images.jsonl is not the one that was written with manifest.json"),
]
RECORDS: list[Row] = [
    ("id", 2, READ, "line 1: image 2 won nowhere"),
    ("id", 1, READ, "line 2: image 1 comes again"),
    ("name", "x.png", VERIFY, "the name of 'x.png' is 'x.png' and '0.png'"),
    ("width", 99, VERIFY, "the width of '0.png' is 99 and 14"),
    ("height", 99, VERIFY, "the height of '0.png' is 99 and 14"),
    ("hash", "00", VERIFY, "the hash of '0.png' is '00' and "),
]
ARRAYS: list[Row] = [
    ("values", lambda a: a + 100, VERIFY, "in the run, "),
    ("images", lambda a: a[:, ::-1], VERIFY, "in the run, "),
    ("images", lambda a: np.where(a == 5, 2, a), READ, "image 2 won and lies outside of the coverage"),
    ("positions", lambda a: (a + 1) % 10, VERIFY, "at row "),
    ("boxes", lambda a: a + 1, VERIFY, "in box "),
    ("status", lambda a: np.full_like(a, "tied"), TOLD, "whether another image ties, only a scan tells"),
    ("status", lambda a: np.full_like(a, "unseparated"), READ, "6 units are unseparated, and the manifest counts 0"),
]
SAMPLE: list[Row] = [
    ("images", lambda a: a[::-1], READ, "the ids of images do not ascend"),
    ("images", lambda a: np.array([0, 1, 2, 4, 5]), READ, "image 2 lies outside of the coverage"),
    ("images", lambda a: a[:4], READ, r"images is int64 \[4\], not int64 \[5\]"),
    ("hashes", lambda a: a[:4], READ, r"hashes is <U32 \[4\], not text \[5\]"),
    ("hashes", lambda a: np.roll(a, 1), VERIFY, "the hash of image 0 of the sample is '.*' and "),
    ("0/responses", lambda a: a[:4], READ, r"layer '0': responses is float32 \[4, 6\], not float32 \[5, 6\]"),
    ("0/responses", lambda a: a.astype(np.float64), READ, "layer '0': responses is float64"),
    ("0/responses", lambda a: np.nextafter(a, a + 1), VERIFY, "image 0 gives unit 0 of layer '0' .* in the sample and"),
    ("2/responses", lambda a: a[::-1], VERIFY, "image 0 gives unit 0 of layer '2' .* in the sample and .* now"),
]


def way(field: str) -> tuple[Any, ...]:
    """The way to a field of the manifest."""
    for short, long in SHORT.items():
        field = re.sub(rf"^{short}\b", long, field)
    if field.startswith("files."):
        return ("files", field.removeprefix("files."))
    first, *inside = field.split(".")
    return (first, *(int(key) if first == "failures" else key for key in inside[:1]), *inside[1:])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two layers over six images, one of which cannot be read."""
    folder = tmp_path_factory.mktemp("fields")
    (folder / "photos").mkdir()
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (14, 14, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{number}.png")
    (folder / "photos" / "2.png").write_bytes(b"broken")
    transform = unitvis.Transform(12, 12, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    spec = model_file(folder, TWO_CONVOLUTIONS)
    unitvis.scan(spec, folder / "photos", k=2, transform=transform, out=folder / "run", progress=False)
    return folder / "run"


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def findings(folder: Path, whole: Path) -> Iterator[str]:
    """What `verify` finds in a run, with the model that was scanned."""
    run = unitvis.load(folder)
    try:
        found = verify(run, f"{whole.parent / 'nets.py'}:net")
    except UnitvisError as error:
        yield str(error)
        return
    yield from found["differing"]
    if found["wrong"]:
        yield found["first_wrong"]


def check(kind: str, said: str, folder: Path, whole: Path) -> None:
    if kind == READ:
        with pytest.raises(UnitvisError, match=said) as refused:
            unitvis.load(folder)
        assert "\n" not in str(refused.value)
        return
    found = list(findings(folder, whole))
    assert any(re.search(said, one) for one in found), found


def test_the_table_names_every_field(whole: Path) -> None:
    manifest = read(whole / "manifest.json")
    noise = [f"model.{loud}{kind}" for loud in ("", "loud_") for kind in ("responses", "channels")]
    for layer in ("layers", *noise):
        at = manifest
        for key in layer.split("."):
            at = at[key]
        del at["2"]
    leaves = [place for place in places(manifest) if not any(other[:-1] == place for other in places(manifest))]
    named = {way(field) for field, *_ in MANIFEST}
    assert [place for place in leaves if not any(place[:n] in named for n in range(1, len(place) + 1))] == []
    assert {key for record in read(whole / "images.jsonl") for key in record} == {field for field, *_ in RECORDS}
    with np.load(whole / "top.npz") as arrays:
        assert {name.removeprefix("0/") for name in arrays if name.startswith("0/")} == {name for name, *_ in ARRAYS}
    with np.load(whole / "sample.npz") as arrays:
        assert set(arrays) == {name for name, *_ in SAMPLE}
    assert all(reason for *_, reason in MANIFEST)


def named(rows: list[Row]) -> Any:
    chosen = [row for row in rows if row[2] != TOLD]
    return pytest.mark.parametrize("row", chosen, ids=[f"{field}-{n}" for n, (field, *_) in enumerate(chosen)])


@named(MANIFEST)
def test_a_field_of_the_manifest(row: Row, whole: Path, folder: Path) -> None:
    field, new, kind, said = row
    write(folder / "manifest.json", changed(read(folder / "manifest.json"), way(field), new))
    check(kind, said, folder, whole)


@named(RECORDS)
def test_a_field_of_a_record(row: Row, whole: Path, folder: Path) -> None:
    field, new, kind, said = row
    records = read(folder / "images.jsonl")
    write(folder / "images.jsonl", [records[0] | {field: new}, *records[1:]])
    without_hashes(folder)
    check(kind, said, folder, whole)


@named(ARRAYS)
def test_an_array(row: Row, whole: Path, folder: Path) -> None:
    name, change, kind, said = row
    arrays = dict(np.load(folder / "top.npz"))
    arrays[f"0/{name}"] = change(arrays[f"0/{name}"])
    np.savez_compressed(folder / "top.npz", **arrays)
    without_hashes(folder)
    check(kind, said, folder, whole)


@named(SAMPLE)
def test_an_array_of_the_sample(row: Row, whole: Path, folder: Path) -> None:
    name, change, kind, said = row
    arrays = dict(np.load(folder / "sample.npz"))
    arrays[name] = change(arrays[name])
    np.savez(folder / "sample.npz", **arrays)
    without_hashes(folder)
    check(kind, said, folder, whole)


@pytest.mark.parametrize("same_machine", [True, False])
def test_what_is_only_told_hides_nothing(same_machine: bool, whole: Path, folder: Path) -> None:
    manifest = read(folder / "manifest.json")
    for field, new, kind, _ in MANIFEST:
        if kind == TOLD and not (same_machine and field.startswith("fingerprint")):
            manifest = changed(manifest, way(field), new)
    write(folder / "manifest.json", manifest)
    assert list(findings(folder, whole)) == []
    if same_machine:
        return
    arrays = dict(np.load(folder / "top.npz"))
    rows = arrays["0/positions"][..., 0]
    rows[...] = (rows + 1) % 10
    arrays["0/boxes"][..., [1, 3]] = np.stack([rows, rows + 3], axis=-1)
    np.savez_compressed(folder / "top.npz", **arrays)
    without_hashes(folder)
    assert any("at row" in one for one in findings(folder, whole))


def test_a_receptive_field_that_is_called_unknown(whole: Path, folder: Path) -> None:
    field = {"size": [12, 12], "stride": None, "whole_image": False, "method": "unknown", "note": "forged"}
    manifest = changed(read(folder / "manifest.json"), ("layers", "0", "receptive_field"), field)
    write(folder / "manifest.json", changed(manifest, ("layers", "0", "effective_box"), None))
    arrays = dict(np.load(folder / "top.npz"))
    arrays["0/boxes"][...] = [0, 0, 12, 12]
    np.savez_compressed(folder / "top.npz", **arrays)
    without_hashes(folder)
    check(VERIFY, "layers.0.receptive_field.method is unknown and traced", folder, whole)


def scanned(whole: Path, out: Path, **options: Any) -> unitvis.Run:
    spec, transform = f"{whole.parent / 'nets.py'}:net", unitvis.Transform(12, 12, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    photos = whole.parent / "photos"
    return unitvis.scan(spec, photos, k=2, transform=transform, out=out, progress=False, **options)


@pytest.fixture(scope="module")
def shards(whole: Path) -> Path:
    """The folder of the runs of two shards."""
    for number in (1, 2):
        scanned(whole, whole.parent / "shards" / str(number), shard=(number, 2))
    return whole.parent / "shards"


def stronger(array: Any) -> Any:
    """The state with every response, in the high half of a key, twice as large."""
    places = (array.shape[1] - 2) // 2
    array = array.copy()
    more = np.where(array[:, :places] > 0, 1 << 55, -(1 << 55))
    array[:, :places] += np.where(array[:, places:-2] >= 0, more, 0)  # a blank place stays blank
    return array


def in_another_order(array: Any) -> Any:
    """The state with the first two places of each unit exchanged."""
    places = (array.shape[1] - 2) // 2
    order = np.arange(array.shape[1])
    order[[0, 1, places, places + 1]] = [1, 0, places + 1, places]
    return array[:, order]


def with_entry(name: str, value: Any) -> Any:
    def change(array: Any) -> Any:
        array = array.copy()
        array[name][0] = value
        return array

    return change


OTHERS = "does not belong to manifest.json"
STATE: list[tuple[str, Any, str, str, str]] = [
    ("format", 4, READ, "has format 4", "has format 4"),
    ("identity.model.class", "Other", READ, OTHERS, "model.class is Other and"),
    ("identity.model.parameters", 9, READ, OTHERS, "model.parameters is 9 and"),
    ("identity.model.weights", "00", READ, OTHERS, "model.weights is 00 and"),
    ("identity.model.modules", "00", READ, OTHERS, "model.modules is 00 and"),
    ("identity.model.responses.0", [9.0] * 5, READ, OTHERS, "computes something else in 0"),
    ("identity.model.channels.0", encoded(np.ones(6, np.float32)), READ, OTHERS, "computes something else in 0"),
    ("identity.input", [3, 13, 12], READ, OTHERS, "layers.0 is "),
    ("identity.k", 1, READ, OTHERS, "k is 1 and 2"),
    ("identity.unit", "neuron", READ, "the state is", "the state is"),
    ("identity.transform.resize", 13, READ, OTHERS, "transform.resize is 13 and 12"),
    ("identity.fingerprint.torch", "x", READ, OTHERS, "fingerprint.torch is x and"),
    ("identity.precision", "bf16", READ, "largest_inputs is", "largest_inputs is"),
    ("identity.layers.0", [6, 20, 20], READ, OTHERS, "layers.0 is "),
    ("identity.source.kind", "list", READ, OTHERS, "source.kind is list and folder"),
    ("identity.source.images", 7, READ, OTHERS, "source.images is 7 and 6"),
    ("identity.source.names", "00", READ, OTHERS, "source.names is 00 and"),
    ("identity.source.decoding.scaled", True, READ, OTHERS, "source.decoding.scaled is true and false"),
    ("identity.shard", "2/2", TOLD, "which part it is, its coverage tells", "shard is 2/2 and 1/2"),
    ("batch_sizes", [64], READ, r"batch_sizes is \[64\], and the precision fp32", r"batch_sizes is \[64\]"),
    ("reasons", [], READ, "is damaged", "is damaged"),
    ("reasons", ["x"], TOLD, "what the scan met", ""),
    ("seconds", 9.0, TOLD, "a time", ""),
    ("state", stronger, VERIFY, "give other responses here", "responses have changed and its images have not"),
    ("state", in_another_order, READ, "of a unit are not in order", "are not in order"),
    ("largest_inputs", lambda a: np.zeros((5, 6), np.int64), READ, "largest_inputs is", "largest_inputs is"),
    ("coverage", lambda a: a + 1, READ, "was not scanned", "was not scanned"),
    ("coverage", lambda a: np.array([[0, 2], [4, 5]]), READ, "its coverage is 0 to 1, 4, and that of the run", ""),
    ("failed", lambda a: a + 9, READ, "image 11 is said to have failed, of 6", "image 11 is said to have failed, of 6"),
    ("reason", lambda a: a + 9, READ, "is damaged", "is damaged"),
    ("seen", with_entry("digest", np.void(bytes(16))), VERIFY, "is no longer the file", "its images have changed"),
    ("seen", with_entry("id", 5), READ, "not in order", "not in order"),
    ("seen", with_entry("width", 99), TOLD, "verify compares that of the record", ""),
    ("seen", with_entry("height", 99), TOLD, "verify compares that of the record", ""),
]


@pytest.mark.parametrize("row", STATE, ids=[f"{name}-{n}" for n, (name, *_) in enumerate(STATE)])
def test_the_state_of_a_shard_and_of_a_checkpoint(
    row: tuple[str, Any, str, str, str], whole: Path, shards: Path, tmp_path: Path
) -> None:
    """It is read with the run of a shard, and resumed: `resumed` is what that says, empty where it cannot tell."""
    name, new, kind, said, resumed = row
    folder = without_hashes(Path(shutil.copytree(shards / "1", tmp_path / "1")))
    with np.load(folder / "state.npz") as saved:
        arrays = dict(saved)
    about = json.loads(arrays["about"].tobytes())
    if name in arrays:
        arrays[name] = new(arrays[name])
    else:
        about = changed(about, tuple(name.split(".")), new)
    (tmp_path / "unfinished").mkdir()
    checkpoint = changed(about, ("identity", "shard"), about["identity"].get("shard", "1/2"))
    for path, value in ((folder / "state.npz", about), (tmp_path / "unfinished" / "progress.npz", checkpoint)):
        np.savez(path, **{**arrays, "about": np.frombuffer(json.dumps(value).encode(), np.uint8)})
    if kind == TOLD:
        assert unitvis.load(folder).partial
    else:
        run = unitvis.load(folder) if kind == VERIFY else folder
        with pytest.raises(UnitvisError, match=said):
            unitvis.merge([run, shards / "2"], f"{whole.parent / 'nets.py'}:net")
    if resumed:
        with pytest.raises(UnitvisError, match=resumed):
            scanned(whole, tmp_path / "unfinished", shard=(1, 2), resume=True)


def test_the_table_names_every_array_of_a_state(shards: Path) -> None:
    with np.load(shards / "1" / "state.npz") as arrays:
        about, fields = json.loads(arrays["about"].tobytes()), set(arrays) - {"about"}
        fields |= set(about) - {"identity"} | {f"identity.{key}" for key in [*about["identity"], "shard"]}
    assert fields == {".".join(name.split(".")[: 1 + name.startswith("identity")]) for name, *_ in STATE}


@pytest.mark.parametrize("what", ["a shard", "a run"])
@pytest.mark.parametrize("forged", ["values", "positions", "boxes", "feeds_relu", "an image", "nothing"])
def test_a_finished_run_that_is_resumed_proves_itself(
    what: str, forged: str, whole: Path, shards: Path, tmp_path: Path
) -> None:
    options = {"shard": (1, 2)} if what == "a shard" else {}
    folder = without_hashes(Path(shutil.copytree(shards / "1" if options else whole, tmp_path / "run")))
    photos = Path(shutil.copytree(whole.parent / "photos", tmp_path / "photos"))
    shutil.copy(whole.parent / "nets.py", tmp_path)
    name = "state.npz" if options else "top.npz"
    with np.load(folder / name) as saved:
        arrays = dict(saved)
    said = None
    if forged == "values":
        if options:
            arrays["state"] = stronger(arrays["state"])
        else:
            arrays |= {f"{layer}/values": arrays[f"{layer}/values"] + 100 for layer in "02"}
        said = r"because its responses have changed and its images have not: .* gave .* and gives .* now"
    elif forged == "an image":
        shutil.copy(photos / "3.png", photos / "0.png")
        said = r"because its images have changed: '0.png' is no longer the file that was scanned"
    elif options and forged != "nothing":
        return
    elif forged == "positions":
        arrays["0/positions"][...] = (arrays["0/positions"] + 1) % 10
        rows, columns = arrays["0/positions"][..., 0], arrays["0/positions"][..., 1]
        arrays["0/boxes"][...] = np.stack([columns, rows, columns + 3, rows + 3], axis=-1)
        said = r"because its responses have changed and its images have not"
    elif forged == "boxes":
        arrays["0/boxes"][...] += 1
        said = r"because a winner of layer '0' has the box \[.*\] there and \[.*\] now; start again with --overwrite"
    elif forged == "feeds_relu":
        manifest = read(folder / "manifest.json")
        write(folder / "manifest.json", changed(manifest, ("layers", "0", "feeds_relu"), False))
        said = r"because the network contradicts it \(then and now\): layers.0.feeds_relu is false and true"
    np.savez(folder / name, **arrays)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    if said is None:
        assert scanned(tmp_path / "x", folder, resume=True, **options).folder == folder
    else:
        with pytest.raises(UnitvisError, match=rf"the finished run in .* is not believed, {said}"):
            scanned(tmp_path / "x", folder, resume=True, **options)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
