"""Protects the reading of YAML: no surprise of YAML 1.1, no silent loss of a key, no object built from a tag."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from theworld_train.config.errors import ConfigError
from theworld_train.config.reading import dotted, read_file, read_text


def value_of(text: str) -> object:
    document = read_text(f"key: {text}", "test")
    assert not document.problems
    assert isinstance(document.data, dict)
    return document.data["key"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3e-4", 3e-4),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-.inf", -math.inf),
        ("43_520", 43_520),
        ("+7", 7),
        ("0", 0),
        ("0x1F", 31),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
    ],
)
def test_plain_scalars_have_the_type_that_they_look_like(text, expected):
    value = value_of(text)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    "text", ["on", "off", "yes", "no", "y", "12:30", "2024-01-01", "010", "1e", "v1.2.3", "1.2.3", "="]
)
def test_what_only_yaml_1_1_takes_for_a_value_stays_text(text):
    assert value_of(text) == text


def test_quotes_make_text():
    assert value_of("'5'") == "5"
    assert value_of("!!str 5") == "5"


def test_nan_is_read_as_a_number():
    value = value_of(".nan")
    assert isinstance(value, float)
    assert math.isnan(value)


def test_a_key_stated_twice_is_a_problem_that_names_both_lines():
    document = read_text("a:\n  b: 1\n  c: 2\n  b: 3\n", "f.yaml")
    (problem,) = document.problems
    assert (problem.source, problem.key) == ("f.yaml", "a.b")
    assert "lines 2 and 4" in problem.message


def test_all_doubled_keys_are_found_at_once():
    assert len(read_text("a: 1\na: 2\nb: {c: 1, c: 2}", "f").problems) == 2


@pytest.mark.parametrize(
    "text",
    ["!!python/object/apply:os.system [echo]", "!env HOME", "!!binary aGk=", "!!set {a}", "!!timestamp 2024-01-01"],
)
def test_tags_are_refused_and_build_nothing(text):
    document = read_text(f"key: {text}", "f")
    (problem,) = document.problems
    assert problem.key == "key"
    assert "is refused" in problem.message
    assert "line 1" in problem.message


def test_anchors_and_merge_keys_work_and_own_keys_win():
    document = read_text("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: *a", "f")
    assert document.problems == ()
    assert document.data == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"x": 1, "y": 2}}


def test_of_several_merged_mappings_the_first_wins():
    document = read_text("a: &a {x: 1}\nb: &b {x: 2, y: 2}\nc: {<<: [*a, *b]}", "f")
    assert isinstance(document.data, dict)
    assert document.data["c"] == {"x": 1, "y": 2}


def test_an_alias_to_its_own_ancestor_is_refused():
    with pytest.raises(ConfigError, match="leads back to itself"):
        read_text("a: &a [*a]", "f")


def test_aliases_that_multiply_are_refused():
    lines = ["x0: &x0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 10)}]" for i in range(1, 8)]
    with pytest.raises(ConfigError, match="multiplies"):
        read_text("\n".join(lines), "f")


def test_deep_nesting_is_refused_without_a_traceback():
    with pytest.raises(ConfigError, match="nested too deeply"):
        read_text("[" * 5000, "f")


@pytest.mark.parametrize("text", ["1: a", "null: a", "true: a", "[a]: b"])
def test_keys_are_names(text):
    (problem,) = read_text(text, "f").problems
    assert "keys are names" in problem.message


def test_words_that_yaml_1_1_takes_for_booleans_are_names():
    assert read_text("on: 1\nno: 2", "f").data == {"on": 1, "no": 2}


def test_a_syntax_error_names_the_place_and_quotes_nothing():
    with pytest.raises(ConfigError) as caught:
        read_text("a: 1\nb: [secret-word", "f.yaml")
    assert "not valid YAML" in str(caught.value)
    assert "line" in str(caught.value)
    assert "secret-word" not in str(caught.value)


def test_a_tab_is_answered_with_spaces():
    with pytest.raises(ConfigError, match="spaces, not tabs"):
        read_text("a:\n\tb: 1", "f")


def test_characters_outside_yaml_are_refused():
    with pytest.raises(ConfigError, match="characters that YAML does not allow"):
        read_text("a: \x00", "f")


def test_two_documents_are_refused():
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_text("a: 1\n---\nb: 2", "f")


@pytest.mark.parametrize(
    ("text", "words"), [("- a\n- b", "a list"), ("hello", "a single value"), ("# nothing", "empty")]
)
def test_the_top_of_a_file_is_a_mapping(tmp_path: Path, text, words):
    (tmp_path / "f.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_file(str(tmp_path / "f.yaml"))


def test_a_missing_file_is_answered_with_the_nearest_name(tmp_path: Path):
    (tmp_path / "projection.yaml").write_text("a: 1")
    with pytest.raises(ConfigError, match=r"no such file; did you mean '.*projection\.yaml'"):
        read_file(str(tmp_path / "projecton.yml"))


def test_a_missing_directory_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="no directory"):
        read_file(str(tmp_path / "nowhere" / "f.yaml"))


def test_a_directory_is_no_file(tmp_path: Path):
    with pytest.raises(ConfigError, match="is a directory"):
        read_file(str(tmp_path))


def test_bytes_that_are_no_text_are_refused(tmp_path: Path):
    (tmp_path / "f.yaml").write_bytes(b"a: \xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_file(str(tmp_path / "f.yaml"))


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path):
    (tmp_path / "f.yaml").write_bytes(b"\xef\xbb\xbfa: 1")
    assert read_file(str(tmp_path / "f.yaml")).data == {"a": 1}


def test_dotted_keys_are_written_as_users_write_them():
    assert dotted(("stages", 0, "config")) == "stages[0].config"
    assert dotted(("optimizer", "lr")) == "optimizer.lr"
    assert dotted(()) == ""
