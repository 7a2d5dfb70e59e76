"""`tools_config`, the JSON document a client's assistant is configured with: edited by people, read by programs.

Known keys are typed, unknown keys are kept untouched, at every level. What was written in one form stays in it: a bare
`true` stays a bare `true`, a key that was not there is not added. Every key is optional; an absent one reads as None.

Times of day are texts such as "08:00", local to the client: in the zone that `timezone` names, or in `DEFAULT_ZONE`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final, Literal, get_args
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import AfterValidator, Field, SecretStr, StrictBool, StrictStr, StringConstraints

from kestra.columns import TrackedModel
from kestra.errors import ConfigurationError, InvalidToolsConfig, InvalidValue

DEFAULT_ZONE: Final = "America/Sao_Paulo"
"""Where a client is that does not say it."""

TimeOfDay = Annotated[
    str, StringConstraints(strict=True, pattern=r"^(([01]?[0-9]|2[0-3]):[0-5][0-9](:[0-5][0-9])?|24:00|)$")
]
"""A local time of day, kept as it was typed: "08:00", "8:00", "24:00" as the end of a day, "" for a blank field."""


def _zone(name: str) -> ZoneInfo:
    """A zone by its IANA name.

    Raises:
        ValueError: There is no such zone.
        ConfigurationError: This machine knows no zone at all.
    """
    # KeyError: unknown. ValueError: no name, or no zone's file. OSError: a folder of zones, a name that is too long.
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        pass
    try:
        ZoneInfo(DEFAULT_ZONE)
    except ZoneInfoNotFoundError:
        raise ConfigurationError("This machine has no time zones. Install the package tzdata.") from None
    raise ValueError(f"there is no such time zone; give the name of one, such as {DEFAULT_ZONE}")


def _known_zone(name: str) -> str:
    _zone(name)
    return name


ZoneName = Annotated[StrictStr, AfterValidator(_known_zone)]
"""The IANA name of a time zone, such as "America/Manaus"."""


class _Section(TrackedModel):
    _error: ClassVar[type[InvalidValue]] = InvalidToolsConfig


class Tool(_Section):
    """A tool that has settings. A tool without any is a bare `true` or `false`."""

    active: StrictBool | None = None


class WhatsApp(_Section):
    """How messages are sent. The key is in clear in the database only; the URL names the instance: neither is shown."""

    url: StrictStr | None = Field(default=None, repr=False)
    key: SecretStr | None = None
    provider: StrictStr | None = None

    @property
    def enforces_window(self) -> bool:
        """Whether the channel refuses what is sent later than 24 hours after the end customer's last message.

        Meta's own API does: `provider` says "meta", or names nobody and `url` is Meta's. No other is known to.
        """
        if self.provider is not None:
            return self.provider == "meta"
        url = self.url or ""
        try:
            return urlsplit(url if "//" in url else f"//{url}").hostname == "graph.facebook.com"
        except ValueError:  # malformed, so nobody's
            return False


class FollowUpStage(_Section):
    """One message to a silent end customer."""

    delay_minutes: Annotated[int, Field(strict=True, ge=0)] | None = None
    prompt: StrictStr | None = Field(default=None, repr=False)
    type: Literal["text", "audio"] | None = None
    audio_url: StrictStr | None = Field(default=None, repr=False)


class AllowedHours(_Section):
    """When follow-ups may be sent."""

    enabled: StrictBool | None = None
    start: TimeOfDay | None = None
    end: TimeOfDay | None = None


class FollowUp(_Section):
    """What is sent to an end customer who does not answer, stage by stage."""

    active: StrictBool | None = None
    stages: list[FollowUpStage] | None = None
    allowed_hours: AllowedHours | None = None


class Day(_Section):
    """The opening hours of one weekday."""

    on: StrictBool | None = None
    start: TimeOfDay | None = None
    end: TimeOfDay | None = None


class Schedule(_Section):
    """The week, Monday to Sunday."""

    seg: Day | None = None
    ter: Day | None = None
    qua: Day | None = None
    qui: Day | None = None
    sex: Day | None = None
    sab: Day | None = None
    dom: Day | None = None


class BusinessHours(_Section):
    """When the client is open, and what is answered when it is not."""

    active: StrictBool | None = None
    mode: StrictStr | None = None
    schedule: Schedule | None = None
    off_message: StrictStr | None = Field(default=None, repr=False)


class ToolsConfig(_Section):
    """The whole document. Any key that is not declared here may be a tool of its own: see `is_active`."""

    ai_active: StrictBool | None = None
    timezone: ZoneName | None = None
    start_upper: StrictBool | None = None
    consultar_cep: StrictBool | Tool | None = None
    whatsapp: WhatsApp | None = None
    followup: FollowUp | None = None
    business_hours: BusinessHours | None = None

    def zone(self) -> ZoneInfo:
        """The zone that the document's times of day are in.

        Raises:
            ConfigurationError: This machine knows no zone at all.
        """
        return _zone(self.timezone or DEFAULT_ZONE)

    def is_active(self, tool: str) -> bool:
        """Whether a tool or section is on: `true`, or an object with `"active": true`. Anything else is off."""
        value = self.get(tool)
        if isinstance(value, TrackedModel | Mapping):
            value = value.get("active")
        return value is True


# --- patches ----------------------------------------------------------------------------------------------------------

MASK: Final = SecretStr(str(SecretStr("shown")))
"""What a secret is shown as, and so what comes back from a form in its place."""


def merge_patch(document: object, patch: object) -> Any:  # JSON is any value
    """The document after a JSON merge patch (RFC 7396): objects are merged key by key, and null takes a key away.

    Everything else replaces what was there, a list as a whole. Neither argument is changed. A section of the document's
    own types counts as the object that it is.
    """
    match patch:
        case TrackedModel():
            return merge_patch(document, patch.document())
        case Mapping():
            merged = dict(document) if isinstance(document, Mapping) else {}
            for key, value in patch.items():
                if value is None:
                    merged.pop(key, None)
                else:
                    merged[key] = merge_patch(merged.get(key), value)
            return merged
    return patch


def unmask(document: object, *, stored: object) -> ToolsConfig:
    """The document, validated as a whole; where it shows the mask of a secret, it has the stored secret.

    Args:
        document: What is to be stored. It is not changed.
        stored: The JSON that it replaces, valid or not.

    Raises:
        InvalidToolsConfig: A key has the wrong type, or a mask is all there is: no secret is stored in its place.
        InvalidValue: A value is none that JSONB can hold.
    """
    config = ToolsConfig.model_validate(document).model_copy()
    for path in SECRETS:
        if _at(config, path) == MASK:
            secret = _at(stored, path)
            if not secret:
                raise InvalidToolsConfig(
                    f"ToolsConfig: {'.'.join(path)}: this is the mask of a secret, and no secret is stored. "
                    "Give the secret itself, or leave the key out."
                )
            _at(config, path[:-1])[path[-1]] = secret
    return config


def _at(node: Any, path: Sequence[str]) -> Any:  # JSON is any value
    for key in path:
        node = node.get(key) if isinstance(node, TrackedModel | Mapping) else None
    return node


def _secrets(section: type[TrackedModel]) -> Iterator[tuple[str, ...]]:
    for name, field in section.model_fields.items():
        for kind in get_args(field.annotation) or (field.annotation,):
            if kind is SecretStr:
                yield (name,)
            elif isinstance(kind, type) and issubclass(kind, TrackedModel):
                yield from ((name, *path) for path in _secrets(kind))


SECRETS: Final = tuple(_secrets(ToolsConfig))
"""The path of every secret of the document. None is in a list: there, no stored one could be told from another."""
