"""Bodies of requests, and parts of them, read strictly: nothing is converted to a number or a boolean."""

from __future__ import annotations

from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Loose(BaseModel):
    """A body, or a part of one, whose unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)

    @field_validator("*", mode="before")
    @classmethod
    def _as_it_is_written(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse what pydantic would convert to a number or a boolean: `false` is not 0, and "1" is neither."""
        assert info.field_name is not None
        wanted = _plain_types(cls.model_fields[info.field_name].annotation)
        if value is None or not wanted or not wanted <= {bool, int, float}:
            return value
        is_right = isinstance(value, bool) if wanted == {bool} else isinstance(value, int | float)
        if not is_right or (isinstance(value, bool) and bool not in wanted):
            raise ValueError(f"expected {'true or false' if wanted == {bool} else 'a number'}")
        return value


def _plain_types(annotation: Any) -> set[Any]:
    """Types of a value, apart from null: int and float for `Annotated[int, ...] | float | None`."""
    if get_origin(annotation) is Annotated:
        return _plain_types(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return {kind for part in get_args(annotation) for kind in _plain_types(part)} - {NoneType}
    return {annotation}
