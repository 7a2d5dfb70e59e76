"""`tools_config`, the JSON document a client's assistant is configured with: edited by people, read by programs.

Known keys are typed, unknown keys are kept untouched, at every level. What was written in one form stays in it: a bare
`true` stays a bare `true`, a key that was not there is not added. Every key is optional; an absent one reads as None.

Times of day are texts such as "08:00", local to the client; the document names no zone, and America/Sao_Paulo is meant.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, SecretStr, StrictBool, StrictStr, StringConstraints

from kestra.columns import TrackedModel
from kestra.errors import InvalidToolsConfig, InvalidValue

TimeOfDay = Annotated[
    str, StringConstraints(strict=True, pattern=r"^(([01]?[0-9]|2[0-3]):[0-5][0-9](:[0-5][0-9])?|24:00|)$")
]
"""A local time of day, kept as it was typed: "08:00", "8:00", "24:00" as the end of a day, "" for a blank field."""


class _Section(TrackedModel):
    _error: ClassVar[type[InvalidValue]] = InvalidToolsConfig


class Tool(_Section):
    """A tool that has settings. A tool without any is a bare `true` or `false`."""

    active: StrictBool | None = None


class WhatsApp(_Section):
    """How messages are sent. The key is in clear in the database only; the URL names the instance: neither is shown."""

    url: StrictStr | None = Field(default=None, repr=False)
    key: SecretStr | None = None


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
    start_upper: StrictBool | None = None
    consultar_cep: StrictBool | Tool | None = None
    whatsapp: WhatsApp | None = None
    followup: FollowUp | None = None
    business_hours: BusinessHours | None = None

    def is_active(self, tool: str) -> bool:
        """Whether a tool or section is on: `true`, or an object with `"active": true`. Anything else is off."""
        value = self.get(tool)
        if isinstance(value, TrackedModel | Mapping):
            value = value.get("active")
        return value is True
