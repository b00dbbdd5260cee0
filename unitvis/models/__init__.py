"""Load a model by its spec: torchvision:NAME, timm:NAME, file.py:function or package.module:function."""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from torch import nn

from unitvis.choices import MODEL_FORMS
from unitvis.errors import UnitvisError, closest_names, error_text
from unitvis.models.labels import Labels
from unitvis.models.weights import load_weights
from unitvis.sources.transform import Transform

_OF_A_LIBRARY = re.compile(r"(?:torchvision|timm):[\w.-]+")  # a spec in which no file or module can be named


def names_library_model(spec: str) -> bool:
    """Whether a spec has the form of a name in the registry of torchvision or timm, so that it leads to no other code.

    `load` looks the name up in that registry.
    """
    return _OF_A_LIBRARY.fullmatch(spec) is not None


class Loaded(NamedTuple):
    """A loaded model with its spec and preprocessing; `scan` accepts it in place of a module."""

    spec: str
    model: nn.Module
    transform: Transform | None  # preprocessing that the weights were trained with; None if unknown
    file: str | None = None  # absolute path of the checkpoint that was loaded
    pretrained: bool = True  # the value given to `load`
    labels: Labels | None = None  # the names of the classes that the weights were trained with; None if unknown

    def origin(self) -> dict[str, Any]:
        """Arguments with which `load` gives this model again, as the manifest keeps them: spec, file, pretrained."""
        return {"spec": self.spec, "file": self.file, "pretrained": self.pretrained}


def known_labels(model: nn.Module | Loaded) -> Labels | None:
    """The names of the classes that a loaded model's weights were trained with; None if unknown."""
    return model.labels if isinstance(model, Loaded) else None


def resolved(model: nn.Module | str | Loaded) -> tuple[nn.Module, Transform | None, dict[str, Any]]:
    """The module that a module, a spec or a loaded model stands for, with its preprocessing and origin if known."""
    if isinstance(model, str):
        model = load(model)
    if isinstance(model, Loaded):
        return model.model, model.transform, model.origin()
    return model, None, {"spec": None}


def load(spec: str, weights: str | Path | None = None, *, pretrained: bool = True) -> Loaded:
    """Load the model that a spec names.

    Args:
        spec: torchvision:NAME or timm:NAME, with pretrained weights unless `pretrained` is false or `weights` is given;
            file.py:function or package.module:function, an nn.Module or a function without arguments that returns one.
        weights: a checkpoint to load into the model, see `weights.load_weights`.
        pretrained: False: random weights for torchvision and timm models.

    Raises UnitvisError if the spec names no model or the model cannot be built.
    """
    library, _, known = spec.partition(":")
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise UnitvisError(f"model {spec!r} is not of the form {MODEL_FORMS}{_suggestion(spec)}")
    pretrained = bool(pretrained) and weights is None
    if library == "torchvision":  # before any other form: what follows is looked up in the library, and never imported
        loaded = _torchvision(known, pretrained)
    elif library == "timm":
        loaded = _timm(known, pretrained)
    else:
        loaded = Loaded(spec, _model_of(spec, place, name), None)
    if weights is not None:
        load_weights(loaded.model, weights)
        loaded = loaded._replace(file=str(Path(weights).absolute()))
    return loaded._replace(pretrained=pretrained)


def _suggestion(spec: str) -> str:
    """End of an error message about a spec without a colon: the forms that a file or a library's name asks for."""
    if spec.endswith(".py"):
        return f"; name a function in it: {spec}:FUNCTION"
    found = []
    with suppress(UnitvisError):
        if spec in _import_library("torchvision.models", "torchvision").list_models():
            found.append(f"torchvision:{spec}")
    with suppress(UnitvisError):
        if _import_library("timm", "timm").is_model(spec):
            found.append(f"timm:{spec}")
    return f"; write {' or '.join(found)}" if found else ""


def _torchvision(name: str, pretrained: bool) -> Loaded:
    """Load an image classification model of torchvision with its preprocessing."""
    zoo = _import_library("torchvision.models", "torchvision")
    try:
        weights = zoo.get_model_weights(name).DEFAULT
    except (ValueError, AttributeError):
        raise UnitvisError(f"torchvision has no model {name!r}; {closest_names(name, zoo.list_models())}") from None
    preset = weights.transforms()
    if not all(hasattr(preset, key) for key in ("resize_size", "crop_size", "mean", "std", "interpolation")):
        raise UnitvisError(f"torchvision:{name} takes no single images; only image classification models are scanned")
    transform = Transform(
        resize=preset.resize_size[0],
        crop=preset.crop_size[0],
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        interpolation=preset.interpolation.value,
    )
    chosen = weights if pretrained else None
    model = _built_model(f"torchvision:{name}", lambda: zoo.get_model(name, weights=chosen))
    names = weights.meta.get("categories") if pretrained else None
    labels = Labels(tuple(names), f"the weights of torchvision:{name}") if names else None
    return Loaded(f"torchvision:{name}", model, transform, labels=labels)


