import json
import pickle
import sys
import traceback
import zoneinfo
from collections.abc import Callable, Iterator
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from pydantic import SecretStr, TypeAdapter, ValidationError

from kestra.columns import json_loads
from kestra.errors import ConfigurationError, InvalidToolsConfig, InvalidValue
from kestra.tools_config import (
    MASK,
    SECRETS,
    AllowedHours,
    Day,
    FollowUp,
    FollowUpStage,
    Tool,
    ToolsConfig,
    WhatsApp,
    merge_patch,
    unmask,
)

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
    ({"timezone": "SECRET"}, "timezone"),
    ({"timezone": ["SECRET"]}, "timezone"),
    ({"whatsapp": {"provider": ["SECRET"]}}, "whatsapp.provider"),
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


# --- patches ----------------------------------------------------------------------------------------------------------

# Every example of RFC 7396, appendix A.
RFC_7396 = """
    {"a":"b"}         {"a":"c"}           {"a":"c"}
    {"a":"b"}         {"b":"c"}           {"a":"b","b":"c"}
    {"a":"b"}         {"a":null}          {}
    {"a":"b","b":"c"} {"a":null}          {"b":"c"}
    {"a":["b"]}       {"a":"c"}           {"a":"c"}
    {"a":"c"}         {"a":["b"]}         {"a":["b"]}
    {"a":{"b":"c"}}   {"a":{"b":"d","c":null}} {"a":{"b":"d"}}
    {"a":[{"b":"c"}]} {"a":[1]}           {"a":[1]}
    ["a","b"]         ["c","d"]           ["c","d"]
    {"a":"b"}         ["c"]               ["c"]
    {"a":"foo"}       null                null
    {"a":"foo"}       "bar"               "bar"
    {"e":null}        {"a":1}             {"e":null,"a":1}
    [1,2]             {"a":"b","c":null}  {"a":"b"}
    {}                {"a":{"bb":{"ccc":null}}} {"a":{"bb":{}}}
"""


@pytest.mark.parametrize("example", RFC_7396.strip().splitlines())
def test_patch_is_merged_as_the_rfc_says(example: str) -> None:
    document, patch, result = map(json.loads, example.split())
    before = json.dumps([document, patch])
    assert merge_patch(document, patch) == result
    assert json.dumps([document, patch]) == before


def test_section_in_a_patch_counts_as_the_keys_that_are_set() -> None:
    document = {"followup": {"active": True, "x": 1, "allowed_hours": {"start": "08:00", "end": "20:00"}}}
    section = FollowUp(active=False, allowed_hours=AllowedHours(end="21:00"))
    expected = {"followup": {"active": False, "x": 1, "allowed_hours": {"start": "08:00", "end": "21:00"}}}
    assert merge_patch(document, {"followup": section}) == expected
    assert merge_patch(document, ToolsConfig(followup=section)) == expected


def test_paths_of_secrets_are_all_there_are() -> None:
    assert ("whatsapp", "key") in SECRETS
    assert json.dumps(ToolsConfig.model_json_schema()).count('"format": "password"') == len(SECRETS)


def test_mask_is_what_a_secret_is_shown_as() -> None:
    config = ToolsConfig.model_validate({"whatsapp": {"key": "k"}})
    assert json.loads(config.model_dump_json())["whatsapp"]["key"] == MASK.get_secret_value()


@pytest.mark.parametrize("masked", [MASK, MASK.get_secret_value()], ids=["secret", "text"])
def test_mask_stands_for_the_stored_secret(masked: object) -> None:
    config = unmask({"whatsapp": {"key": masked, "url": "u"}}, stored={"whatsapp": {"key": "k"}, "x": 1})
    assert config.document() == {"whatsapp": {"key": "k", "url": "u"}}


@pytest.mark.parametrize("key", ["k", "*********", "***********", "", None])
def test_what_is_no_mask_is_taken_as_it_is(key: str | None) -> None:
    config = unmask({"whatsapp": {"key": key}}, stored={"whatsapp": {"key": "stored"}})
    assert config.document() == {"whatsapp": {"key": key}}


@pytest.mark.parametrize(
    "stored",
    [{}, {"whatsapp": None}, {"whatsapp": "k"}, {"whatsapp": ["k"]}, {"whatsapp": {}}, {"whatsapp": {"key": ""}}, None],
    ids=repr,
)
def test_mask_without_a_stored_secret_is_refused(stored: object) -> None:
    with pytest.raises(InvalidToolsConfig, match=r"whatsapp\.key"):
        unmask({"whatsapp": {"key": MASK.get_secret_value()}}, stored=stored)


