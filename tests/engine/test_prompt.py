"""From messages to text. Templates come with downloaded files: they may compute text and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.prompt import TEMPLATE_FILE, JinjaTemplate, PrefixTemplate, load_prompt_format
from infsvc.errors import BadRequest, LoadError
from infsvc.types import Message
from tests.tiny_models import CHATML

HELLO = (Message(role="user", content="hello"),)
TALK = (
    Message(role="system", content="be kind"),
    Message(role="user", content="hello"),
    Message(role="assistant", content="hi"),
    Message(role="user", content="<b>'\"&"),
)


def rendered(source: str, messages: tuple[Message, ...] = HELLO, **options: bool) -> str:
    return JinjaTemplate(source, bos="<s>", eos="</s>").render(messages, **{"think": False} | options)


def test_a_models_own_template() -> None:
    assert rendered(CHATML, TALK) == (
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
        "<|im_start|>assistant\nhi<|im_end|>\n"
        "<|im_start|>user\n<b>'\"&<|im_end|>\n<|im_start|>assistant\n"
    )


def test_what_template_authors_expect() -> None:
    assert rendered("{{ bos_token }}{{ eos_token }}{{ add_generation_prompt }}") == "<s></s>True"
    told = "{% if enable_thinking is defined %}{{ enable_thinking }}{% else %}open{% endif %}"
    assert [rendered(told, think=think) for think in (True, False, None)] == ["True", "False", "open"]
    assert rendered("{% if tools %}tools{% else %}none{% endif %}") == "none"
    assert rendered("{% for m in messages %}{{ loop.index }}{% break %}{% endfor %}") == "1"
    assert (
        rendered("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}")
        == "1"
    )
    assert rendered("{{ messages[0]['content'].split('l') | join('L') }}") == "heLLo"
    assert rendered("{{ messages[0].content is string and messages[0].name is not defined }}") == "True"
    assert rendered("{% for i in range(3) %}{{ i }}{% endfor %}{{ 2 * 3 }}{{ 'a' ~ 1 }}") == "0126a1"
    assert rendered("a\n  {% if true %}\nb\n  {% endif %}\nc") == "a\nb\nc"
    assert rendered("{% generation %}{{ messages[0].content }}{% endgeneration %}") == "hello"
    assert len(rendered("{{ strftime_now('%Y-%m-%d') }}")) == 10


def test_tojson_keeps_the_order_and_escapes_nothing_for_html() -> None:
    source = "{{ {'z': '<a> & \\'b\\'', 'a': 'é'} | tojson }}"
    assert rendered(source) == '{"z": "<a> & \'b\'", "a": "é"}'
    assert rendered("{{ {'b': 1} | tojson(indent=2) }}") == '{\n  "b": 1\n}'
    assert rendered("{{ {'b': 1, 'a': 2} | tojson(sort_keys=True, separators=(',', ':')) }}") == '{"a":2,"b":1}'


def test_a_template_may_refuse() -> None:
    with pytest.raises(BadRequest, match="refuses these messages: no system here") as caught:
        rendered("{{ raise_exception('no system here') }}")
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "escape",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__ }}",
        "{{ messages[0].content.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ raise_exception['__globals__'] }}",
        "{{ strftime_now.__code__ }}",
        "{{ range.__closure__ }}",
        "{{ self._TemplateReference__context }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ '%s'.__mod__ }}",
        "{{ ''|attr('__class__') }}",
        "{{ ''|attr('__cl' ~ 'ass__') }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ ['{0.__class__}'] | map('format', '') | list }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'a': 1}) }}",
    ],
)
def test_no_way_out_of_the_sandbox(escape: str) -> None:
    try:
        text = rendered(escape)
    except BadRequest:
        return
    # Jinja answers some with an undefined value, which is nothing.
    assert "class" not in text
    assert "object at" not in text
    assert "uid=" not in text
    assert text.strip() in ("", "[]", "{0.__class__}", "['{0.__class__}']")


@pytest.mark.parametrize("reach", ["{% include '/etc/passwd' %}", "{% import 'os' as os %}", "{% extends 'base' %}"])
def test_no_file_is_read(reach: str) -> None:
    with pytest.raises((BadRequest, LoadError)):
        rendered(reach)


@pytest.mark.parametrize(
    "endless",
    [
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% for i in range(1000000000) %}x{% endfor %}",
        "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 1000000000 }}",
        "{{ 1000000000 * 'x' }}",
        "{{ [0] * 1000000000 }}",
        "{{ 10 ** 10 ** 10 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 1 / 0 }}",
        "{{ messages[99].content.x }}",
        "{{ messages[0].content + 1 }}",
        "{{ strftime_now(5) }}",
        "{{ nothing() }}",
    ],
)
def test_what_never_ends_or_fails_is_a_bad_request(endless: str) -> None:
    with pytest.raises(BadRequest, match=r"fails on these messages: ."):
        rendered(endless)


def test_each_rendering_may_loop_anew() -> None:
    template = JinjaTemplate("{% for i in range(60000) %}{% endfor %}ok", bos="", eos="")
    assert [template.render(HELLO, think=False) for _ in range(3)] == ["ok"] * 3


def test_a_prompt_without_bound_is_refused() -> None:
    with pytest.raises(BadRequest, match="too long"):
        rendered(
            "{% for i in range(9) %}{{ messages[0].content }}{% endfor %}", (Message(role="user", content="x" * 2**21),)
        )


@pytest.mark.parametrize(
    "broken", ["{% if %}", "{{ a b }}", "{% for %}", "{% nothing %}", "{{ x | no_such_filter }}", "{{" * 30]
)
def test_a_template_that_does_not_compile_names_the_way_out(broken: str) -> None:
    with pytest.raises(LoadError, match=TEMPLATE_FILE):
        JinjaTemplate(broken, bos="", eos="")


SEED = {
    "name": "Gemma-3",
    "user_prefix": "<start_of_turn>user\n",
    "user_suffix": "<end_of_turn>\n",
    "model_prefix": "<start_of_turn>model\n",
    "model_suffix": "",
}


def override(folder: Path, content: str | bytes) -> Path:
    path = folder / TEMPLATE_FILE
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / "model.gguf"


def test_the_override_in_its_documented_form(tmp_path: Path) -> None:
    form = load_prompt_format(override(tmp_path, json.dumps(SEED)), CHATML, bos="", eos="")
    assert form is not None
    assert form.render(HELLO, think=False) == "<start_of_turn>user\nhello<end_of_turn>\n<start_of_turn>model\n"
    assert form.render(TALK, think=False) == (
        "<start_of_turn>user\nbe kind\n\nhello<end_of_turn>\n<start_of_turn>model\nhi"
        "<start_of_turn>user\n<b>'\"&<end_of_turn>\n<start_of_turn>model\n"
    )


def test_an_override_with_a_place_for_system_messages() -> None:
    form = PrefixTemplate(
        user_prefix="U:", user_suffix=";", model_prefix="M:", model_suffix=".", system_prefix="S:", system_suffix="|"
    )
    assert form.render(TALK, think=False) == "S:be kind|U:hello;M:hi.U:<b>'\"&;M:"


def test_a_system_message_alone_is_not_lost() -> None:
    form = PrefixTemplate(user_prefix="U:", user_suffix=";", model_prefix="M:")
    assert form.render((Message(role="system", content="be kind"),), think=False) == "U:be kind;M:"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "JSON"),
        ("[]", "object"),
        ("{}", "user_prefix"),
        (json.dumps(SEED | {"user_prefix": 5}), "user_prefix"),
        (json.dumps(SEED | {"userprefix": "x"}), "userprefix"),
        (b"\xff\xfe\x00", "JSON"),
        ("", "JSON"),
    ],
)
def test_a_broken_override_names_its_file(tmp_path: Path, content: str | bytes, why: str) -> None:
    with pytest.raises(LoadError, match=why) as caught:
        load_prompt_format(override(tmp_path, content), CHATML, bos="", eos="")
    assert str(tmp_path / TEMPLATE_FILE) in str(caught.value)


def test_neither_override_nor_template_leaves_raw_only(tmp_path: Path) -> None:
    assert load_prompt_format(tmp_path / "model.gguf", None, bos="", eos="") is None
    assert isinstance(load_prompt_format(tmp_path / "model.gguf", CHATML, bos="", eos=""), JinjaTemplate)
