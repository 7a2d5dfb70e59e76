# ruff: noqa: SLF001  # the nodes of a document's tree know each other; their links are nobody else's business
"""Column types: scalars that refuse what must not be stored, and a JSONB document that saves what is changed inside it.

A document is a tree of `TrackedModel`, `TrackedDict` and `TrackedList`. Every change runs up the tree to the row that
owns the document and flags it, as `sqlalchemy.ext.mutable` does for flat values. A change that would make the document
invalid is undone and refused at once.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from functools import wraps
from itertools import chain
from typing import Any, ClassVar, Final, Self, TypeVar, cast, get_args

from pydantic import BaseModel, ConfigDict, PrivateAttr, SecretStr, ValidationError
from sqlalchemy import ColumnElement, DateTime, Dialect, Integer, Text, event, type_coerce
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.mutable import Mutable
from sqlalchemy.orm import InstanceState, Mapper
from sqlalchemy.orm.attributes import flag_modified
from sqlalchemy.sql import operators
from sqlalchemy.sql.operators import OperatorType
from sqlalchemy.types import TypeDecorator, TypeEngine

from kestra.errors import InvalidValue

_EQUALITY: Final = frozenset(
    {
        operators.eq,
        operators.ne,
        operators.in_op,
        operators.not_in_op,
        operators.is_distinct_from,
        operators.is_not_distinct_from,
    }
)


# --- scalars ----------------------------------------------------------------------------------------------------------


EARLIEST: Final = datetime(2, 1, 1, tzinfo=UTC)
LATEST: Final = datetime(9998, 12, 31, tzinfo=UTC)
"""The instants that Python can show in every time zone. One beyond them could be stored, and never be read again."""


def check_instant(value: object) -> datetime:
    """The value, when it is an instant that can be stored and read.

    Raises:
        InvalidValue: It is no datetime, a naive one, or of a year that not every time zone has.
    """
    # Annotations bind nobody: a date or a text can arrive here.
    if not isinstance(value, datetime):
        raise InvalidValue(f"This column takes a datetime with a time zone, not {type(value).__name__}.")
    if value.utcoffset() is None:
        raise InvalidValue("naive datetime; attach a time zone")
    if not EARLIEST <= value <= LATEST:
        raise InvalidValue(f"The datetime is not of the years {EARLIEST.year} to {LATEST.year}.")
    return value


class Timestamptz(TypeDecorator[datetime]):
    """An instant. A naive datetime is refused, stored or compared: its instant would depend on the connection.

    Operands that are no datetime keep their own type, so `created_at > func.now() - timedelta(days=1)` works.
    """

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: object, dialect: Dialect) -> datetime | None:  # noqa: ARG002  # the hook's signature
        """The value itself, if it is an instant."""
        return None if value is None else check_instant(value)

    def coerce_compared_value(self, op: OperatorType | None, value: object) -> TypeEngine[Any]:
        """A datetime is checked like a stored one; an interval or a date stays what it is."""
        return self if isinstance(value, datetime) else self.impl_instance.coerce_compared_value(op, value)


class OneOf(TypeDecorator[str]):
    """A text that can only be one of the values of a `Literal`.

    Equality (`==`, `!=`, `in_`, …) with another value is refused too: it can only be a slip, and would silently match
    nothing. Every other operator (`like`, `||`, `<`, …) takes any text.

    Args:
        literal: A `typing.Literal` of texts.
    """

    impl = Text
    cache_ok = True

    def __init__(self, literal: object) -> None:
        super().__init__()
        self.literal = literal  # also the cache key, by its name

    def process_bind_param(self, value: object, dialect: Dialect) -> str | None:  # noqa: ARG002  # the hook's signature
        """The value itself, if it is an allowed one."""
        allowed: tuple[str, ...] = get_args(self.literal)
        if value is None or (isinstance(value, str) and value in allowed):
            return value
        raise InvalidValue(f"The value is not one of {', '.join(map(repr, allowed))}.")

    def coerce_compared_value(self, op: OperatorType | None, value: object) -> TypeEngine[Any]:
        """Equality is checked like a stored value, other operators compare plain text."""
        return self if op in _EQUALITY else self.impl_instance.coerce_compared_value(op, value)


class IntBetween(TypeDecorator[int]):
    """An integer within bounds, both included. Only storing is bounded: `stage < 7` and `stage + 1` take any integer.

    Args:
        low: The smallest value that can be stored.
        high: The largest value that can be stored.
    """

    impl = Integer
    cache_ok = True

    def __init__(self, low: int, high: int) -> None:
        super().__init__()
        self.low = low
        self.high = high

    def process_bind_param(self, value: object, dialect: Dialect) -> int | None:  # noqa: ARG002  # the hook's signature
        """The value itself, if it is an integer within the bounds."""
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not self.low <= value <= self.high:
            raise InvalidValue(f"The value is not an integer from {self.low} to {self.high}.")
        return value

    def coerce_compared_value(self, op: OperatorType | None, value: object) -> TypeEngine[Any]:
        """Comparing and computing are not storing: the operand is a plain value."""
        return self.impl_instance.coerce_compared_value(op, value)


_MAX_DIGITS: Final = 131_072
"""Of an integer in JSONB. Reading one takes time that grows with the square of its digits."""

MAX_DEPTH: Final = 50
"""How deeply the objects and lists of a document may be nested: what reads it calls itself once for each level."""

# --- JSON text --------------------------------------------------------------------------------------------------------


def json_loads(text: str | bytes | bytearray) -> Any:  # JSON is any value
    """JSON to Python without losing a digit: a number that no float holds exactly becomes a Decimal.

    `kestra.driver` gives it to psycopg, for every connection of the pools.

    Raises:
        InvalidValue: The text has NaN or Infinity, which are no JSON, is nested so deeply that Python cannot follow, or
            has an integer of more digits than JSONB holds.
    """
    try:
        return json.loads(text, parse_float=_number, parse_int=_integer, parse_constant=_refuse_constant)
    except RecursionError:
        pass  # its traceback would be as long
    raise InvalidValue("The JSON is nested too deeply.")


def json_dumps(value: object) -> str:
    """Python to JSON, the inverse of `json_loads`.

    Raises:
        InvalidValue: A NUL character, a lone surrogate, NaN or Infinity, a key that is no text, or a type
            that JSON does not have.
    """
    match value:
        case TrackedModel():
            return json_dumps(value.document())
        case None | bool():
            return json.dumps(value)
        case int() | Decimal() | float():
            _check(value)
            return repr(float(value)) if isinstance(value, float) else str(Decimal(value))
        case str():
            _check(value)
            return json.dumps(value, ensure_ascii=False)
        case Mapping():
            return "{" + ",".join(f"{json_dumps(_key(key))}:{json_dumps(item)}" for key, item in value.items()) + "}"
        case list() | tuple():
            return "[" + ",".join(map(json_dumps, value)) + "]"
    raise InvalidValue(f"JSON has no {type(value).__name__}.")


def _number(text: str) -> float | Decimal:
    approximate, exact = float(text), Decimal(text)
    return approximate if math.isfinite(approximate) and Decimal(repr(approximate)) == exact else exact


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise InvalidValue(f"An integer has more than {_MAX_DIGITS} digits.")
    return int(Decimal(digits))  # int() refuses more than 4,300 digits, Decimal does not


def _refuse_constant(name: str) -> None:
    raise InvalidValue(f"{name} is no JSON.")


def _key(key: object) -> str:
    if not isinstance(key, str):
        raise InvalidValue(f"The keys of a JSON object are texts, not {type(key).__name__}.")
    return key


def check_text(text: str) -> None:
    """Nothing, when PostgreSQL can store the text.

    Raises:
        InvalidValue: It has a NUL character or a lone surrogate.
    """
    if "\0" in text:
        raise InvalidValue("A text has a NUL character, which PostgreSQL cannot store.")
    try:
        text.encode()
    except UnicodeEncodeError:
        pass  # an error that is raised here would hold this one, which holds the text
    else:
        return
    raise InvalidValue("A text has a lone surrogate, which is no Unicode text.")


def _check(value: object) -> None:
    """Refuse a scalar that JSONB cannot hold."""
    match value:
        case SecretStr():
            _check(value.get_secret_value())
        case str():
            check_text(value)
        case float() | Decimal():
            if not Decimal(value).is_finite():
                raise InvalidValue("JSON has no NaN and no Infinity.")
        case None | bool() | int():
            pass
        case _:
            raise InvalidValue(f"JSON has no {type(value).__name__}.")


# --- the tracked tree -------------------------------------------------------------------------------------------------


class _Links:
    """Where a node hangs: the rows that own it, and the nodes that contain it.

    Links are strong, so `session.get(Client, id).tools_config.followup.stages.append(…)` is saved although nobody else
    holds the client. They are no part of the node's value: a copy starts without any, and equality ignores them.
    """

    def __init__(self) -> None:
        self.owners: dict[InstanceState[Any], tuple[object, str]] = {}
        self.containers: dict[int, _Node] = {}

    def __setitem__(self, state: InstanceState[Any], key: str) -> None:
        """Called by `sqlalchemy.ext.mutable` when the node becomes the value of a row's attribute."""
        self.owners[state] = (state.obj(), key)

    def pop(self, state: InstanceState[Any], default: None = None) -> None:
        """Called by `sqlalchemy.ext.mutable` when another value replaces the node."""
        self.owners.pop(state, default)

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        """What pickle and deepcopy make a copy from: where a node hangs stays behind."""
        return type(self), ()

    def __eq__(self, other: object) -> bool:
        """Always: see above."""
        return isinstance(other, _Links)

    __hash__ = None  # type: ignore[assignment]  # Python's way to say that equality without identity has no hash


