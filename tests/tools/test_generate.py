"""`rave-jax generate`: what it prints and writes is what `Generator` answers; one bad request spoils nothing else."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rave_jax.config import ConfigError
from rave_jax.data.sample import SampleError
from rave_jax.inference import Completion, Generator, NotFinite, Piece, Request, Sampling, SlotConfig
from rave_jax.tools import generate as command
from rave_jax.tools import jsonl
from rave_jax.tools import source as sources
from rave_jax.tools.answer import show
from rave_jax.tools.cli import main
from rave_jax.tools.jsonl import written
from tests.data.films import film
from tests.tools.generating import FLAGS, SAMPLING, SIZES, answer, user

ASKED = "Which digit is on the red cell?"


def test_a_prompt_from_directory_and_flags_to_stdout(
    folder: Path, generator: Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(folder), "--prompt", ASKED, *FLAGS]) == 0
    printed = capsys.readouterr()
    assert printed.out == answer(generator, user(ASKED)).text + "\n" and printed.err == ""


def test_a_video_file_on_the_command_line_and_in_a_request(
    folder: Path, generator: Generator, loaded: list[tuple], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = film(tmp_path / "clip.mp4", 4, size=(56, 84))
    content = [{"type": "video", "video": str(path)}, {"type": "text", "text": ASKED}]
    wanted = answer(generator, {"role": "user", "content": content})
    assert main(["generate", str(folder), "--prompt", ASKED, "--video", str(path), *FLAGS]) == 0
    assert capsys.readouterr().out == wanted.text + "\n"
    requests = [[{"type": "video", "video": name}, content[1]] for name in ("clip.mp4", "gone.mp4")]
    lines = [json.dumps({"messages": [{"role": "user", "content": parts}]}) for parts in requests]
    (tmp_path / "r.jsonl").write_text("\n".join(lines))
    assert main(["generate", str(folder), "--requests", str(tmp_path / "r.jsonl"), *FLAGS]) == 1
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["text"] == wanted.text
    assert "gone.mp4: No such file" in second["error"]


@pytest.mark.slow
def test_a_native_checkpoint_answers_as_the_directory_it_is_from(
    folder: Path, generator: Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", "from-hf", str(folder), str(tmp_path / "native")]) == 0
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "native"), "--prompt", ASKED, *FLAGS]) == 0
    assert capsys.readouterr().out == answer(generator, user(ASKED)).text + "\n"


def test_a_character_that_stdout_cannot_show_ends_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(said, encoding="ascii"))
    assert main(["generate", str(tmp_path / "nowhere"), "--prompt", "a"]) == 2
    show(iter([Piece(0, "é", Completion("é", (1,), "stop", 3))]), verbose=False)
    assert said.getvalue() == b"\\xe9\n"


def test_pictures_system_and_sampling_reach_the_model(
    folder: Path, generator: Generator, loaded: list[tuple], capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = (folder.parent / name for name in ("one.png", "two.png"))
    given = ["--image", str(two), "--image", str(one), "--system", "Short.", "--temperature", "1", "--seed", "3"]
    rest = ["--stop", "zzz", "--stop", "yyy", "--stop-ids", "5", "--dtype", "bfloat16", "--verbose", "--cache", "int8"]
    assert main(["generate", str(folder), "--prompt", ASKED, *FLAGS, *given, *rest]) == 0
    sampling = Sampling(max_new_tokens=8, temperature=1.0, seed=3, stop=("zzz", "yyy"), stop_ids=(5,))
    system = {"role": "system", "content": "Short."}
    expected = answer(generator, system, user(ASKED, two, one), sampling=sampling)
    printed = capsys.readouterr()
    assert printed.out == expected.text + "\n" and expected.text != answer(generator, user(ASKED, one, two)).text
    assert f"{len(expected.tokens)} tokens in" in printed.err and f"a prompt of {expected.prompt_tokens}" in printed.err
    assert loaded[0][2:] == (SlotConfig(slots=2, max_length=128, chunk=64, cache="int8"), "bfloat16")


def test_slots_are_one_for_a_prompt_and_eight_for_a_file(folder: Path, loaded: list[tuple], tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("\n")
    assert main(["generate", str(folder), "--prompt", ASKED, "--max-new-tokens", "1"]) == 0
    assert main(["generate", str(folder), "--requests", str(tmp_path / "none.jsonl")]) == 0
    assert [call[2].slots for call in loaded] == [1, 8]


def test_pieces_are_shown_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    record = SimpleNamespace(write=lambda text: events.append(f"write {text!r}"), flush=lambda: events.append("flush"))
    monkeypatch.setattr(sys, "stdout", record)

    def pieces() -> Any:
        for text, end in (("a", None), ("b\n", Completion("ab\n", (1, 2), "stop", 3))):
            events.append("made")
            yield Piece(0, text, end)

    assert show(pieces(), verbose=False).text == "ab\n"
    seen = [event for event in events if event not in ("write ''", "write '\\n'")]
    assert seen == ["made", "write 'a'", "flush", "made", "write 'b\\n'", "flush", "flush"]
    with pytest.raises(ConfigError, match="no such picture"):
        show(iter([Piece(0, "", SampleError("no such picture"))]), verbose=False)


LINES = [
    {"messages": [{"role": "user", "content": ASKED}]},
    {"messages": [user("What?", "broken.png")]},
    {"messages": [user("What?", "one.png")], "temperature": 1.0, "seed": 7, "max_new_tokens": 4, "stop": ["zzz"]},
    {"messages": [user("What?")], "temprature": 1.0},
    {"messages": [user("word " * 200)]},
    {"messages": [user("What?")], "top_p": 2},
    {"messages": [user("What?")], "temperature": 10**400},
    {"messages": [user("What?")], "stop": "a"},
    {"messages": [user("What?", "\udcff.png")]},
    {"messages": "What?"},
    ["What?"],
    {"messages": [user("How many?", "two.png", "one.png")]},
]
ERRORS = {
    1: r"line 2: .*broken\.png: cannot identify",
    3: r"line 5: unknown key 'temprature'; did you mean 'temperature'\?",
    4: r"line 6: the prompt has \d+ tokens, .* budget of max_length 128",
    5: r"line 7: top_p is 2.0, expected above 0",
    6: r"line 8: temperature is too large an integer",
    7: r"line 9: stop is 'a', expected a list",
    8: r"line 10: .*",
    9: r"line 11: messages: expected a JSON list of messages",
    10: r"line 12: expected an object with the key 'messages'",
    12: r"line 14: not JSON: ",
    13: r"line 15: not JSON: ",
}


def test_a_file_of_requests(
    folder: Path, generator: Generator, loaded: list[tuple], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requests, out = folder.parent / "requests.jsonl", tmp_path / "new" / "out.jsonl"
    lines = [json.dumps(line).encode() for line in LINES] + [b'{"messages"', b"\xff"]
    requests.write_bytes(b"\n".join([*lines[:3], b" ", *lines[3:]]) + b"\n")
    run = ["generate", str(folder), "--requests", str(requests), *FLAGS]
    assert main([*run, "--out", str(out), "--verbose"]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and "of 3 answers" in printed.err
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["index"] for line in answers] == list(range(len(lines)))
    refused = {place: line["error"] for place, line in enumerate(answers) if line.keys() == {"index", "error"}}
    assert refused.keys() == ERRORS.keys()
    assert {n: text for n, text in refused.items() if not re.match(ERRORS[n], text)} == {}
    chosen = {0: SAMPLING, 2: Sampling(max_new_tokens=4, temperature=1.0, seed=7, stop=("zzz",)), 11: SAMPLING}
    home = folder.parent
    asked = {
        0: user(ASKED),
        2: user("What?", home / "one.png"),
        11: user("How many?", home / "two.png", home / "one.png"),
    }
    for place, sampling in chosen.items():
        end = answer(generator, asked[place], sampling=sampling)
        counts = {"tokens": len(end.tokens), "prompt_tokens": end.prompt_tokens}
        assert answers[place] == {"index": place, "text": end.text, "reason": end.reason, **counts}
    assert [file.name for file in out.parent.iterdir()] == ["out.jsonl"]

    requests.write_text(json.dumps(LINES[0]))
    assert main([*run, "--out", str(out)]) == 0  # one that is there is replaced
    assert [json.loads(line) for line in out.read_text().splitlines()] == answers[:1]
    assert main(run) == 0
    assert json.loads(capsys.readouterr().out) == answers[0]


def test_requests_from_stdin_name_pictures_below_one_folder(
    folder: Path,
    generator: Generator,
    loaded: list[tuple],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    home, inner = folder.parent, tmp_path / "inner"
    inner.mkdir()
    (inner / "link.png").symlink_to(home / "one.png")
    monkeypatch.chdir(inner)
    shown = ["link.png", str(home / "one.png"), "../../one.png", str(home / "pipe")]
    lines = [json.dumps({"messages": [user("What?", picture)]}) for picture in shown]

    def run(*more: str) -> list[dict[str, Any]]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode())))
        assert main(["generate", str(folder), "--requests", "-", *FLAGS, *more]) == 1
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    said = answer(generator, user("What?", home / "one.png")).text
    outside = [line["error"] for line in run()]
    wanted = r"line \d: messages\[0\]\.content\[0\]: the picture .* lies outside of .*inner, .* give --image-dir FOLDER"
    assert len(outside) == 4 and all(re.match(wanted, line) for line in outside)
    below = run("--image-dir", str(home))
    assert [line.get("text") for line in below] == [said, said, None, None]
    assert "lies outside" in below[2]["error"] and "pipe: it is a named pipe" in below[3]["error"]
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"/image {home / 'one.png'}\n/image link.png\nWhat?\n"))
    assert main(["generate", str(folder), "--interactive", *FLAGS]) == 0
    printed = capsys.readouterr()
    assert printed.err.count("lies outside of") == 2 and printed.out == answer(generator, user("What?")).text + "\n"


def test_a_program_may_wait_for_an_answer_before_it_asks_again(
    folder: Path, generator: Generator, loaded: list[tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe that stays open between requests holds no answer."""
    read, write = os.pipe()
    asked = [json.dumps({"messages": [user(text)]}).encode() + b"\n" for text in ("What?", "Which?")]
    said: list[str] = []

    def answered(line: dict[str, Any]) -> None:
        said.append(line["text"])
        if len(said) < len(asked):
            os.write(write, asked[len(said)])
        else:
            os.close(write)

    monkeypatch.setattr(jsonl, "_print", answered)
    os.write(write, asked[0])
    with os.fdopen(read) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert main(["generate", str(folder), "--requests", "-", *FLAGS]) == 0
    assert said == [answer(generator, user(text)).text for text in ("What?", "Which?")]


