"""Options from YAML files and flags: what stands there arrives as it is, or is refused by name."""

from __future__ import annotations

import pytest
from helpers.cli import flags, refused

from selfgen import BSSConfig
from selfgen.cli.options import parse
from selfgen.cli.train import _parser


def from_yaml(tmp_path, content: str, *more: str):
    """(model, data, method, config) of ``selfgen train`` from a file with ``content``."""
    file = tmp_path / "options.yaml"
    file.write_text(f"model: m\noutput_dir: {tmp_path / 'out'}\nuse_cpu: true\n{content}")
    return parse(_parser(BSSConfig, everything=True), [str(file), *more])


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("dataset_config: 010", "010"),
        ("dataset_config: 0o17", "0o17"),
        ("dataset_config: 1:30", "1:30"),
        ("dataset_config: 2024-01-05", "2024-01-05"),
        ("dataset_config: 2024-01-05 10:00:00", "2024-01-05 10:00:00"),
        ("dataset_config: 1.10", "1.10"),
        ("dataset_config: 1_000", "1_000"),
        ("dataset_config: yes", "yes"),
        ("dataset_config: No", "No"),
        ("dataset_config: on", "on"),
        ("dataset_config: off", "off"),
        ("dataset_config: true", "true"),
        ("dataset_config: 'null'", "null"),
        ("dataset_config: -x", "-x"),
        ("dataset_config: --dtype", "--dtype"),
        ("dataset_config: a=b c", "a=b c"),
        ('dataset_config: ""', ""),
        ("dataset_config: !!str 5", "5"),
        ("dataset_config: |-\n  two\n  lines", "two\nlines"),
        ("dataset_config:", None),
        ("dataset_config: ~", None),
        ("dataset-config: a", "a"),
        ("learning_rate: 1e-5", 1e-5),
        ("learning_rate: 1E-5", 1e-5),
        ("learning_rate: .5", 0.5),
        ("learning_rate: '2'", 2.0),
        ("max_grad_norm: .inf", float("inf")),
        ("self_prob: auto", "auto"),
        ("self_prob: '0.5'", 0.5),
        ("self_prob: 1", 1.0),
        ("self_prob_warmup: settled", "settled"),
        ("self_prob_warmup: 20", 20.0),
        ("self_prob_warmup:", "settled"),
        ("max_steps: -1", -1),
        ("max_steps: 1_000", 1000),
        ("max_steps: +5", 5),
        ("tf32: no", False),
        ("bf16_full_eval: off", False),
        ("lean_loss: on", True),
        ("lean_loss: No", False),
        ("lean_loss: 'yes'", True),
        ("lean_loss: 1", True),
        ("eval_strategy: no", "no"),
        ("eval_strategy: off", "no"),
        ("save_strategy: false", "no"),
        ("label_names: [a, no, 010]", ["a", "no", "010"]),
        ("label_names: a", ["a"]),
        ("label_names:\n- -a\n- b", ["-a", "b"]),
        ("optim_target_modules: all-linear", "all-linear"),
        ("optim_target_modules: [q, k]", ["q", "k"]),
        ("report_to: none", []),
        ("report_to: [none]", []),
        ("lr_scheduler_kwargs: {a: 1, b: 1e-5, c: {d: [yes, 2024-01-05, '010', 0.5, null]}}",
         {"a": 1, "b": 1e-5, "c": {"d": [True, "2024-01-05", "010", 0.5, None]}}),
        ("lr_scheduler_kwargs: '{\"a\": 1e-5}'", {"a": 1e-5}),
        ("liger_kernel_config: {rope: false}", {"rope": False}),
        ("chat_template_kwargs: {think: no, day: 2024-01-05}", {"think": False, "day": "2024-01-05"}),
        ("tools: [{name: f, parameters: {n: 1}}]", [{"name": "f", "parameters": {"n": 1}}]),
        ("tools: '[{\"name\": \"f\"}]'", [{"name": "f"}]),
    ],
)  # fmt: skip
def test_yaml_values(tmp_path, line, value):
    found = from_yaml(tmp_path, line + "\n")
    name = line.split(":")[0].replace("-", "_")
    got = next(getattr(one, name) for one in found if hasattr(one, name))
    assert got == value
    assert type(got) is type(value) or name.endswith("_strategy")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("seed: 1\nmax_steps: 2\nseed: 3\n", "line 6: seed is given already in line 4"),
        ("max_steps: 1\nmax-steps: 1\n", "line 5: max-steps is given already in line 4"),
        ("lr_scheduler_kwargs:\n  a: 1\n  a: 2\n", "line 6: a is given already in line 5"),
        ("max_steps: 010\n", "line 4: max_steps is 010, which some"),
        ("max_steps: 0o10\n", "line 4: max_steps is 0o10, which some"),
        ("max_steps: 0x10\n", "line 4: max_steps is 0x10, which some"),
        ("max_steps: 0b11\n", "line 4: max_steps is 0b11, which some"),
        ("max_steps: 1:30\n", "line 4: max_steps is 1:30, which some"),
        ("learning_rate: 010\n", "line 4: learning_rate is 010"),
        ("self_prob: 0o1\n", "line 4: self_prob is 0o1, which some"),
        ("self_prob: automatic\n", "argument --self_prob: 'automatic' is neither a number nor auto"),
        ("self_prob: [auto]\n", "line 4: self_prob takes one value, and not a list"),
        ("learning_rate: 1:30.5\n", "line 4: learning_rate is 1:30.5"),
        ("lr_scheduler_kwargs: {a: 010}\n", "line 4: a is 010"),
        ("max_steps: 1.5\n", "line 4: max_steps: argument --max_steps: invalid int value: '1.5'"),
        ("max_steps: yes\n", "invalid int value: 'yes'"),
        ("max_steps: 2024-01-05\n", "invalid int value: '2024-01-05'"),
        ("learning_rate: .nan\n", "learning_rate is nan"),
        ("use_liger_kernel: maybe\n", "line 4: use_liger_kernel"),
        ("max_steps: [1]\n", "line 4: max_steps takes one value, and not a list"),
        ("dataset_config: [a, b]\n", "line 4: dataset_config takes one value, and not a list"),
        ("dataset_config: {a: b}\n", "line 4: dataset_config takes one value, and not a mapping"),
        ("label_names: {a: b}\n", "line 4: label_names takes a list, and not a mapping"),
        ("label_names: []\n", "line 4: label_names is a list with nothing in it"),
        ("label_names: [[a]]\n", "line 4: label_names has an item that is no value"),
        ("label_names: [null]\n", "line 4: label_names has an item that is no value"),
        ("lr_scheduler_kwargs: [a]\n", "line 4: lr_scheduler_kwargs takes a mapping, and not a list"),
        ("lr_scheduler_kwargs: a\n", "is no JSON object"),
        ("lr_scheduler_type: magic\n", "line 4: lr_scheduler_type is 'magic'; accepted: linear"),
        ("max_length:\n", "line 4: max_length has no value"),
        ("help: me\n", "line 4: unknown option 'help'"),
        ("dataset: !mine a\n", "line 4: the tag '!mine' has no meaning here"),
        ("? [a]\n: b\n", "line 4: a key must be text"),
        ("<<: 5\n", "line 4: << takes a mapping"),
        ("<<: &a {<<: *a}\n", "is merged into itself"),
        ("lr_scheduler_kwargs: &a {b: *a}\n", "lr_scheduler_kwargs is a mapping that holds itself"),
        ("---\na: b\n", "is not valid YAML"),
        ("max_steps: 1\nmax_steps:\n", "line 5: max_steps is given already"),
    ],
)
def test_yaml_that_is_refused(tmp_path, capsys, content, words):
    with pytest.raises((ValueError, SystemExit)) as error:
        from_yaml(tmp_path, content)
    assert words in " ".join(str(error.value).split()) + capsys.readouterr().err


