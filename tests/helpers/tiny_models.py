"""Every architecture of `transformers` whose source has a convolution, built small: configuration, model, inputs.

Found by reading the sources, so a new architecture is found too. A default configuration is made small by the names of
its numbers alone. Which architectures can be built and run that way stands in `tests/compat/transformers.json`.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

CONVOLUTION = re.compile(r"nn\.Conv(Transpose)?[123]d|F\.conv|functional\.conv")
MOST_PARAMETERS = 20_000_000

# What a number of a configuration becomes, by the first pattern that its name matches.
NUMBERS: tuple[tuple[str, int], ...] = (
    (r"(^|_)(vocab_size|vocabulary_size)$", 64),
    (r"max_(2d_)?position_embeddings|max_source_positions|max_target_positions|max_length", 256),
    (r"(num|n)_.*(kv|key_value)_?heads$|multi_query_group_num", 2),
    (r"heads?$|num_heads|n_head", 2),
    (r"head_dim|attention_head_size|d_kv|head_size|d_head", 16),
    (r"num_(conv_pos|feat|hidden_)?_?.*(layers|blocks)$|(encoder|decoder)_layers$|_layers$|^depth$|n_layer$", 2),
    (r"intermediate_size|ffn_dim|mlp_dim|d_ff|feed_forward_dim|ffn_size|inner_dim", 48),
    (r"(hidden_size|d_model|embed_dim|hidden_dim|projection_dim|embedding_size|encoder_dim|decoder_dim|width)$", 32),
    (r"^(dim|n_embd|output_dim|embed_dims|fpn_feature_size|fusion_hidden_size|feature_size|mask_feature_size)$", 32),
    (r"(num_experts|n_routed_experts|num_local_experts)$", 4),
    (r"num_queries|num_labels|num_query_tokens", 8),
    (r"image_size|img_size|input_size|resolution", 64),
    (r"spec_size", 64),
    (r"num_mel_bins|n_mels|feature_dim$", 16),
)
LISTS: tuple[tuple[str, Any], ...] = (
    (r"depths?$|num_blocks|layer_repeats|layers_per_stage|num_encoder_blocks", lambda old: [1] * len(old)),
    (r"hidden_sizes|embed_dims?|embedding_sizes|neck_hidden_sizes|widths|encoder_hidden|decoder_hidden|dims|channels",
     lambda old: [min(16 * 2 ** min(i, 2), v) for i, v in enumerate(old)]),
    (r"num_(attention_)?heads", lambda old: [2] * len(old)),
    (r"image_size|input_size|img_size", lambda old: [64] * len(old)),
    (r"conv_dim$", lambda old: [16] * len(old)),
)  # fmt: skip


def families() -> list[str]:
    """Names of the architectures whose source has a convolution."""
    import transformers

    root = Path(transformers.__file__).parent / "models"
    return sorted({p.parent.name for p in root.glob("*/modeling_*.py") if CONVOLUTION.search(p.read_text())})


# How much of a configuration is made small; where one way leads to numbers that do not fit each other, the next is
# tried: everything; all but lists; all but lists and sizes of inputs; only what grows a model in depth.
LEVELS = ("all", "no-lists", "no-sizes", "depth", "nothing")
_SIZES = re.compile(r"image_size|img_size|input_size|resolution|spec_size|num_mel_bins|n_mels|feature_dim")
_DEPTH = re.compile(r"layers|blocks|^depth|n_layer|vocab_size|experts")


def shrink(config: Any, level: str = "all", seen: int = 0) -> None:
    """Make a configuration's numbers small, and those of the configurations in it."""
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict") and seen < 4:
            shrink(value, level, seen + 1)
        elif isinstance(value, bool) or name.startswith("_") or level == "nothing":
            continue
        elif isinstance(value, int):
            new = next((small for pattern, small in NUMBERS if re.search(pattern, name)), None)
            kept = (level in ("no-sizes", "depth") and _SIZES.search(name)) or (
                level == "depth" and not _DEPTH.search(name)
            )
            if new is not None and value > new and not kept:
                _set(config, name, new)
        elif isinstance(value, (list, tuple)) and value and all(isinstance(v, int) for v in value) and level == "all":
            make = next((make for pattern, make in LISTS if re.search(pattern, name)), None)
            if make is not None:
                _set(config, name, type(value)(make(value)))
    layers = getattr(config, "num_hidden_layers", None)
    if getattr(config, "layer_types", None) and isinstance(layers, int):
        _set(config, "layer_types", _one_of_each(config.layer_types, layers))
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
        if isinstance(getattr(config, name, None), int) and getattr(config, name) >= 64:
            _set(config, name, 1)


