"""What a module computes last: the names of its ATen operators, from its last convolution or normalisation on."""

from __future__ import annotations

from collections.abc import Sequence


def names(text: str) -> frozenset[str]:
    """Names separated by blanks, as a set."""
    return frozenset(text.split())


CONVOLUTIONS_AND_NORMS = names(
    """convolution convolution_overrideable mkldnn_convolution cudnn_convolution _convolution
    native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm
    _batch_norm_no_update miopen_batch_norm batch_norm native_group_norm native_layer_norm _fused_rms_norm"""
)
# Linear operators, and those that move or copy values: after them a response is still the one before any activation.
_LINEAR = names(
    """add add_ sub sub_ rsub mul mul_ div div_ neg sum mean cat stack split split_with_sizes
    linear mkldnn_linear mm addmm bmm baddbmm avg_pool2d _adaptive_avg_pool2d upsample_bilinear2d upsample_nearest2d
    view _unsafe_view _reshape_alias view_copy permute transpose t select slice narrow unbind squeeze unsqueeze expand
    flip roll constant_pad_nd reflection_pad2d replication_pad2d pixel_shuffle pixel_unshuffle channel_shuffle
    native_channel_shuffle clone copy_ _to_copy lift_fresh"""
)


def last_layer(operators: Sequence[str], own: range) -> int | None:
    """The number of the last convolution or normalisation; None if there is none.

    operators: names of those of a forward pass, in order. own: the numbers of a module's.
    """
    return next((number for number in reversed(own) if operators[number] in CONVOLUTIONS_AND_NORMS), None)


def activation_after(operators: Sequence[str], own: range) -> str | None:
    """The first operator after a module's last convolution or normalisation that is not linear; None if all are."""
    if (last := last_layer(operators, own)) is None:
        return None
    return next((name for name in operators[last + 1 : own.stop] if name not in _LINEAR), None)