def test_stored_secret_of_the_wrong_type_is_refused_and_not_shown() -> None:
    stored = {"whatsapp": {"key": ["hunter2"]}}
    with pytest.raises(InvalidToolsConfig, match="key") as refused:
        unmask({"whatsapp": {"key": MASK}}, stored=stored)
    assert "hunter2" not in "".join(traceback.format_exception(refused.value))


def test_mask_that_was_stored_stops_no_other_change() -> None:
    stored = {"whatsapp": {"key": MASK.get_secret_value()}}
    assert unmask({**stored, "x": 1}, stored=stored).document() == {**stored, "x": 1}


def test_document_that_is_unmasked_is_not_changed_and_not_shared() -> None:
    given = ToolsConfig.model_validate({"whatsapp": {"key": MASK.get_secret_value()}, "x": {"y": 1}})
    config = unmask(given, stored={"whatsapp": {"key": "k"}})
    config["x"]["y"] = 2
    assert given.document() == {"whatsapp": {"key": MASK.get_secret_value()}, "x": {"y": 1}}


# --- the zone and the channel ---


def test_zone_is_the_one_that_is_named_or_that_of_sao_paulo() -> None:
    config = ToolsConfig()
    assert config.zone() == ZoneInfo("America/Sao_Paulo")
    config.timezone = "America/Manaus"
    assert config.zone() == ZoneInfo("America/Manaus")
    assert config.document() == {"timezone": "America/Manaus"}


@pytest.mark.parametrize(
    "name", ["", "America", "Mars/Phobos", "../etc/passwd", "/etc/localtime", "zone.tab", "x" * 999]
)
def test_zone_that_does_not_exist_is_refused(name: str) -> None:
    with pytest.raises(InvalidToolsConfig, match=r"timezone: .*no such time zone"):
        ToolsConfig(timezone=name)


@pytest.fixture
def machine_without_zones(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for package in ("tzdata", "tzdata.zoneinfo.America"):
        monkeypatch.setitem(sys.modules, package, None)
    zoneinfo.reset_tzpath([])
    ZoneInfo.clear_cache()
    yield
    zoneinfo.reset_tzpath()


@pytest.mark.usefixtures("machine_without_zones")
def test_machine_without_zones_is_told_what_to_install() -> None:
    with pytest.raises(ConfigurationError, match="tzdata"):
        ToolsConfig().zone()
    with pytest.raises(ConfigurationError, match="tzdata"):
        ToolsConfig(timezone="America/Manaus")


@pytest.mark.parametrize(
    ("whatsapp", "enforced"),
    [
        ({"provider": "meta"}, True),
        ({"provider": "meta", "url": "https://api.z-api.io/x"}, True),
        ({"provider": "uazapi", "url": "https://graph.facebook.com/v19.0/1"}, False),
        ({"provider": "", "url": "https://graph.facebook.com/v19.0/1"}, False),
        ({"url": "https://graph.facebook.com/v19.0/1"}, True),
        ({"url": "https://GRAPH.facebook.com:443/v19.0/1"}, True),
        ({"url": "graph.facebook.com/v19.0/1"}, True),
        ({"url": "https://api.z-api.io/?next=https://graph.facebook.com/"}, False),
        ({"url": "https://graph.facebook.com.example.org/"}, False),
        ({"url": "https://[graph.facebook.com/"}, False),
        ({"url": ""}, False),
        ({}, False),
    ],
)
def test_window_is_enforced_by_meta_alone(whatsapp: dict[str, Any], enforced: bool) -> None:  # noqa: FBT001  # a parameter of the test
    assert WhatsApp(**whatsapp).enforces_window is enforced


# --- depth ------------------------------------------------------------------------------------------------------------


def nested(levels: int) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for level in range(levels - 1):
        document = {"a": document if level % 2 else [document]}
    return document


def test_a_document_may_be_nested_in_fifty_levels() -> None:
    deepest = {"x": nested(24)}
    assert ToolsConfig.model_validate(deepest).document() == deepest


@pytest.mark.parametrize("levels", [60, 5000])
def test_a_document_that_is_nested_more_deeply_is_refused(levels: int) -> None:
    with pytest.raises(InvalidToolsConfig, match="more than 50 levels"):
        ToolsConfig.model_validate({"x": nested(levels)})


def test_what_is_put_into_a_document_is_bounded_too() -> None:
    config = ToolsConfig()
    config["x"] = nested(60)
    with pytest.raises(InvalidToolsConfig, match="more than 50 levels"):
        ToolsConfig.check_depth(config.document())
