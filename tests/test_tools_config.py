import json
import pickle
import traceback
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import SecretStr, TypeAdapter, ValidationError

from kestra.columns import json_loads
from kestra.errors import InvalidToolsConfig, InvalidValue
from kestra.tools_config import AllowedHours, Day, FollowUp, FollowUpStage, Tool, ToolsConfig, WhatsApp

EXISTING = """{
    "ai_active": true, "start_upper": false, "consultar_cep": true,
    "whatsapp": {"url": "https://api.z-api.io/instances/861168", "key": "secret-892f902b"},
    "followup": {
        "active": true,
        "stages": [
            {"delay_minutes": 30, "prompt": "Retome com cordialidade", "type": "text"},
            {"delay_minutes": 120, "prompt": "Retome", "type": "audio", "audio_url": "https://cdn/signed?token=abc"}
        ],
        "allowed_hours": {"enabled": true, "start": "08:00", "end": "20:00"}
    },
    "business_hours": {
        "active": true, "mode": "reply", "off_message": "Fechado",
        "schedule": {"seg": {"on": true, "start": "8:00", "end": "24:00"}, "dom": {"on": false, "start": "", "end": ""}}
    },
    "agenda": {"active": true, "calendar": "c1"},
    "chave_desconhecida": {"versao": 7, "lista": [1, 2, {"x": null}]}
}"""

DOCUMENTED: dict[str, Any] = {
    "ai_active": True,
    "start_upper": False,
    "consultar_cep": {"active": True},
    "whatsapp": {"url": "https://api.z-api.io/...", "key": "secret-key"},
}


def _set(assign: Callable[[ToolsConfig, str, Any], None], document: dict[str, Any]) -> None:
    for key, value in document.items():
        assign(ToolsConfig(), key, value)


def _existing() -> ToolsConfig:
    return ToolsConfig.model_validate_json(EXISTING)


@pytest.mark.parametrize("document", [json.loads(EXISTING), DOCUMENTED, {}, {"followup": None}, {"whatsapp": {}}])
def test_document_survives_a_load_and_a_save(document: dict[str, Any]) -> None:
    assert ToolsConfig.model_validate(document).document() == document


def test_unknown_keys_are_kept_at_every_level() -> None:
    document: dict[str, Any] = {
        "x": 1,
        "consultar_cep": {"x": 1},
        "whatsapp": {"x": 1},
        "followup": {"x": 1, "stages": [{"x": 1}], "allowed_hours": {"x": 1}},
        "business_hours": {"x": 1, "schedule": {"x": 1, "sab": {"x": 1}}},
    }
    assert ToolsConfig.model_validate(document).document() == document


def test_known_keys_are_typed() -> None:
    config = _existing()
    assert config.followup is not None
    assert config.followup.stages is not None
    assert config.followup.stages[0].delay_minutes == 30
    assert config.followup.allowed_hours == AllowedHours(enabled=True, start="08:00", end="20:00")
    assert config.business_hours is not None
    assert config.business_hours.schedule is not None
    assert config.business_hours.schedule.seg == Day(on=True, start="8:00", end="24:00")
    assert config.whatsapp is not None
    assert config.whatsapp.key == SecretStr("secret-892f902b")
    assert ToolsConfig().followup is None


@pytest.mark.parametrize(
    ("value", "active"),
    [
        (True, True),
        ({"active": True}, True),
        ({"active": True, "limit": 3}, True),
        (False, False),
        (None, False),
        ({}, False),
        ({"active": False}, False),
        ({"active": None}, False),
    ],
)
@pytest.mark.parametrize("tool", ["consultar_cep", "agenda"])
def test_tool_is_active_when_true_or_told_so(tool: str, value: object, active: bool) -> None:  # noqa: FBT001  # a parameter of the test
    assert ToolsConfig.model_validate({tool: value}).is_active(tool) is active


@pytest.mark.parametrize("value", [1, "true", {"active": 1}, {"active": "true"}, [True], ["active"]])
def test_undeclared_tool_in_another_form_is_off(value: object) -> None:
    assert not ToolsConfig.model_validate({"agenda": value}).is_active("agenda")


def test_absent_tool_and_method_names_are_off() -> None:
    assert not ToolsConfig().is_active("consultar_cep")
    assert not ToolsConfig().is_active("is_active")


def test_section_is_active_as_a_tool_is() -> None:
    assert _existing().is_active("followup")
    assert _existing().is_active("ai_active")
    assert not _existing().is_active("whatsapp")


def test_bare_tool_stays_bare_until_it_gets_settings() -> None:
    config = _existing()
    config.ai_active = False
    assert config.document()["consultar_cep"] is True
    config.consultar_cep = Tool(active=True, limit=3)
    assert config.document()["consultar_cep"] == {"active": True, "limit": 3}