def _timm(name: str, pretrained: bool) -> Loaded:
    """Load a timm model; its data config gives the preprocessing, as timm's own evaluation transform does."""
    timm = _import_library("timm", "timm")
    if not timm.is_model(name):
        raise UnitvisError(f"timm has no model {name!r}; {closest_names(name, timm.list_models())}")
    model = _built_model(f"timm:{name}", lambda: timm.create_model(name, pretrained=pretrained))
    config = timm.data.resolve_model_data_config(model)
    height, width = config["input_size"][1:]
    crop_fraction = config.get("crop_pct") or 1.0
    larger = math.floor(height / crop_fraction), math.floor(width / crop_fraction)  # before the central crop
    if config.get("crop_mode", "center") == "squash" or height != width:
        resize: int | tuple[int, int] = larger
    else:
        resize = larger[0]
    interpolation = config["interpolation"]
    transform = Transform(resize, (height, width), tuple(config["mean"]), tuple(config["std"]), interpolation)
    labels = _timm_labels(f"timm:{name}", timm.data, vars(model)["pretrained_cfg"]) if pretrained else None
    return Loaded(f"timm:{name}", model, transform, labels=labels)


def _timm_labels(spec: str, data: Any, config: dict[str, Any]) -> Labels | None:
    """The classes of a timm model's weights: those in its configuration or, by their number, ImageNet's; or None.

    data: the module timm.data, which holds the names, so that nothing is downloaded. Of ImageNet's synonyms the first.
    """
    origin = f"the weights of {spec}"
    if names := config.get("label_names"):
        return Labels(tuple(names), origin)
    if (subset := data.infer_imagenet_subset(config)) is None:
        return None
    info = data.ImageNetInfo(subset)
    names = tuple(one.split(",")[0] for one in info.label_descriptions())
    return Labels(names, origin, tuple(info.label_names()))


def _import_library(module: str, package: str) -> Any:
    """Import a module of an optional package; UnitvisError if it is not installed or cannot be imported."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise UnitvisError(f"{package} is not installed; pip install 'unitvis[{package}]'") from None
    except Exception as error:
        raise UnitvisError(
            f"{package} is installed but cannot be imported ({error_text(error)}); "
            f"install the release of it that belongs to this torch"
        ) from error


def _built_model(spec: str, build: Callable[[], nn.Module]) -> nn.Module:
    """Call `build`; whatever it raises (a failed download, for example) becomes a UnitvisError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torchvision warns about its initial weights
            return build()
    except Exception as error:
        raise UnitvisError(
            f"{spec} could not be made ({error_text(error)}); pretrained weights are "
            f"downloaded: give --weights FILE for a checkpoint, or --no-pretrained for random ones"
        ) from error


def _model_of(spec: str, place: str, name: str) -> nn.Module:
    """Look up `name` in the file or module `place`, and call it if it is not a module itself."""
    found: Any = _import_place(place)
    for part in name.split("."):
        if not hasattr(found, part):
            public = [n for n, v in vars(found).items() if callable(v) and not n.startswith("_")]
            raise UnitvisError(f"{place} has no {name!r}; it has {', '.join(public) or 'nothing to call'}")
        found = getattr(found, part)
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise UnitvisError(f"{spec} is a {type(found).__name__}; a function that returns an nn.Module is needed")
        try:
            found = found()
        except UnitvisError:
            raise
        except (Exception, SystemExit) as error:
            raise UnitvisError(f"{spec} raised {error_text(error)}") from error
    if not isinstance(found, nn.Module):
        raise UnitvisError(f"{spec} returned a {type(found).__name__}, not an nn.Module")
    return found


def _import_place(place: str) -> ModuleType:
    """Import a Python file by its path (ending in .py) or a module by its name."""
    if not place.endswith(".py"):
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise UnitvisError(
                f"there is no module {error.name!r} for the model {place}; models are {MODEL_FORMS}"
            ) from error
        except (Exception, SystemExit) as error:
            raise UnitvisError(f"importing {place} raised {error_text(error)}") from error
    path = Path(place)
    if not path.is_file():
        raise UnitvisError(f"there is no file {place} for the model")
    spec = importlib.util.spec_from_file_location(f"unitvis_model_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UnitvisError(f"{place} cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling inside the file look it up
    sys.path.insert(0, str(path.parent.resolve()))  # as if the file were run: it may import its neighbours
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UnitvisError(f"importing {place} raised {error_text(error)}") from error
    finally:
        sys.path.pop(0)
    return module