def test_a_number_or_a_word_as_a_flag(tmp_path):
    words = from_yaml(tmp_path, "", "--self-prob", "auto", "--self_prob_warmup=settled")[3]
    assert (words.self_prob, words.warm_up) == ("auto", "settled")
    numbers = from_yaml(tmp_path, "self_prob: auto\n", "--self-prob", ".5", "--self-prob-warmup", "1e1")[3]
    assert (numbers.self_prob, numbers.warm_up) == (0.5, 10.0)


def test_yaml_merges_and_encodings(tmp_path):
    found = from_yaml(tmp_path, "<<: [&a {max_steps: 5, seed: 1}, {seed: 2}]\nmax_steps: 6\n")
    assert (found[3].max_steps, found[3].seed) == (6, 1)
    file = tmp_path / "other.yaml"
    text = "model: m\noutput_dir: o\nuse_cpu: yes\nprompt_column: Frage_ä\n"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        file.write_bytes(text.encode(encoding))
        assert parse(_parser(BSSConfig, everything=True), [str(file)])[3].prompt_column == "Frage_ä"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"other\.yaml is not valid YAML"):
        parse(_parser(BSSConfig, everything=True), [str(file)])


def test_flags_win_over_yaml(tmp_path):
    found = from_yaml(tmp_path, "max_steps: 5\nreport_to: [none]\nreuse_passes: no\n", "--max_steps", "7")
    assert (found[3].max_steps, found[3].reuse_passes) == (7, False)
    assert from_yaml(tmp_path, "cuda_graphs: yes\n", "--no_cuda_graphs")[3].cuda_graphs is False


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["--max_steps", "-1"], "max_steps", -1),
        (["--max-steps=-1"], "max_steps", -1),
        (["--eval_delay", "-1e-5"], "eval_delay", -1e-5),
        (["--eval_delay", "-.5"], "eval_delay", -0.5),
        (["--prompt_column", "-question"], "prompt_column", "-question"),
        (["--label_names", "a", "b"], "label_names", ["a", "b"]),
        (["--optim_target_modules", "q", "k"], "optim_target_modules", ["q", "k"]),
        (["--optim_target_modules", "q"], "optim_target_modules", "q"),
        (["--lr_scheduler_kwargs", '{"a": 1}'], "lr_scheduler_kwargs", {"a": 1}),
        (["--liger_kernel_config", '{"a": true}'], "liger_kernel_config", {"a": True}),
    ],
)
def test_flags_that_argparse_would_misread(arguments, name, value):
    common = ["--model", "m", "--output_dir", "o", "--use_cpu"]
    assert getattr(parse(_parser(BSSConfig, everything=True), [*common, *arguments])[3], name) == value


def test_an_option_is_no_value_of_another(arguments, capsys):
    assert "--prompt_column" in refused(["train", *flags(arguments), "--prompt_column", "--bogus"], capsys)
