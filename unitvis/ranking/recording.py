"""Recording: batches in, the strongest responses of every unit in a state on the device."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Self, TypeVar

import torch
from torch import Tensor, nn

from unitvis import models
from unitvis.errors import UnitvisError, abridged, error_text, whole_number
from unitvis.half_precision.candidates import EXTRA_CANDIDATES
from unitvis.half_precision.step import HALF, Step
from unitvis.half_precision.suitability import NAMES, suitable_precision
from unitvis.network.device import default_batch, refuse_state, unwrapped
from unitvis.network.forward import COMPUTE_BATCH, CanonicalPass
from unitvis.network.inside import rank_inside
from unitvis.network.memory import TooLargeError, holding, may_fit_in_parts, shortage, too_large
from unitvis.network.network import Network, Shape
from unitvis.ranking.batches import check_coverage, checked_ids, checked_images, some_values
from unitvis.ranking.watch import WeightsWatch
from unitvis.schema import MAX_BATCH_SIZE, MAX_K
from unitvis.sources.transform import Transform
from unitvis.state.interval_set import IntervalSet
from unitvis.state.magnitudes import ranked_magnitudes
from unitvis.state.partial import differences
from unitvis.state.topk import TopK

logger = logging.getLogger("unitvis")
Result = TypeVar("Result")


class Recording:
    """The recording part of a `Recorder`, which documents the arguments: takes batches and keeps a top-k.

    network, precision, images, coverage and topk are its state: how many images are in the top-k, and under which ids.
    """

    make_step = Step.of  # of a scan in half precision; a subclass of Step can emulate it

    def __init__(
        self,
        model: nn.Module | str | models.Loaded,
        layers: Sequence[str] | str | None = None,
        k: int = 9,
        *,
        exclude: Sequence[str] | str = (),
        unit: str = "channel",
        inside: bool = False,
        device: torch.device | str | None = None,
        transform: Transform | None = None,
        precision: str = "fp32",
        batch_size: int | None = None,
        weights: str = "fixed",
    ) -> None:
        k = whole_number("k", k, 1, MAX_K)
        if unit not in ("channel", "neuron"):
            raise UnitvisError(f"unit must be 'channel' or 'neuron', not {unit!r}")
        if inside and unit == "neuron":
            raise UnitvisError("inside=True (--inside) ranks some positions, and every neuron has one: rank channels")
        if weights not in ("fixed", "moving"):
            raise UnitvisError(f"weights must be 'fixed' or 'moving', not {weights!r}")
        model = models.load(model) if isinstance(model, str) else model
        self.labels = models.known_labels(model)  # that its runs have
        model, own_transform, self._origin = models.resolved(model)
        self.network = Network(model, device=device, transform=transform or own_transform)
        self._given = unwrapped(model)
        if weights == "moving" and self.network.model is not self._given:
            raise UnitvisError(
                "weights='moving' ranks the model itself, and this one would be copied, because it is on another "
                "device or not in float32; leave out device=, or move the model before"
            )
        self.k, self.images = k, 0  # images: how many are in the top-k
        self.coverage = IntervalSet()  # the ids in the top-k, where they came on the CPU
        self.batch_sizes: set[int] = set()  # in which half precision computed the images of the top-k
        self.topk: TopK  # made with the first batch
        self.largest_inputs: TopK  # images by the magnitudes of their inputs, in half precision; made with it
        self._layers, self._exclude, self._unit, self._weights = layers, exclude, unit, weights
        self._inside = inside
        self._like: Tensor | None = None  # no images, of the shape and type of those that were taken
        self._next_id = 0
        self._counted = False  # a call gave no ids, so that they were counted
        self._waiting: tuple[Tensor, Tensor] | None = None  # images and ids, fewer than are computed at once
        self._raised = 0  # images of the last call, if it raised; it took none of them
        self._first_raised: Tensor | None = None  # some of its values, if it raised without ids
        self._lost = 0  # images that were given and not ranked, because an exception ended the block
        self._begun = self._settled = False
        self._watch: WeightsWatch | None = None  # of weights that are to stay fixed, from the first call on
        self._canonical: CanonicalPass  # in float32, once it has begun
        self._step: Step  # in half precision, once it has begun
        self._open = False
        self._lock = threading.RLock()  # held while images or results are taken, by one thread at a time
        self.set_precision(precision, batch_size)

    def __enter__(self) -> Self:
        if self._open:
            raise UnitvisError("this Recorder's block is open already; leave it before you enter it again")
        self._tell_of_lost_images()
        self._begun = False  # the model may have changed since an earlier block
        self._open = True
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._open = False
        try:
            if error is None:
                self.flush()
        finally:  # without an exception none wait any more
            waiting = 0 if self._waiting is None else len(self._waiting[1])
            self._lost = waiting + (0 if error is None else self._raised)
            self._waiting, self._raised = None, 0

    def set_precision(self, precision: str, batch_size: int | None) -> None:
        """Choose how the images are computed, before the first one is. batch_size: None is `default_batch`."""
        if batch_size is not None:
            batch_size = whole_number("batch_size", batch_size, 1, MAX_BATCH_SIZE)
        if precision != "fp32" and precision not in HALF:
            raise UnitvisError(f"precision must be fp32, {' or '.join(HALF)}, not {precision!r}")
        if precision != "fp32" and self._weights == "moving":
            raise UnitvisError(f"weights='moving' needs precision='fp32': {precision} ranks with a copy of the weights")
        self.precision, self._asked_size = precision, batch_size
        wanted = default_batch(self.network.device) if batch_size is None else batch_size
        self._size = COMPUTE_BATCH if precision == "fp32" else wanted  # images that are computed at once
        self._told_size = self._size  # that the user knows of

    @torch.inference_mode(False)
    def settle_precision(self, images: Tensor) -> str | None:
        """Take the next wider precision where the one chosen does not suit the network; the reason, None if it suits.

        images: as they were read; what the network computes from them decides. Only before the first image.
        """
        reason = None
        if self.precision != "fp32":
            if not self.network.layers:
                self.prepare(self.network.input_shape_of(images))
            with self.network.turn(), self.network.evaluating():
                precision, reason = suitable_precision(self.network, images, self.precision)
            self.set_precision(precision, self._asked_size)
        self._settled = True
        return reason

    @torch.inference_mode(False)
    def prepare(self, shape: Shape) -> None:
        """For inputs [C, H, W]: find the layers and what their neurons see, and describe the model.

        All that can fail because of the model fails here, before the first image is computed.
        """
        with self.network.turn(), holding("a forward pass of one image", self.network.device):
            self._prepare(shape)

    def _prepare(self, shape: Shape) -> None:
        self.network.examine(shape, self._layers, self._unit, self._exclude)
        if silent := self.network.silent_hooks:
            named = abridged([f"{number} on {name or 'the model'}" for name, number in silent.items()])
            warnings.warn(
                f"the model has forward hooks that return nothing ({named}); if they collect what they see, they also "
                f"get noise, repeated images and symbolic tensors, with which the network is examined: remove them "
                f"before, and register them again afterwards"
            )
        try:
            self.network.description  # noqa: B018  it is kept
        except UnitvisError:
            raise
        except Exception as error:
            raise UnitvisError(
                f"the model cannot be described for the manifest, because its state_dict() cannot be read "
                f"({error_text(error)}); give a model whose state can be read"
            ) from error
        refuse_state(self.network.units, self.k + 1, COMPUTE_BATCH, self.network.device)
        self.network.find_receptive_fields()
        if self._inside:
            rank_inside(self.network)

    @torch.inference_mode(False)  # a loop may be in it; the top-k outlives the loop
    def __call__(self, batch: Tensor, ids: Tensor | Sequence[int] | None = None) -> None:
        """Take a batch: float [N, C, H, W], already normalised, or uint8 [N, H, W, 3] where a transform was given.

        ids: whole numbers from 0, one an image, each used once; None counts up.

        A call that raises takes none of its images, so that a loop may catch the exception and call again.
        """
        with self._lock:
            images = batch if isinstance(batch, Tensor) and batch.ndim else torch.empty(0)
            if ids is None:
                self._tell_of_missing_images(images)
            try:
                self._take(batch, ids)
            except BaseException:
                self._raised = len(images)
                if ids is None and len(images):
                    with suppress(Exception):  # a device that failed cannot be read
                        self._first_raised = some_values(images)
                raise
            self._raised = 0
            self._tell_of_halving()

    def _take(self, batch: Tensor, ids: Tensor | Sequence[int] | None) -> None:
        if not self._open:
            raise UnitvisError("a Recorder records inside its block: with unitvis.Recorder(...) as recorder: ...")
        given = checked_images(batch, self._like, self.network.transform)
        if self._weights == "fixed" and self._watch is None:
            self._watch = WeightsWatch(self._given, self.network.evaluating)
        if not self._settled and len(given) and (reason := self.settle_precision(given)):
            warnings.warn(f"{reason}; the images are scanned in {NAMES[self.precision]}")
        images = self._moved(given) if self.precision == "fp32" else given
        if ids is None:
            self._counted = True
            ids = torch.arange(self._next_id, self._next_id + len(given), device="cpu")
        ids = checked_ids(ids, len(given))
        if self._waiting is not None:
            images = torch.cat([self._waiting[0].to(images.device), images])
            ids = torch.cat([self._waiting[1], ids])
        now = len(images) if self._weights == "moving" else len(images) - len(images) % self._size
        waiting = (images[now:].clone(), ids[now:].clone()) if now < len(images) else None
        if now:
            self._rank(images[:now], ids[:now])
        self._waiting, self._like = waiting, given.new_empty((0, *given.shape[1:]))
        self._next_id += len(given)

    def _moved(self, images: Tensor) -> Tensor:
        """Images on the device, or as they came where it has no room for all, and each compute batch is moved alone."""
        try:
            return images.to(self.network.device)
        except RuntimeError as error:
            if shortage(error) is None:
                raise
        return images

    @torch.inference_mode(False)
    def flush(self) -> None:
        """Compute the images that wait for a whole compute batch."""
        self._tell_of_lost_images()
        with self._lock:
            if self._waiting is not None:
                self._rank(*self._waiting)
                self._waiting = None
            self._tell_of_halving()

    def _tell_of_missing_images(self, images: Tensor) -> None:
        """Warn where a call without ids raised, and its images are not those that come now."""
        first, self._first_raised = self._first_raised, None
        if first is not None and not torch.equal(some_values(images), first):
            warnings.warn(
                f"a call raised and took none of its {self._raised} images, and others came next; they are counted on "
                f"from {self._next_id}, so a loop that left images out must give ids"
            )

    def _tell_of_lost_images(self) -> None:
        """Warn once of the images that an exception cost."""
        if self._lost:
            lost, self._lost = self._lost, 0
            warnings.warn(
                f"an exception ended the recorder's block, and the last {lost} images that it was given are not "
                "ranked; record them again, under their ids"
            )

    def _rank(self, images: Tensor, ids: Tensor) -> None:
        """Fold images into the top-k: all of them or, where one cannot be computed and so this raises, none."""
        # A loop may train the model meanwhile; half precision, once it has begun, computes with a copy.
        copied = self.precision != "fp32" and self._begun
        with self.network.turn(), nullcontext() if copied else self.network.evaluating():
            if not self._begun:
                with self._passes():
                    self._begin(images[: self._size])
            with self._canonical if self.precision == "fp32" else nullcontext():  # hooks for the length of this call
                self._halving(lambda: self._fold_all(images, ids))
        self.images += len(ids)
        if self.precision != "fp32":
            self.batch_sizes.add(self._size)
        if ids.device.type == "cpu":  # ids that came on a GPU stay unknown
            self.coverage.add(ids.numpy().copy())

    def _halving(self, compute: Callable[[], Result]) -> Result:
        """Call `compute`, which computes `_size` images at once, again with half of them while memory runs out.

        In float32 the number is part of the canonical response; it stays, and `TooLargeError` tells of it.
        """
        asked = self._size
        while True:
            try:
                return compute()
            except Exception as error:
                if self.precision == "fp32" or self._size == 1 or not may_fit_in_parts(error):
                    what = "one image" if self._size == 1 else f"a compute batch of {self._size} images"
                    if self._size < asked:  # a later call may find more memory
                        self._resize(asked)
                    if (cause := shortage(error)) is None or isinstance(cause, TooLargeError):
                        raise
                    raise too_large(f"{what} in {NAMES[self.precision]}", self.network.device, cause) from error
            self._resize(self._size // 2)  # outside of the handler, which holds what the batch computed

    def _resize(self, size: int) -> None:
        """Compute so many images at once from now on, in half precision."""
        self._size = size
        self._step.resize(size)

    def _tell_of_halving(self) -> None:
        """Say once that batches are smaller now: a warning where the user chose their size, else a line in the log."""
        if self._size == self._told_size:
            return
        before, self._told_size = self._told_size, self._size
        said = f"batch {before} did not fit on {self.network.device}, went on with {self._size}"
        if self._asked_size is None:
            logger.info("%s", said)
        else:
            warnings.warn(said)

    def _fold_all(self, images: Tensor, ids: Tensor) -> None:
        """Fold images into the top-k, as many at a time as are computed at once; where one raises, none."""
        states = self.topk.tensor, self.largest_inputs.tensor
        before = [state.clone() for state in states]
        try:
            for start in range(0, len(ids), self._size):
                self._fold(images[start : start + self._size], ids[start : start + self._size])
        except BaseException:
            for state, copy in zip(states, before, strict=True):
                state.copy_(copy)  # in place: the step, and a graph that was captured, write to it
            raise

    def _fold(self, images: Tensor, ids: Tensor) -> None:
        """Compute at most as many images as are computed at once, and fold them into the top-k."""
        if self.precision != "fp32":
            if self._watch is not None:
                self._watch.look()
            self._step(images, ids)
            return
        with self._passes():
            keys = self._canonical.keys(images, self.topk.threshold())
            if self.network.unfollowed is not None:
                self.network.check_alone(self._canonical, images, keys)
            self.topk.merge(keys, ids.to(keys.device))

    def _passes(self) -> AbstractContextManager[None]:
        """Context of forward passes, after a look at whether the weights moved before them."""
        return nullcontext() if self._watch is None else self._watch.passes()

    def _begin(self, images: Tensor) -> None:
        """Find the layers by the first images, and see that their responses can be ranked."""
        with holding(f"what is computed of the first {COMPUTE_BATCH} images", self.network.device):
            self._begin_with(images)

    def _begin_with(self, images: Tensor) -> None:
        shape = self.network.input_shape_of(images)
        # Images of another size may have raised before, and none was taken.
        if not self.network.layers or (self.images == 0 and self.network.input_shape != shape):
            self.prepare(shape)
        if self.images == 0:
            # One more than k in float32 tells whether the k-th is tied; in half precision there are candidates.
            places = self.k + (1 if self.precision == "fp32" else EXTRA_CANDIDATES)
            self.topk = TopK.empty(self.network.units, places, self.network.device)
            channels = 0 if self.precision == "fp32" else self.network.input_shape[0]
            self.largest_inputs = ranked_magnitudes(channels, self.network.device)
        if self.precision == "fp32":
            self._canonical = self.network.reading()
            with self._canonical:
                self.network.check_independence(self._canonical, images[:COMPUTE_BATCH])
            if (layer := self.network.unfollowed) is not None:
                warnings.warn(
                    f"the model's code could not be followed as far as layer {layer!r} and may mix the images of later "
                    f"batches, so each image is computed alone as well, which takes two to three times as long"
                )
        else:
            self._step = self.make_step(
                self.network, self.topk, self.largest_inputs, images, precision=self.precision, size=self._size
            )
        self._begun = True

    def _check_recorded(self) -> None:
        """Raise UnitvisError unless there are images, each under an id of its own, ranked by one set of weights."""
        self.flush()
        if self.images == 0:
            raise UnitvisError("no image was recorded, so there is nothing to rank")
        if len(self.coverage):  # none are known where they came on a GPU
            check_coverage(self.coverage, self.images)
        if self._watch is not None:
            self._watch.refuse(hashes=True)
            self._refuse_another_network()

    def _refuse_another_network(self) -> None:
        """Raise UnitvisError where the model computes something else than at the first image, for whatever reason.

        An attribute, a hook or a function may have changed as well as a tensor.
        """
        if self.network.model is not self._given:  # a copy was ranked, which nobody else has
            return
        before, now = self.network.description, self.network.responses_to_noise()
        if different := list(differences({k: before[k] for k in now if k in before}, now, "model")):
            raise UnitvisError(
                f"the model changed while images were recorded ({different[0]}), so the responses are those of "
                f"different networks; leave its attributes, modules and hooks as they are until the result is made"
            )