INVALID: list[tuple[dict[str, Any], str]] = [
    ({"ai_active": "SECRET"}, "ai_active"),
    ({"ai_active": 1}, "ai_active"),
    ({"start_upper": "SECRET"}, "start_upper"),
    ({"consultar_cep": "SECRET"}, "consultar_cep"),
    ({"consultar_cep": {"active": "SECRET"}}, "consultar_cep.Tool.active"),
    ({"whatsapp": "SECRET"}, "whatsapp"),
    ({"whatsapp": {"url": ["SECRET"]}}, "whatsapp.url"),
    ({"whatsapp": {"key": ["SECRET"]}}, "whatsapp.key"),
    ({"followup": {"stages": {"SECRET": 1}}}, "followup.stages"),
    ({"followup": {"stages": [{}, {"delay_minutes": "SECRET"}]}}, "followup.stages.1.delay_minutes"),
    ({"followup": {"stages": [{"delay_minutes": -1}]}}, "followup.stages.0.delay_minutes"),
    ({"followup": {"stages": [{"delay_minutes": True}]}}, "followup.stages.0.delay_minutes"),
    ({"followup": {"stages": [{"delay_minutes": 1.0}]}}, "followup.stages.0.delay_minutes"),
    ({"followup": {"stages": [{"type": "SECRET"}]}}, "followup.stages.0.type"),
    ({"followup": {"allowed_hours": {"start": "SECRET"}}}, "followup.allowed_hours.start"),
    ({"followup": {"allowed_hours": {"end": "25:00"}}}, "followup.allowed_hours.end"),
    ({"followup": {"allowed_hours": {"end": 8}}}, "followup.allowed_hours.end"),
    ({"business_hours": {"schedule": {"seg": {"on": "SECRET"}}}}, "business_hours.schedule.seg.on"),
    ({"business_hours": {"schedule": {"seg": {"start": "08:60"}}}}, "business_hours.schedule.seg.start"),
    ({"business_hours": {"mode": 1}}, "business_hours.mode"),
]


@pytest.mark.parametrize(("document", "path"), INVALID)
@pytest.mark.parametrize(
    "build",
    [
        ToolsConfig.model_validate,
        lambda document: ToolsConfig(**document),
        lambda document: ToolsConfig.model_validate_json(json.dumps(document)),
        lambda document: _set(setattr, document),
        lambda document: _set(ToolsConfig.__setitem__, document),
        lambda document: ToolsConfig.coerce("tools_config", document),
    ],
    ids=["validate", "construct", "json", "attribute", "item", "column"],
)
def test_invalid_document_is_refused_with_the_path_and_without_the_value(
    build: Callable[[dict[str, Any]], object], document: dict[str, Any], path: str
) -> None:
    with pytest.raises(InvalidToolsConfig) as refused:
        build(document)
    assert path in str(refused.value)
    assert "SECRET" not in "".join(traceback.format_exception(refused.value))
    assert refused.value.__cause__ is None
    assert refused.value.__context__ is None
    assert not isinstance(refused.value, ValidationError)


def test_pydantic_itself_does_not_print_the_value() -> None:
    with pytest.raises(ValidationError, match="ai_active") as refused:
        TypeAdapter(ToolsConfig).validate_python({"ai_active": "SECRET"})
    assert "SECRET" not in str(refused.value)


def test_every_problem_is_listed() -> None:
    with pytest.raises(InvalidToolsConfig, match=r"ai_active: .*; followup\.active: "):
        ToolsConfig.model_validate({"ai_active": 1, "followup": {"active": 1}})


def test_refused_assignment_changes_nothing() -> None:
    config = _existing()
    value: Any = "x"
    with pytest.raises(InvalidToolsConfig, match="ai_active"):
        config.ai_active = value
    with pytest.raises(InvalidToolsConfig, match="key"):
        WhatsApp()["key"] = [value]
    assert config == _existing()


def test_unknown_key_is_reached_like_in_a_dict() -> None:
    config = _existing()
    config["chave_desconhecida"]["lista"][2]["x"] = 1
    assert config.get("chave_desconhecida") == {"versao": 7, "lista": [1, 2, {"x": 1}]}
    del config["chave_desconhecida"]
    assert "chave_desconhecida" not in config
    assert "chave_desconhecida" not in config.document()


@pytest.mark.parametrize(
    "show", [repr, str, "{}".format, lambda config: repr([config])], ids=["repr", "str", "format", "in a list"]
)
def test_nothing_secret_is_shown(show: Callable[[ToolsConfig], str]) -> None:
    config = _existing()
    config["crm"] = {"password": "hunter2"}
    config.consultar_cep = Tool(active=True, api_key="hunter2")
    shown = show(config)
    for hidden in ("secret-892f902b", "861168", "Retome", "signed", "Fechado", "versao", "hunter2", "calendar"):
        assert hidden not in shown
    for visible in ("ai_active=True", "chave_desconhecida", "crm", "api_key", "delay_minutes=30", "08:00"):
        assert visible in shown


def test_key_is_in_clear_for_the_database_only() -> None:
    config = _existing()
    assert config.document()["whatsapp"]["key"] == "secret-892f902b"
    assert "secret-892f902b" not in config.model_dump_json()
    assert "secret-892f902b" not in str(config.model_dump())


def test_key_survives_pickling_and_replacement() -> None:
    config: ToolsConfig = pickle.loads(pickle.dumps(_existing()))  # noqa: S301  # our own bytes
    assert config == _existing()
    assert config.whatsapp is not None
    config.whatsapp["key"] = "new"
    assert config.whatsapp.key == SecretStr("new")
    assert config.document()["whatsapp"]["key"] == "new"


def test_stages_are_edited_in_place() -> None:
    config = _existing()
    assert config.followup is not None
    assert config.followup.stages is not None
    config.followup.stages.append(FollowUpStage(delay_minutes=480, type="text"))
    config.followup.stages[0].delay_minutes = 15
    del config.followup.stages[1]
    assert [stage["delay_minutes"] for stage in config.document()["followup"]["stages"]] == [15, 480]
    with pytest.raises(InvalidToolsConfig, match="delay_minutes"):
        config.followup.stages[0].delay_minutes = -1


def test_section_is_built_from_a_mapping_that_is_assigned() -> None:
    config = ToolsConfig()
    config["followup"] = {"active": True}
    assert config.followup == FollowUp(active=True)


def test_nul_in_a_prompt_is_refused() -> None:
    with pytest.raises(InvalidValue, match="NUL"):
        FollowUpStage(prompt="a\0b")


def test_json_of_the_database_reads_as_the_same_document() -> None:
    assert ToolsConfig.model_validate(json_loads(EXISTING)) == _existing()
