"""Vision towers and their projectors, as a wrapper's ``vision_config`` gives them: a row for each wrapper.

Tensors of one kind are counted together, with their biases as a further column: the sizes are those of the
files, the names are the planner's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from quant.models.spec import Weight
from quant.models.values import Values, is_number
from quant.vllm.config import parts

#: A tensor of a tower: its name, shape, and how many there are of it.
_Tensor = tuple[str, tuple[int, ...], int]


@dataclass(frozen=True)
class _Vision:
    """What is stated of a tower.

    Attributes:
        config: the wrapper's own values; ``values``: those of its vision_config.
        width, depth, inner: hidden size, layers, inner size of the MLP.
        hidden: of the text decoder.
        positions: patches of an image, along both sides.
    """

    config: Values
    values: Values
    width: int
    depth: int
    inner: int
    hidden: int
    positions: int

    @property
    def merged(self) -> int:
        """Values of the patches that become one token."""
        return self.width * self.values.count("spatial_merge_size", 2) ** 2


@dataclass(frozen=True)
class Tower:
    """One wrapper's tower.

    Attributes:
        tensors: lists everything but the patch embedding.
        width, depth, inner: where its vision_config leaves them out; 0: it must not.
        crossed: the decoder reads its output by cross attention.
        frames: images' worth of the longest video that vLLM profiles with, where the context holds it (14
            frames, two to an image's tokens: `models/qwen2_vl.py`).
        projections: of its MLP, 3 gated and 2 plain; ``patches`` make one token; ``tokens`` of the largest
            image
            that its processor lets through. 0: not known, and no activations are planned.
    """

    tensors: Callable[[_Vision], Iterator[_Tensor]]
    width: int = 0
    depth: int = 0
    inner: int = 0
    projections: int = 0
    patches: int = 0
    tokens: int = 0
    crossed: bool = False
    frames: int = 1


def _qwen2(v: _Vision) -> Iterator[_Tensor]:
    h, i, n, merged = v.width, v.inner, v.depth, v.merged
    yield "qkv", (3 * h, h + 1), n
    yield "proj", (h, h + 1), n
    yield "gate_up", (2 * i, h + 1), n
    yield "down", (h, i + 1), n
    yield "norms", (2, h), n
    yield "merger", (merged, merged + 1), 1
    yield "merger_out", (v.values.count("out_hidden_size", v.hidden), merged + 1), 1
    yield "merger_norm", (h,), 1


def _qwen3(v: _Vision) -> Iterator[_Tensor]:
    h, merged, deep = v.width, v.merged, len(v.values.items("deepstack_visual_indexes"))
    yield "patch_bias", (h,), 1
    yield "positions", (v.values.count("num_position_embeddings", 2304), h), 1
    yield from _blocks(v)
    yield "merger", (merged, merged + 1), 1 + deep
    yield "merger_out", (v.values.count("out_hidden_size", v.hidden), merged + 1), 1 + deep
    yield "merger_norm", (2, h), 1
    if deep:
        yield "deep_norms", (2, merged), deep


def _pixtral(v: _Vision) -> Iterator[_Tensor]:
    h, n = v.width, v.depth
    yield "attention", (4 * h, h), n
    yield "mlp", (3 * v.inner, h), n
    yield "norms", (2, h), n
    yield "ln_pre", (h,), 1
    yield "patch_merger", (h, h * v.config.count("spatial_merge_size", 2) ** 2), 1
    yield "projector_norm", (h,), 1
    yield "projector", (v.hidden, h), 1
    yield "projector2", (v.hidden, v.hidden), 1


def _blocks(v: _Vision) -> Iterator[_Tensor]:
    """The layers of a plain vision transformer, with biases."""
    h, i, n = v.width, v.inner, v.depth
    yield "attention", (4 * h, h + 1), n
    yield "up", (i, h + 1), n
    yield "down", (h, i + 1), n
    yield "norms", (4, h), n


def _gemma3(v: _Vision) -> Iterator[_Tensor]:
    h = v.width
    yield from _blocks(v)
    yield "patch_bias", (h,), 1
    yield "positions", (v.positions, h), 1
    yield "post_norm", (2, h), 1
    yield "projector", (h, v.hidden), 1
    yield "projector_norm", (h,), 1


def _llava(v: _Vision) -> Iterator[_Tensor]:
    h, siglip = v.width, "siglip" in str(v.values.get("model_type"))
    features = v.config.get("vision_feature_layer")
    yield from _blocks(v)
    if not siglip:
        yield "class_embedding", (h,), 1
        yield "pre_norm", (2, h), 1
    yield "positions", (v.positions + (0 if siglip else 1), h), 1
    yield "post_norm", (2, h), 1
    yield "projector", (v.hidden, h * (len(features) if isinstance(features, list) else 1) + 1), 1
    yield "projector2", (v.hidden, v.hidden + 1), 1


def _internvl(v: _Vision) -> Iterator[_Tensor]:
    h, merged = v.width, v.width * round(1 / v.config.number("downsample_ratio", 0.5)) ** 2
    yield from _blocks(v)
    yield "class_embedding", (h,), 1
    yield "patch_bias", (h,), 1
    yield "positions", (v.positions + 1, h), 1
    yield "scales", (2, h), v.depth
    yield "projector_norm", (2, merged), 1
    yield "projector", (v.hidden, merged + 1), 1
    yield "projector2", (v.hidden, v.hidden + 1), 1


def _mllama(v: _Vision) -> Iterator[_Tensor]:
    """More layers with global attention, and tables of positions for every tile and aspect ratio."""
    h, i = v.width, v.inner
    tiles, ratios = v.values.count("max_num_tiles", 4), 9
    yield from _blocks(v)
    yield "global_layers", (4 * h * h + 2 * h * i,), v.values.count("num_global_layers", 8)
    yield "tile_positions", (ratios, tiles * (v.positions + 1) * h), 1
    yield "projector", (v.hidden, v.values.count("vision_output_dim", 7680) + 1), 1


def _plain(v: _Vision) -> Iterator[_Tensor]:
    """A tower whose kind is not known."""
    yield from _blocks(v)
    yield "positions", (v.positions + 1, v.width), 1
    yield "projector", (v.hidden, v.width), 1


_QWEN2_5 = Tower(_qwen2, 1280, 32, 3420, projections=3, patches=4, tokens=16384, frames=7)
_QWEN3 = Tower(_qwen3, projections=2, patches=4, tokens=16384)

#: ``model_type`` of the wrapper → its tower
TOWERS = {
    "qwen2_vl": Tower(_qwen2, projections=2, patches=4, tokens=16384, frames=7),
    "qwen2_5_vl": _QWEN2_5,
    "qwen2_5_omni_thinker": _QWEN2_5,
    "qwen3_vl": _QWEN3,
    "qwen3_vl_moe": _QWEN3,
    "qwen3_5": _QWEN3,
    "qwen3_5_moe": _QWEN3,
    "gemma3": Tower(_gemma3, projections=2, patches=16, tokens=256),
    "gemma4": Tower(_plain, projections=2, patches=9, tokens=280),
    "mistral3": Tower(_pixtral, 1024, 24, 4096, projections=3, patches=4, tokens=3025),
    "llava": Tower(_llava, projections=2, patches=1, tokens=576),
    "llava_next": Tower(_llava, projections=2, patches=1, tokens=2928),
    "internvl": Tower(_internvl, projections=2, patches=4, tokens=3328),
    "llama4": Tower(_plain, 1408, 34, 5632, projections=2, patches=4, tokens=2584),
    "mllama": Tower(_mllama, projections=2, patches=1, tokens=6404, crossed=True),
    "kimi_k25": Tower(_plain, 1152, 27, 4304, projections=2, patches=4, tokens=4096),
    "kimi_vl": Tower(_plain, 1152, 27, 4304, projections=2, patches=4, tokens=1024),
}

#: Keys under which a vision_config states a size, beside the decoder's.
_WIDTH, _DEPTH, _INNER = (
    ("hidden_size", "embed_dim", "vt_hidden_size"),
    ("num_hidden_layers", "depth", "vt_num_hidden_layers"),
    ("intermediate_size", "vt_intermediate_size"),
)


def vision_weights(
    config: Mapping[str, Any], where: str, hidden: int
) -> tuple[list[Weight], dict[str, int], list[str]]:
    """The vision tower and its projector.

    Args:
        hidden: size of the text decoder's hidden state.

    Returns:
        the weights; the shape that the planner needs (:attr:`quant.models.spec.ModelSpec.vision_shape`),
        empty where nothing is known of it; notes on what is approximate.

    Raises:
        UsageError: vision_config states an impossible size.
    """
    outer = next((p for p in parts(config) if isinstance(p.get("vision_config"), Mapping)), None)
    if outer is None:
        return [], {}, []
    kind = str(outer.get("model_type"))
    tower = TOWERS.get(kind, Tower(_plain))
    values = Values(outer["vision_config"], f"{where}: vision_config")
    width, depth, inner = (
        _first(values, keys) or default
        for keys, default in ((_WIDTH, tower.width), (_DEPTH, tower.depth), (_INNER, tower.inner))
    )
    if not (width and depth and inner):
        note = "vision_config gives no width, depth and inner width: the vision tower is not counted"
        return [], {}, [note]
    patch, image = _side(values, "patch_size", 14), _side(values, "image_size", 336)
    vision = _Vision(Values(outer, where), values, width, depth, inner, hidden, (image // patch) ** 2)
    channels = _first(values, ("num_channels", "in_channels", "in_chans")) or 3
    embedding = (width, channels * values.count("temporal_patch_size", 1) * patch * patch)
    tensors = [("patch_embed", embedding, 1), *tower.tensors(vision)]
    weights = [Weight(f"vision.{name}", "tower", shape, count=count) for name, shape, count in tensors]
    planned = {
        "hidden": width, "inner": inner, "projections": tower.projections, "patches": tower.patches,
        "tokens": tower.tokens, "crossed": int(tower.crossed), "frames": tower.frames,
    }  # fmt: skip
    approximate = (
        f"the vision tower of {kind} is counted as a plain vision transformer: its size is approximate"
    )
    return weights, planned if tower.tokens else {}, [approximate] if tower.tensors is _plain else []


def _first(values: Values, keys: tuple[str, ...]) -> int:
    """The first size that is stated under one of these keys; 0 where there is none."""
    return next((size for key in keys if (size := values.count(key, 0, least=0))), 0)


def _side(values: Values, key: str, default: int) -> int:
    """The side of a square, which some configs state twice."""
    stated = values.get(key)
    if isinstance(stated, list) and stated and is_number(stated[0]) and stated == [stated[0]] * len(stated):
        return Values({key: stated[0]}, values.where).count(key)
    return values.count(key, default, least=0) or default