def _one_of_each(kinds: list[str], count: int) -> list[str]:
    """The first of every kind of layer, as many as there is room for."""
    return [*dict.fromkeys(kinds), *kinds][:count]


def _set(config: Any, name: str, value: Any) -> None:
    try:
        setattr(config, name, value)
    except AttributeError:  # worked out from other numbers
        return


def model_classes(family: str) -> Iterator[Any]:
    """Models of an architecture, the plain one first."""
    import transformers

    folder = Path(transformers.__file__).parent / "models" / family
    found = []
    for path in sorted(folder.glob("modeling_*.py")):
        if not CONVOLUTION.search(path.read_text()):
            continue
        home = importlib.import_module(f"transformers.models.{family}.{path.stem}")
        for name, kind in vars(home).items():
            if not (inspect.isclass(kind) and issubclass(kind, transformers.PreTrainedModel)):
                continue
            if kind.__module__ == home.__name__ and "PreTrained" not in name and kind.config_class is not None:
                found.append(kind)
    order = ("Model", "Backbone", "ForImageClassification", "ForObjectDetection", "ForDepthEstimation")
    yield from sorted(
        found,
        key=lambda kind: (
            next((i for i, end in enumerate(order) if kind.__name__.endswith(end)), len(order)), len(kind.__name__)
        ),
    )  # fmt: skip


def build(kind: Any, level: str = "all") -> torch.nn.Module:
    """A small model.

    Raises:
        Exception: whatever its configuration or constructor raises.
        ValueError: it stays large.
    """
    torch.manual_seed(0)
    config = kind.config_class()
    shrink(config, level)
    with torch.device("meta"):
        size = sum(p.numel() for p in kind(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"has {size:,} parameters when small")
    return kind(config).float().eval()


# Ways to make the inputs that a model's forward asks for, tried in this order.
SHAPES = ("image", "video", "mono", "frames")


def inputs(model: Any, shape: str = "image") -> dict[str, Any]:
    """Inputs by the names that the model's forward asks for; `shape` says how those of one name differ."""
    taken = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(0)

    def randn(*dims: int) -> torch.Tensor:
        return torch.randn(dims, generator=generator)

    def of(default: int, *names: str) -> int:
        parts = ("vision_config", "backbone_config", "audio_config", "encoder_config")
        homes = [model.config, *(getattr(model.config, part, None) for part in parts)]
        for home, name in ((home, name) for home in homes for name in names):
            value = getattr(home, name, None)
            value = value[0] if isinstance(value, (list, tuple)) and value else value
            if isinstance(value, int):
                return value
        return default

    size, channels = of(64, "image_size", "img_size"), of(3, "num_channels", "in_channels")
    mels = of(16, "num_mel_bins", "feature_size", "input_dim", "input_feat_per_channel")
    words = torch.randint(3, 40, (2, 12), generator=generator)
    image = (1, of(4, "num_frames"), channels, size, size) if shape == "video" else (2, channels, size, size)
    sound = (2, 1, 4000) if shape == "mono" else (2, 4000)
    frames = 2 * of(64, "max_source_positions")
    patch = of(14, "patch_size")
    cells = channels * of(2, "temporal_patch_size") * patch * patch
    made: dict[str, Any] = {
        "pixel_values": lambda: randn(*image),
        "pixel_values_videos": lambda: randn(*image),
        "input_values": lambda: randn(*sound),
        "input_features": lambda: randn(2, frames, mels) if shape == "frames" else randn(2, mels, frames),
        "input_ids": lambda: words,
        "decoder_input_ids": lambda: words[:, :6],
        "use_cache": lambda: False,
    }
    if "grid_thw" in taken:
        made |= {"hidden_states": lambda: randn(64, cells), "grid_thw": lambda: torch.tensor([[1, 8, 8]])}
    found = {name: make() for name, make in made.items() if name in taken}
    return found if set(found) - {"use_cache"} else {model.main_input_name: randn(*image)}


def run(model: Any, given: dict[str, torch.Tensor]) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Everything of floating point that the model returns, and the gradients of its parameters."""
    torch.manual_seed(0)
    model.zero_grad(set_to_none=True)
    found = torch.utils._pytree.tree_leaves(_plain(model(**given)))
    outputs = [t for t in found if isinstance(t, torch.Tensor) and t.is_floating_point()]
    loss = sum(t.double().square().mean() for t in outputs if t.requires_grad and t.numel())
    if isinstance(loss, torch.Tensor):
        loss.backward()
    gradients = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    return [t.detach() for t in outputs], gradients


def _plain(value: Any) -> Any:
    if isinstance(value, dict) or hasattr(value, "items"):
        return [_plain(v) for _, v in value.items()]
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
