"""Reading a Hugging Face config.json without dropping anything.

Files come in two spellings of the same facts (`num_experts` / `num_local_experts`, `torch_dtype` / `dtype`,
`rope_theta` + `rope_scaling` / `rope_parameters`), and a field that a reader passes over in silence becomes a model
that computes something else. So `Fields` keeps account: a field is *taken*, *refused* unless it has the value that
this code computes, or on the list of those that cannot change a model's arithmetic. `finish` raises for whatever is
left.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from zigzag_jax.models.rope import Linear, Rope, Yarn

REQUIRED = object()

# fields that cannot change what a model computes
NO_EFFECT: frozenset[str] = frozenset(
    {
        *("_name_or_path", "architectures", "transformers_version", "problem_type", "is_encoder_decoder"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id"),
        *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict"),
        *("use_cache", "chunk_size_feed_forward", "max_window_layers"),
    }
)


class Fields:
    """The fields of one config.json and which of them have been accounted for."""

    def __init__(self, source: Mapping[str, Any] | str | os.PathLike):
        self.values = dict(source) if isinstance(source, Mapping) else read_json(source)
        self.seen: set[str] = set(NO_EFFECT)

    def take(self, *names: str, default: Any = REQUIRED) -> Any:
        """The value of a field under any of its spellings; null counts as absent."""
        self.seen.update(names)
        found = {name: self.values[name] for name in names if self.values.get(name) is not None}
        if len({repr(value) for value in found.values()}) > 1:
            raise ValueError(f"two spellings of one config field must agree, got {found}")
        if not found and default is REQUIRED:
            raise ValueError(f"config field {' or '.join(names)} is missing")
        return next(iter(found.values()), default)

    def refuse_unless(self, name: str, computed: Collection[Any]) -> None:
        """NotImplementedError if a field has another value than those this code computes (null is always fine)."""
        self.seen.add(name)
        value = self.values.get(name)
        if value is not None and value not in computed:
            raise not_supported(name, value)

    def rope(self) -> Rope:
        """The rotary embedding: default, linear or yarn, in either spelling; any other kind raises."""
        found = []
        for field in ("rope_parameters", "rope_scaling"):
            value = dict(self.take(field, default={}) or {})
            kind = _same("rope_type", value.pop("rope_type", None), value.pop("type", None))
            self.values["rope_theta"] = _same(
                "rope_theta", self.values.get("rope_theta"), value.pop("rope_theta", None)
            )
            if value.pop("partial_rotary_factor", 1) != 1:
                raise not_supported(field, self.values[field])
            found.append((field, kind, {name: x for name, x in value.items() if x is not None}))
        scaled = [x for x in found if x[1] not in (None, "default") or x[2]]
        if len(scaled) > 1:
            raise ValueError(
                f"config fields rope_parameters and rope_scaling must not both scale, got {[x[2] for x in scaled]}"
            )
        return Rope(float(self.take("rope_theta")), self._scaling(*scaled[0]) if scaled else None)

    def _scaling(self, field: str, kind: str | None, value: dict[str, Any]) -> Linear | Yarn:
        if kind == "yarn":
            longest = self.values.get("max_position_embeddings")
            value.setdefault("original_max_position_embeddings", longest)
            if value["original_max_position_embeddings"] is None:
                raise ValueError(f"config field {field} must hold original_max_position_embeddings")
            value.setdefault("factor", (longest or 0) / value["original_max_position_embeddings"])
        kinds = {x.kind: x for x in (Linear, Yarn)}
        if kind not in kinds or not value.keys() <= {f.name for f in dataclasses.fields(kinds[kind])}:
            raise not_supported(field, self.values[field])
        if "factor" not in value:
            raise ValueError(f"config field {field} must hold factor")
        return kinds[kind](**value)

    def finish(self) -> None:
        """NotImplementedError for a field nobody has accounted for."""
        for name, value in self.values.items():
            if name not in self.seen and value is not None:
                raise NotImplementedError(
                    f"config field {name} is unknown, got {value!r}: remove it if it does not change the model"
                )


def not_supported(name: str, value: Any) -> NotImplementedError:
    """The error for a field that is understood and not computed."""
    return NotImplementedError(f"config field {name} is not supported with this value, got {value!r}")


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """A config.json, or the one inside a folder."""
    path = pathlib.Path(path)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"a model's folder must hold a config.json, got {path}")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"a model's config must be a JSON file, got {path}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"a model's config must be a JSON object, got {path}")
    return values


def _same(name: str, first: Any, second: Any) -> Any:
    if first is not None and second is not None and first != second:
        raise ValueError(f"two places of one config field must agree, got {name} = {first} and {second}")
    return second if first is None else first