class _Node(ABC):
    """One container of a document."""

    _links: _Links

    @property
    def _parents(self) -> _Links:
        return self._links

    @abstractmethod
    def _children(self) -> Iterable[object]: ...

    @abstractmethod
    def _snapshot(self) -> Callable[[], None]:
        """What undoes the changes made after this call."""

    @abstractmethod
    def _adopt(self) -> None:
        """Make every child a tracked node that hangs here, or refuse what JSON cannot hold."""

    def _adopted(self, value: object) -> object:
        node = _tracked(value)
        if isinstance(node, _Node) and id(self) not in node._links.containers:
            if node in _Ancestry(self):
                raise InvalidValue("A document cannot contain itself.")
            node._links.containers[id(self)] = self
        return node

    def _containers(self) -> list["_Node"]:
        """The nodes that still hold this one. Links to others are dropped here, so that no mutator has to do it."""
        containers = self._links.containers
        for key, container in list(containers.items()):
            if not any(child is self for child in container._children()):
                del containers[key]
        return list(containers.values())

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Around every change: make new children tracked, tell the owners, undo everything if one of them refuses."""
        undo = self._snapshot()
        try:
            yield
            self._adopt()
            self.changed()
        except BaseException:
            undo()
            raise

    def changed(self) -> None:
        """Flag the rows that own the document this node is part of.

        Raises:
            InvalidValue: The document was expired or refreshed: it is no row's value now, the change would be lost.
        """
        owners = self._links.owners
        stale = [state for state, (_, key) in owners.items() if state.dict.get(key) is not self]
        if owners and len(stale) == len(owners):
            raise InvalidValue(
                "This document was expired or refreshed since it was read, so a change to it would be lost. "
                "Read it from its object again, or change a copy (model_copy())."
            )
        for state in stale:
            del owners[state]
        for owner, key in owners.values():
            flag_modified(owner, key)
        for container in self._containers():
            container._child_changed(self)

    def _child_changed(self, child: "_Node") -> None:  # noqa: ARG002  # a model has to know which one
        self.changed()


class _Ancestry:
    """A node and everything above it, by identity (nodes compare by value)."""

    def __init__(self, node: _Node) -> None:
        self.node = node

    def __contains__(self, other: object) -> bool:
        """Whether it is the node or one above it."""
        return self.node is other or any(other in _Ancestry(container) for container in self.node._containers())


def _tracked(value: object) -> object:
    match value:
        case _Node():
            return value
        case Mapping():
            return TrackedDict(value)
        case list() | tuple():
            return TrackedList(value)
    _check(value)
    return value


_Result = TypeVar("_Result")
_Method = TypeVar("_Method", bound=Callable[..., Any])


def _mutator(method: _Method) -> _Method:
    """A method of `list` or `dict` that tells the owners."""

    @wraps(method)
    def tracked(self: _Node, *args: object, **kwargs: object) -> object:
        with self._changing():
            return method(self, *args, **kwargs)

    return cast("_Method", tracked)


class TrackedList(_Node, list[Any]):
    """A list inside a document. Plain containers put into it are copied into tracked ones."""

    def __init__(self, items: Iterable[object] = ()) -> None:
        super().__init__(items)
        self._links = _Links()
        self._adopt()

    append = _mutator(list.append)
    clear = _mutator(list.clear)
    extend = _mutator(list.extend)
    insert = _mutator(list.insert)
    pop = _mutator(list.pop)
    remove = _mutator(list.remove)
    reverse = _mutator(list.reverse)
    sort = _mutator(list.sort)
    __delitem__ = _mutator(list.__delitem__)
    __iadd__ = _mutator(list.__iadd__)
    __imul__ = _mutator(list.__imul__)
    __setitem__ = _mutator(list.__setitem__)

    def __reduce__(self) -> tuple[type[Self], tuple[list[Any]]]:
        """What pickle and deepcopy make a copy from: where a node hangs stays behind."""
        return type(self), (list(self),)

    def _children(self) -> Iterable[object]:
        return self

    def _snapshot(self) -> Callable[[], None]:
        before = list(self)
        return lambda: self._replace(before)

    def _adopt(self) -> None:
        self._replace([self._adopted(item) for item in self])

    def _replace(self, items: Iterable[object]) -> None:
        list.__setitem__(self, slice(None), items)


class TrackedDict(_Node, dict[str, Any]):
    """An object inside a document. Plain containers put into it are copied into tracked ones."""

    def __init__(self, items: Mapping[str, object] | None = None) -> None:
        super().__init__(items or {})
        self._links = _Links()
        self._adopt()

    clear = _mutator(dict.clear)
    pop = _mutator(dict.pop)
    popitem = _mutator(dict.popitem)
    update = _mutator(dict.update)
    __delitem__ = _mutator(dict.__delitem__)
    __ior__ = _mutator(dict.__ior__)
    __setitem__ = _mutator(dict.__setitem__)

    def setdefault(self, key: str, default: object = None) -> Any:  # as dict
        """The value of the key, after giving it the default if it has none. A container is returned tracked."""
        if key not in self:
            self[key] = default
        return self[key]

    def __reduce__(self) -> tuple[type[Self], tuple[dict[str, Any]]]:
        """What pickle and deepcopy make a copy from: where a node hangs stays behind."""
        return type(self), (dict(self),)

    def _children(self) -> Iterable[object]:
        return self.values()

    def _snapshot(self) -> Callable[[], None]:
        before = dict(self)
        return lambda: self._replace(before)

    def _adopt(self) -> None:
        for key in self:
            _check(_key(key))
        self._replace({key: self._adopted(item) for key, item in self.items()})

    def _replace(self, items: Mapping[str, object]) -> None:
        dict.clear(self)
        dict.update(self, items)


class TrackedModel(BaseModel, _Node, Mutable):  # type: ignore[misc]  # _parents: ours holds its owners, Mutable's forgets them
    """A document, or a section of one: declared keys are typed, all others are kept as they are.

    The name of a field is its key. A key that was never set is not written. Values are JSON: scalars, `SecretStr` (in
    clear in the database only), sections, and lists or dicts of these. Undeclared keys are reached as
    `document["key"]`; as an attribute too, where no method has that name. Copies are always deep: two owners would
    otherwise change each other's document.

    Every error is one of `kestra.errors`; it names the paths and never carries a value.
    """

    model_config = ConfigDict(
        extra="allow", validate_assignment=True, hide_input_in_errors=True, protected_namespaces=()
    )

    _error: ClassVar[type[InvalidValue]] = InvalidValue
    """What is raised when the document is invalid."""

    _links: _Links = PrivateAttr(default_factory=_Links)

    # --- construction

    def __init__(self, /, **data: Any) -> None:
        validate = super().__init__
        self._refusing(lambda: validate(**data))

    # As BaseModel marks its own: without it pydantic would build sections through __init__, and errors lose their path.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]  # functions take attributes

    @classmethod
    def model_validate(cls, obj: object, **options: Any) -> Self:
        """A document from a mapping; an instance is returned as it is. The options are pydantic's."""
        cls.check_depth(obj)
        validate = super().model_validate
        return cls._refusing(lambda: validate(obj, **options))

    @classmethod
    def check_depth(cls, json: object) -> None:
        """Nothing, when the JSON is nested in at most `MAX_DEPTH` levels.

        Raises:
            InvalidValue: The model's kind of it: it is nested more deeply.
        """
        if _is_deeper(json, MAX_DEPTH):
            raise cls._error(f"{cls.__name__}: objects and lists are nested in more than {MAX_DEPTH} levels.")

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **options: Any) -> Self:
        """A document from JSON text, with every digit of its numbers. The options are pydantic's."""
        return cls.model_validate(cls._parsed(json_data), **options)

    def model_post_init(self, context: object, /) -> None:  # noqa: ARG002  # the hook's signature
        """Make what was validated tracked. A subclass that overrides this must call it."""
        self._adopt()

    @classmethod
    def coerce(cls, key: str, value: object) -> Self:  # noqa: ARG003  # the hook's signature
        """What an assignment to the mapped attribute becomes. None is refused: a row always has a document."""
        return cls.model_validate(value)

    # --- copies

    def __copy__(self) -> Self:
        """An independent copy."""
        return self.__deepcopy__()

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """An independent copy, owned by no row."""
        copied = super().__deepcopy__(memo)
        copied._adopt()
        return copied

    def __setstate__(self, state: dict[Any, Any]) -> None:
        """Unpickled; owned by no row until its owner is unpickled too."""
        super().__setstate__(state)
        self._adopt()

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = True) -> Self:  # noqa: ARG002  # pydantic's signature
        """An independent copy, with the keys of `update` changed and validated."""
        copied = self.__deepcopy__()
        for key, value in (update or {}).items():
            copied[key] = value
        return copied

    # --- keys

    def __contains__(self, key: str) -> bool:
        """Whether the key is set, declared or not."""
        return key in (self.model_fields_set if key in type(self).model_fields else self._unknown)

    def __getitem__(self, key: str) -> Any:  # an undeclared key is any JSON
        """The value of a key that is set."""
        if key not in self:
            raise KeyError(key)
        return self.__dict__[key] if key in type(self).model_fields else self._unknown[key]

    def __setitem__(self, key: str, value: object) -> None:
        """Set a key; a declared one is validated."""
        if key in type(self).model_fields:
            setattr(self, key, value)
            return
        with self._changing():
            self._unknown[key] = value
            self.model_fields_set.add(key)

    def __delitem__(self, key: str) -> None:
        """Remove a key; a declared one reads as its default again."""
        if key not in self:
            raise KeyError(key)
        with self._changing():
            field = type(self).model_fields.get(key)
            if field is None:
                del self._unknown[key]
            else:
                self.__dict__[key] = field.get_default(call_default_factory=True, validated_data={})
            self.model_fields_set.discard(key)

    def __setattr__(self, name: str, value: object) -> None:
        """Set a key; a declared one is validated."""
        if name in type(self).model_fields:
            if isinstance(value, _Node) and self.__dict__.get(name) is value:
                return  # the second half of `document.items += […]`: it is there, tracked and validated
            with self._changing():
                self._assign(name, value)
        elif name.startswith("_"):
            super().__setattr__(name, value)
        elif hasattr(type(self), name):
            raise AttributeError(f"{name!r} is part of {type(self).__name__} itself; write document[{name!r}].")
        else:
            self[name] = value

    def __delattr__(self, name: str) -> None:
        """Remove a key."""
        if name.startswith("_") or name not in self:
            raise AttributeError(name)
        del self[name]

    def get(self, key: str, default: object = None) -> Any:  # an undeclared key is any JSON
        """The value of a key that is set, or the default."""
        try:
            return self[key]
        except KeyError:
            return default

    def document(self) -> dict[str, Any]:
        """Plain JSON, as the database gets it: only the keys that are set, and secrets in clear. Never log it."""
        declared = {key: self.__dict__[key] for key in type(self).model_fields if key in self.model_fields_set}
        return {key: _plain(value) for key, value in (declared | self._unknown).items()}

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """The declared keys that are set; of the others the names alone, their values may be credentials."""
        for name, field in type(self).model_fields.items():
            if field.repr and name in self.model_fields_set:
                yield name, self.__dict__[name]
        if self._unknown:
            yield "unknown_keys", sorted(self._unknown)

    # --- tracking

    @property
    def _unknown(self) -> dict[str, Any]:
        if self.__pydantic_extra__ is None:  # only while pydantic builds the model
            self.__pydantic_extra__ = {}
        return self.__pydantic_extra__

    def _children(self) -> Iterable[object]:
        return [*self.__dict__.values(), *self._unknown.values()]

    def _snapshot(self) -> Callable[[], None]:
        fields, unknown, fields_set = dict(self.__dict__), dict(self._unknown), set(self.model_fields_set)

        def undo() -> None:
            self.__dict__.clear()
            self.__dict__.update(fields)
            self.__pydantic_extra__ = unknown
            self.__pydantic_fields_set__ = fields_set

        return undo

    def _adopt(self) -> None:
        for key in self._unknown:
            _check(_key(key))
        for values in (self.__dict__, self._unknown):
            for key, value in values.items():
                values[key] = self._adopted(value)

    def _child_changed(self, child: _Node) -> None:
        """Validate a changed list or dict of a declared key as a whole; sections validate themselves."""
        for name in [name for name, value in self.__dict__.items() if value is child]:
            if isinstance(child, TrackedList | TrackedDict):
                self._assign(name, child)
                validated, self.__dict__[name] = self.__dict__[name], child
                _merge(child, validated)
            self.model_fields_set.add(name)
        self.changed()

    def _assign(self, name: str, value: object) -> None:
        assign = super().__setattr__
        self._refusing(lambda: assign(name, value))

    @classmethod
    def _parsed(cls, text: str | bytes | bytearray) -> Any:
        try:
            return json_loads(text)
        except ValueError:  # its text says where; its `doc` is the whole document
            pass
        raise cls._error(f"{cls.__name__}: the text is not JSON.")

    @classmethod
    def _refusing(cls, validation: Callable[[], _Result]) -> _Result:
        """The result of a validation. Pydantic's error carries the values; what is raised carries the paths alone."""
        try:
            return validation()
        except ValidationError as error:
            problem = _problems(cls.__name__, error)
        raise cls._error(problem)  # out here, so that not even its context is pydantic's error