def test_python_ends_while_standard_input_is_waited_for() -> None:
    """It aborts (exit code -6) where a thread waits inside of `sys.stdin`."""
    code = (
        "import threading, time; from rave_jax.tools.jsonl import _standard_input\n"
        "threading.Thread(target=_standard_input().readline, daemon=True).start(); time.sleep(0.2)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.wait(60) == 0


def test_ids_that_end_an_answer_may_be_many(
    folder: Path, loaded: list[tuple], capsys: pytest.CaptureFixture[str]
) -> None:
    ids = [word for n in range(300, 307) for word in ("--stop-ids", str(n))]
    assert main(["generate", str(folder), "--prompt", ASKED, *FLAGS, *ids]) == 2
    assert "--prompt: 9 ids end its answer, but max_stop_ids is 8: " in (err := capsys.readouterr().err)
    assert "a larger max_stop_ids (--max-stop-ids)" in err
    main(["generate", str(folder), "--prompt", ASKED, *FLAGS, *ids, "--max-stop-ids", "9"])
    assert loaded[-1][2].max_stop_ids == 9


def test_an_output_is_whole_or_under_another_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    out.write_text("before")
    with pytest.raises(KeyboardInterrupt), written(out):
        raise KeyboardInterrupt
    assert not part.exists() and capsys.readouterr().err == ""
    with pytest.raises(KeyboardInterrupt), written(out) as write:
        write({"index": 0, "text": "é"})
        assert part.read_text() == '{"index": 0, "text": "é"}\n'  # at once
        raise KeyboardInterrupt
    assert out.read_text() == "before" and str(part) in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"out\.jsonl\.part exists"), written(out):
        raise AssertionError("another's file must not be written over")
    with pytest.raises(ConfigError, match="is not a file"), written(tmp_path):
        pass
    with pytest.raises(ConfigError, match="cannot write"), written(out / "below"):
        pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no question"),
        (["--prompt", "a", "--top-p", "2"], "top_p is 2.0"),
        (["--prompt", "a", "--top-k", "many"], "--top-k"),
        (["--prompt", "a", "--stop", ""], "stop is"),
        (["--prompt", "a", "--chunk", "0"], "chunk is 0"),
        (["--prompt", "a", "--cache", "float64"], "--cache"),
        (["--prompt", "a", "--out", "{tmp}/out"], "--out needs --requests"),
        (["--prompt", "a", "--image", "{home}/broken.png"], "broken.png: cannot identify"),
        (["--prompt", "a", "--image", "{tmp}/nowhere.png"], "nowhere.png"),
        (["--prompt", "<|image_pad|>", "--special-tokens-in-text", "tokens"], "placeholder"),
        (["--requests", "{tmp}/nowhere.jsonl"], "nowhere.jsonl: cannot be read: No such file"),
        (["--requests", "{home}/pipe"], "named pipe, such as `<(...)` of a shell makes; only regular files are read"),
        (["--requests", "{home}/pipe"], "Save the requests, or pipe them to `--requests -`"),
        (["--requests", "{home}/broken.png", "--image-dir", "{tmp}/nowhere"], "nowhere: no such folder"),
        (["--prompt", "a", "--image-dir", "{tmp}"], "--image-dir needs --requests or --interactive"),
        (["--interactive", "--video", "a.mp4"], "--video cannot be used with --interactive: give --prompt"),
        (["--prompt", "a", "--video", "{home}/one.png"], "one.png: not a video file that is read, such as mp4"),
        (["--prompt", "a", "--image", "{home}/pipe"], "pipe: it is a named pipe"),
        (["--prompt", "a", "--request-timeout", "-1"], "request_timeout is -1.0"),
        (["--requests", "{home}"], "it is a directory; only regular files are read"),
        (["--requests", "{home}/broken.png", "--system", "a"], "--system cannot be used with --requests"),
        (["--requests", "{home}/broken.png", "--out", "{home}/broken.png"], "is the file of requests"),
    ],
)
def test_misuse_is_one_line_before_a_model_is_read(
    arguments: list[str],
    message: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "load", lambda *_: pytest.fail("a model was read"))
    given = [text.format(home=folder.parent, tmp=tmp_path) for text in arguments]
    try:
        code = main(["generate", str(folder), *given])
    except SystemExit as stopped:
        code = stopped.code
    err = capsys.readouterr().err
    assert code == 2 and err.startswith("rave-jax") and err.count("\n") == 1 and message in err, err
    assert list(tmp_path.iterdir()) == []


