"""Classes of pydantic as people hand them to clients: what their JSON schemas say is what an answer must be."""

from __future__ import annotations

import datetime
import decimal
import enum
import ipaddress
import uuid
from pathlib import Path
from typing import Literal

from pydantic import (
    UUID4,
    AnyUrl,
    Base64Bytes,
    BaseModel,
    ConfigDict,
    Field,
    IPvAnyAddress,
    PositiveInt,
    SecretStr,
)


class Colour(enum.Enum):
    RED, GREEN, BLUE = "red", "green", "blue"


class Person(BaseModel):
    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=150)


class Optionals(BaseModel):
    a: int | None = None
    b: str | None = Field(None, max_length=5)


class Choices(BaseModel):
    colour: Colour
    level: Literal["low", "high"]


class Nested(BaseModel):
    people: list[Person] = Field(max_length=2)
    boss: Person


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int = Field(ge=0, le=9)


class Dog(BaseModel):
    kind: Literal["dog"]
    good: bool


class Pet(BaseModel):
    pet: Cat | Dog = Field(discriminator="kind")


class Either(BaseModel):
    value: int | bool | None


class Dates(BaseModel):
    day: datetime.date
    at: datetime.datetime
    time: datetime.time
    lasts: datetime.timedelta


class Money(BaseModel):
    amount: decimal.Decimal


class Link(BaseModel):
    link: AnyUrl = Field(max_length=40)


class Identifiers(BaseModel):
    any_id: uuid.UUID
    random_id: UUID4


class Network(BaseModel):
    ip: IPvAnyAddress
    v4: ipaddress.IPv4Address


class Sets(BaseModel):
    tags: set[Literal["a", "b", "c"]] = Field(min_length=2)
    numbers: set[int] = Field(min_length=2, max_length=3)


class Maps(BaseModel):
    counts: dict[str, int] = Field(max_length=2)
    by_colour: dict[Colour, bool]


class Tuples(BaseModel):
    pair: tuple[int, bool]
    point: tuple[float, float, float]


class Tree(BaseModel):
    value: int
    children: list[Tree] = Field(default_factory=list, max_length=2)


class Hidden(BaseModel):
    password: SecretStr = Field(max_length=8)
    path: Path
    data: Base64Bytes = Field(max_length=16)


class Described(BaseModel):
    """With examples and words of its own."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"weight": 1}], "x-order": 1})

    weight: float = Field(gt=0, lt=100, examples=[3.5], json_schema_extra={"unit": "kg"})
    code: str = Field(pattern=r"^[A-Z]{2}\d{3}$")
    count: PositiveInt = Field(multiple_of=5)


class Colours(BaseModel):
    colours: list[Colour] = Field(min_length=1)


MODELS: tuple[type[BaseModel], ...] = (
    Person, Optionals, Choices, Nested, Pet, Either, Dates, Money, Link, Identifiers, Network, Sets, Maps, Tuples,
    Tree, Hidden, Described, Colours,
)  # fmt: skip