def _is_deeper(value: object, levels: int) -> bool:
    """Whether plain objects and lists are nested in more levels; without recursion, which is what it guards."""
    containers = [value]
    for _ in range(levels + 1):
        inside = chain.from_iterable(
            node.values() if isinstance(node, Mapping) else node
            for node in containers
            if isinstance(node, Mapping | list)
        )
        containers = [item for item in inside if isinstance(item, Mapping | list)]
        if not containers:
            return False
    return True


def _problems(name: str, error: ValidationError) -> str:
    return f"{name}: " + "; ".join(
        ": ".join(filter(None, (".".join(map(str, problem["loc"])), problem["msg"])))
        for problem in error.errors(include_url=False, include_context=False, include_input=False)
    )


def _merge(kept: TrackedList | TrackedDict, validated: Any) -> None:  # a list or a dict, as kept
    """Take over what validation made of new items; containers that are already tracked stay the same objects."""
    if isinstance(kept, TrackedList):
        kept._replace([old if isinstance(new, list | dict) else new for old, new in zip(kept, validated, strict=True)])
    else:
        kept._replace({key: kept[key] if isinstance(new, list | dict) else new for key, new in validated.items()})
    kept._adopt()


def _plain(value: object) -> object:
    match value:
        case TrackedModel():
            return value.document()
        case SecretStr():
            return value.get_secret_value()
        case dict():
            return {key: _plain(item) for key, item in value.items()}
        case list():
            return [_plain(item) for item in value]
    return value