def test_what_shows_only_with_a_model_is_one_line_too(
    folder: Path, loaded: list[tuple], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(folder), "--prompt", "word " * 200, *FLAGS]) == 2
    assert "budget of max_length 128" in capsys.readouterr().err
    assert main(["generate", str(tmp_path / "nowhere"), "--prompt", "a"]) == 2
    err = capsys.readouterr().err
    assert "no such directory" in err and err.count("\n") == 1


def test_weights_that_are_nan_give_an_error_and_no_text(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By prompt, file, conversation, logits and what evaluations ask."""
    broken = shutil.copytree(folder, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], np.nan)
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    loaded = command.load(broken, sources.processor_of(broken), SIZES)
    monkeypatch.setattr(command, "load", lambda *_: loaded)
    said = r"the model's logits for token 1 of the answer, at position \d+ of the conversation, are NaN or infinite"
    assert main(["generate", str(broken), "--prompt", ASKED, *FLAGS]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and re.match(f"rave-jax: --prompt: {said}", printed.err) and printed.err.count("\n") == 1
    requests = tmp_path / "requests.jsonl"
    requests.write_text(f"{json.dumps(LINES[0])}\n{json.dumps({'messages': [user('What?')]})}\n")
    assert main(["generate", str(broken), "--requests", str(requests), *FLAGS]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.keys() for line in lines] == [{"index", "error"}] * 2
    assert all(re.match(f"line {n}: {said}", line["error"]) for n, line in enumerate(lines, 1))
    monkeypatch.setattr(sys, "stdin", io.StringIO("What?\nWhich?\n"))
    assert main(["generate", str(broken), "--interactive", *FLAGS]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and len(re.findall(f"the conversation: {said}", printed.err)) == 2
    request = tmp_path / "request.json"
    request.write_text(json.dumps([user("What?")]))
    assert main(["logits", str(broken), str(request), str(tmp_path / "out.npz")]) == 2
    err = capsys.readouterr().err
    assert re.search(r"request\.json: the logits of (\d+) of \1 positions are NaN .* first at position 0 ", err), err
    assert not (tmp_path / "out.npz").exists()
    ends = loaded.answers([Request([user("What?")], SAMPLING, "sample 3")])
    assert isinstance(ends[0], NotFinite) and ends[0].reason == "logits not finite"