# --- the column -------------------------------------------------------------------------------------------------------

DocumentT = TypeVar("DocumentT", bound=TrackedModel)


class PydanticJSONB(TypeDecorator[DocumentT]):
    """A JSONB object that is a `TrackedModel` in Python. Every mapped attribute of this type is tracked.

    It stores an instance, or a mapping that is validated. None is refused: the column is NOT NULL, and JSON null is no
    object. Expressions into the document are plain JSONB: `Client.tools_config["whatsapp"]["url"].as_string()`,
    `.contains({…})`.

    Args:
        model: The type of the document.
    """

    impl = JSONB
    cache_ok = True
    # Without it the ORM leaves None out of an INSERT, and the server's default would hide the mistake.
    should_evaluate_none = True

    class Comparator(TypeDecorator.Comparator[Any], JSONB.Comparator[Any]):
        """The operators of JSONB; what is inside a document is no document."""

        def __getitem__(self, index: Any) -> ColumnElement[Any]:  # a key, a position or a path
            """The value at a key, a position or a path, as plain JSONB."""
            return type_coerce(self.expr, JSONB())[index]

    comparator_factory = Comparator

    def __init__(self, model: type[DocumentT]) -> None:
        super().__init__()
        self.model = model

    def process_bind_param(self, value: DocumentT | Mapping[str, Any] | None, dialect: Dialect) -> dict[str, Any]:  # noqa: ARG002  # the hook's signature
        """The document as plain JSON.

        Raises:
            InvalidValue: The model's kind of it: something that was put into the document is nested too deeply.
        """
        document = self.model.model_validate(value).document()
        self.model.check_depth(document)
        return document

    def process_result_value(self, value: object, dialect: Dialect) -> DocumentT | None:  # noqa: ARG002  # the hook's signature
        """The document, or None for the missing row of an outer join.

        Raises:
            InvalidValue: The model's kind of it: the stored document, written by other means, breaks the types.
        """
        return None if value is None else self.model.model_validate(value)

    def coerce_compared_value(self, op: OperatorType | None, value: object) -> TypeEngine[Any]:
        """An operand is plain JSON, not a whole document."""
        return self.impl_instance.coerce_compared_value(op, value)

    def compare_values(self, x: object, y: object) -> bool:
        """Only the same object is no change: 1 equals True, and the old document may have changed since."""
        return x is y


@event.listens_for(Mapper, "mapper_configured")
def _track(mapper: Mapper[Any], class_: type) -> None:
    for attribute in mapper.column_attrs:
        column_type = attribute.columns[0].type
        if isinstance(column_type, PydanticJSONB):
            column_type.model.associate_with_attribute(getattr(class_, attribute.key))
